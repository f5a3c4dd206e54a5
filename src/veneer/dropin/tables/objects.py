"""The objects that PEFT's names stand for."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

from packaging.version import Version

import veneer

from ...core.config import TaskType
from ...errors import ConfigError, TargetError, VeneerError
from ...files.pull import resolve
from ...model.detached_shadow import DetachedShadowModel
from .. import (
    alora,
    attach,
    buffer_dict,
    configs,
    conversion,
    helpers,
    hotswap,
    kappa,
    layers,
    lora_conversion,
    matching,
    merging,
    models,
    state,
    status,
    tuners,
    utils,
)
from ..inside import constants
from ..wording import pefts_words
from . import methods as table

PARTS = (
    helpers,
    attach,
    buffer_dict,
    hotswap,
    kappa,
    lora_conversion,
    matching,
    merging,
    alora,
    state,
    status,
    utils,
    models,
    tuners,
    layers,
    configs,
    conversion,
)
"""Modules whose own classes and functions have PEFT's names; of two with the same name, the later one counts."""

RENAMED: dict[str, Any] = {
    "PeftType": configs.PeftType,
    "TaskType": TaskType,
    "DetachedShadowModel": DetachedShadowModel,
    "PeftConfigMixin": configs.PeftConfig,
    "PeftError": VeneerError,
    "NoMatchingPeftModuleError": TargetError,
    "PEFT_TYPE_TO_CONFIG_MAPPING": configs.CONFIGS,
    "PEFT_TYPE_TO_TUNER_MAPPING": tuners.TUNERS,
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": models.MIXABLE,
    "PEFT_TYPE_TO_PREFIX_MAPPING": {configs.PeftType(kind): row.prefix for kind, row in table.METHODS.items()},
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": models.MODELS,
    "_get_submodules": utils.get_submodules,
    "_get_module_names_tied_with_embedding": matching.tied_modules,
    "_freeze_adapter": utils.freeze_adapter,
    "_find_minimal_target_modules": matching.find_minimal_target_modules,
    "_get_no_split_modules": utils.no_split_modules,
    "_set_adapter": attach.set_adapter,
    "check_adapters_to_merge": layers.to_merge,
}
"""Objects by PEFT's name where veneer has another name for them, or defines them outside `PARTS`."""


def everything() -> dict[str, Any]:
    """Every object of the drop-in by its name in PEFT; each of PEFT's modules takes a part of them."""
    objects: dict[str, Any] = dict(table.CONSTANTS)
    objects |= {name: value for name, value in vars(constants).items() if not name.startswith("_")}
    objects |= _default_targets()
    for module in PARTS:
        for name, value in vars(module).items():
            if getattr(value, "__module__", "") == module.__name__:
                objects[name] = value
    for made_class in (*configs.CONFIGS.values(), *tuners.TUNERS.values()):
        objects[made_class.__name__] = made_class
    for name in FROM_VENEER:
        value = getattr(veneer, name)
        objects[name] = configs.settings_class(value) if isinstance(value, type) else pefts_words()(value)
    objects |= RENAMED
    for name in dir(veneer):
        if name.startswith("AutoPeftModel"):
            objects[name] = _auto(getattr(veneer, name))
    for name, library in AVAILABLE.items():
        objects[name] = _is_installed(library)
    for name, (library, version) in VERSIONS.items():
        objects[name] = _is_at_least(library, version)
    objects["is_torchao_ge_v0_18_0"] = lambda: _is_at_least("torchao", "0.18.0")
    return objects


def _default_targets() -> dict[str, Any]:
    """The mappings from model types to default targets."""
    mappings: dict[str, Any] = {}
    for kind, row in table.METHODS.items():
        if row.layers:
            name = f"TRANSFORMERS_MODELS_TO_{kind.replace('_', '')}_TARGET_MODULES_MAPPING"
            mappings[name] = utils.DefaultTargets(configs.PeftType(kind))
    feedforward = utils.DefaultTargets(configs.PeftType("IA3"), "feedforward_modules")
    mappings["TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"] = feedforward
    mappings["TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"] = {}
    return mappings


def _is_installed(library: str) -> Callable[..., bool]:
    """A function that says whether a library is installed."""
    return lambda: importlib.util.find_spec(library) is not None


def _is_at_least(library: str, version: str) -> bool:
    """Whether a library is installed in this version or a newer one."""
    if importlib.util.find_spec(library) is None:
        return False
    return Version(importlib.metadata.version(library)) >= Version(version)


