"""EVA: start A at the principal components of what each layer reads, and give rank to the layers it explains most.

    A = the first r' right singular vectors of a layer's centred inputs,  B = 0

r' of a layer: of all components of all layers, the r times (number of layers) that explain the largest share of their
layer's variance are kept, at most rho r in one layer. Paischer et al., 2024, arXiv:2410.07170. The components come
from an incremental SVD over batches (Ross et al., 2008) until they turn by less than tau allows. A no-op at the
start, since B is zero; a layer that gets no rank gets no adapter.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ...core.config import at, check_range
from ...core.state import state_of
from ...errors import ConfigError, VeneerError, listing
from ...files.checked import Settings
from ...maths.svd import randomised_svd
from ...targets.modules import evaluating
from ...upstream.models import is_conv1d
from .gather import alone, linear_targets

if TYPE_CHECKING:
    from ..lora import LoraConfig

PREFIX = "base_model.model."


@dataclass
class EvaConfig(Settings):
    """How EVA finds its start."""

    rho: float = 2.0
    """A layer's rank is at most rho r; 1 leaves every layer its r."""
    tau: float = 0.99
    """A component has converged when its cosine with that of the batch before is at least this."""
    use_label_mask: bool = True
    """Leave out positions whose label is `label_mask_value`."""
    label_mask_value: int = -100
    """The label of positions that are not learned."""
    whiten: bool = False
    """Divide each component by the root of its singular value."""
    adjust_scaling_factors: bool = True
    """Scale `lora_alpha` with a layer's rank, so that alpha / r stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, float("inf"), "rho")  # type: ignore[arg-type]
        check_range(self, 0, 1 + 1e-9, "tau")  # type: ignore[arg-type]


class Components:
    """The first n principal components of rows that come batch by batch."""

    def __init__(self, n: int, tau: float) -> None:
        self.n, self.tau = n, tau
        self.count, self.mean, self.scatter = 0, torch.tensor(0.0), torch.tensor(0.0)
        self.vectors = self.values = torch.empty(0)
        self.converged = torch.zeros(n, dtype=torch.bool)

    def add(self, x: Tensor) -> None:
        """Take in rows, at least n; Ross et al.'s update of the mean, the vectors and the singular values."""
        n, mean = len(x), x.double().mean(0)
        rows, shift = x - mean.to(x), self.mean.to(mean) - mean
        weight = self.count * n / (self.count + n)
        self.scatter = self.scatter.to(mean) + rows.double().square().sum() + weight * shift.square().sum()
        self.mean = (self.mean.to(mean) * self.count + mean * n) / (self.count + n)
        before = self.vectors
        if self.count:
            rows = torch.cat([self.values[:, None] * before, rows, (weight**0.5 * shift[None]).to(rows)])
        # PEFT's seed, and from the second batch on its float64, so that both find the same; in float32, 4 times as fast
        _, S, Vh = randomised_svd(rows, 2 * self.n, 4, seed=42, draw=torch.float64 if self.count else None)
        self.vectors, self.values = upright(Vh[: self.n]), S[: self.n]
        if self.count:
            self.converged = torch.cosine_similarity(self.vectors, before) >= self.tau
        self.count += n

    def shares(self) -> Tensor:
        """Of the variance, what each component explains."""
        return self.values.double().square() / self.scatter


def upright(rows: Tensor) -> Tensor:
    """Each row with the sign that makes its largest entry positive."""
    return rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """The positions (row, column) that count: not padding, and not left out by their label."""
    settings = peft_config.eva_config or EvaConfig()
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """What a layer read at the positions that count."""
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return x[model_input.T.unbind()]


def flat(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Everything a layer read, as rows."""
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return x.flatten(0, -2)


@dataclass
class Reader:
    """Runs the model on a batch and hands on the rows that chosen modules read."""

    model: nn.Module
    config: LoraConfig
    forward: Callable[[nn.Module, Any], Any]
    positions: Callable[[Any, LoraConfig], Any] | None
    rows: Callable[[Any, Any, str], Tensor] | Mapping[str, Callable[[Any, Any, str], Tensor]] | None
    gather: bool

    def __call__(self, modules: Mapping[str, nn.Module], batch: Any, use: Callable[[str, Tensor], None]) -> None:
        batch = moved(batch, next(self.model.parameters()).device)
        seen = batch if self.positions is None else self.positions(batch, self.config)

        def hook(name: str) -> Callable[[nn.Module, Any], None]:
            rows = self.rows.get(name) if isinstance(self.rows, Mapping) else self.rows
            return lambda module, args: use(name, self.whole((rows or flat)(args, seen, name)))

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
        try:
            self.forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all processes of a distributed run."""
        if not (self.gather and dist.is_available() and dist.is_initialized()):
            return rows
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)


def moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    return type(batch)(moved(value, device) for value in batch) if isinstance(batch, (list, tuple)) else batch


def served_by(read: Reader, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, str]:
    """For each module the first that reads the same (q serves k and v), those that serve themselves first."""
    leaders: dict[Any, str] = {}
    served: dict[str, str] = {}

    def look(name: str, rows: Tensor) -> None:
        key = (rows.shape, hash(rows.float().cpu().numpy().tobytes()))
        served[name] = leaders.setdefault(key, name)

    read(modules, batch, look)
    idle = [name for name in modules if name not in served]
    if idle:
        raise VeneerError(f"the model does not run these targets:{listing(idle)}")
    order = [name for name in modules if served[name] == name]
    return {name: served[name] for name in (*order, *(n for leader in order for n in modules if served[n] == leader))}


