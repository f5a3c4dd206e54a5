"""Conversion of any adapter that updates the weights to a plain LoRA, exact or of a reduced rank.

`veneer.save_as_lora("plain", model)` is exact; `rank=0.99` uses the lowest ranks that keep 99 % of the squared update.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..core.adapter import Adapter, LowRank, Parts, Replace
from ..core.config import Config
from ..core.layer import AdapterLayer
from ..core.provenance import fingerprint
from ..core.state import State, state_of
from ..errors import NotMergeable, VeneerError
from ..files.read import PREFIX
from ..maths.low_rank import Pair, compress, truncate
from ..methods.inits.plain import check_joined, joined, plain
from ..methods.lora import LoRA, LoraConfig
from ..terminal import tracked

if TYPE_CHECKING:
    from .peft_model import PeftModel


@dataclass
class Update:
    """The update dW of one weight: a factor pair if the method has one, else the dense matrix."""

    pair: Pair | None
    dense: Tensor | None
    noise: float = 0.0
    """Singular values of `dense` up to this size are rounding errors."""

    def matrix(self) -> Tensor:
        """The update as a dense matrix, (out, in)."""
        if self.dense is not None:
            return self.dense
        assert self.pair is not None
        A, B = self.pair
        return B @ A

    def reduced(self, rank: int | float | None) -> Pair:
        """The update as a factor pair: of at most a rank, with a share of the squared update, or (None) exact."""
        if self.pair is None:
            return exact(self.matrix(), self.noise) if rank is None else truncate(self.matrix(), rank)
        return self.pair if rank is None else compress(*self.pair, rank)


def exact(D: Tensor, noise: float) -> Pair:
    """Factor a dense matrix at its full numerical rank."""
    S = torch.linalg.svdvals(D)
    rounding = float(S[0]) * max(D.shape) * torch.finfo(D.dtype).eps
    is_signal = max(noise, rounding) < S
    rank = max(1, int(is_signal.sum()))
    return truncate(D, rank)


def update_of(layer: AdapterLayer, name: str) -> Update | None:
    """The update of a layer's weight by the adapter called `name`, in fp32 or wider.

    None if the adapter only trains a copy of the module (`modules_to_save`).

    Raises:
        NotMergeable: the method is not a weight update, or it changes a bias, which a LoRA does not hold.
    """
    parts = [part for part in layer.adapters[name].parts if not isinstance(part, Replace)]
    if not parts:
        return None
    if layer.target.kind not in ("linear", "conv", "embedding"):
        raise NotMergeable(f"the adapter on {layer.path!r} changes a {layer.target.kind}, which LoRA cannot adapt")
    pair = factors_of(layer, name)
    with torch.no_grad():
        if pair is None:
            return _dense(layer, parts)
        return Update(pair, None)


@torch.no_grad()
def factors_of(layer: AdapterLayer, name: str) -> Pair | None:
    """The factor pair of the adapter called `name`, in fp32 or wider; None if its update has no factors."""
    parts = layer.adapters[name].parts
    part = next(iter(parts))
    if len(parts) > 1 or layer.target.groups > 1 or not isinstance(part, LowRank):
        return None
    method = type(part)
    if method.fold is not LowRank.fold or method.delta is not LowRank.delta:
        return None
    A, B = part.factors()
    wide = torch.promote_types(A.dtype, torch.float32)
    return A.to(wide), B.to(wide)


def _dense(layer: AdapterLayer, parts: list[Adapter]) -> Update:
    """The update of a method without factors: its folded weight minus the original one."""
    original = layer.target.original_weight()
    b = layer.target.original_bias()
    W = original.to(torch.promote_types(original.dtype, torch.float32))
    new_W = W
    new_b = b
    for part in parts:
        new_W, new_b = part.fold(new_W, new_b)
    if not _is_same_bias(b, new_b):
        raise NotMergeable(f"the adapter on {layer.path!r} changes the bias, which a plain LoRA cannot represent")
    noise = float(W.norm()) * torch.finfo(W.dtype).eps
    return Update(None, new_W - W, noise)


def _is_same_bias(old: Tensor | None, new: Tensor | None) -> bool:
    if old is None or new is None:
        return old is new
    return old is new or torch.equal(new, old)


def adapter_state(model: nn.Module, name: str) -> State:
    """The state of an adapted model whose adapter `name` adapts layers.

    Raises:
        VeneerError: there is no such adapter.
        NotMergeable: the adapter is a prompt or a gate.
    """
    state = state_of(_base_model(model))
    if state is None or name not in state.configs:
        known = ", ".join(state.configs) if state is not None else "none"
        raise VeneerError(f"no adapter is called {name!r}; the model has {known}")
    if not state.adapters(name):
        raise NotMergeable(f"{name!r} adapts no layers (it is a prompt or a gate), so it is not an update of weights")
    return state


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lora_config(config: Config, pairs: Mapping[str, Pair]) -> LoraConfig:
    """The config of a plain LoRA with the given factors; its scaling is 1 on every layer.

    Args:
        config: the config to take the base model and the task from.
        pairs: factor pairs by path.
    """
    ranks = {path: A.shape[0] for path, (A, _) in pairs.items()}
    r = max(ranks.values())
    lower_ranks = {path: rank for path, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=dict(lower_ranks),
        alpha_pattern=dict(lower_ranks),
        target_modules=list(ranks),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )


def convert_to_lora(
    model: nn.Module, rank: int | float | None = None, adapter_name: str = "default", progressbar: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert an adapter to a plain LoRA; returns its config and its tensors by their keys in a file.

    The model is unchanged.

    Args:
        model: an adapted model.
        rank: an int: the rank of every layer; a float, 0 < rank <= 1: the share of the squared update to keep; None:
            exact, at whatever rank is necessary.
        adapter_name: which adapter.
        progressbar: show progress.

    Raises:
        NotMergeable: the method is not a weight update (prompts, bottlenecks, gates).
    """
    check_rank(rank)
    state = adapter_state(model, adapter_name)
    pairs: dict[str, Pair] = {}
    tensors: dict[str, Tensor] = {}
    for path, adapter in tracked(state.adapters(adapter_name).items(), "converting", progressbar):
        layer = state.layers[path]
        update = update_of(layer, adapter_name)
        if update is not None:
            A, B = update.reduced(rank)
            pairs[path] = A, B
            tensors |= keys(layer, A, B)
        tensors |= copies(path, adapter)
    original = state.configs[adapter_name]
    config = lora_config(original, pairs)
    config.modules_to_save = original.modules_to_save
    return config, tensors


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
) -> None:
    """Write an adapter as a plain LoRA; see `convert_to_lora`."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar)
    config.inference_mode = True
    state = adapter_state(model, adapter_name)
    base_weights = checkpoint.base_weights(_base_model(model), state, adapter_name)
    provenance = {"base": fingerprint(base_weights)}
    tensors = {key: t.cpu().contiguous() for key, t in tensors.items()}
    checkpoint.write(Path(path), tensors, provenance, config)


def check_rank(rank: int | float | None) -> None:
    """Raise VeneerError if the rank is neither a positive int, a share in (0, 1] nor None."""
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise VeneerError(f"rank = {rank} is a share of the squared update to keep and must lie in (0, 1]")
    if isinstance(rank, int) and rank < 1:
        raise VeneerError(f"rank must be at least 1, not {rank}")


def keys(layer: AdapterLayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A layer's factors by their keys in a LoRA file, in the shapes of the file."""
    prefix = f"{PREFIX}{layer.path}."
    if layer.target.kind == "embedding":
        return {f"{prefix}lora_embedding_A": A, f"{prefix}lora_embedding_B": B}
    like_A, like_B = layer.target.factors(A.shape[0])
    return {
        f"{prefix}lora_A.weight": A.reshape(like_A.weight.shape),
        f"{prefix}lora_B.weight": B.reshape(like_B.weight.shape),
    }


