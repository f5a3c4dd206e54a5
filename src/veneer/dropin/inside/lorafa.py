"""`peft.optimizers.lorafa`: AdamW as PEFT takes it for LoRA-FA, which trains B and freezes A."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import VeneerError
from ...train.optimizers.riemannian import inverse


class LoraFAOptimizer(Optimizer):
    """AdamW whose gradient of B makes the update of B A the closest to that of full training.

    A group of parameters has, beside AdamW's settings, their `names` and their `scaling_factors`; A precedes its B.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if eps < 0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, settings)
        self.has_warned = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            frozen: Tensor | None = None  # the A that precedes a B
            for parameter, name, scaling in zip(group["params"], group["names"], self._scalings(group), strict=True):
                if "lora" not in name:
                    if parameter.grad is not None:
                        adamw_(parameter, parameter.grad, self.state[name], group)
                elif frozen is None:
                    frozen = parameter
                else:
                    gradient = closest(parameter.grad, frozen, scaling)
                    key = name[: name.find("lora")] + "lora"
                    adamw_(parameter, gradient, self.state[key], group, of="_B")
                    frozen = None
        return loss

    def _scalings(self, group: dict[str, Any]) -> list[float]:
        if "scaling_factors" in group:
            return group["scaling_factors"]
        if "scaling_factor" not in group:
            raise KeyError("Expected optimizer param group to define `scaling_factors`.")
        if not self.has_warned:
            warnings.warn(
                "`scaling_factor` is deprecated and will be removed after 2026-11-01. Please use `scaling_factors` "
                "instead.",
                FutureWarning,
                stacklevel=4,
            )
            self.has_warned = True
        return [group["scaling_factor"]] * len(group["params"])


def closest(gradient: Tensor, A: Tensor, scaling: float) -> Tensor:
    """The gradient of B, (out, r), corrected for A being frozen; PEFT takes the product in bf16 where it can."""
    from accelerate.utils.imports import is_bf16_available

    correction = inverse(A, 1e-8)
    dtype = torch.bfloat16 if is_bf16_available() else correction.dtype
    corrected = gradient.to(dtype) @ correction.to(dtype) / scaling**2
    return corrected.to(gradient.dtype)


def adamw_(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], of: str = "") -> None:
    """One step of AdamW; epsilon is added before the bias correction, and weights decay after the step."""
    beta1, beta2 = group["betas"]
    average = state.setdefault(f"exp_avg{of}", torch.zeros_like(parameter))
    square = state.setdefault(f"exp_avg_sq{of}", torch.zeros_like(parameter))
    state["step"] = state.get("step", 0) + 1
    average.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    rate = group["lr"]
    if group["correct_bias"]:
        rate *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    parameter.addcdiv_(average, square.sqrt() + group["eps"], value=-rate)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: Any,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze A of every LoRA layer and return a `LoraFAOptimizer` of all parameters.

    Raises:
        VeneerError: `use_rslora` differs from the setting of an active adapter.
    """
    uses = {name: bool(getattr(model.peft_config[name], "use_rslora", False)) for name in model.active_adapters}
    if use_rslora is not None:
        others = [name for name, used in uses.items() if used != use_rslora]
        if others:
            raise VeneerError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the following active adapters "
                f"have `use_rslora` set differently in the model config: {others}. Please configure rsLoRA via "
                "LoraConfig and remove the `use_rslora` argument from create_lorafa_optimizer as the parameter is "
                "deprecated."
            )
        warnings.warn(
            "`use_rslora` in create_lorafa_optimizer is deprecated and will be removed after 2026-11-01. Please "
            "configure rsLoRA via LoraConfig instead.",
            FutureWarning,
            stacklevel=2,
        )
    is_rank_stabilised = all(uses.values()) if use_rslora is None else use_rslora
    names, parameters, scalings = [], [], []
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
        names.append(name)
        parameters.append(parameter)
        scalings.append(scaling_of(model, name))
    group = {
        "params": parameters,
        "names": names,
        "scaling_factors": scalings,
        "scaling_factor": lora_alpha / (math.sqrt(r) if is_rank_stabilised else r),
        "lr": lr,
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])


def scaling_of(model: nn.Module, name: str) -> float | None:
    """The scaling of the LoRA that a parameter belongs to; None for other parameters."""
    path, _, rest = name.rpartition(".lora_")
    if not path:
        return None
    scaling = getattr(model.get_submodule(path), "scaling", {})
    return scaling.get(rest.split(".")[1])
