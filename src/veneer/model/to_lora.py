"""Any adapter that is a change of the weights as a plain LoRA: exact where the method is low-rank, else the nearest.

`veneer.save_as_lora("plain", model)` is exact; `rank=0.99` takes the least ranks that hold 99 % of the squared update.
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
from ..maths.low_rank import Pair, compress, truncate
from ..methods.inits.plain import check_joined, joined, plain
from ..methods.lora import LoraConfig
from ..terminal import tracked

if TYPE_CHECKING:
    from .peft_model import PeftModel


@dataclass
class Update:
    """What an adapter adds to one weight: a factor pair where it has one, else the dense matrix."""

    pair: Pair | None
    dense: Tensor | None
    noise: float = 0.0
    """Singular values of `dense` up to here are rounding."""

    def matrix(self) -> Tensor:
        if self.dense is not None:
            return self.dense
        assert self.pair is not None
        return self.pair[1] @ self.pair[0]

    def reduced(self, rank: int | float | None) -> Pair:
        """As a factor pair of at most a rank, of a share of the energy, or (None) exactly."""
        if rank is None:
            return self.pair if self.pair is not None else exact(self.matrix(), self.noise)
        return compress(*self.pair, rank) if self.pair is not None else truncate(self.matrix(), rank)


def exact(D: Tensor, noise: float) -> Pair:
    """A dense matrix as factors of its full numerical rank."""
    S = torch.linalg.svdvals(D)
    noise = max(noise, float(S[0]) * max(D.shape) * torch.finfo(D.dtype).eps)
    return truncate(D, max(1, int((noise < S).sum())))


def update_of(layer: AdapterLayer, name: str) -> Update | None:
    """What the adapter called `name` adds to a layer's weight, in at least fp32; None where only a copy is trained.

    Raises:
        NotMergeable: it has no form as a weight, or changes a bias, which a LoRA does not hold.
    """
    parts = [part for part in layer.adapters[name].parts if not isinstance(part, Replace)]
    if not parts:
        return None
    if layer.target.kind not in ("linear", "conv", "embedding"):
        raise NotMergeable(f"the adapter on {layer.path!r} changes a {layer.target.kind}, on which there is no LoRA")
    pair = factors_of(layer, name)
    with torch.no_grad():
        return _dense(layer, parts) if pair is None else Update(pair, None)


@torch.no_grad()
def factors_of(layer: AdapterLayer, name: str) -> Pair | None:
    """The factor pair of the adapter called `name`, in at least fp32; None where it has none."""
    part = next(iter(layer.adapters[name].parts))
    if len(layer.adapters[name].parts) > 1 or layer.target.groups > 1:
        return None
    kind = type(part)
    if not isinstance(part, LowRank) or kind.fold is not LowRank.fold or kind.delta is not LowRank.delta:
        return None
    A, B = part.factors()
    wide = torch.promote_types(A.dtype, torch.float32)
    return A.to(wide), B.to(wide)


def _dense(layer: AdapterLayer, parts: list[Adapter]) -> Update:
    W, b = layer.target.original_weight(), layer.target.original_bias()
    W = start = W.to(torch.promote_types(W.dtype, torch.float32))
    folded = b
    for part in parts:
        W, folded = part.fold(W, folded)
    if folded is not b and not (b is not None and folded is not None and torch.equal(folded, b)):
        raise NotMergeable(f"the adapter on {layer.path!r} changes the bias, which a plain LoRA does not hold")
    return Update(None, W - start, float(start.norm()) * torch.finfo(start.dtype).eps)


def adapter_state(model: nn.Module, name: str) -> State:
    """The state of an adapted model that has layers called `name`.

    Raises:
        VeneerError: it has no such adapter.
        NotMergeable: the adapter is a prompt.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = state_of(inner)
    if state is None or name not in state.configs:
        known = ", ".join(state.configs) if state is not None else "none"
        raise VeneerError(f"no adapter is called {name!r}; the model has {known}")
    if not state.adapters(name):
        raise NotMergeable(f"{name!r} has no layers of its own (it is a prompt or a gate), so it is no weight update")
    return state


def lora_config(config: Config, pairs: Mapping[str, Pair]) -> LoraConfig:
    """The config of a plain LoRA with these factors by path, for the base of another; the scaling is one everywhere."""
    ranks = {path: A.shape[0] for path, (A, _) in pairs.items()}
    r = max(ranks.values())
    other = {path: rank for path, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=dict(other),
        alpha_pattern=dict(other),
        target_modules=list(ranks),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )


