"""transformers' Auto classes: finding the one for a config, and model classes and architectures by name.

The private mapping of an Auto class and `_from_config` are the same in 5.20 to 5.24.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..errors import ConfigError, nearest

GENERATIVE = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
GENERATIVE_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Endings of the names of classes that write text."""


def makes(name: str, config: Any) -> Any:
    """The Auto class called `name` if it has a model class for the config; else None."""
    import transformers

    auto = getattr(transformers, name)
    return auto if type(config) in auto._model_mapping else None


def fitting(name: str, config: Any, keys: Collection[str] = ()) -> Any:
    """The class for the Auto class called `name` whose modules the keys of adapters name; None if there is none.

    A composite model (vision and language) may be loaded whole, by the class that its config names, or as the language
    model alone, by AutoModelForCausalLM. The two have other paths, so that an adapter fits one of them.
    """
    auto = makes(name, config)
    if name not in GENERATIVE or not keys:
        return auto
    candidates = []
    for architecture in config.architectures or ():
        is_generative = architecture.endswith(GENERATIVE_ENDINGS)
        is_the_same = auto is not None and auto._model_mapping[type(config)].__name__ == architecture
        if is_generative and not is_the_same and model_class(architecture) is not None:
            candidates.append(model_class(architecture))
    if auto is not None:
        candidates.append(auto)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    return max(candidates, key=lambda candidate: _modules_named(candidate, config, keys))


def _modules_named(candidate: Any, config: Any, keys: Collection[str]) -> int:
    """How many keys of an adapter's file name a module of a class."""
    import torch

    with torch.device("meta"):
        model = candidate.from_config(config)
    leaves = {path for path, module in model.named_modules() if not module._modules}
    count = 0
    for key in keys:
        parts = key.removeprefix("base_model.model.").split(".")
        paths = [".".join(parts[:length]) for length in range(1, len(parts))]
        count += any(path in leaves for path in paths)
    return count


def model_class(name: str) -> Any:
    """An object whose `from_config` creates a model of the transformers class called `name`; None if there is none."""
    import transformers

    cls = getattr(transformers, name, None)
    return None if cls is None else _Direct(cls)


class _Direct:
    """A model class with the interface of the Auto classes."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls

    def from_config(self, config: Any) -> Any:
        return self.cls._from_config(config)

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self.cls.from_pretrained(*args, **kwargs)


def default_config(model_type: str) -> Any:
    """The config of an architecture with its default sizes.

    Raises:
        ConfigError: transformers has no such architecture.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"transformers has no model type {model_type!r}{nearest(model_type, list(CONFIG_MAPPING))}")
    return CONFIG_MAPPING[model_type]()


AUTO_CLASSES: dict[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
