"""Scale down the intruder dimensions of a trained adapter, so that the model forgets less of its pretraining.

    W + dW = sum_i s_i u_i v_i^T,  dW' = dW + sum (lambda - 1) s_i u_i v_i^T over i with max_j |u_i . u_j(W)| < eps

Shuttleworth et al., 2024, arXiv:2410.21228: fine-tuning with LoRA adds singular directions of large singular value to
the weight that are close to none of the pretrained ones; scaling them down recovers much of what was forgotten.
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
    """Add a copy of a LoRA with its intruder dimensions scaled down, and activate it.

    The new adapter is a plain LoRA of the same ranks; the old one stays on the model.

    Args:
        peft_model: the model with the trained adapter.
        old_adapter_name: the trained adapter.
        new_adapter_name: the name of the new adapter.
        top_k: how many of the largest singular directions of each weight are checked.
        threshold_epsilon: a direction is an intruder if its cosine with every pretrained one is below this.
        mitigation_lambda: factor for the singular values of intruders; 1 changes nothing, 0 removes them.
        logging_sink: called with a line for each layer; None: no logging.

    Raises:
        VeneerError: the adapter is not a LoRA, or the new name is taken.
    """
    state = adapter_state(peft_model, old_adapter_name)
    config = state.configs[old_adapter_name]
    if str(config.peft_type).rpartition(".")[2] != "LORA":
        raise VeneerError(f"{old_adapter_name!r} is {config.peft_type}; intruder dimensions are defined for LoRA only")
    log = logging_sink or (lambda line: None)
    pairs: dict[str, Pair] = {}
    for path in state.adapters(old_adapter_name):
        layer = state.layers[path]
        pairs[path], count = _mitigated(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
        summary = f"Intruders: {count}" if count else "No intruders"
        log(f"{path}: {summary}")
    peft_model.add_adapter(new_adapter_name, lora_config(config, pairs))
    fill(state, new_adapter_name, pairs)
    for path in pairs:
        adapters = state.layers[path].adapters
        old_dtype = adapters[old_adapter_name].dtype
        adapters[new_adapter_name].to(old_dtype)
    log(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _mitigated(layer: AdapterLayer, name: str, k: int, eps: float, strength: float) -> tuple[Pair, int]:
    """The factors of the mitigated update, and the number of intruders."""
    update = update_of(layer, name)
    if update is None:
        raise VeneerError(f"{name!r} trains a copy of {layer.path!r}, which is not an update of the weight")
    W = layer.target.original_weight().float()
    intruding = intruders(W, W + update.matrix(), k, eps)
    old = update.pair if update.pair is not None else truncate(update.matrix(), min(W.shape))
    if intruding is None:
        return old, 0
    rank = update.pair[0].shape[0] if update.pair is not None else min(W.shape)
    A, B = intruding
    joined_A = torch.cat([old[0], A])
    joined_B = torch.cat([old[1], (strength - 1) * B], dim=1)
    mitigated = compress(joined_A, joined_B, rank)
    return padded(*mitigated, rank), A.shape[0]


def intruders(W: Tensor, merged: Tensor, k: int, eps: float) -> Pair | None:
    """The part of the merged weight in intruder dimensions as factors; None if there are none.

    Args:
        W: the pretrained weight, (out, in).
        merged: the weight with the update.
        k: how many of the largest singular directions are checked.
        eps: the cosine with every pretrained direction that an intruder stays below.
    """
    pretrained, _, _ = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    cosines = U[:, :k].T @ pretrained
    closest = cosines.abs().amax(dim=1)
    indices = (closest < eps).nonzero()[:, 0]
    if len(indices) == 0:
        return None
    A = Vh[indices]
    B = U[:, indices] * S[indices]
    return A, B
