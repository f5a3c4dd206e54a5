"""Inspect an adapter's files without its base model, and without trusting them.

A damaged or hostile file is not refused: what can be read is described, and the rest is listed under `problems`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import provenance
from ..core.config import CONFIG_NAME, Config, LayerConfig, at
from ..errors import CheckpointError
from ..errors import printable as escape
from ..files.read import PICKLE_NAME, WEIGHTS_NAME, check_header, read_json
from ..maths.low_rank import Pair, effective_rank, singular_values
from ..methods.lora import LoraConfig
from ..targets.walk import by_number, matches

PREFIX = "base_model."
MOST_RANK = 2048
"""Highest rank for which singular values are computed; above it they would take minutes."""
CHUNK = 1 << 24
"""Number of values that are converted to fp64 at a time."""


@dataclass(frozen=True)
class TensorFacts:
    """Facts about a tensor of a file."""

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
    """Facts about an adapter's tensors for one module."""

    path: str
    parts: tuple[str, ...]
    count: int
    rank: int | None = None
    effective_rank: float | None = None
    """The exponential of the entropy of the update's normalised singular values (Roy and Vetterli, 2007)."""
    norm: float | None = None
    """Frobenius norm of the update, including the scaling if the config gives one."""


@dataclass
class Inspection:
    """What the files of an adapter contain."""

    directory: str
    method: str = "unknown"
    base: str | None = None
    base_file: str | None = None
    """The name and the SHA-256 of the file that the base model came from, if it was a GGUF file."""
    settings: dict[str, Any] = field(default_factory=dict)
    file_bytes: int = 0
    tensors: list[TensorFacts] = field(default_factory=list)
    layers: list[LayerFacts] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.count for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"count": self.count}


def inspect(directory: str | Path) -> Inspection:
    """Describe the adapter in a local directory.

    Raises:
        CheckpointError: the directory has neither a config nor a tensor file.
    """
    home = Path(directory)
    if not any((home / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)):
        raise CheckpointError(f"{str(home)!r} holds no adapter: it has neither {CONFIG_NAME} nor {WEIGHTS_NAME}")
    inspection = Inspection(printable(home))
    config = _read_config(home, inspection)
    try:
        _read_tensors(home, config, inspection)
    except Exception as error:  # a hostile file can fail in any library; what was read before the error is kept
        inspection.problems.append(f"{WEIGHTS_NAME} cannot be read: {printable(error)}")
    if config is not None:
        _check_against(config, inspection)
    return inspection


def _read_config(home: Path, inspection: Inspection) -> Config | None:
    """Fill in what the config says, and return it; None if it cannot be used."""
    try:
        content = read_json(home / CONFIG_NAME)
        inspection.method = printable(content.get("peft_type", "unknown"))
        base = content.get("base_model_name_or_path")
        if base:
            inspection.base = printable(base)
        config = Config.from_dict(content)
    except Exception as error:  # a config may contain anything
        inspection.problems.append(f"{CONFIG_NAME} cannot be used: {printable(error)}")
        return None
    inspection.settings = {name: getattr(config, name) for name in config.semantic_fields()}
    if isinstance(config, LayerConfig):
        inspection.settings["target_modules"] = config.target_modules
    if not inspection.base:
        inspection.problems.append("the config does not name the base model")
    return config


def _read_tensors(home: Path, config: Config | None, inspection: Inspection) -> None:
    """Fill in the tensors and layers, and problems with their values."""
    path = home / WEIGHTS_NAME
    if not path.is_file():
        has_pickle = (home / PICKLE_NAME).is_file()
        pickle = f"; {PICKLE_NAME} is a pickle and was not read" if has_pickle else ""
        inspection.problems.append(f"there is no {WEIGHTS_NAME}{pickle}")
        return
    inspection.file_bytes = path.stat().st_size
    check_header(path)
    for tensor in tensor_facts(path):  # one by one: an error keeps the tensors before it
        inspection.tensors.append(tensor)
    inspection.base_file = _base_file(path)
    inspection.problems += _value_problems(inspection.tensors)
    inspection.layers = _layers(path, config, inspection.tensors)


def _base_file(path: Path) -> str | None:
    """The name and the SHA-256 of the base model's file in the notes of a weight file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        noted = provenance.read(file.metadata() or {}, {}).get("file")
    return printable(f"{noted.get('name')}, SHA-256 {noted.get('sha256')}") if noted else None


def _value_problems(tensors: list[TensorFacts]) -> list[str]:
    """Problems with the values of tensors, by kind."""
    not_finite = []
    all_zero = []
    empty = []
    for tensor in tensors:
        if not tensor.count:
            empty.append(f"{tensor.key}: empty")
        elif not tensor.finite:
            not_finite.append(f"{tensor.key}: values that are not finite")
        elif tensor.norm == 0:
            all_zero.append(f"{tensor.key}: all zero")
    return not_finite + all_zero + empty


def tensor_facts(path: Path) -> Iterator[TensorFacts]:
    """Yield the facts of each tensor in a safetensors file, with one tensor in memory at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for key in sorted(file.keys(), key=by_number):
            tensor = file.get_tensor(key)
            norm, finite = _norm(tensor)
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield TensorFacts(printable(key), tuple(tensor.shape), dtype, norm, finite)


