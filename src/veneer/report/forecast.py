"""Forecast what a fine-tuning run trains and how much memory it takes, from the model's config alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..core import checkpoint
from ..core.config import Config, default_of
from ..data.collate import MOST_LOGITS
from ..errors import VeneerError
from ..model.counting import Row
from ..model.peft_model import PeftModel, get_peft_model
from ..ops import plain
from ..targets.walk import matches
from ..upstream.quantisation import Quantisation
from .memory import step_peak

ADAM_BYTES = 8
"""Optimizer state per trained number: two fp32 moments."""
PROCESS_BYTES = 600_000_000
"""Memory of Python, torch, transformers and datasets in a training process, measured on Linux with torch for CPUs."""
HOLES = 0.65
"""Fragmentation of glibc's heap as a share of a step without checkpointing: freed blocks lie between blocks in use.
Measured on SmolLM2-135M with 512 to 2,048 tokens per step: 0.46 to 0.73; as many bytes with checkpointing."""


@dataclass(frozen=True)
class Hit:
    """The modules of a model that one entry of `target_modules` matches."""

    entry: str
    paths: tuple[str, ...]
    parameters: int
    """Number of trained parameters in all of them."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step."""

    base: int
    adapter: int
    optimizer: int
    """Two fp32 moments per trained number."""
    step: int | None
    """Activations and gradients; None if the method reads values of tensors, which the meta device does not have."""
    process: int
    """Python and its libraries; 0 with an accelerator, which has its own memory."""
    heap: int | None
    """Memory lost to fragmentation of the C library's heap; 0 with an accelerator."""
    end: int
    """What evaluating and verifying the adapter takes: logits, and the adapted weights with the adapter merged."""

    @property
    def total(self) -> int | None:
        """The peak of training or of what follows it; on a CPU, an estimate of the report's `peak_rss_bytes`."""
        if self.step is None or self.heap is None:
            return None
        always = self.base + self.adapter + self.process
        return always + max(self.optimizer + self.step + self.heap, self.end)


@dataclass(frozen=True)
class Forecast:
    """What a fine-tuning run trains and how much memory it needs."""

    model: str
    method: str
    settings: dict[str, Any]
    hits: tuple[Hit, ...]
    rows: tuple[Row, ...]
    outside: int
    """Trained parameters outside the adapted modules: of a prompt, a gate, or shared parts."""
    trainable: int
    total: int
    """Parameters of the model with the adapter."""
    file_bytes: int
    """Size of the adapter's tensor file."""
    batch_size: int
    length: int
    memory: Memory

    def as_dict(self) -> dict[str, Any]:
        """The forecast for JSON."""
        content = asdict(self)
        content["memory"]["total"] = self.memory.total
        return content


def forecast(
    base: Any,
    config: Config,
    batch_size: int,
    length: int,
    checkpointing: bool = False,
    quantise: Quantisation | None = None,
) -> Forecast:
    """Forecast the training of `config` on `base`, a model on the meta device. `base` is changed.

    Args:
        batch_size: rows per step.
        length: tokens per row.
        checkpointing: whether gradient checkpointing is on.
        quantise: how the base model is quantised.

    Raises:
        TargetError: an entry of the config matches nothing.
        VeneerError: the method's sizes depend on the values of the weights.
    """
    stored = _Stored(base, quantise)
    base_bytes = sum(p.numel() * p.element_size() for p in base.parameters()) - stored.saved
    model = _adapted(base, config)
    trainable, total = model.get_nb_trainable_parameters()
    plan = model.parameter_plan()
    sizes = _file_sizes(model)
    adapter_bytes = sum(sizes.values())
    end = stored.merged(model) + _logits_bytes(base, batch_size, length)
    beyond_weights = _beyond_weights(model, batch_size, length, checkpointing, stored.largest)
    model_config = model.active_peft_config
    return Forecast(
        model=type(base).__name__,
        method=type(model_config).__module__.rpartition(".")[2],
        settings=_settings(model_config),
        hits=_hits(getattr(model_config, "target_modules", None), plan.rows),
        rows=plan.rows,
        outside=plan.other,
        trainable=trainable,
        total=total,
        file_bytes=adapter_bytes + _header(sizes),
        batch_size=batch_size,
        length=length,
        memory=Memory(base_bytes, adapter_bytes, ADAM_BYTES * trainable, end=end, **beyond_weights),
    )


