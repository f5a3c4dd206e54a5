"""What is in an adapter's files, read without its base model and without trusting them.

A damaged or hostile file is described, not refused: what cannot be read stands under `problems`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.config import CONFIG_NAME, Config, LayerConfig, at
from ..errors import CheckpointError
from ..errors import printable as escape
from ..files.read import PICKLE_NAME, WEIGHTS_NAME, check_header, read_json
from ..maths.low_rank import Pair, effective_rank, singular_values
from ..methods.lora import LoraConfig
from ..targets.walk import matches

PREFIX = "base_model."
MOST_RANK = 2048
"""Above it the singular values of an update would take minutes."""
CHUNK = 1 << 24


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a file."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    finite: bool

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class LayerFacts:
    """What an adapter holds for one module."""

    path: str
    parts: tuple[str, ...]
    count: int
    rank: int | None = None
    effective_rank: float | None = None
    """exp of the entropy of the update's normalised singular values (Roy and Vetterli, 2007)."""
    norm: float | None = None
    """Frobenius norm of the update, with its scaling where the config gives one."""


@dataclass
class Inspection:
    directory: str
    method: str = "unknown"
    base: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    file_bytes: int = 0
    tensors: list[TensorFacts] = field(default_factory=list)
    layers: list[LayerFacts] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(t.count for t in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"count": self.count}


def inspect(directory: str | Path) -> Inspection:
    """Describe the adapter in a local directory.

    Raises:
        CheckpointError: there is neither a config nor a tensor file.
    """
    home = Path(directory)
    if not any((home / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)):
        raise CheckpointError(f"{str(home)!r} holds no adapter: neither {CONFIG_NAME} nor {WEIGHTS_NAME} is there")
    found = Inspection(printable(home))
    config = _read_config(home, found)
    try:
        _read_tensors(home, config, found)
    except Exception as error:  # a hostile file can fail in any library below; what was read so far stands
        found.problems.append(f"{WEIGHTS_NAME} cannot be read: {printable(error)}")
    if config is not None:
        _check_against(config, found)
    return found


def _read_config(home: Path, found: Inspection) -> Config | None:
    try:
        content = read_json(home / CONFIG_NAME)
        found.method = printable(content.get("peft_type", "unknown"))
        found.base = printable(content["base_model_name_or_path"]) if content.get("base_model_name_or_path") else None
        config = Config.from_dict(content)
    except Exception as error:  # as above: a config may hold anything
        found.problems.append(f"{CONFIG_NAME} cannot be used: {printable(error)}")
        return None
    found.settings = {name: getattr(config, name) for name in config.semantic_fields()}
    found.settings |= {"target_modules": config.target_modules} if isinstance(config, LayerConfig) else {}
    if not found.base:
        found.problems.append("the config does not name the base model")
    return config


def _read_tensors(home: Path, config: Config | None, found: Inspection) -> None:
    path = home / WEIGHTS_NAME
    if not path.is_file():
        pickle = f"; {PICKLE_NAME} is a pickle and was not read" if (home / PICKLE_NAME).is_file() else ""
        found.problems.append(f"there is no {WEIGHTS_NAME}{pickle}")
        return
    found.file_bytes = path.stat().st_size
    check_header(path)
    for facts in tensor_facts(path):
        found.tensors.append(facts)
    found.problems += [f"{t.key}: values that are not finite" for t in found.tensors if not t.finite]
    found.problems += [f"{t.key}: all zero" for t in found.tensors if t.finite and t.norm == 0 and t.count]
    found.problems += [f"{t.key}: empty" for t in found.tensors if not t.count]
    found.layers = _layers(path, config, found)


