"""EVA: start A at the principal components of each layer's inputs, and distribute the ranks by explained variance.

    A = the first r' right singular vectors of a layer's centred inputs,  B = 0

r' of a layer: the number of its components that are kept. Of the components of all layers, those that explain the
largest share of their layer's variance are kept: r times the number of layers in total, and at most rho r in one layer.
Paischer et al., 2024, arXiv:2410.07170. The components come from an incremental SVD over batches (Ross et al., 2008),
which ends when they have converged to within tau. Starts as a no-op, since B is zero. A layer whose rank is 0 gets no
adapter.
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
from ...files.read import PREFIX
from ...maths.svd import randomised_svd
from ...targets.modules import evaluating
from ...upstream.models import is_conv1d
from .gather import alone, linear_targets

if TYPE_CHECKING:
    from ..lora import LoraConfig


@dataclass
class EvaConfig(Settings):
    """How EVA computes its start."""

    rho: float = 2.0
    """A layer's rank is at most rho r; with 1 every layer has rank r."""
    tau: float = 0.99
    """A component has converged when its cosine similarity to its value one batch earlier is at least this."""
    use_label_mask: bool = True
    """Ignore positions whose label is `label_mask_value`."""
    label_mask_value: int = -100
    """The label of positions without a loss."""
    whiten: bool = False
    """Divide each component by the square root of its singular value."""
    adjust_scaling_factors: bool = True
    """Scale `lora_alpha` with a layer's rank, so that alpha / r does not change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, float("inf"), "rho")  # type: ignore[arg-type]
        check_range(self, 0, 1 + 1e-9, "tau")  # type: ignore[arg-type]


class Components:
    """The first n principal components of rows that arrive in batches."""

    def __init__(self, n: int, tau: float) -> None:
        self.n = n
        self.tau = tau
        self.count = 0
        """The number of rows added so far."""
        self.mean = torch.tensor(0.0)
        self.scatter = torch.tensor(0.0)
        """The sum of squared distances from the mean."""
        self.vectors = torch.empty(0)
        self.values = torch.empty(0)
        self.converged = torch.zeros(n, dtype=torch.bool)

    def add(self, x: Tensor) -> None:
        """Add at least n rows and update the singular vectors and values, as in Ross et al."""
        is_first = self.count == 0
        before = self.vectors
        rows, correction = self._add_to_moments(x)
        if not is_first:
            rows = torch.cat([self.values[:, None] * before, rows, correction])
        # As in PEFT, the random numbers are drawn with seed 42 and, from the second batch on, in float64, so that both
        # find the same components. The SVD itself runs in float32, which is 4 times as fast.
        draw = None if is_first else torch.float64
        _, S, Vh = randomised_svd(rows, 2 * self.n, 4, seed=42, draw=draw)
        self.vectors = upright(Vh[: self.n])
        self.values = S[: self.n]
        if not is_first:
            self.converged = torch.cosine_similarity(self.vectors, before) >= self.tau

    def _add_to_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Update the count, the mean and the scatter.

        Returns the centred rows, and an additional row (1, in) that corrects for the change of the mean.
        """
        n = len(x)
        total = self.count + n
        mean = x.double().mean(0)
        rows = x - mean.to(x)
        shift = self.mean.to(mean) - mean
        weight = self.count * n / total
        within = rows.double().square().sum()
        between = weight * shift.square().sum()
        self.scatter = self.scatter.to(mean) + within + between
        former_sum = self.mean.to(mean) * self.count
        self.mean = (former_sum + mean * n) / total
        self.count = total
        correction = (weight**0.5 * shift[None]).to(rows)
        return rows, correction

    def shares(self) -> Tensor:
        """The share of the variance that each component explains."""
        return self.values.double().square() / self.scatter


def upright(rows: Tensor) -> Tensor:
    """Flip the sign of each row whose entry of largest magnitude is negative."""
    places = rows.abs().argmax(1, keepdim=True)
    largest = rows.gather(1, places)
    return rows * largest.sign()


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Call the model with a batch as keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """The positions (row, column) to use: those that are neither padding nor masked by the labels."""
    settings = peft_config.eva_config or EvaConfig()
    everywhere = torch.ones_like(model_input["input_ids"])
    mask = model_input.get("attention_mask", everywhere).bool()
    if settings.use_label_mask and "labels" in model_input:
        has_loss = model_input["labels"] != settings.label_mask_value
        mask = mask & has_loss
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """A layer's inputs at the positions to use, as rows."""
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return x[model_input.T.unbind()]


