"""LoRA-GA: start the update so that its first step resembles that of full fine-tuning.

    U S V^T = dL/dW,  A0 = c V[:, i]^T,  B0 = c U[:, j],  c = out^(1/4) / sqrt(gamma)

with i the first r directions and j the next r ("ArB2r"). Wang et al., 2024, arXiv:2407.05000. PEFT also multiplies B0
by the singular values of the gradient and scales only B0; the paper and its code do neither, nor do we. The start is
subtracted, so that the adapter starts as a no-op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...core.config import check_range
from ...errors import ConfigError, VeneerError, listing
from ...files.checked import Settings
from ...maths.svd import randomised_svd
from ...targets.target import Target
from .gather import alone, cached, linear_targets, note, read_cache, taken, write_cache

if TYPE_CHECKING:
    from ..lora import LoraConfig


@dataclass
class LoraGAConfig(Settings):
    """How LoRA-GA computes its start from gradients."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Which of the first 2 r singular directions A gets; B gets the others. "ArBr": every second one; "A2rBr": the last
    r; "ArB2r": the first r; "random": a fixed random half."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """The norm of A's rows and B's columns. "stable": from the width and `stable_gamma`; "weight_svd": from the
    singular values of the weight; "gd_scale": 1 / scaling; "unit": 1."""
    stable_gamma: int = 16
    """With "stable", the norm is divided by the square root of this number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, float("inf"), "stable_gamma")  # type: ignore[arg-type]


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Estimate the gradients from which a LoRA with `init_lora_weights="lora_ga"` starts.

    Call it before `get_peft_model`.

    Args:
        model: the bare model.
        lora_config: the config that you will pass to `get_peft_model`.
        train_step: runs the model forward and backward on some batches, without an optimizer.
        cache_file: file for the gradients; if it exists, they are read from it and `train_step` does not run.

    Raises:
        VeneerError: some target got no gradient.
    """
    modules = linear_targets(model, lora_config)
    grads = read_cache(cache_file)
    if grads is None:
        grads = gradients(model, modules, train_step)
        write_cache(cache_file, grads)
    for path, module in modules.items():
        note(module, "lora_ga", cached(grads, path, str(cache_file)))


def gradients(model: nn.Module, modules: Mapping[str, Any], train_step: Callable[[], None]) -> dict[str, Tensor]:
    """The mean gradient of each module's weight over the backward passes of `train_step`."""
    passes = dict.fromkeys(modules, 0)

    def counter(path: str) -> Callable[[Tensor], None]:
        def count(_: Tensor) -> None:
            passes[path] += 1

        return count

    means = {}
    with alone(model), only_learning(model, [module.weight for module in modules.values()]):
        handles = []
        for path, module in modules.items():
            handles.append(module.weight.register_post_accumulate_grad_hook(counter(path)))
        try:
            train_step()
            for path, module in modules.items():
                if passes[path]:
                    means[path] = module.weight.grad.detach() / passes[path]
        finally:
            for handle in handles:
                handle.remove()
    idle = [path for path in modules if path not in means]
    if idle:
        raise VeneerError(f"train_step gave these targets no gradient; does it call loss.backward()?{listing(idle)}")
    return means


@contextmanager
def only_learning(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """A context in which the model is in training mode and only these weights accumulate gradients, from zero.

    On exit, the mode, `requires_grad` and the gradients are restored.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    was_training = model.training
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    for weight in weights:
        weight.requires_grad_(True)
    model.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)
        for parameter, learns, grad in before:
            parameter.requires_grad_(learns)
            parameter.grad = grad


def lora_ga(
    G: Tensor, W: Tensor, r: int, scaling: float, direction: str, scale: str, gamma: float
) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) from a gradient G and a weight W, both (out, in).

    Raises:
        ConfigError: the gradient has fewer than 2 r directions.
    """
    if 2 * r > min(G.shape):
        raise ConfigError(f"LoRA-GA of rank {r} needs {2 * r} directions; a weight of {tuple(G.shape)} has fewer")
    U, _, Vh = randomised_svd(G.float(), min(4 * r, *G.shape), 4)
    for_A, for_B = halves(direction, r)
    size = norm_of(W, r, scaling, scale, gamma)
    A0 = Vh[for_A] * size
    B0 = U[:, for_B] * size
    return A0.contiguous(), B0.contiguous()


def norm_of(W: Tensor, r: int, scaling: float, scale: str, gamma: float) -> Tensor | float:
    """The norm of A0's rows and B0's columns."""
    if scale == "stable":
        return len(W) ** 0.25 / gamma**0.5
    if scale == "weight_svd":
        return (singular_values(W, r) / scaling).sqrt().mean()
    if scale == "gd_scale":
        return 1 / scaling
    return 1.0


def halves(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """The indices of A's directions and of B's among the first 2 r."""
    if direction == "random":
        generator = torch.Generator(device="cpu").manual_seed(0)
        order = torch.randperm(2 * r, generator=generator, device="cpu")
        return order[:r], order[r:]
    indices = torch.arange(2 * r, device="cpu")
    if direction == "ArBr":
        return indices[1::2], indices[0::2]
    first, second = indices.split(r)
    if direction == "ArB2r":
        return first, second
    return second, first


def singular_values(W: Tensor, r: int) -> Tensor:
    """The r largest singular values of W, by a randomised SVD."""
    _, S, _ = randomised_svd(W.float(), min(4 * r, *W.shape), 4)
    return S[:r]


def lora_ga_start(target: Target, r: int, scaling: float, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A0 and B0 from the gradient that `preprocess_loraga` estimated for a target."""
    settings = config.lora_ga_config or LoraGAConfig()
    W = target.original_weight()
    G = target.as_matrix(taken(target, "lora_ga", config).to(W.device))
    if G.shape != W.shape:
        raise ConfigError(
            f"preprocess_loraga found a gradient of {tuple(G.shape)} for {target.path!r}; use another cache_file"
        )
    return lora_ga(G, W, r, scaling, settings.direction, settings.scale, settings.stable_gamma)
