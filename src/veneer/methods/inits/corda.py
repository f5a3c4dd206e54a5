"""CorDA: start the update along the directions of the weight that matter most, or least, for given data.

    C = E[x x^T] of a layer's inputs,  U S V^T = W C,  A0 = sqrt(S_k / s) V_k^T C^-1,  B0 = U_k sqrt(S_k / s)

k: the first r directions (instruction-previewed mode, "ipm") or the last r (knowledge-preserved mode, "kpm"). Yang
et al., 2024, arXiv:2406.05223. As in the authors' code, each sequence is first divided by its largest entry, and the
diagonal of C is increased by 1 % of its mean (by more, if the inverse is not accurate otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...core.config import at
from ...errors import ConfigError, VeneerError, listing
from ...files.checked import Settings
from ...targets.modules import evaluating
from ...targets.target import Target
from ...upstream.models import is_conv1d
from .gather import alone, cached, linear_targets, note, read_cache, taken, write_cache

if TYPE_CHECKING:
    from ..lora import LoraConfig


@dataclass
class CordaConfig(Settings):
    """How CorDA computes its start."""

    cache_file: str | Path | None = None
    """File for the computed start; if it exists, the start is read from it and not computed."""
    covariance_file: str | Path | None = None
    """File for the covariances, which can be reused with other ranks."""
    corda_method: Literal["ipm", "kpm"] = "ipm"
    """"ipm": learn along the main directions of the data; "kpm": along its minor ones, to preserve prior knowledge."""
    verbose: bool = False
    """Show progress."""
    use_float16_for_covariance: bool = False
    """Sum the covariances in the dtype of the activations instead of float32."""
    prune_temporary_fields: bool = True
    """Ignored; kept for PEFT compatibility."""


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Compute the start of a LoRA with `init_lora_weights="corda"`. Call it before `get_peft_model`.

    Args:
        model: the bare model.
        lora_config: the config that you will pass to `get_peft_model`.
        run_model: runs the model on a few hundred samples; not needed if the config names files that exist.
        hooked_model: the model that `run_model` runs, if it is not `model`.

    Raises:
        VeneerError: `run_model` is missing, or some target never ran.
    """
    settings = lora_config.corda_config or CordaConfig()
    modules = linear_targets(model, lora_config)
    starts = read_cache(settings.cache_file)
    if starts is None:
        by_path = covariances(hooked_model or model, modules, lora_config, run_model)
        starts = _decompose(modules, by_path, lora_config, settings)
        write_cache(settings.cache_file, starts)
    source = str(settings.cache_file)
    for path, module in modules.items():
        A0 = cached(starts, f"{path}.A", source)
        B0 = cached(starts, f"{path}.B", source)
        note(module, "corda", (A0, B0))


def _decompose(
    modules: Mapping[str, nn.Module], by_path: Mapping[str, Tensor], config: LoraConfig, settings: CordaConfig
) -> dict[str, Tensor]:
    """A0 and B0 of each target, as `<path>.A` and `<path>.B`."""
    starts = {}
    for path, module in tqdm(modules.items(), desc="decomposing", disable=not settings.verbose):
        W: Tensor = module.weight.T if is_conv1d(module) else module.weight  # type: ignore[assignment]
        C = by_path[path].to(W.device)
        r = at(path, config.rank_pattern, config.r)
        A0, B0 = corda(W, C, r, settings.corda_method)
        starts[f"{path}.A"] = A0
        starts[f"{path}.B"] = B0
    return starts


def covariances(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, run_model: Callable[[], None] | None
) -> dict[str, Tensor]:
    """E[x x^T] of each target's inputs in `model`, read from the covariance file or computed by running the model."""
    settings = config.corda_config or CordaConfig()
    stored = read_cache(settings.covariance_file)
    if stored is not None:
        source = str(settings.covariance_file)
        return {path: cached(stored, path, source) for path in modules}
    if run_model is None:
        raise ConfigError(
            "preprocess_corda needs run_model, which runs the model on samples, or the files of an earlier run"
        )

    sums = {path: Covariance(settings.use_float16_for_covariance) for path in modules}
    _run_hooked(model, linear_targets(model, config), sums, run_model)
    idle = [path for path, covariance in sums.items() if not covariance.samples]
    if idle:
        raise VeneerError(f"run_model never ran these targets:{listing(idle)}")
    means = {path: covariance.total / covariance.samples for path, covariance in sums.items()}
    write_cache(settings.covariance_file, means)
    return means


def _run_hooked(
    model: nn.Module, modules: Mapping[str, nn.Module], sums: Mapping[str, Covariance], run_model: Callable[[], None]
) -> None:
    """Run the model and add each module's inputs to its covariance."""
    handles = []
    for path, covariance in sums.items():
        if path in modules:
            handles.append(modules[path].register_forward_pre_hook(covariance))
    try:
        with alone(model), evaluating(model):
            run_model()
    finally:
        for handle in handles:
            handle.remove()


class Covariance:
    """A forward pre-hook that sums x^T x of a module's inputs."""

    def __init__(self, as_is: bool) -> None:
        self.as_is = as_is
        """Sum in the dtype of the inputs instead of float32."""
        self.samples = 0
        self.total = torch.tensor(0.0)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        if not self.as_is:
            x = x.float()
        x = x[None] if x.dim() == 2 else x.flatten(0, -3)  # (samples, length, in)
        if not x.numel():
            return
        self.samples += len(x)
        largest = x.flatten(1).amax(1).abs()
        x = (x / largest[:, None, None]).flatten(0, 1)
        if not torch.isfinite(x).all():
            raise VeneerError("the model's activations are not finite (or all zero) on the samples of run_model")
        self.total = self.total.to(x) + x.T @ x


def corda(W: Tensor, C: Tensor, r: int, method: str) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) for a scaling of 1, from a weight W (out, in) and a covariance C (in, in).

    Raises:
        ConfigError: the rank exceeds that of the weight.
    """
    if r > min(W.shape):
        raise ConfigError(f"CorDA of rank {r} needs a weight of at least that rank, not {tuple(W.shape)}")
    C, inverse = inverted(C.float())
    U, S, Vh = torch.linalg.svd(W.float() @ C, full_matrices=False)
    directions = slice(0, r) if method == "ipm" else slice(len(S) - r, len(S))
    root = S[directions].sqrt()
    A0 = root[:, None] * (Vh[directions] @ inverse)
    B0 = U[:, directions] * root
    return A0, B0


def inverted(C: Tensor) -> tuple[Tensor, Tensor]:
    """C, with its diagonal increased until its inverse is accurate, and that inverse."""
    eye = torch.eye(len(C), device=C.device)
    mean = C.diagonal().mean()
    damping = 0.01
    while True:
        damped = C + eye * mean * damping
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            return damped, inverse
        damping *= 2


def corda_start(target: Target, r: int, scaling: float, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A0 and B0 that `preprocess_corda` computed for a target."""
    A0, B0 = taken(target, "corda", config)
    if A0.shape != (r, target.in_features) or B0.shape != (target.out_features, r):
        raise ConfigError(
            f"preprocess_corda computed a start of rank {len(A0)} for {target.path!r}, but the config has r = {r}; use "
            "the same config for both, or another cache_file"
        )
    device = target.weight().device
    root = scaling**0.5
    return A0.to(device) / root, B0.to(device) / root
