"""Base model and adapter in one call: `AutoPeftModelForCausalLM.from_pretrained(adapter_dir)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ..core.config import Config, TaskType
from ..core.model import PeftModel
from ..errors import ConfigError
from ..files import HUB_ARGUMENTS
from ..hub import resolve


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
        import transformers

        hub = {name: kwargs.pop(name) for name in list(kwargs) if name in HUB_ARGUMENTS}
        named = config or cls.config_class.from_pretrained(adapter, **hub)
        if not named.base_model_name_or_path:
            raise ConfigError(
                f"{str(adapter)!r} does not name its base model; load that yourself and use PeftModel.from_pretrained"
            )
        auto = getattr(transformers, cls.auto_class or _auto_class(named))
        shared = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
        base = auto.from_pretrained(
            resolve(named.base_model_name_or_path), revision=named.revision or "main", **shared, **kwargs
        )
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


AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def load_base(adapter: str | Path, model: str | None = None, **kwargs: Any) -> Any:
    """The base model of an adapter, without it; on request from another place than the one its config names.

    Raises:
        ConfigError: neither names a base model.
    """
    import transformers

    config = Config.from_pretrained(adapter)
    name = model or config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{str(adapter)!r} does not name its base model; give it with --model")
    task = config.task_type if isinstance(config.task_type, TaskType) else TaskType.CAUSAL_LM
    auto = getattr(transformers, AUTO_CLASSES[task])
    return auto.from_pretrained(resolve(name), **kwargs)


def _auto_class(config: Config) -> str:
    if not isinstance(config.task_type, TaskType):
        raise ConfigError("the adapter states no task_type; use the AutoPeftModelFor... class of its task")
    return AUTO_CLASSES[config.task_type]
