"""Schedules of the learning rate: their arguments, checked before anything is loaded."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from ..errors import ConfigError, nearest
from .recipe import Recipe

OF_THE_RUN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "name", "timescale_steps")
"""Arguments of transformers' functions that a run sets itself."""


def name_of(recipe: Recipe) -> str:
    """The schedule's name in transformers."""
    return "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule


def check(recipe: Recipe) -> None:
    """Try the schedule on an optimizer of one number.

    Raises:
        ConfigError: an argument is unknown, missing or wrong.
    """
    name = name_of(recipe)
    function: Any = next(f for kind, f in TYPE_TO_SCHEDULER_FUNCTION.items() if kind.value == name)
    accepted = [argument for argument in inspect.signature(function).parameters if argument not in OF_THE_RUN]
    if "kwargs" in accepted:
        accepted = list(inspect.signature(torch.optim.lr_scheduler.ReduceLROnPlateau).parameters)[1:]
    for option in recipe.schedule_options:
        if option not in accepted:
            known = nearest(option, accepted) or f"; it has {', '.join(accepted) or 'none'}"
            raise ConfigError(f"schedule {recipe.schedule!r} has no option {option!r}{known}")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    steps = recipe.max_steps or 1000
    try:
        get_scheduler(name, optimizer, 1, steps, dict(recipe.schedule_options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"schedule {recipe.schedule!r}: {error}") from None
