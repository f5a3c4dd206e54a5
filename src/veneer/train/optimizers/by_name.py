"""Optimizers by the name that a recipe gives, and the learning rate of each parameter.

A name is one of transformers' TrainingArguments, a class of torch.optim or bitsandbytes in lower case, or one of
veneer's own. Rates differ between parameters with LoRA+ (`lora_plus_ratio`), `layer_decay` and `rates`; their factors
multiply.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from torch import nn, optim
from torch.optim import Optimizer

from ...errors import ConfigError, nearest
from ...files.regex import pattern
from .lorafa import EPSILON, Projection, freeze_A_
from .loraplus import EMBEDDING_RATE, grouped
from .pairs import Pair, pairs
from .riemannian import REGULARISER, Preconditioner, trained_pairs

LORA_FA = "lora_fa"
RIEMANNIAN = "riemannian"
OURS = (LORA_FA, RIEMANNIAN)
"""Optimizers of this package: AdamW with other gradients of A and B."""
OF_WHOLE_WEIGHTS = ("galore", "apollo", "lomo")
"""Names of optimizers that change whole weights begin with these, or with "ada" and these."""
NORM_OF_ZERO = "it scales a step by the norm of the weight, and most adapters start at zero"
UNUSABLE = {
    "lbfgs": "it evaluates the loss several times in a step",
    "sparseadam": "it needs sparse gradients",
    "lamb": NORM_OF_ZERO,
    "lars": NORM_OF_ZERO,
    "pytorchlars": NORM_OF_ZERO,
}
"""Classes that cannot train an adapter, without the number of bits in their names, and why."""


class Request(Protocol):
    """The keys of a recipe that are read here; `train.recipe.Recipe` documents them."""

    optimizer: str
    optimizer_options: dict[str, Any]
    lora_plus_ratio: float | None
    layer_decay: float | None
    rates: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """An optimizer's class, and its arguments except the parameters."""

    kind: type[Optimizer]
    settings: dict[str, Any]


def names_of_transformers() -> list[str]:
    from transformers.training_args import OptimizerNames

    return [name.value for name in OptimizerNames]


def argument_of(recipe: Request) -> str:
    """The name for TrainingArguments. An optimizer that they do not know is created by `choose` in AdamW's place."""
    return recipe.optimizer if recipe.optimizer in names_of_transformers() else "adamw_torch"


def choose(recipe: Request, of_transformers: Callable[[], tuple[Any, dict[str, Any]]]) -> Choice:
    """The optimizer that a recipe names.

    Args:
        of_transformers: gives the class and arguments that transformers chooses by `argument_of`.

    Raises:
        ConfigError: there is no such optimizer, its library is missing, or it has no such option.
    """
    name = recipe.optimizer
    if name.removeprefix("ada").startswith(OF_WHOLE_WEIGHTS):
        raise ConfigError(f"optimizer {name!r} works on whole weights, which an adapter does not train")
    reason = UNUSABLE.get(name.removesuffix("8bit").removesuffix("32bit"))
    if reason is not None:
        raise ConfigError(f"optimizer {name!r} cannot be used: {reason}")
    options = dict(recipe.optimizer_options)
    try:
        kind, settings = of_transformers()
    except (ImportError, ValueError) as error:
        raise ConfigError(f"optimizer {name!r}: {' '.join(str(error).split())}") from None
    if name == LORA_FA:
        settings = settings | {"eps": EPSILON}
    elif name == RIEMANNIAN:
        options.pop("reg", None)
    elif name not in names_of_transformers():
        kind = _classes().get(name) or _unknown(name)
        settings = {"lr": settings["lr"]}
    if not isinstance(kind, type):  # a function that builds several optimizers
        raise ConfigError(f"optimizer {name!r} is not supported")
    _check_options(name, kind, options)
    return Choice(kind, settings | options)


def _classes() -> dict[str, type[Optimizer]]:
    """The optimizers of bitsandbytes and torch by their class names in lower case; torch's win."""
    modules: list[Any] = [optim]
    if find_spec("bitsandbytes"):
        from bitsandbytes import optim as of_bitsandbytes

        modules.insert(0, of_bitsandbytes)
    classes = {}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer:
                classes[name.lower()] = value
    return classes