def _load_by_class(path: Any, allowed: list[str] | None, *args: Any, **kwargs: Any) -> Any:
    """Base model and adapter, if the adapter's config names a class for the base instead of a task.

    Args:
        allowed: the packages that the class may be in; None: PEFT's list.

    Raises:
        ConfigError: the class is in another package; importing that could run code of the file's choice.
    """
    hub = {name: kwargs.pop(name) for name in list(kwargs) if name in configs.hub_arguments()}
    config = configs.PeftConfig.from_pretrained(path, **hub)
    mapping = config.auto_mapping or {}
    library = str(mapping.get("parent_library", ""))
    name = str(mapping.get("base_model_class", ""))
    if not helpers.check_import_allowlist(allowed or helpers.get_default_import_allowlist(), library):
        raise ConfigError(
            f"The library {library} is not in the import allowlist. {str(path)!r} names {library}.{name} as the class "
            "of its base model; pass import_allowlist=[...] if you trust that library"
        )
    base_class: Any = getattr(importlib.import_module(library), name, None)
    if not hasattr(base_class, "from_pretrained"):
        raise ConfigError(f"{str(path)!r} names {library}.{name} as the class of its base model, which there is not")
    if not config.base_model_name_or_path:
        raise ConfigError(f"{str(path)!r} does not name its base model; load it yourself")
    base = base_class.from_pretrained(resolve(config.base_model_name_or_path), **kwargs)
    return models.PeftModel.from_pretrained(base, path, *args, **hub)


def _auto(veneer_class: Any) -> Any:
    """PEFT's form of one of veneer's classes that load base model and adapter: it makes the drop-in's `PeftModel`s."""
    target_class = getattr(models, veneer_class.__name__.removeprefix("Auto"))

    class Auto(veneer_class):  # type: ignore[misc]
        peft_model = models.PeftModel
        config_class = configs.PeftConfig
        _target_peft_class = target_class

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(
                f"{type(self).__name__} is designed to be instantiated using the "
                f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` or "
                f"`{type(self).__name__}.from_config(config)` methods."
            )

        @classmethod
        def from_pretrained(
            cls,
            pretrained_model_name_or_path: Any,
            adapter_name: str = "default",
            is_trainable: bool = False,
            config: Any = None,
            revision: str | None = None,
            import_allowlist: list[str] | None = None,
            **kwargs: Any,
        ) -> Any:
            args = (adapter_name, is_trainable, config)
            if revision is not None:
                kwargs["revision"] = revision
            hub = {name: value for name, value in kwargs.items() if name in configs.hub_arguments()}
            saved = configs.PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            task_class = models.MODELS.get(saved.task_type)
            if target_class is models.PeftModel:
                if task_class is None:
                    return _load_by_class(pretrained_model_name_or_path, import_allowlist, *args, **kwargs)
                raise VeneerError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            if task_class is not None and task_class is not target_class:
                raise VeneerError(
                    f"Expected target PEFT class: {task_class.__name__}, but you have asked for: "
                    f"{target_class.__name__} make sure that you are loading the correct model for your task type."
                )
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    Auto.__name__ = veneer_class.__name__
    Auto.__qualname__ = veneer_class.__name__
    Auto.__module__ = "peft.auto"
    return Auto


FROM_VENEER = (
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraGAConfig",
    "MontecloraConfig",
    "VeloraConfig",
    "compose_cartridge_adapters",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "get_eva_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "prepare_model_for_compiled_hotswap",
    "preprocess_corda",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
)
"""Functions and settings that veneer's own API has under the same name."""

VERSIONS = {
    "is_transformers_ge_v5": ("transformers", "5"),
    "is_transformers_ge_v5_1_0": ("transformers", "5.1.0"),
    "is_transformers_ge_v5_4_0": ("transformers", "5.4.0"),
    "is_transformers_ge_v5_6_0": ("transformers", "5.6.0"),
    "is_transformers_ge_v5_13_0": ("transformers", "5.13.0"),
    "is_transformers_ge_v5_17_0": ("transformers", "5.17.0"),
}
"""Constants of PEFT's import_utils: whether a library has at least a version."""

AVAILABLE = {
    "is_aqlm_available": "aqlm",
    "is_bnb_4bit_available": "bitsandbytes",
    "is_bnb_available": "bitsandbytes",
    "is_diffusers_available": "diffusers",
    "is_eetq_available": "eetq",
    "is_gptqmodel_available": "gptqmodel",
    "is_hqq_available": "hqq",
    "is_inc_available": "neural_compressor",
    "is_optimum_available": "optimum",
    "is_te_available": "transformer_engine",
    "is_te_pytorch_available": "transformer_engine",
    "is_torchao_available": "torchao",
}
"""Functions of PEFT's import_utils: whether a library is installed."""