def _adapted(base: Any, config: Config) -> PeftModel:
    """The model with an adapter on the meta device."""
    try:
        return get_peft_model(base, config, low_cpu_mem_usage=True)
    except NotImplementedError:  # torch raises it when the value of a meta tensor is read
        raise VeneerError(
            f"the sizes of {config.peft_type}'s parts depend on the values of the base weights, which a config does "
            "not have; load the model and call get_peft_model(...).parameter_plan()"
        ) from None


def _settings(config: Config) -> dict[str, Any]:
    """The method's fields that are not at their defaults, and always its rank and alpha."""
    semantic = config.semantic_fields()
    settings = {}
    for f in fields(config):
        if f.name not in semantic:
            continue
        value = getattr(config, f.name)
        if value != default_of(f) or f.name in ("r", "lora_alpha"):
            settings[f.name] = value
    return settings


class _Stored:
    """The sizes of a base model's quantised weights, before adapters are attached."""

    def __init__(self, base: Any, quantise: Quantisation | None) -> None:
        self.bytes: dict[str, int] = {}
        """Of each quantised weight, by the path of its layer."""
        self.saved = 0
        """Bytes that quantising saves."""
        self.largest = 0
        """Bytes of the largest of these weights as it is computed with: a layer reads its weight for each product."""
        for path, layer in quantise.layers(base) if quantise is not None else ():
            weight = layer.weight
            size = quantise.stored_bytes(layer.in_features, layer.out_features, weight.dtype)
            self.bytes[path] = size
            self.saved += weight.nbytes - size
            self.largest = max(self.largest, weight.nbytes)

    def merged(self, model: PeftModel) -> int:
        """Bytes of the adapted modules' weights, of which merging makes new ones."""
        total = 0
        for path, layer in model._state.layers.items():
            plain = sum(p.numel() * p.element_size() for p in layer.base_layer.parameters(recurse=False))
            total += self.bytes.get(path, plain)
        return total


def _beyond_weights(
    model: PeftModel, batch_size: int, length: int, checkpointing: bool, dequantised: int
) -> dict[str, Any]:
    """The `step`, `process` and `heap` of `Memory`.

    Args:
        dequantised: bytes of a quantised weight while a product is computed with it.
    """
    with plain("low_rank_linear", "folded_linear") if dequantised else nullcontext():  # these read plain weights
        plain_step = _step(model, batch_size, length)
        step = plain_step
        if checkpointing:
            model.gradient_checkpointing_enable()
            step = _step(model, batch_size, length)
    if step is not None:
        step += dequantised
    if torch.accelerator.is_available():
        return {"step": step, "process": 0, "heap": 0}
    heap = None if plain_step is None else round(HOLES * plain_step)
    return {"step": step, "process": PROCESS_BYTES, "heap": heap}


def _step(model: PeftModel, batch_size: int, length: int) -> int | None:
    """Bytes of activations and gradients; None if they depend on values of tensors."""
    try:
        return step_peak(model, batch_size, length)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # the method reads values, or arguments that this call does not pass
        return None


def _logits_bytes(base: Any, batch_size: int, length: int) -> int:
    """Bytes of the logits that evaluation holds at a time: those of a batch up to a limit, or those of one row."""
    row_bytes = length * getattr(base.config.get_text_config(), "vocab_size", 0) * 4
    return max(row_bytes, min(MOST_LOGITS, batch_size * row_bytes))


def _file_sizes(model: PeftModel) -> dict[str, int]:
    """Bytes of each tensor in the adapter's file; half precision is upcast to fp32."""
    sizes = {}
    for key, tensor in checkpoint.slots(model._state, model.active_adapter).items():
        is_half = tensor.is_floating_point() and tensor.element_size() == 2
        element_size = 4 if is_half else tensor.element_size()
        sizes[key] = tensor.numel() * element_size
    return sizes


def _header(sizes: dict[str, int]) -> int:
    """Approximate bytes of a safetensors header: a line of JSON per tensor."""
    return 8 + sum(len(key) + 60 for key in sizes)


def _hits(entries: Any, rows: Sequence[Row]) -> tuple[Hit, ...]:
    """The modules that each entry of a list matches by their endings. A string is one entry that matches all rows."""
    if isinstance(entries, str):
        return (_hit(entries, rows),)
    hits = []
    for entry in entries or ():
        matching = [row for row in rows if matches(row.path, entry)]
        hits.append(_hit(entry, matching))
    return tuple(hits)


def _hit(entry: str, rows: Sequence[Row]) -> Hit:
    paths = dict.fromkeys(row.path for row in rows)
    return Hit(entry, tuple(paths), sum(row.added for row in rows))
