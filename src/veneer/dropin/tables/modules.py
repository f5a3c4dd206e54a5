"""PEFT's modules and the names in each, and the objects that the names stand for."""

from __future__ import annotations

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
from ..wording import pefts_words
from . import methods as table

PARTS = (
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
    "resolve_quantization_backend": utils.no_backend,
}
"""Objects by PEFT's name where veneer has another name for them, or defines them outside `PARTS`."""


def everything() -> dict[str, Any]:
    """Every object of the drop-in by its name in PEFT; each of PEFT's modules takes a part of them."""
    objects: dict[str, Any] = dict(table.CONSTANTS)
    objects |= _default_targets()
    for module in PARTS:
        for name, value in vars(module).items():
            if getattr(value, "__module__", "") == module.__name__:
                objects[name] = value
    for made_class in (*configs.CONFIGS.values(), *tuners.TUNERS.values()):
        objects[made_class.__name__] = made_class
    for name in FROM_VENEER:
        value = getattr(veneer, name)
        objects[name] = _settings(value) if isinstance(value, type) else pefts_words()(value)
    objects |= RENAMED
    for name in dir(veneer):
        if name.startswith("AutoPeftModel"):
            objects[name] = _auto(getattr(veneer, name))
    for name, library in AVAILABLE.items():
        objects[name] = _is_installed(library)
    for name, (library, version) in VERSIONS.items():
        objects[name] = _is_at_least(library, version)
    return objects


def _settings(ours: type) -> type:
    """A class of settings for LoRA whose errors are in PEFT's words."""
    namespace = {
        "__module__": "peft.tuners.lora.config",
        "__doc__": ours.__doc__,
        "__post_init__": pefts_words()(ours.__post_init__),  # type: ignore[attr-defined]
    }
    return type(ours.__name__, (ours,), namespace)


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
    return lambda *args, **kwargs: importlib.util.find_spec(library) is not None


def _is_at_least(library: str, version: str) -> bool:
    """Whether a library is installed in this version or a newer one."""
    if importlib.util.find_spec(library) is None:
        return False
    return Version(importlib.metadata.version(library)) >= Version(version)


def _load_by_class(path: Any, *args: Any, **kwargs: Any) -> Any:
    """Base model and adapter, if the adapter's config names a class of transformers for the base instead of a task.

    Raises:
        ConfigError: the class is not one of transformers; importing it could run code of the file's choice.
    """
    import transformers

    hub = {name: kwargs.pop(name) for name in list(kwargs) if name in configs.hub_arguments()}
    config = configs.PeftConfig.from_pretrained(path, **hub)
    mapping = config.auto_mapping or {}
    library = str(mapping.get("parent_library", ""))
    name = str(mapping.get("base_model_class", ""))
    base_class = None
    if library.partition(".")[0] == "transformers":
        base_class = getattr(transformers, name, None)
    if not (isinstance(base_class, type) and issubclass(base_class, transformers.PreTrainedModel)):
        raise ConfigError(f"{str(path)!r} names no model class of transformers for its base, but {library}.{name}")
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
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            hub = {name: value for name, value in kwargs.items() if name in configs.hub_arguments()}
            config = configs.PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            task_class = models.MODELS.get(config.task_type)
            if target_class is models.PeftModel:
                if task_class is None:
                    return _load_by_class(pretrained_model_name_or_path, *args, **kwargs)
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
    "is_torchao_ge_v0_18_0": ("torchao", "0.18.0"),
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
    "is_torch_tpu_available": "torch_xla",
}
"""Functions of PEFT's import_utils: whether a library is installed."""

