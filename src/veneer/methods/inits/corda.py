"""CorDA: start the update at the directions of the weight that matter most, or least, for some data.

    C = E[x x^T] of a layer's inputs,  U S V^T = W C,  A0 = sqrt(S_k / s) V_k^T C^-1,  B0 = U_k sqrt(S_k / s)

k: the first r directions (instruction-previewed mode, "ipm") or the last (knowledge-preserved mode, "kpm").
Yang et al., 2024, arXiv:2406.05223. As in the authors' code, each sequence is divided by its largest entry before it
counts, and C gets a hundredth (or more, until its inverse is good) of its mean diagonal added to the diagonal.
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
    """How CorDA finds its start."""

    cache_file: str | Path | None = None
    """Where the start is kept; when the file exists, nothing is computed."""
    covariance_file: str | Path | None = None
    """Where the covariances are kept, to be used again for other ranks."""
    corda_method: Literal["ipm", "kpm"] = "ipm"
    """"ipm" learns along the data's main directions; "kpm" along its least ones, which keeps what the model knows."""
    verbose: bool = False
    """Show progress."""
    use_float16_for_covariance: bool = False
    """Sum the covariances in the dtype of the activations, not in float32."""
    prune_temporary_fields: bool = True
    """There are no temporary fields here; kept for the file."""


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find where a LoRA with `init_lora_weights="corda"` starts. Call it before `get_peft_model`.

    Args:
        model: the bare model.
        lora_config: the config that `get_peft_model` will get.
        run_model: runs the model on a few hundred samples; not needed where the config names files that exist.
        hooked_model: another model whose layers `run_model` runs.

    Raises:
        VeneerError: `run_model` is missing, or some target never ran.
    """
    settings = lora_config.corda_config or CordaConfig()
    modules = linear_targets(model, lora_config)
    known = read_cache(settings.cache_file)
    if known is None:
        found = covariances(hooked_model or model, modules, lora_config, run_model)
        known = {}
        for path, module in tqdm(modules.items(), desc="decomposing", disable=not settings.verbose):
            W: Tensor = module.weight.T if is_conv1d(module) else module.weight  # type: ignore[assignment]
            r = at(path, lora_config.rank_pattern, lora_config.r)
            known[f"{path}.A"], known[f"{path}.B"] = corda(W, found[path].to(W.device), r, settings.corda_method)
        write_cache(settings.cache_file, known)
    for path, module in modules.items():
        note(module, "corda", tuple(cached(known, f"{path}.{side}", str(settings.cache_file)) for side in "AB"))


def covariances(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, run_model: Callable[[], None] | None
) -> dict[str, Tensor]:
    """E[x x^T] of what each target reads in `model`, from the file that keeps them or by running the model."""
    settings = config.corda_config or CordaConfig()
    kept = read_cache(settings.covariance_file)
    if kept is not None:
        return {path: cached(kept, path, str(settings.covariance_file)) for path in modules}
    if run_model is None:
        raise ConfigError("preprocess_corda needs run_model, which runs the model on samples, or files from before")
    hooked = linear_targets(model, config)
    sums = {path: Covariance(settings.use_float16_for_covariance) for path in modules}
    handles = [hooked[path].register_forward_pre_hook(seen) for path, seen in sums.items() if path in hooked]
    try:
        with alone(model), evaluating(model):
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    idle = [path for path, seen in sums.items() if not seen.samples]
    if idle:
        raise VeneerError(f"run_model never ran these targets:{listing(idle)}")
    found = {path: seen.total / seen.samples for path, seen in sums.items()}
    write_cache(settings.covariance_file, found)
    return found


class Covariance:
    """A hook that sums x^T x of what a module reads."""

    def __init__(self, as_is: bool) -> None:
        self.as_is, self.samples, self.total = as_is, 0, torch.tensor(0.0)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach() if self.as_is else args[0].detach().float()
        x = x[None] if x.dim() == 2 else x.flatten(0, -3)
        if not x.numel():
            return
        self.samples += len(x)
        x = (x / x.flatten(1).amax(1).abs()[:, None, None]).flatten(0, 1)
        if not torch.isfinite(x).all():
            raise VeneerError("the model's activations are not finite (or all zero) on the samples of run_model")
        self.total = self.total.to(x) + x.T @ x


def corda(W: Tensor, C: Tensor, r: int, method: str) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) for a scaling of 1, of a weight W (out, in) and a covariance C (in, in).

    Raises:
        ConfigError: the rank exceeds that of the weight.
    """
    if r > min(W.shape):
        raise ConfigError(f"CorDA of rank {r} needs a weight of at least that rank, not {tuple(W.shape)}")
    C, inverse = inverted(C.float())
    U, S, Vh = torch.linalg.svd(W.float() @ C, full_matrices=False)
    keep = slice(0, r) if method == "ipm" else slice(len(S) - r, len(S))
    root = S[keep].sqrt()
    return root[:, None] * (Vh[keep] @ inverse), U[:, keep] * root


def inverted(C: Tensor) -> tuple[Tensor, Tensor]:
    """C with enough added to its diagonal, and the inverse of that."""
    eye, mean, damping = torch.eye(len(C), device=C.device), C.diagonal().mean(), 0.01
    while True:
        safe = C + eye * mean * damping
        inverse = torch.linalg.inv(safe)
        if torch.dist(safe @ inverse, eye) < 0.05:
            return safe, inverse
        damping *= 2


def corda_start(target: Target, r: int, scaling: float, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A0 and B0 that `preprocess_corda` found for a target."""
    A0, B0 = taken(target, "corda", config)
    if A0.shape != (r, target.in_features) or B0.shape != (target.out_features, r):
        raise ConfigError(
            f"preprocess_corda found a start of rank {len(A0)} for {target.path!r}, the config says r = {r}; give both "
            "the same config, or another cache_file"
        )
    device = target.weight().device
    return A0.to(device) / scaling**0.5, B0.to(device) / scaling**0.5
