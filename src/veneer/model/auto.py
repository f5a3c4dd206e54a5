"""Load a base model and an adapter in one call: `AutoPeftModelForCausalLM.from_pretrained(adapter_dir)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ..core.config import Config
from ..core.config import Config as PeftConfig
from ..files.find import HUB_ARGUMENTS
from .loading import load_base
from .peft_model import PeftModel


class AutoPeftModel:
    """Loads an adapter together with the base model that its config names."""

    auto_class: ClassVar[str | None] = None
    """Name of the transformers class for the base model; None: chosen by the config's task."""
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
        allow_absent: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Load a base model and put an adapter on it.

        Args:
            adapter: a directory or a hub id.
            adapter_name: the name that the adapter gets on the model.
            is_trainable: load the adapter for further training.
            config: a config to use instead of the adapter's saved one.
            check_base: refuse a base model other than the one the adapter was trained on.
            allow_pickle: read tensors from a pickle if there is no safetensors file.
            follow_paths: allow paths in the config that lead out of the adapter's directory.
            allow_absent: pass over tensors for modules that the base model lacks, with a warning.
            kwargs: `subfolder`, `revision` and the like for the adapter; the rest goes to the base model's
                `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            ConfigError: the adapter's config names no base model.
        """
        hub = {}
        for name in HUB_ARGUMENTS:
            if name in kwargs:
                hub[name] = kwargs.pop(name)
        base_config = config or cls.config_class.from_pretrained(adapter, **hub)
        base = load_base(adapter, config=base_config, auto_class=cls.auto_class, hub=hub, **kwargs)
        return cls.peft_model.from_pretrained(
            base,
            adapter,
            adapter_name,
            is_trainable,
            config,
            check_base=check_base,
            allow_pickle=allow_pickle,
            follow_paths=follow_paths,
            allow_absent=allow_absent,
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


PeftModelForCausalLM = PeftModel
PeftModelForSeq2SeqLM = PeftModel
PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModel
PeftModelForQuestionAnswering = PeftModel
PeftModelForFeatureExtraction = PeftModel


__all__ = [
    "PeftConfig",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]
