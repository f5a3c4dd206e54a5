"""Base model and adapter in one call: `AutoPeftModelForCausalLM.from_pretrained(adapter_dir)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ..core.config import Config
from ..core.config import Config as PeftConfig
from ..files.find import HUB_ARGUMENTS
from .loading import load_base
from .peft_model import PeftModel


class AutoPeftModel:
    """Loads the base model that an adapter's config names, by the config's task, and the adapter onto it."""

    auto_class: ClassVar[str | None] = None
    peft_model: ClassVar[type[PeftModel]] = PeftModel
    config_class: ClassVar[type[Config]] = Config

    def __init__(self) -> None:
        raise TypeError(f"use {type(self).__name__}.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Config | None = None,
        *,
        check_base: bool = True,
        allow_pickle: bool = False,
        follow_paths: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base and adapter.

        Args:
            adapter: a directory, or a hub id.
            kwargs: `subfolder`, `revision` and the like for the adapter; the rest goes to the base model's
                `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            ConfigError: the adapter does not say which base model it is for.
        """
        hub = {name: kwargs.pop(name) for name in list(kwargs) if name in HUB_ARGUMENTS}
        named = config or cls.config_class.from_pretrained(adapter, **hub)
        base = load_base(adapter, config=named, auto_class=cls.auto_class, hub=hub, **kwargs)
        return cls.peft_model.from_pretrained(
            base,
            adapter,
            adapter_name,
            is_trainable,
            config,
            check_base=check_base,
            allow_pickle=allow_pickle,
            follow_paths=follow_paths,
            **hub,
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    auto_class = "AutoModel"


PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModelForSequenceClassification = PeftModel


PeftModelForTokenClassification = PeftModelForQuestionAnswering = PeftModelForFeatureExtraction = PeftModel


__all__ = [
    "PeftConfig",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]