def _unknown(name: str) -> type[Optimizer]:
    known = [*names_of_transformers(), *_classes(), *OURS]
    raise ConfigError(f"there is no optimizer {name!r}{nearest(name, known)}")


def _check_options(name: str, kind: type[Optimizer], options: dict[str, Any]) -> None:
    accepted = list(inspect.signature(kind).parameters)[1:]
    for option in options:
        if option not in accepted:
            raise ConfigError(f"optimizer {name!r} has no option {option!r}{nearest(option, accepted)}")


# On the model


def freeze_(model: nn.Module, recipe: Request) -> None:
    """Freeze what the optimizer does not train: the matrices A, for LoRA-FA."""
    if recipe.optimizer == LORA_FA:
        freeze_A_(pairs(model))


def correct_gradients(optimizer: Optimizer, model: nn.Module, recipe: Request) -> None:
    """Let an optimizer of ours change the gradients before each step."""
    if recipe.optimizer == LORA_FA:
        trained = [pair for pair in pairs(model) if pair.B.requires_grad]
        optimizer.register_step_pre_hook(Projection(trained))
    elif recipe.optimizer == RIEMANNIAN:
        reg = recipe.optimizer_options.get("reg", REGULARISER)
        layers: list[Pair] = trained_pairs(model)
        optimizer.register_step_pre_hook(Preconditioner(layers, reg))


def groups(
    model: nn.Module, recipe: Request, rate: float, decay: float, decayed: Collection[str]
) -> list[dict[str, Any]] | None:
    """The optimizer's parameter groups, one for each learning rate; None if all parameters learn at the same rate.

    Args:
        rate: the recipe's learning rate.
        decay: the weight decay.
        decayed: names of the parameters that it acts on.

    Raises:
        ConfigError: an entry of `rates` matches no trained parameter.
    """
    if recipe.lora_plus_ratio is None and recipe.layer_decay is None and not recipe.rates:
        return None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = _lora_plus_rates(model, trained, recipe.lora_plus_ratio, rate)
    factors = _factors(list(trained), recipe)
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        kind = (rates[name] * factors[name], decay if name in decayed else 0.0)
        kinds.setdefault(kind, []).append(parameter)
    plain_first = sorted(kinds, key=lambda kind: kind[0] != rate)  # the rate of the first group is what is logged
    return [{"params": kinds[kind], "lr": kind[0], "weight_decay": kind[1]} for kind in plain_first]


def _lora_plus_rates(
    model: nn.Module, trained: dict[str, nn.Parameter], ratio: float | None, rate: float
) -> dict[str, float]:
    """The learning rate of each parameter with LoRA+."""
    if ratio is None:
        return dict.fromkeys(trained, rate)
    by_group = {"A": rate, "embedding": EMBEDDING_RATE, "B": rate * ratio, "undecayed": rate * ratio}
    by_id = {id(parameter): by_group[group] for group, parameter in grouped(model)}
    return {name: by_id[id(parameter)] for name, parameter in trained.items()}


def _factors(names: list[str], recipe: Request) -> dict[str, float]:
    """By what the learning rate of each parameter is multiplied, for its layer and for the patterns it matches."""
    factors = dict.fromkeys(names, 1.0)
    if recipe.layer_decay is not None:
        depths = {name: _depth(name) for name in names}
        numbered = [depth for depth in depths.values() if depth is not None]
        if not numbered:
            raise ConfigError("layer_decay needs numbered layers, and no trained parameter is in one")
        top = max(numbered)
        for name, depth in depths.items():
            if depth is not None:
                factors[name] *= recipe.layer_decay ** (top - depth)
    for text, factor in recipe.rates.items():
        expression = pattern(f".*(?:{text})", "rates")
        matching = [name for name in names if expression.match(name)]
        if not matching:
            parts = set(".".join(names).split("."))
            raise ConfigError(f"rates: {text!r} matches no trained parameter{nearest(text, parts)}")
        for name in matching:
            factors[name] *= factor
    return factors


def _depth(name: str) -> int | None:
    """The number of the layer that a parameter is in; None outside of numbered layers."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None
