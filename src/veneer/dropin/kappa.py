"""PEFT's KappaTune: targets chosen by the condition number of their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..targets.roles import is_linear
from ..targets.walk import walk


class KappaTuneSelector:
    """Ranks a model's weights by their condition numbers, the lowest first: PEFT's KappaTune adapts these.

    Args:
        settings: PEFT's limits on sizes, which are not needed: singular values alone are computed.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        modules = list(walk(model))
        self.modules = {path: _kappa(m.weight) for path, m in modules if is_linear(m)}
        bare_parameters = {f"{path}.{n}": p for path, m in modules for n, p in m._parameters.items() if p is not None}
        self.parameters = {path: _kappa(p) for path, p in bare_parameters.items() if p.dim() == 3}

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Paths of linear layers, the best first: a share, a number, or those up to a condition number."""
        return _best(self.modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_params: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of experts that are one parameter with three dimensions."""
        return _best(self.parameters, top_p, num_params, threshold)


def _kappa(weight: Tensor) -> float:
    """The largest singular value over the smallest; of several matrices the mean."""
    return float(torch.linalg.cond(weight.detach().float()).mean())


def _best(numbers: dict[str, float], share: float | None, count: int | None, threshold: float | None) -> list[str]:
    order = sorted(numbers, key=lambda path: numbers[path])
    if share is not None:
        return order[: max(1, int(len(order) * share))]
    if count is not None:
        return order[:count]
    return [path for path in order if threshold is None or numbers[path] <= threshold]


def find_kappa_target_modules(model: nn.Module, top_p: float = 0.2, **settings: Any) -> dict[str, list[str] | None]:
    """What to adapt by `KappaTuneSelector`: linear layers, and parameters of fused experts if there are any."""
    selector = KappaTuneSelector(model)
    found = {"target_modules": selector.get_best_targets(top_p)}
    return found | {"target_parameters": selector.get_best_target_parameters(top_p) or None}
