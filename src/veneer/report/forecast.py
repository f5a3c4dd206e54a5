"""What a fine-tune will train and take, from the model's config alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..core import checkpoint
from ..core.config import Config, default_of
from ..errors import ConfigError, VeneerError, nearest
from ..model.counting import Row
from ..model.peft_model import PeftModel, get_peft_model
from ..targets.walk import matches
from .memory import step_peak

HALF_BYTES, ADAM_BYTES = 2, 8
PROCESS_BYTES = 600_000_000
"""Python, torch, transformers and datasets in a process that trains: measured on Linux with torch for CPUs."""
HOLES = 0.65
"""What glibc's heap grows beyond the tensors, in parts of a step without checkpointing: what a layer frees lies between
what it keeps. Measured on SmolLM2-135M, 512 to 2,048 tokens a step: 0.46 to 0.73; with checkpointing as much."""


@dataclass(frozen=True)
class Hit:
    """What one entry of `target_modules` means on a model."""

    entry: str
    paths: tuple[str, ...]
    parameters: int
    """Trained on all of them together."""


@dataclass(frozen=True)
class Memory:
    """Bytes, at the worst moment of a training step."""

    base: int
    adapter: int
    optimizer: int
    """Two fp32 moments for each trained number."""
    step: int | None
    """Activations and gradients; None where the method looks at values, which are not there yet."""
    process: int
    """Python and its libraries; 0 where there is an accelerator, which has a memory of its own."""
    heap: int | None
    """Holes in the C library's heap; 0 where there is an accelerator."""

    @property
    def total(self) -> int | None:
        """On a CPU what training reports as `peak_rss_bytes`."""
        if self.step is None or self.heap is None:
            return None
        return self.base + self.adapter + self.optimizer + self.step + self.process + self.heap


@dataclass(frozen=True)
class Forecast:
    model: str
    method: str
    settings: dict[str, Any]
    hits: tuple[Hit, ...]
    rows: tuple[Row, ...]
    outside: int
    """Trained outside the layers: a prompt, a gate, shared parts."""
    trainable: int
    total: int
    """Parameters of the model with the adapter."""
    file_bytes: int
    """The adapter's tensor file."""
    batch_size: int
    length: int
    memory: Memory

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a layer's row is its path and sizes."""
        found = asdict(self)
        found["memory"]["total"] = self.memory.total
        return found


def forecast(base: Any, config: Config, batch_size: int, length: int, checkpointing: bool = False) -> Forecast:
    """What training `config` on `base`, a model on the meta device, trains and takes. `base` is used up.

    Args:
        batch_size: rows of one step.
        length: tokens of a row.
        checkpointing: with gradient checkpointing.

    Raises:
        TargetError: an entry of the config matches nothing.
        VeneerError: the method's sizes follow from the weights' values.
    """
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    model = _adapted(base, config)
    trainable, total = model.get_nb_trainable_parameters()
    plan, sizes = model.parameter_plan(), _file_sizes(model)
    beyond = _beyond_weights(model, batch_size, length, checkpointing)
    memory = Memory(weights, sum(sizes.values()), ADAM_BYTES * trainable, **beyond)
    chosen = model.active_peft_config
    return Forecast(
        model=type(base).__name__,
        method=type(chosen).__module__.rpartition(".")[2],
        settings=_settings(chosen),
        hits=_hits(getattr(chosen, "target_modules", None), plan.rows),
        rows=plan.rows,
        outside=plan.other,
        trainable=trainable,
        total=total,
        file_bytes=sum(sizes.values()) + _header(sizes),
        batch_size=batch_size,
        length=length,
        memory=memory,
    )


def _adapted(base: Any, config: Config) -> PeftModel:
    try:
        return get_peft_model(base, config, low_cpu_mem_usage=True)
    except NotImplementedError:  # torch's, of a tensor without values
        raise VeneerError(
            f"{config.peft_type} sizes its parts by the values of the base weights, so a config cannot tell what it "
            "trains; load the model and use get_peft_model(...).parameter_plan()"
        ) from None


def _settings(config: Config) -> dict[str, Any]:
    """The method's own fields that are not at their defaults, and its rank."""
    own = [f for f in fields(config) if f.name in config.semantic_fields()]
    return {f.name: v for f in own if (v := getattr(config, f.name)) != default_of(f) or f.name in ("r", "lora_alpha")}


def _beyond_weights(model: PeftModel, batch_size: int, length: int, checkpointing: bool) -> dict[str, Any]:
    """Bytes of a step, and on a CPU of what is there besides."""
    step = plain = _step(model, batch_size, length)
    if checkpointing:
        model.gradient_checkpointing_enable()
        step = _step(model, batch_size, length)
    if torch.accelerator.is_available():
        return {"step": step, "process": 0, "heap": 0}
    return {"step": step, "process": PROCESS_BYTES, "heap": None if plain is None else round(HOLES * plain)}


def _step(model: PeftModel, batch_size: int, length: int) -> int | None:
    try:
        return step_peak(model, batch_size, length)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it needs values, or facts of a call that has none
        return None


def _file_sizes(model: PeftModel) -> dict[str, int]:
    """Bytes of each tensor of the file; half precision is lifted to fp32."""
    state, name = model._state, model.active_adapter
    tensors = checkpoint.slots(state, name)
    lifted = {key: HALF_BYTES if t.is_floating_point() and t.element_size() == 2 else 0 for key, t in tensors.items()}
    return {key: t.numel() * (t.element_size() + lifted[key]) for key, t in tensors.items()}


def _header(sizes: dict[str, int]) -> int:
    """About what a safetensors header takes: a line of JSON for each tensor."""
    return 8 + sum(len(key) + 60 for key in sizes)


def _hits(entries: Any, rows: Sequence[Row]) -> tuple[Hit, ...]:
    """A string stands for all; of a list each entry for what ends in it."""
    given = [entries] if isinstance(entries, str) else list(entries or ())
    found = []
    for entry in given:
        mine = [row for row in rows if isinstance(entries, str) or matches(row.path, entry)]
        paths = tuple(dict.fromkeys(row.path for row in mine))
        found.append(Hit(entry, paths, sum(row.added for row in mine)))
    return tuple(found)


def settings_of(config: type[Config], rank: int | None, targets: str | None, given: Sequence[str]) -> dict[str, Any]:
    """A config's fields from the words of a command line.

    Args:
        rank: for the field `r`.
        targets: names with commas between them, or "all-linear".
        given: "field=value", the value as JSON or a plain word.

    Raises:
        ConfigError: the method has no such field.
    """
    known = [f.name for f in fields(config)]
    found: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes field=value, not {pair!r}")
        found[name] = _value(value)
    if rank is not None:
        found["r"] = rank
    if targets is not None:
        found["target_modules"] = targets if targets == "all-linear" else targets.split(",")
    for name in found:
        if name not in known:
            raise ConfigError(f"{config.__name__} has no field {name!r}{nearest(name, known)}")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
