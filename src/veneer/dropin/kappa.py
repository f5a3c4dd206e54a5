"""PEFT's KappaTune: choose targets by the condition number of their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..targets.roles import is_linear
from ..targets.walk import walk


class KappaTuneSelector:
    """Ranks a model's weights by condition number, lowest first; KappaTune adapts those with the lowest.

    Args:
        max_dim_size_to_analyze: leave out weights that have a larger dimension.
        moe_param_suffixes: endings of the names of parameters with three dimensions to rank; None: all of them.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: list[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        from tqdm import tqdm

        endings = ("",) if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.modules: dict[str, float] = {}
        self.parameters: dict[str, float] = {}
        for path, module in tqdm(list(walk(model)), desc="condition numbers", disable=not show_progress):
            if is_linear(module) and max(module.weight.shape) <= max_dim_size_to_analyze:  # type: ignore[union-attr]
                self.modules[path] = _kappa(module.weight)  # type: ignore[arg-type]
            for name, parameter in module._parameters.items():
                is_stack = parameter is not None and parameter.dim() == 3 and name.endswith(endings)
                if is_stack and max(parameter.shape) <= max_dim_size_to_analyze:  # type: ignore[union-attr]
                    self.parameters[f"{path}.{name}"] = _kappa(parameter)  # type: ignore[arg-type]

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Paths of linear layers, best first: a fraction, a number, or all up to a condition number."""
        return _best(self.modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of parameters with three dimensions (fused experts), selected in the same way."""
        return _best(self.parameters, top_p, num_modules, threshold)


def _kappa(weight: Tensor) -> float:
    """The ratio of the largest to the smallest singular value; the mean over a stack of matrices."""
    W = weight.detach().float()
    return float(torch.linalg.cond(W).mean())


def _best(numbers: dict[str, float], share: float | None, count: int | None, threshold: float | None) -> list[str]:
    """Names by ascending number: a share of them, a count of them, or those up to a threshold."""
    ranking = sorted(numbers, key=numbers.__getitem__)
    if share is not None:
        count = max(1, int(len(ranking) * share))
    if count is not None:
        return ranking[:count]
    if threshold is not None:
        return [name for name in ranking if numbers[name] <= threshold]
    return ranking


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: list[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Targets chosen by `KappaTuneSelector`: linear layers, and parameters of fused experts if there are any."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    modules = selector.get_best_targets(top_p)
    parameters = selector.get_best_target_parameters(top_p)
    return {"target_modules": modules, "target_parameters": parameters or None}