def _norm(tensor: Tensor) -> tuple[float, bool]:
    """(Frobenius norm, whether all values are finite); the norm is nan if they are not."""
    if not tensor.numel():
        return 0.0, True
    square = 0.0
    for chunk in tensor.flatten().split(CHUNK):
        wide = chunk.double()
        if not torch.isfinite(wide).all():
            return float("nan"), False
        square += float(wide.square().sum())
    return square**0.5, True


def place(key: str) -> tuple[str, str]:
    """(path of the module, name of the part): base_model.model.h.0.attn.lora_A.weight becomes (h.0.attn, lora_A)."""
    inner = key.removeprefix("base_model.model.").removeprefix(PREFIX)
    path, _, name = inner.removesuffix(".weight").rpartition(".")
    if not path:
        return "", inner
    return path, name


def _layers(file: Path, config: Config | None, tensors: list[TensorFacts]) -> list[LayerFacts]:
    """The tensors grouped by module."""
    tensors_at: dict[str, list[TensorFacts]] = {}
    for tensor in tensors:
        path, _ = place(tensor.key)
        tensors_at.setdefault(path, []).append(tensor)
    return [_layer(file, config, path, own) for path, own in tensors_at.items()]


def _layer(file: Path, config: Config | None, path: str, tensors: list[TensorFacts]) -> LayerFacts:
    parts = tuple(place(tensor.key)[1] for tensor in tensors)
    count = sum(tensor.count for tensor in tensors)
    pair = None
    if all(tensor.finite for tensor in tensors):
        pair = pair_at(file, path, {tensor.key for tensor in tensors})
    if pair is None:
        return LayerFacts(path, parts, count)
    S = singular_values(pair)
    norm = abs(scaling_at(config, path, pair)) * float(S.norm())
    return LayerFacts(path, parts, count, rank=pair[0].shape[0], effective_rank=effective_rank(S), norm=norm)


def pair_at(file: Path, path: str, keys: set[str]) -> Pair | None:
    """A (r, in) and B (out, r) of a module's LoRA in fp64; None if it has none, or their shapes do not fit."""
    from safetensors import safe_open

    names = _pair_names(path, keys)
    if names is None:
        return None
    with safe_open(file, framework="pt") as opened:
        A = opened.get_tensor(names[0]).double()
        B = opened.get_tensor(names[1]).double()
    if A.dim() < 2 or B.dim() < 2 or not A.numel() or not B.numel():
        return None
    A = A.flatten(1)
    B = B.flatten(1)
    if A.shape[0] != B.shape[1] or A.shape[0] > MOST_RANK:
        return None
    return A, B


def _pair_names(path: str, keys: set[str]) -> tuple[str, str] | None:
    """The keys of a module's A and B."""
    for A_name, B_name in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        A_key = _ending_in(f"{path}.{A_name}", keys)
        B_key = _ending_in(f"{path}.{B_name}", keys)
        if A_key is not None and B_key is not None:
            return A_key, B_key
    return None


def _ending_in(ending: str, keys: set[str]) -> str | None:
    return next((key for key in keys if key.endswith(ending)), None)


def scaling_at(config: Config | None, path: str, pair: Pair | None) -> float:
    """The factor by which LoRA scales B A on a module; 1 for other methods."""
    if pair is None or not isinstance(config, LoraConfig):
        return 1.0
    rank = pair[0].shape[0]
    alpha = at(path, config.alpha_pattern, config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _check_against(config: Config, inspection: Inspection) -> None:
    """Add problems of the tensors with each other and with the config."""
    keys = [tensor.key for tensor in inspection.tensors]
    problems = inspection.problems
    problems += [f"{key}: the other half of the pair is missing" for key in sorted(_halves(keys), key=by_number)]
    if isinstance(config, LayerConfig):
        others = [key for key in keys if not key.startswith(PREFIX)]
        if others:
            problems.append(f"{len(others)} keys are not in PEFT's layout, such as {others[0]}; see `veneer convert`")
    entries = getattr(config, "target_modules", None)
    if isinstance(entries, list) and keys:
        for entry in entries:
            if not any(matches(layer.path, entry) for layer in inspection.layers):
                problems.append(f"target_modules: the file has no tensor for {printable(entry)}")
    if type(config) is LoraConfig and not config.target_parameters:
        problems += _rank_problems(config, inspection.layers)


def _halves(keys: list[str]) -> list[str]:
    """Keys of A or B whose other half is not in the file."""
    present = set(keys)
    halves = []
    for key in present:
        if "lora_A" in key and key.replace("lora_A", "lora_B") not in present:
            halves.append(key)
        if "lora_B" in key and key.replace("lora_B", "lora_A") not in present:
            halves.append(key)
    return halves


def _rank_problems(config: LoraConfig, layers: list[LayerFacts]) -> list[str]:
    problems = []
    for layer in layers:
        expected = at(layer.path, config.rank_pattern, config.r)
        if layer.rank is not None and layer.rank != expected:
            problems.append(f"{layer.path}: rank {layer.rank} in the file, {expected} in the config")
    return problems


def printable(value: Any) -> str:
    """Text from a file made safe for a terminal: one line of limited length, with control characters escaped."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, (list, dict)):
        return escape(json.dumps(value))
    return escape(str(value))
