"""The start of a run from a saved adapter: the adapter is trained on, or merged into the base model for a new one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..core.config import Config
from ..errors import ConfigError
from ..files.checked import Checked
from ..model.catalogue import page, page_of
from ..model.loading import quantised_in_training
from .recipe import Recipe


def begun(recipe: Recipe) -> Recipe:
    """The recipe with `start_mode` filled in, and with the method of the adapter that is trained on.

    Its base model is quantised again as it was for its training, unless the recipe says how to quantise it.

    Raises:
        CheckpointError: `start_from` is no adapter.
        ConfigError: the recipe contradicts the adapter.
    """
    if recipe.start_from is None:
        return recipe
    config = Config.from_pretrained(recipe.start_from)
    method = method_of(config)
    given = page(recipe.method).name if "method" in recipe.model_fields_set else method
    mode = recipe.start_mode or ("continue" if given == method else "merge")
    if mode == "merge":
        return recipe.changed(start_mode=mode)
    if given != method:
        raise ConfigError(
            f"method = {recipe.method!r} contradicts the adapter in {recipe.start_from!r}, which is {method}; leave it "
            "out to train the adapter on, or set start_mode: merge to train a new one"
        )
    changes: dict[str, Any] = {"start_mode": mode, "method": method}
    how = quantised_in_training(recipe.start_from)
    if how is not None and "quantise" not in recipe.model_fields_set:
        changes |= {"quantise": how.scheme, "quantise_options": dict(how.options)}
    return recipe.changed(**changes)


def method_of(config: Config) -> str:
    """The name of the method that a saved config is of, which may be a variant of LoRA."""
    variants = config.variants() if hasattr(config, "variants") else []
    if len(variants) == 1:
        return config.files[variants[0]]  # type: ignore[attr-defined]
    return page_of(config).name


def continued(recipe: Recipe, settings: dict[str, Any], steps: int) -> Config:
    """The config of the adapter that is trained on, with what may change for another training.

    Args:
        settings: the fields of the config that the recipe sets.
        steps: optimizer steps of the run, for methods with a schedule.

    Raises:
        ConfigError: a setting contradicts the adapter.
    """
    assert recipe.start_from is not None
    saved = Config.from_pretrained(recipe.start_from)
    known = {field.name for field in fields(saved)}
    changes = {"total_step": steps} if "total_step" in known else {}
    free = {name for name in known if "dropout" in name} | set(saved.for_training)
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"{recipe.method} has no setting {name!r}")
        if name in free:
            changes[name] = value
        elif not _is_same(value, getattr(saved, name)):
            raise ConfigError(
                f"{name} = {value!r} contradicts the adapter in {recipe.start_from!r}, which has "
                f"{getattr(saved, name)!r}; leave it out to train the adapter on, or set start_mode: merge to train a "
                "new one"
            )
    return Config.from_dict(saved.to_dict() | changes | {"inference_mode": False})


def _is_same(given: Any, saved: Any) -> bool:
    """Whether two values of a setting mean the same: of lists, the same entries."""
    if isinstance(given, (list, tuple, set)) and isinstance(saved, (list, tuple, set)):
        return sorted(map(str, given)) == sorted(map(str, saved))
    if isinstance(saved, Checked) and isinstance(given, dict):
        return all(getattr(saved, name, None) == value for name, value in given.items())
    return given == saved
