"""transformers' Auto classes: finding the one for a config, and model classes and architectures by name.

The private mapping of an Auto class and `_from_config` are the same in 5.20 to 5.24.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, nearest


def makes(name: str, config: Any) -> Any:
    """The Auto class called `name` if it has a model class for the config; else None."""
    import transformers

    auto = getattr(transformers, name)
    return auto if type(config) in auto._model_mapping else None


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