MODULES = {
    "peft.auto": "AutoPeftModel*",
    "peft.config": "PeftConfig PeftConfigMixin PromptLearningConfig CONFIG_NAME MIN_EXPECTED_CONFIG_KEYS "
    "_get_commit_hash",
    "peft.functional": "cast_adapter_dtype delete_adapter get_peft_model_state_dict inject_adapter_in_model "
    "set_adapter set_peft_model_state_dict set_requires_grad",
    "peft.helpers": "DoraCaching KappaTuneSelector check_if_peft_model disable_input_dtype_casting "
    "find_kappa_target_modules MontecloraTrainerMixin rescale_adapter_scale update_forward_signature "
    "update_generate_signature update_signature",
    "peft.import_utils": "is_*_available is_*_ge_*",
    "peft.mapping": "get_peft_config inject_adapter_in_model PEFT_TYPE_TO_* get_peft_model",
    "peft.mapping_func": "get_peft_model MODEL_TYPE_TO_* PEFT_TYPE_TO_*",
    "peft.mixed_model": "PeftMixedModel",
    "peft.optimizers": "create_*_optimizer",
    "peft.optimizers.lorafa": "create_lorafa_optimizer LoraFAOptimizer",
    "peft.optimizers.loraplus": "create_loraplus_optimizer",
    "peft.optimizers.riemannian": "create_riemannian_optimizer",
    "peft.peft_model": "PeftModel* PEFT_TYPE_TO_* Tuner*Status get_layer_status get_model_status *WEIGHTS_NAME",
    "peft.tuners": "*Model *Config *Encoder *Embedding PromptTuningInit MultitaskPromptTuningInit "
    "PromptEncoderReparameterizationType convert_to_lora create_arrow_model get_eva_state_dict "
    "initialize_lora_eva_weights preprocess_loraga save_as_lora",
    "peft.tuners._buffer_dict": "BufferDict",
    "peft.tuners.cartridge.utils": "compose_cartridge_adapters initialize_kv_prefix_* "
    "prompt_embeddings_from_past_key_values",
    "peft.tuners.lora.arrow": "create_arrow_model",
    "peft.tuners.lora.conversion": "convert_to_lora save_as_lora",
    "peft.tuners.lora.corda": "preprocess_corda",
    "peft.tuners.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "peft.tuners.lora.intruders": "reduce_intruder_dimension",
    "peft.tuners.lora.loraga": "preprocess_loraga",
    "peft.tuners.lora.variants": "calculate_alora_offsets get_alora_offsets_for_forward get_alora_offsets_for_generate",
    "peft.tuners.mixed": "MixedModel",
    "peft.tuners.mixed.model": "MixedModel",
    "peft.tuners.shadow.layers": "DetachedShadowModel",
    "peft.tuners.tuners_utils": "Base* cast_adapter_dtype check_adapters_to_merge check_target_module_exists "
    "delete_adapter find_parameter_name_by_module get_device_map inspect_matched_modules set_adapter "
    "set_requires_grad _find_minimal_target_modules DUMMY_* EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES "
    "INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION UPCAST_DTYPES ModulesToSaveWrapper",
    "peft.utils": "*Wrapper PeftType TaskType Peft*Error PeftError PeftWarning NoMatchingPeftModuleError "
    "bloom_model_* cast_mixed_precision_params get_* id_tensor_storage infer_device load_peft_weights "
    "prepare_model_for_kbit_training register_peft_method replace_lora_weights_loftq "
    "resolve_quantization_backend set_* shift_tokens_right transpose TRANSFORMERS_MODELS_TO_* *_NAME "
    "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES INCLUDE_LINEAR_LAYERS_SHORTHAND _get_submodules _freeze_adapter _set_adapter "
    "str_to_bool",
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_* bloom_model_* *_NAME *_NAMES DUMMY_* MIN_* ALLOWED_* UPCAST_* "
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "peft.utils.error": "PeftError NoMatchingPeftModuleError",
    "peft.utils.hotswap": "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap",
    "peft.utils.integrations": "dequantize_bnb_weight init_empty_weights skip_init_on_device "
    "dequantize_module_weight gather_params_ctx",
    "peft.utils.loftq_utils": "replace_lora_weights_loftq",
    "peft.utils.merge_utils": "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_prune prune "
    "task_arithmetic ties",
    "peft.utils.other": "*Wrapper cast_mixed_precision_params fsdp_auto_wrap_policy get_pattern_key "
    "get_quantization_config id_tensor_storage infer_device match_target_against_key prepare_model_for_kbit_training "
    "shift_tokens_right str_to_bool transpose TRANSFORMERS_MODELS_TO_* *_NAME *_NAMES "
    "INCLUDE_LINEAR_LAYERS_SHORTHAND _get_submodules _freeze_adapter _set_adapter _get_no_split_modules",
    "peft.utils.peft_types": "PeftType TaskType register_peft_method",
    "peft.utils.quantization_utils": "resolve_quantization_backend",
    "peft.utils.save_and_load": "get_base_model_state_dict get_peft_model_state_dict load_peft_weights "
    "set_base_model_state_dict set_peft_model_state_dict *WEIGHTS_NAME",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping "
    "convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers",
    "peft.utils.warning": "PeftWarning",
}
"""The names in PEFT's modules, separated by spaces; `*` matches any characters. Those of a method are in its `Row`."""

TOP = """
    AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig
    AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
    AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
    BOFTConfig BOFTModel BdLoraConfig BeftConfig BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding
    CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig DeloraModel EvaConfig FourierFTConfig
    FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig GraloraModel HRAConfig HRAModel
    HiraConfig HiraModel IA3Config IA3Model KasaConfig LNTuningConfig LNTuningModel LilyConfig LilyModel
    LoHaConfig LoHaModel LoKrConfig LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING MissConfig MissModel MontecloraConfig MultitaskPromptTuningConfig
    MultitaskPromptTuningInit NoMatchingPeftModuleError OFTConfig OFTModel OSFConfig OSFModel
    PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeanutConfig
    PeanutModel PeftConfig PeftError PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction
    PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification
    PeftModelForTokenClassification PeftType PeftWarning PolyConfig PolyModel PrefixEncoder PrefixTuningConfig
    PromptEmbedding PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType PromptLearningConfig
    PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel PveraConfig PveraModel RandLoraConfig
    RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig ShiraModel SupertuningConfig
    SupertuningModel TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType TinyLoraConfig
    TinyLoraModel TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel
    VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel
    bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters
    convert_to_lora create_arrow_model find_kappa_target_modules get_base_model_state_dict get_eva_state_dict
    get_layer_status get_model_status get_peft_config get_peft_model get_peft_model_state_dict
    initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text initialize_lora_eva_weights
    inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training preprocess_loraga
    prompt_embeddings_from_past_key_values replace_lora_weights_loftq save_as_lora set_base_model_state_dict
    set_peft_model_state_dict shift_tokens_right
"""
"""The names in the top-level package `peft`."""