def flat(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """All inputs of a layer, as rows."""
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return x.flatten(0, -2)


RowsFunction = Callable[[Any, Any, str], Tensor]
"""Selects rows (rows, in) from a layer's arguments, the prepared batch and the layer's name."""


@dataclass
class Reader:
    """Runs the model on a batch and passes the inputs of chosen modules, as rows, to a function."""

    model: nn.Module
    config: LoraConfig
    forward: Callable[[nn.Module, Any], Any]
    positions: Callable[[Any, LoraConfig], Any] | None
    """Prepares the batch for `rows`; None: `rows` gets the batch itself."""
    rows: RowsFunction | Mapping[str, RowsFunction] | None
    """One function for all modules, or a mapping with one for each name; None: all rows are used."""
    gather: bool
    """Use the rows of all processes of a distributed run."""

    def __call__(self, modules: Mapping[str, nn.Module], batch: Any, use: Callable[[str, Tensor], None]) -> None:
        batch = moved(batch, next(self.model.parameters()).device)
        prepared = batch if self.positions is None else self.positions(batch, self.config)

        def hook(name: str) -> Callable[[nn.Module, Any], None]:
            select = self.rows_of(name)

            def pass_on(module: nn.Module, args: Any) -> None:
                rows = select(args, prepared, name)
                use(name, self.gathered(rows))

            return pass_on

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
        try:
            self.forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def rows_of(self, name: str) -> RowsFunction:
        """The function that selects the rows of a module."""
        rows = self.rows.get(name) if isinstance(self.rows, Mapping) else self.rows
        return rows or flat

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes of a distributed run if `gather` is set, else those of this process."""
        if not (self.gather and dist.is_available() and dist.is_initialized()):
            return rows
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, including those in mappings, lists and tuples."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def served_by(read: Reader, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, str]:
    """The leader of each module: the first module with the same inputs, such as q_proj for k_proj and v_proj.

    Leaders come first in the result.
    """
    first: dict[Any, str] = {}
    leaders: dict[str, str] = {}

    def compare(name: str, rows: Tensor) -> None:
        content = rows.float().cpu().numpy().tobytes()
        leaders[name] = first.setdefault((rows.shape, hash(content)), name)

    read(modules, batch, compare)
    idle = [name for name in modules if name not in leaders]
    if idle:
        raise VeneerError(f"the model does not run these targets:{listing(idle)}")
    ordered = [name for name in modules if leaders[name] == name]
    for leader in list(ordered):
        ordered += [name for name in modules if leaders[name] == leader != name]
    return {name: leaders[name] for name in ordered}


def distribute(shares: Mapping[str, Tensor], served: Mapping[str, str], budget: int) -> dict[str, int]:
    """The rank of each module: among the components of all modules, the `budget` that explain most are kept."""
    owners: list[str] = []
    for name, leader in served.items():
        owners += [name] * len(shares[leader])
    all_shares = torch.cat([shares[leader] for leader in served.values()])
    order = all_shares.argsort(descending=True, stable=True)
    ranks = dict.fromkeys(served, 0)
    for i in order[:budget].tolist():
        ranks[owners[i]] += 1
    for name, leader in served.items():  # convergence is checked up to the leader's rank
        if ranks[leader] < ranks[name]:
            ranks[leader], ranks[name] = ranks[name], ranks[leader]
    return ranks


def compute_starts(
    read: Reader, modules: Mapping[str, nn.Module], dataloader: Any, progress: bool
) -> dict[str, Tensor]:
    """Compute A of each module, with the rank assigned to the module."""
    config = read.config
    settings = config.eva_config or EvaConfig()
    served = served_by(read, modules, next(iter(dataloader)))
    config_ranks = {name: at(name.removeprefix(PREFIX), config.rank_pattern, config.r) for name in modules}
    budget = sum(config_ranks.values())
    parts = components_of(modules, served, config_ranks, settings)
    ranks = {name: parts[leader].n for name, leader in served.items()}

    def add(name: str, rows: Tensor) -> None:
        if len(rows) >= parts[name].n:
            parts[name].add(rows.float())

    for batch in tqdm(batches(dataloader, parts), desc="EVA", disable=not progress):
        unfinished = {}
        for name, part in parts.items():
            if not part.converged[: ranks[name]].all():
                unfinished[name] = modules[name]
        if not unfinished:
            break
        read(unfinished, batch, add)
        if all(part.count for part in parts.values()):
            shares = {name: part.shares() for name, part in parts.items()}
            ranks = distribute(shares, served, budget)

    starts = {}
    for name, leader in served.items():
        vectors = parts[leader].vectors[: ranks[name]]
        values = parts[leader].values[: ranks[name]]
        starts[name] = vectors / (values[:, None].sqrt() if settings.whiten else 1)
    return starts


def components_of(
    modules: Mapping[str, nn.Module], served: Mapping[str, str], ranks: Mapping[str, int], settings: EvaConfig
) -> dict[str, Components]:
    """The components of each leader, as many as the modules that it leads may need."""
    counts: dict[str, int] = {}
    for name, leader in served.items():
        most = min(round(ranks[name] * settings.rho), width_of(modules[name]))
        counts[leader] = max(most, counts.get(leader, 0))
    return {leader: Components(n, settings.tau) for leader, n in counts.items()}


def width_of(module: Any) -> int:
    """The input width of a linear layer or a Conv1D."""
    return module.weight.shape[0] if is_conv1d(module) else module.weight.shape[1]


def batches(dataloader: Any, parts: Mapping[str, Components]) -> Iterator[Any]:
    """Repeat the batches endlessly.

    Raises:
        VeneerError: after a full pass over the data, some layer has not had a batch with enough rows.
    """
    stored = list(dataloader)
    yield from stored
    short = []
    for name, part in parts.items():
        if not part.count:
            short.append(f"{name}: {part.n} rows")
    if short:
        raise VeneerError(
            f"no batch has as many tokens as the largest rank (r rho); make batches larger:{listing(short)}"
        )
    yield from itertools.cycle(stored)


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
    """Compute EVA's A for each target. The keys are the names of the modules in `model`.

    Args:
        model: the bare model, or one that has the adapter.
        dataloader: the batches to run; an iterable with a length.
        peft_config: the config of the adapter to start; required for a bare model.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: takes a batch and the config; its result is passed to `prepare_layer_inputs_fn`.
            None: the batch itself is passed.
        prepare_layer_inputs_fn: takes a layer's arguments, the result of `prepare_model_inputs_fn` and the layer's
            name; returns the rows to use. It can be a mapping with one function for each name. None: all rows are used.
        adapter_name: the adapter to start, if the model already has it.
        gather_distributed_inputs: use the rows of all processes.
        show_progress_bar: show progress.
    """
    adapted = hasattr(model, "peft_config")
    config: Any = peft_config or (model.peft_config[adapter_name] if adapted else None)  # type: ignore[index]
    if config is None:
        raise ConfigError("the model has no adapters; pass the peft_config of the adapter to start")
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
        return compute_starts(read, modules, dataloader, show_progress_bar)


def linear_layers(model: Any, adapter_name: str) -> dict[str, nn.Module]:
    """The linear layers that have a LoRA adapter, by name."""
    state = state_of(model.get_base_model())
    modules = {}
    for path, adapter in state.adapters(adapter_name).items():
        layer = state.layers[path]
        if lora_of(adapter) is not None and layer.target.kind == "linear":
            modules[PREFIX + layer.path] = layer.base_layer
    return modules


def lora_of(adapter: Any) -> Any:
    """The LoRA among an adapter's parts on a layer; None if there is only a trained bias."""
    for part in adapter.parts:
        if hasattr(part, "lora_alpha"):
            return part
    return None


def with_ranks(config: Any, loras: Mapping[str, Any], starts: Mapping[str, Tensor]) -> LoraConfig:
    """A copy of the config whose patterns give each path the rank of its A in `starts`."""
    config = copy.copy(config)
    settings = config.eva_config or EvaConfig()
    config.rank_pattern = {}
    config.alpha_pattern = {}
    paths = []
    for path, lora in loras.items():
        r = len(starts[path]) if path in starts else lora.r
        if r == 0:
            continue
        alpha = lora.lora_alpha
        if settings.adjust_scaling_factors and r != lora.r:
            alpha = alpha * (r / lora.r)
        paths.append(path)
        if r != config.r:
            config.rank_pattern[path] = r
        if alpha != config.lora_alpha:
            config.alpha_pattern[path] = alpha
    if len(paths) < len(loras):
        config.target_modules = paths
        config.exclude_modules = None
        config.layers_to_transform = None
        config.layers_pattern = None
    return config
