"""`peft.tuners.osf.utils`: the parts of a weight that OSF keeps and trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...maths.svd import principal


def decompose_weight_matrix(weight: Tensor, top_k: int) -> dict[str, Any]:
    """The singular vectors and values of a weight, the first `top_k` apart from the trainable rest."""
    U, S, Vh = principal(weight.detach().float(), min(weight.shape))
    k = min(top_k, len(S))
    parts: dict[str, Any] = {"rank_high": k}
    for name, tensor in (("U", U.mT), ("S", S), ("V", Vh)):
        high = tensor[:k].to(weight)
        low = tensor[k:].to(weight)
        if name == "U":
            high, low = high.mT, low.mT
        parts[f"{name}_high"] = high.contiguous()
        parts[f"{name}_low"] = nn.Parameter(low.contiguous())
    return parts


@torch.no_grad()
def project_gradient_to_orthogonal_space(svd_dict: dict[str, Any]) -> None:
    """Remove from the gradients of the trained vectors what lies in the span of the fixed ones."""
    U, V = svd_dict["U_high"], svd_dict["V_high"]
    grad_U, grad_V = svd_dict["U_low"].grad, svd_dict["V_low"].grad
    if grad_U is not None:
        grad_U -= U @ (U.mT @ grad_U)
    if grad_V is not None:
        grad_V -= (grad_V @ V.mT) @ V