def convert_to_lora(
    model: nn.Module, rank: int | float | None = None, adapter_name: str = "default", progressbar: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as a plain LoRA: (config, tensors by their keys in the file). The model stays as it is.

    Args:
        model: an adapted model.
        rank: a rank for every layer; a share of the squared update to keep (0 < rank <= 1, a float); None: exact, at
            the rank that takes.
        adapter_name: which adapter.
        progressbar: show progress.

    Raises:
        NotMergeable: the method is no update of the weights (prompts, bottlenecks, gates).
    """
    check_rank(rank)
    state = adapter_state(model, adapter_name)
    pairs: dict[str, Pair] = {}
    tensors: dict[str, Tensor] = {}
    for path, adapter in tracked(state.adapters(adapter_name).items(), "converting", progressbar):
        layer = state.layers[path]
        update = update_of(layer, adapter_name)
        if update is not None:
            pairs[path] = update.reduced(rank)
            tensors |= keys(layer, *pairs[path])
        tensors |= copies(path, adapter)
    config = lora_config(state.configs[adapter_name], pairs)
    config.modules_to_save = state.configs[adapter_name].modules_to_save
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
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    notes = {"base": fingerprint(checkpoint.base_weights(inner, state, adapter_name))}
    checkpoint.write(Path(path), {key: t.cpu().contiguous() for key, t in tensors.items()}, notes, config)


def check_rank(rank: int | float | None) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise VeneerError(f"rank = {rank} is a share of the squared update to keep and must lie in (0, 1]")
    if isinstance(rank, int) and rank < 1:
        raise VeneerError(f"rank must be at least 1, not {rank}")


def keys(layer: AdapterLayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The factors under the names and in the layout of a LoRA file."""
    prefix = f"base_model.model.{layer.path}."
    if layer.target.kind == "embedding":
        return {f"{prefix}lora_embedding_A": A, f"{prefix}lora_embedding_B": B}
    like_A, like_B = layer.target.factors(A.shape[0])
    shaped = A.reshape(like_A.weight.shape), B.reshape(like_B.weight.shape)
    return {f"{prefix}lora_{side}.weight": t for side, t in zip("AB", shaped, strict=True)}


def copies(path: str, adapter: Adapter | Parts) -> dict[str, Tensor]:
    """What `modules_to_save` trained goes along as it is."""
    copies = [part for part in adapter.parts if isinstance(part, Replace)]
    return {f"base_model.model.{path}.{key}": t for part in copies for key, t in part.export().items()}


@torch.no_grad()
def to_plain_lora_(model: PeftModel, adapter_name: str = "default") -> None:
    """Turn a LoRA of any start into plain LoRA, in place: the same output, on the untouched base, in any reader.

    A start that is taken off (PiSSA, OLoRA, CorDA, LoRA-GA) doubles the rank. The parameters are new ones, so make
    optimizers afterwards.

    Raises:
        NotMergeable: the adapter stands on a quantised weight (LoftQ), which no plain LoRA can.
        ConfigError: a variant has tensors of its rank besides A and B (MonteCLoRA).
    """
    from ..methods.lora import LoRA

    state, config = model._state, cast("LoraConfig", model.peft_config[adapter_name])
    loras = [p for a in state.adapters(adapter_name).values() for p in a.parts if isinstance(p, LoRA)]
    if any(getattr(lora, "error", None) is not None for lora in loras):
        raise NotMergeable("LoftQ's update stands on a quantised weight; give the base that with quantise_base_(model)")
    doubled = any(lora.start_A is not None for lora in loras)
    new = plain(config) if doubled else copy.copy(config)
    new.init_lora_weights = True
    for lora in loras if doubled else ():
        check_joined(lora)
    for lora in loras:
        if doubled:
            for key, tensor in joined(lora, lora.state_dict()).items():
                owner, _, attribute = key.rpartition(".")
                setattr(lora.get_submodule(owner), attribute, nn.Parameter(tensor.clone()))
            lora.start_A = lora.start_B = None  # type: ignore[assignment]
            lora.r, lora.lora_alpha = 2 * lora.r, lora.lora_alpha * (math.sqrt(2) if new.use_rslora else 2)
        lora.config = new
    state.configs[adapter_name] = new
    state.mark(adapter_name)
