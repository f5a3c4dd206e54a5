"""Does the adapter on disk work? Load it onto a fresh base model and hold it against what training saw.

started = digests(model)               # before training
record(model, "out", batch, started)   # after saving: a few outputs, and how the tensors started
verify("out", fresh_base).check()      # raises where anything is wrong
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..core.state import State
from ..errors import CheckpointError, NotMergeable, VeneerError, listing
from ..files.find import find_file
from ..files.read import WEIGHTS_NAME
from ..files.write import write_atomically
from ..targets.modules import evaluating
from .peft_model import PeftModel

PROBE_NAME = "probe.safetensors"
MOST_COLUMNS = 1024
FLOOR = 16 * torch.finfo(torch.float32).eps
"""A difference that says nothing, as a share of the outputs: sums in another order."""
ROUNDINGS = 3.0
"""How far merged may lie from unmerged, in moves of every merged number by one unit in its last place."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool | None
    """None: there was nothing to hold it against."""
    detail: str


@dataclass
class Verification:
    directory: str
    checks: list[Check] = field(default_factory=list)
    model: PeftModel | None = field(default=None, repr=False)
    """The reloaded adapter on its base, where it could be loaded."""

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def check(self) -> None:
        """Raise VeneerError unless everything passed."""
        failed = [f"{c.name}: {c.detail}" for c in self.checks if c.passed is False]
        if failed:
            raise VeneerError(f"the adapter in {self.directory!r} failed its verification; {'; '.join(failed)}")

    def as_dict(self) -> dict[str, Any]:
        return {"directory": self.directory, "passed": self.passed, "checks": [vars(check) for check in self.checks]}


# What training writes


def digests(model: PeftModel, adapter_name: str = "default") -> dict[str, str]:
    """A hash of each tensor that training may change, by its key in the file."""
    state = model._state
    learned = {p.data_ptr() for p in state.parameters(adapter_name) if p.requires_grad and p.numel()}
    tensors = {key: t for key, t in checkpoint.slots(state, adapter_name).items() if t.is_floating_point()}
    trained = {key: t for key, t in tensors.items() if t.data_ptr() in learned}
    return {key: _digest(t) for key, t in (trained or tensors).items()}


def record(
    model: PeftModel,
    directory: str | Path,
    batch: Mapping[str, Tensor],
    started: Mapping[str, str],
    adapter_name: str = "default",
    is_main_process: bool = True,
) -> None:
    """Write a few of the model's outputs beside the adapter, to hold a reloaded one against.

    Args:
        batch: arguments of a model call; a row or two of some tokens are enough.
        started: `digests` from before training.
        is_main_process: false on the processes of a distributed run that must not write.
    """
    from safetensors.torch import save

    with evaluating(model):
        output = _output(model, batch)
    if not is_main_process:
        return
    tensors = {f"input.{name}": t.detach().cpu().contiguous() for name, t in batch.items()} | {"output": output}
    metadata = {"started": json.dumps(dict(started)), "adapter": adapter_name}
    write_atomically(Path(directory) / PROBE_NAME, save(tensors, metadata))


def unmoved(directory: str | Path, started: Mapping[str, str]) -> list[str]:
    """Keys of the tensors in an adapter's file that are as they started."""
    from safetensors import safe_open

    with safe_open(find_file(directory, WEIGHTS_NAME), framework="pt") as file:
        keys = set(file.keys()) & started.keys()
        return sorted(key for key in keys if _digest(file.get_tensor(key)) == started[key])


# Verifying


def verify(directory: str | Path, base: nn.Module, *, follow_paths: bool = False) -> Verification:
    """Load the adapter in `directory` onto `base`, a fresh model, and look at everything that can be wrong with it.

    Without a record of outputs (`record`), outputs and starts have nothing to be held against. `base` is used up.
    """
    found = Verification(str(directory))
    try:
        probe = _read_probe(Path(directory))
        tensors, _ = checkpoint.read(directory)
        found.model = PeftModel.from_pretrained(base, directory, follow_paths=follow_paths).eval()
        model = found.model
    except VeneerError as error:
        found.checks.append(Check("loads", False, " ".join(str(error).split())))
        return found
    found.checks.append(Check("loads", True, f"{len(tensors)} tensors, all finite"))
    started = {} if probe is None else probe[2]
    found.checks.append(_not_zero(tensors, started))
    found.checks.append(_changed(tensors, started))
    batch = _random_batch(base) if probe is None else probe[0]
    with torch.no_grad():
        found.checks.append(_same_outputs(model, batch, None if probe is None else probe[1]))
        found.checks.append(_merges(model, batch))
    return found


