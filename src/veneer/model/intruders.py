"""Take the edge off a trained adapter's intruder dimensions, so that the model forgets less of what it knew.

    W + dW = sum_i s_i u_i v_i^T,  dW' = dW + sum (lambda - 1) s_i u_i v_i^T over i with max_j |u_i . u_j(W)| < eps

Shuttleworth et al., 2024, arXiv:2410.21228: fine-tuning with LoRA brings new strong singular directions into the weight
that are near none of the pretrained ones, and scaling them down wins back much of what was forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.layer import AdapterLayer
from ..errors import VeneerError
from ..maths.low_rank import Pair, compress, padded, truncate
from .combine import fill
from .to_lora import adapter_state, lora_config, update_of

if TYPE_CHECKING:
    from .peft_model import PeftModel


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: PeftModel,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add the mitigated adapter beside the old one, a plain LoRA of the same ranks, and make it the active one.

    Args:
        top_k: how many of the strongest singular directions of each weight are looked at.
        threshold_epsilon: a direction intrudes where its cosine with every pretrained one is below this.
        mitigation_lambda: what its singular value is scaled by; 1 changes nothing, 0 takes it out.
        logging_sink: is told the count for each layer; None: nobody.

    Raises:
        VeneerError: the adapter is no LoRA, or the new name is taken.
    """
    state = adapter_state(peft_model, old_adapter_name)
    config = state.configs[old_adapter_name]
    if str(config.peft_type).rpartition(".")[2] != "LORA":
        raise VeneerError(f"{old_adapter_name!r} is {config.peft_type}; intruder dimensions are known of LoRA alone")
    tell = logging_sink or (lambda line: None)
    pairs: dict[str, Pair] = {}
    for path in state.adapters(old_adapter_name):
        pairs[path], count = _mitigated(
            state.layers[path], old_adapter_name, top_k, threshold_epsilon, mitigation_lambda
        )
        tell(f"{path}: {f'Intruders: {count}' if count else 'No intruders'}")
    peft_model.add_adapter(new_adapter_name, lora_config(config, pairs))
    fill(state, new_adapter_name, pairs)
    for path in pairs:
        held = state.layers[path].adapters
        held[new_adapter_name].to(held[old_adapter_name].dtype)
    tell(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _mitigated(layer: AdapterLayer, name: str, k: int, eps: float, strength: float) -> tuple[Pair, int]:
    """(factors of the new update, how many directions intruded)."""
    update = update_of(layer, name)
    if update is None:
        raise VeneerError(f"{name!r} trains a copy of {layer.path!r}, which is no update")
    W = layer.target.original_weight().float()
    rank = update.pair[0].shape[0] if update.pair is not None else min(W.shape)
    added = intruders(W, W + update.matrix(), k, eps)
    old = update.pair if update.pair is not None else truncate(update.matrix(), rank)
    if added is None:
        return old, 0
    A, B = added
    both = torch.cat([old[0], A]), torch.cat([old[1], (strength - 1) * B], dim=1)
    return padded(*compress(*both, rank), rank), A.shape[0]


def intruders(W: Tensor, merged: Tensor, k: int, eps: float) -> Pair | None:
    """The intruding part of the merged weight as factors; None where nothing intrudes.

    Args:
        W: pretrained, (out, in).
        merged: with the update.
    """
    known, _, _ = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    nearest = (U[:, :k].T @ known).abs().amax(dim=1)
    places = (nearest < eps).nonzero()[:, 0]
    return (Vh[places], U[:, places] * S[places]) if len(places) else None
