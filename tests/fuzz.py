"""Mutants of saved adapters: each must raise a veneer error or load bit-equal. `make fuzz` runs thousands.

python -m tests.fuzz --mutants 2000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer import PeftModel, VeneerError
from veneer.core import checkpoint
from veneer.core.state import state_of

from . import models
from .cases import CASES, ONE_EACH, Case

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LABELLED = ("lora-gpt2-embedding", "lora-tied-copy", "lora-llama-bias-and-head", "lora-llama-pissa", "lora-conv")
FUZZED = [case for case in CASES if not case.siblings and (case in ONE_EACH or str(case) in LABELLED)]
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 10**9, 2**70, 0.5, -0.0, 1e300, "", "x", "q_proj", [], {}, ["x"]]
VALUES += [{"x": 1}, {"x": {"y": [1]}}, [[1]], ["q_proj"], "(.*a)+b", "../../etc", "LORA", "IA3", "\x1b[31m", "\ud800"]


@dataclass
class Outcome:
    """What became of the mutants of each kind."""

    refused: Counter[str] = field(default_factory=Counter)
    equal: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.refused.total() + self.equal.total() + len(self.wrong)


class Specimen:
    """A saved adapter, and what a load of it gives."""

    def __init__(self, case: Case, home: Path) -> None:
        self.case, self.home = case, home
        model = case.build()
        model.save_pretrained(home)
        self.files = {name: (home / name).read_bytes() for name in (WEIGHTS, CONFIG)}
        self.base = models.build(case.model)
        self.before = [p.detach().clone() for p in self.base.parameters()]
        self.batch = case.inputs()
        self.expected = self.load()

    def load(self) -> tuple[dict[str, Tensor], Tensor]:
        model = PeftModel.from_pretrained(self.base, self.home, **self.case.trust)
        state = state_of(model.get_base_model())
        try:
            tensors = {key: t.detach().clone() for key, t in checkpoint.slots(state, "default").items()}
            with torch.no_grad():
                return tensors, models.output(model, self.batch)
        finally:
            model.unload()

    def try_mutant(self) -> str | None:
        """None if the files load bit-equal, "refused", or what went wrong."""
        try:
            tensors, logits = self.load()
        except VeneerError:
            result: str | None = "refused"
        except BaseException as error:  # noqa: BLE001 (what must not happen is what is counted)
            result = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            expected, out = self.expected
            same = tensors.keys() == expected.keys() and all(torch.equal(t, expected[k]) for k, t in tensors.items())
            result = None if same and torch.equal(logits, out) else "loaded quietly wrong"
        if not all(torch.equal(p, q) for p, q in zip(self.base.parameters(), self.before, strict=True)):
            self.base = models.build(self.case.model)
            return f"{result}, and the base model was changed"
        return result

    def restore(self) -> None:
        for path in self.home.iterdir():
            if path.name not in self.files:
                path.unlink()
        for name, content in self.files.items():
            (self.home / name).write_bytes(content)


# Mutations. Each changes the files in a directory and says what it did.


def tensors_of(home: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(home / WEIGHTS, framework="pt") as file:
        return load_file(home / WEIGHTS), file.metadata()


def keep(home: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, home / WEIGHTS, metadata)


def drop(home: Path, rng: random.Random) -> str:
    tensors, metadata = tensors_of(home)
    key = rng.choice(sorted(tensors))
    del tensors[key]
    keep(home, tensors, metadata)
    return key


def rename(home: Path, rng: random.Random) -> str:
    tensors, metadata = tensors_of(home)
    key, new = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    how = rng.randrange(4)
    if how == 0:  # two change places
        tensors[key], tensors[new] = tensors[new], tensors[key]
        keep(home, tensors, metadata)
        return f"{key} <-> {new}"
    i = rng.randrange(len(key))
    new = [new, key[:i] + rng.choice("abz.01_") + key[i + 1 :], key[:i] + key[i + 1 :], key + rng.choice("x.")][how]
    tensors[new] = tensors.pop(key)
    keep(home, tensors, metadata)
    return f"{key} -> {new}"


def truncate(home: Path, rng: random.Random) -> str:
    name = rng.choice([WEIGHTS, CONFIG])
    content = (home / name).read_bytes()
    n = rng.choice([rng.randrange(len(content)), rng.randrange(min(len(content), 64)), len(content) - 1])
    (home / name).write_bytes(content[:n])
    return f"{name} to {n} of {len(content)}"


def extend(home: Path, rng: random.Random) -> str:
    name = rng.choice([WEIGHTS, CONFIG])
    more = rng.choice([b"\0", b" ", b"}", b"{}", b"more", b"\0" * 4096])
    (home / name).write_bytes((home / name).read_bytes() + more)
    return f"{name} + {more[:8]!r}"


def reshape(home: Path, rng: random.Random) -> str:
    tensors, metadata = tensors_of(home)
    key = rng.choice(sorted(tensors))
    t = tensors[key]
    if t.numel() == 0 or t.dim() == 0:
        t = torch.zeros(2)
    ways: list[Callable[[], Tensor]] = [
        lambda: t.flatten(),
        lambda: t.T if t.dim() == 2 else t[None],
        lambda: t[:-1],
        lambda: torch.cat([t, t[:1]]),
        lambda: t[None],
        lambda: t[..., None],
        lambda: t[:0],
        lambda: torch.zeros(()),
        lambda: t.repeat(2, *(1,) * (t.dim() - 1)),
    ]
    tensors[key] = rng.choice(ways)()
    keep(home, tensors, metadata)
    return f"{key} {tuple(t.shape)} -> {tuple(tensors[key].shape)}"


def retype(home: Path, rng: random.Random) -> str:
    tensors, metadata = tensors_of(home)
    keys = [rng.choice(sorted(tensors))] if rng.random() < 0.7 else list(tensors)
    dtype = rng.choice([d for d in DTYPES if d != tensors[keys[0]].dtype])
    for key in keys:
        tensors[key] = tensors[key].to(dtype)
    keep(home, tensors, metadata)
    return f"{keys[0]} (of {len(keys)}) as {dtype}"


def poison(home: Path, rng: random.Random) -> str:
    tensors, metadata = tensors_of(home)
    key = rng.choice(sorted(tensors))
    flat = tensors[key].reshape(-1).clone()
    if not flat.numel():
        return drop(home, rng)
    value = rng.choice([float("nan"), float("inf"), 0.0, 1e30, None])
    i = rng.randrange(len(flat))
    flat[i] = (flat[i] + 1) if value is None or not flat.is_floating_point() else value
    tensors[key] = flat.view(tensors[key].shape)
    keep(home, tensors, metadata)
    return f"{key}[{i}] = {value}"


def flip(home: Path, rng: random.Random) -> str:
    name = rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    content = bytearray((home / name).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0] if name == WEIGHTS else len(content)
    at = rng.randrange(rng.choice([header, len(content)]))
    content[at] ^= 1 << rng.randrange(8) if rng.random() < 0.7 else rng.randrange(1, 256)
    (home / name).write_bytes(content)
    return f"{name} at {at}"


def header(home: Path, rng: random.Random) -> str:
    """A well-formed header with a wrong entry."""
    content = (home / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + size])
    key = rng.choice(sorted(k for k in entries if k != "__metadata__"))
    part, value = rng.choice(
        [
            ("dtype", rng.choice(["F32", "F16", "BF16", "I32", "U8", "F64", "BOOL", "F8_E5M2", "F4", "C64", "X"])),
            ("shape", rng.choice([[], [0], [1], [2**40], [2**63], [2**62, 4], [-1], ["x"], None, [0, 2**63]])),
            ("data_offsets", rng.choice([[0, 0], [0, 4], [4, 0], [0, 2**60], [-4, 0], [2**64, 2**64], None])),
        ]
    )
    entries[key][part] = value
    new = json.dumps(entries).encode()
    (home / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])
    return f"{key}.{part} = {value}"


def stated(home: Path, rng: random.Random) -> str:
    content = (home / WEIGHTS).read_bytes()
    size = rng.choice([0, 1, 7, 8, len(content), len(content) - 9, 2**31, 2**40, 2**63, 2**64 - 1])
    (home / WEIGHTS).write_bytes(struct.pack("<Q", size) + content[8:])
    return f"header of {size}"


def setting(home: Path, rng: random.Random) -> str:
    content = json.loads((home / CONFIG).read_text())
    name = rng.choice(sorted(content))
    how = rng.randrange(4)
    if how == 0:
        content.pop(name)
    elif how == 1:
        content[name[: rng.randrange(len(name))] + "x"] = content.pop(name)
    else:
        content[name] = rng.choice(VALUES)
    (home / CONFIG).write_text(json.dumps(content))
    return f"{name}: {['dropped', 'renamed', content.get(name), content.get(name)][how]!r}"


def absent(home: Path, rng: random.Random) -> str:
    name = rng.choice([WEIGHTS, CONFIG])
    (home / name).unlink()
    if rng.random() < 0.5:
        (home / name).mkdir()
    return name


MUTATIONS = [drop, rename, truncate, extend, reshape, retype, poison, header, stated, setting, setting, flip, flip]


def fuzz(mutants: int, seed: int) -> Outcome:
    """Mutants in turn of every kind and of every adapter."""
    rng, found = random.Random(seed), Outcome()
    with tempfile.TemporaryDirectory() as directory:
        chosen = FUZZED if mutants > len(FUZZED) else rng.sample(FUZZED, 8)
        specimens = [Specimen(case, Path(directory) / str(case)) for case in chosen]
        for i, mutation, specimen in zip(range(mutants), _forever(rng), _turns(specimens), strict=False):
            said = mutation(specimen.home, rng)
            result = specimen.try_mutant()
            name = mutation.__name__
            if result is None:
                found.equal[name] += 1
            elif result == "refused":
                found.refused[name] += 1
            else:
                found.wrong.append(f"{specimen.case} {name} ({said}): {result}  [mutant {i} of seed {seed}]")
            specimen.restore()
    return found


def _forever(rng: random.Random) -> Iterator[Callable[[Path, random.Random], str]]:
    while True:
        yield from rng.sample(MUTATIONS, len(MUTATIONS))


def _turns(specimens: list[Specimen]) -> Iterator[Specimen]:
    while True:
        yield from specimens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = fuzz(arguments.mutants, arguments.seed)
    for name in sorted(found.refused | found.equal):
        print(f"{name:<10} refused {found.refused[name]:>5}  loaded bit-equal {found.equal[name]:>5}")
    print(f"{'all':<10} refused {found.refused.total():>5}  loaded bit-equal {found.equal.total():>5}")
    print("\n".join(found.wrong) or f"{found.total} mutants: none crashed, none loaded quietly wrong")
    raise SystemExit(bool(found.wrong))


if __name__ == "__main__":
    main()