def copies(path: str, adapter: Adapter | Parts) -> dict[str, Tensor]:
    """The trained copies of `modules_to_save` by their keys in a LoRA file, unchanged."""
    tensors = {}
    for part in adapter.parts:
        if isinstance(part, Replace):
            for key, t in part.export().items():
                tensors[f"{PREFIX}{path}.{key}"] = t
    return tensors


@torch.no_grad()
def to_plain_lora_(model: PeftModel, adapter_name: str = "default") -> None:
    """Turn a LoRA of any initialisation into a plain LoRA, in place, with the same output on the unchanged base.

    If the initialisation is subtracted (PiSSA, OLoRA, CorDA, LoRA-GA), the rank doubles. The parameters are replaced,
    so create optimizers afterwards.

    Raises:
        NotMergeable: the adapter needs a quantised weight (LoftQ).
        ConfigError: a variant has tensors of its rank besides A and B (MonteCLoRA).
    """
    state = model._state
    config = cast("LoraConfig", model.peft_config[adapter_name])
    loras: list[LoRA] = []
    for adapter in state.adapters(adapter_name).values():
        loras += [part for part in adapter.parts if isinstance(part, LoRA)]
    if any(getattr(lora, "error", None) is not None for lora in loras):
        raise NotMergeable(
            "LoftQ's update is relative to quantised weights; first store these with quantise_base_(model)"
        )
    has_start = any(lora.start_A is not None for lora in loras)
    new_config = plain(config) if has_start else copy.copy(config)
    new_config.init_lora_weights = True
    if has_start:
        for lora in loras:
            check_joined(lora)
        for lora in loras:
            _join_start(lora, new_config.use_rslora)
    for lora in loras:
        lora.config = new_config
    state.configs[adapter_name] = new_config
    state.mark(adapter_name)


def _join_start(lora: LoRA, use_rslora: bool) -> None:
    """Make the subtracted initialisation of a LoRA part of its A and B, at twice the rank and the same scaling."""
    for key, tensor in joined(lora, lora.state_dict()).items():
        path, _, attribute = key.rpartition(".")
        setattr(lora.get_submodule(path), attribute, nn.Parameter(tensor.clone()))
    lora.start_A = None  # type: ignore[assignment]
    lora.start_B = None  # type: ignore[assignment]
    lora.r = 2 * lora.r
    lora.lora_alpha = lora.lora_alpha * (math.sqrt(2) if use_rslora else 2)