def distribute(shares: Mapping[str, Tensor], served: Mapping[str, str], budget: int) -> dict[str, int]:
    """The rank of each module: of all components the `budget` that explain most are kept."""
    owners = [name for name, leader in served.items() for _ in shares[leader]]
    order = torch.cat([shares[leader] for leader in served.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(served, 0)
    for i in order[:budget].tolist():
        ranks[owners[i]] += 1
    for name, leader in served.items():  # a leader's components must converge as far as any that it serves needs
        if ranks[leader] < ranks[name]:
            ranks[leader], ranks[name] = ranks[name], ranks[leader]
    return ranks


def find(read: Reader, modules: Mapping[str, nn.Module], dataloader: Any, progress: bool) -> dict[str, Tensor]:
    """A of each module, with the rank it gets."""
    settings, served = read.config.eva_config or EvaConfig(), served_by(read, modules, next(iter(dataloader)))
    own = {name: at(name.removeprefix(PREFIX), read.config.rank_pattern, read.config.r) for name in modules}
    most = {name: min(round(r * settings.rho), width_of(modules[name])) for name, r in own.items()}
    parts = {n: Components(max(most[m] for m in served if served[m] == n), settings.tau) for n in served.values()}
    ranks = {name: parts[leader].n for name, leader in served.items()}
    for batch in tqdm(batches(dataloader, parts), desc="EVA", disable=not progress):
        waiting = {name: modules[name] for name, part in parts.items() if not part.converged[: ranks[name]].all()}
        if not waiting:
            break
        read(waiting, batch, lambda name, rows: parts[name].add(rows.float()) if len(rows) >= parts[name].n else None)
        if all(part.count for part in parts.values()):
            ranks = distribute({name: part.shares() for name, part in parts.items()}, served, sum(own.values()))
    found = {name: (parts[leader], ranks[name]) for name, leader in served.items()}
    whiten = settings.whiten
    return {n: p.vectors[:r] / (p.values[:r, None].sqrt() if whiten else 1) for n, (p, r) in found.items()}


def width_of(module: Any) -> int:
    return module.weight.shape[0] if is_conv1d(module) else module.weight.shape[1]


def batches(dataloader: Any, parts: Mapping[str, Components]) -> Iterator[Any]:
    """The data again and again.

    Raises:
        VeneerError: after a whole pass some layer has not seen a batch of enough rows.
    """
    yield from (kept := list(dataloader))
    short = [f"{name}: {part.n} rows" for name, part in parts.items() if not part.count]
    if short:
        raise VeneerError(
            f"no batch has as many tokens as the largest rank (r rho); make batches larger:{listing(short)}"
        )
    yield from itertools.cycle(kept)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Any,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Any = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The A that EVA finds for each target, by the name of its module in `model`.

    Args:
        model: the bare model, or one with the adapter on.
        dataloader: batches to run, a sized iterable.
        peft_config: what would be adapted; needed for a bare model.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: makes of a batch and the config what the next function gets; None: the batch.
        prepare_layer_inputs_fn: makes of a layer's arguments, that, and the layer's name the rows that count; or one
            function for each name; None: all rows.
        gather_distributed_inputs: use the rows of all processes.
    """
    adapted = hasattr(model, "peft_config")
    config: Any = peft_config or (model.peft_config[adapter_name] if adapted else None)  # type: ignore[index]
    if config is None:
        raise ConfigError("peft_config must say what would be adapted, since the model has no adapters")
    if not len(dataloader):
        raise VeneerError("the dataloader is empty; EVA starts from data")
    modules = linear_layers(model, adapter_name) if adapted else linear_targets(model, config)
    if isinstance(prepare_layer_inputs_fn, Mapping):
        unknown = [name for name in prepare_layer_inputs_fn if name not in modules]
        if unknown:
            raise VeneerError(f"prepare_layer_inputs_fn names modules that are not adapted:{listing(unknown)}")
    read = Reader(
        model, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs
    )
    with alone(model), evaluating(model):
        return find(read, modules, dataloader, show_progress_bar)


def linear_layers(model: Any, adapter_name: str) -> dict[str, nn.Module]:
    """The linear layers that a LoRA is on, by name."""
    state = state_of(model.get_base_model())
    adapted = [path for path, adapter in state.adapters(adapter_name).items() if lora_of(adapter) is not None]
    layers = [state.layers[path] for path in adapted]
    return {PREFIX + layer.path: layer.base_layer for layer in layers if layer.target.kind == "linear"}


def lora_of(adapter: Any) -> Any:
    """The LoRA among what is called by an adapter's name on a layer; None where there is a trained bias alone."""
    return next((part for part in adapter.parts if hasattr(part, "lora_alpha")), None)


def with_ranks(config: Any, loras: Mapping[str, Any], found: Mapping[str, Tensor]) -> LoraConfig:
    """The config with the ranks of `found`, as patterns of whole paths."""
    config, settings = copy.copy(config), config.eva_config or EvaConfig()
    ranks = {path: len(found[path]) if path in found else lora.r for path, lora in loras.items()}
    grow = {path: ranks[path] / lora.r if settings.adjust_scaling_factors else 1 for path, lora in loras.items()}
    alphas = {
        path: lora.lora_alpha * grow[path] if grow[path] != 1 else lora.lora_alpha for path, lora in loras.items()
    }
    kept = [path for path, r in ranks.items() if r]
    config.rank_pattern = {path: ranks[path] for path in kept if ranks[path] != config.r}
    config.alpha_pattern = {path: alphas[path] for path in kept if alphas[path] != config.lora_alpha}
    if len(kept) < len(ranks):
        config.target_modules = kept
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config