def _read_probe(directory: Path) -> tuple[dict[str, Tensor], Tensor, dict[str, str]] | None:
    """(arguments of the call, outputs, digests at the start), None where training wrote none."""
    from safetensors import SafetensorError, safe_open

    if not (directory / PROBE_NAME).is_file():
        return None
    path = find_file(directory, PROBE_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            started = json.loads((file.metadata() or {}).get("started", "{}"))
        batch = {key.removeprefix("input."): t for key, t in tensors.items() if key.startswith("input.")}
        return batch, tensors["output"], dict(started)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{str(path)!r} is no record of outputs: {error}") from None


def _random_batch(model: Any) -> dict[str, Tensor]:
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids} | more


def _not_zero(tensors: Mapping[str, Tensor], started: Mapping[str, str]) -> Check:
    trained = [key for key in tensors if key in started or not started]
    zero = [k for k in trained if tensors[k].numel() and tensors[k].is_floating_point() and not tensors[k].any()]
    if zero:
        return Check("not all zero", False, f"{len(zero)} tensors hold nothing but zeros:{_inline(zero)}")
    return Check("not all zero", True, f"{len(trained)} tensors hold values")


def _changed(tensors: Mapping[str, Tensor], started: Mapping[str, str]) -> Check:
    if not started:
        return Check("changed", None, "the run left no record of how the tensors started")
    missing = [key for key in started if key not in tensors]
    same = [key for key, digest in started.items() if key in tensors and _digest(tensors[key]) == digest]
    if missing or same:
        what = f"{len(missing)} trained tensors are not in the file" if missing else f"{len(same)} are as they started"
        return Check("changed", False, f"{what}:{_inline(missing or same)}")
    return Check("changed", True, f"all {len(started)} trained tensors moved from their start")


def _same_outputs(model: PeftModel, batch: dict[str, Tensor], recorded: Tensor | None) -> Check:
    """The reloaded model's outputs are the recorded ones: to rounding, and far closer than the base model's are."""
    if recorded is None:
        return Check("same outputs", None, "the run left no record of its outputs")
    active = _output(model, batch)
    if active.shape != recorded.shape:
        return Check("same outputs", False, f"shape {tuple(active.shape)}, recorded {tuple(recorded.shape)}")
    with model.disable_adapter():
        bare = _output(model, batch)
    effect = _distance(active[:, -bare.shape[1] :], bare)  # without the positions that a prompt puts in front
    size, eps, found = float(recorded.double().norm()), _eps(model), _distance(active, recorded)
    is_near = found <= FLOOR * size or found <= min(eps**0.5 * size, 0.1 * effect)
    return Check("same outputs", is_near, f"differ by {found / max(size, 1e-30):.2g} of their size from the recorded")


def _merges(model: PeftModel, batch: dict[str, Tensor]) -> Check:
    """Merged lies within rounding of unmerged; how far rounding moves this model is measured on it."""
    active = _output(model, batch)
    try:
        model.merge_adapter()
    except NotMergeable as error:
        return Check("merges", None, f"has no form as a weight: {' '.join(str(error).split())}")
    merged = _output(model, batch)
    _jitter(model._state)
    rounding = _distance(merged, _output(model, batch))
    model.unmerge_adapter()
    found, size = _distance(merged, active), max(float(active.double().norm()), 1e-30)
    limit = ROUNDINGS * rounding + FLOOR * size
    detail = f"merged differs by {found / size:.2g} from unmerged; rounding allows {limit / size:.2g}"
    return Check("merges", found <= limit, detail)


def _jitter(state: State) -> None:
    """Move every merged number by up to one unit in its last place."""
    generator = torch.Generator().manual_seed(0)
    for layer in state.layers.values():
        for name in layer.kept:
            merged = layer.base_layer._parameters[name]
            step = torch.rand(merged.shape, generator=generator).to(merged.device) * 2 - 1
            wide = merged.to(torch.promote_types(merged.dtype, torch.float32))
            merged.copy_(wide * (1 + step.to(wide) * torch.finfo(merged.dtype).eps))


# Small things


@torch.no_grad()
def _output(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's first output in fp32 on the CPU, of a large vocabulary some columns."""
    device = next(model.parameters()).device
    out = model(**{name: t.to(device) for name, t in batch.items()})
    logits = out.logits if getattr(out, "logits", None) is not None else out[0]
    stride = -(-logits.shape[-1] // MOST_COLUMNS)
    return logits[..., ::stride].float().cpu().contiguous()


def _distance(a: Tensor, b: Tensor) -> float:
    """Infinite where values are not finite, so that no comparison passes by NaN."""
    found = float((a.double() - b.double()).norm())
    return found if found == found else float("inf")


def _eps(model: PeftModel) -> float:
    return max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())


def _digest(t: Tensor) -> str:
    data = t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{t.dtype} {tuple(t.shape)} {hashlib.sha256(data.tobytes()).hexdigest()}"


def _inline(keys: list[str]) -> str:
    return ",".join(listing(keys, 3).split("\n"))[1:]