def tensor_facts(path: Path) -> Iterator[TensorFacts]:
    """Of each tensor of a safetensors file, one in memory at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys()):
            t = file.get_tensor(key)
            square, finite = 0.0, True
            for chunk in t.flatten().split(CHUNK) if t.numel() else ():
                wide = chunk.double()
                finite = finite and bool(torch.isfinite(wide).all())
                square += float(wide.square().sum())
            norm = square**0.5 if finite else float("nan")
            yield TensorFacts(printable(key), tuple(t.shape), str(t.dtype).removeprefix("torch."), norm, finite)


# Layers


def place(key: str) -> tuple[str, str]:
    """(path of the module, name of the part): base_model.model.h.0.attn.lora_A.weight is (h.0.attn, lora_A)."""
    inner = key.removeprefix("base_model.model.").removeprefix(PREFIX)
    path, _, name = inner.removesuffix(".weight").rpartition(".")
    return (path, name) if path else ("", inner)


def _layers(file: Path, config: Config | None, found: Inspection) -> list[LayerFacts]:
    parts: dict[str, list[TensorFacts]] = {}
    for t in found.tensors:
        parts.setdefault(place(t.key)[0], []).append(t)
    layers = []
    for path, own in parts.items():
        names = tuple(place(t.key)[1] for t in own)
        pair = None if any(not t.finite for t in own) else pair_at(file, path, {t.key for t in own})
        facts = _spectrum(pair, scaling_at(config, path, pair)) if pair is not None else (None, None, None)
        layers.append(LayerFacts(path, names, sum(t.count for t in own), *facts))
    return layers


def pair_at(file: Path, path: str, keys: set[str]) -> Pair | None:
    """A (r, in) and B (out, r) in fp64 of a module with a LoRA pair that fits; else None."""
    from safetensors import safe_open

    names = _pair_names(path, keys)
    if names is None:
        return None
    with safe_open(file, framework="pt") as opened:
        A, B = (opened.get_tensor(name).double() for name in names)
    if A.dim() < 2 or B.dim() < 2 or not A.numel() or not B.numel():
        return None
    A, B = A.flatten(1), B.flatten(1)
    return (A, B) if A.shape[0] == B.shape[1] and A.shape[0] <= MOST_RANK else None


def _pair_names(path: str, keys: set[str]) -> tuple[str, str] | None:
    for first, second in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        names = tuple(next((k for k in keys if k.endswith(f"{path}.{end}")), None) for end in (first, second))
        if None not in names:
            return names  # type: ignore[return-value]
    return None


def scaling_at(config: Config | None, path: str, pair: Pair | None) -> float:
    """What LoRA multiplies B A by on a module; 1 for other methods."""
    if pair is None or type(config).__mro__.count(LoraConfig) == 0:
        return 1.0
    settings: Any = config
    rank = pair[0].shape[0]
    return at(path, settings.alpha_pattern, settings.lora_alpha) / (rank**0.5 if settings.use_rslora else rank)


def _spectrum(pair: Pair, scaling: float) -> tuple[int, float, float]:
    """(rank, effective rank, norm) of scaling * B A."""
    S = singular_values(pair)
    return pair[0].shape[0], effective_rank(S), abs(scaling) * float(S.norm())


# Checks


def _check_against(config: Config, found: Inspection) -> None:
    """Problems that show when the config and the tensors are laid side by side."""
    keys = {t.key for t in found.tensors}
    alone = [k for k in keys if "lora_A" in k and k.replace("lora_A", "lora_B") not in keys]
    alone += [k for k in keys if "lora_B" in k and k.replace("lora_B", "lora_A") not in keys]
    found.problems += [f"{key}: the other half of the pair is missing" for key in sorted(alone)]
    strange = [t.key for t in found.tensors if isinstance(config, LayerConfig) and not t.key.startswith(PREFIX)]
    if strange:
        found.problems.append(f"{len(strange)} keys are not PEFT's, {strange[0]} first; see `veneer convert`")
    wanted = getattr(config, "target_modules", None)
    for entry in wanted if isinstance(wanted, list) and found.tensors else ():
        if not any(matches(layer.path, entry) for layer in found.layers):
            found.problems.append(f"target_modules: the file holds nothing for {printable(entry)}")
    if type(config) is LoraConfig and not config.target_parameters:
        _check_ranks(config, found)


def _check_ranks(config: LoraConfig, found: Inspection) -> None:
    for layer in found.layers:
        expected = at(layer.path, config.rank_pattern, config.r)
        if layer.rank is not None and layer.rank != expected:
            found.problems.append(f"{layer.path}: rank {layer.rank} in the file, {expected} in the config")


def printable(value: Any) -> str:
    """Text from a file, safe for a terminal: control characters escaped, one line, not endless."""
    text = value if isinstance(value, str) else json.dumps(value) if isinstance(value, (list, dict)) else str(value)
    return escape(text)
