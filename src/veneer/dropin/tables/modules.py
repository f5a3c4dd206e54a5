"""PEFT's modules and the names in each: one table, from which the drop-in is made."""

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
from . import methods as table


def _default_targets() -> dict[str, Any]:
    found: dict[str, Any] = {
        f"TRANSFORMERS_MODELS_TO_{kind.replace('_', '')}_TARGET_MODULES_MAPPING": utils.DefaultTargets(
            configs.PeftType(kind)
        )
        for kind, row in table.METHODS.items()
        if row.layers
    }
    found["TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"] = utils.DefaultTargets(
        configs.PeftType("IA3"), "feedforward_modules"
    )
    found["TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"] = {}
    return found


def _is_there(name: str) -> Callable[..., bool]:
    return lambda *args, **kwargs: importlib.util.find_spec(name) is not None


def _is_newer(module: str, version: str) -> bool:
    if importlib.util.find_spec(module) is None:
        return False
    return Version(importlib.metadata.version(module)) >= Version(version)


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


def everything() -> dict[str, Any]:
    """Every name once, wherever PEFT has it; its modules then take their share."""
    found: dict[str, Any] = dict(table.CONSTANTS) | _default_targets()
    for module in PARTS:
        found |= {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    found |= {config.__name__: config for config in configs.CONFIGS.values()}
    found |= {tuner.__name__: tuner for tuner in tuners.TUNERS.values()}
    found |= {name: getattr(veneer, name) for name in FROM_VENEER}
    found |= {
        "PeftType": configs.PeftType,
        "TaskType": TaskType,
        "DetachedShadowModel": DetachedShadowModel,
        "PeftConfigMixin": configs.PeftConfig,
        "PeftError": VeneerError,
        "NoMatchingPeftModuleError": TargetError,
        "PEFT_TYPE_TO_CONFIG_MAPPING": configs.CONFIGS,
        "PEFT_TYPE_TO_TUNER_MAPPING": tuners.TUNERS,
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": models.MIXABLE,
        "PEFT_TYPE_TO_PREFIX_MAPPING": {configs.PeftType(k): row.prefix for k, row in table.METHODS.items()},
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
    found |= {name: _auto(getattr(veneer, name)) for name in dir(veneer) if name.startswith("AutoPeftModel")}
    found |= {name: _is_there(module) for name, module in AVAILABLE.items()}
    found |= {name: _is_newer(*wanted) for name, wanted in VERSIONS.items()}
    return found


def _by_class(path: Any, *args: Any, **kwargs: Any) -> Any:
    """Base and adapter, where the file names the base's class instead of a task: one of transformers'.

    Raises:
        ConfigError: the class is of another library, which would run code that a file names.
    """
    import transformers

    hub = {n: kwargs.pop(n) for n in list(kwargs) if n in configs.hub_arguments()}
    config = configs.PeftConfig.from_pretrained(path, **hub)
    mapping = config.auto_mapping or {}
    library, name = str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", ""))
    kind = getattr(transformers, name, None) if library.partition(".")[0] == "transformers" else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(f"{str(path)!r} names no model class of transformers for its base, but {library}.{name}")
    if not config.base_model_name_or_path:
        raise ConfigError(f"{str(path)!r} does not name its base model; load it yourself")
    base = kind.from_pretrained(resolve(config.base_model_name_or_path), **kwargs)
    return models.PeftModel.from_pretrained(base, path, *args, **hub)


def _auto(ours: Any) -> Any:
    """A class that loads base and adapter, whose adapter model is PEFT's."""
    wanted = getattr(models, ours.__name__.removeprefix("Auto"))

    class Auto(ours):  # type: ignore[misc]
        peft_model, config_class, _target_peft_class = models.PeftModel, configs.PeftConfig, wanted

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(
                f"{type(self).__name__} is designed to be instantiated using the "
                f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` or "
                f"`{type(self).__name__}.from_config(config)` methods."
            )

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            hub = {n: v for n, v in kwargs.items() if n in configs.hub_arguments()}
            task = configs.PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub).task_type
            found = models.MODELS.get(task)
            if found is None and wanted is models.PeftModel:
                return _by_class(pretrained_model_name_or_path, *args, **kwargs)
            if found is not None and wanted is models.PeftModel:
                raise VeneerError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            if found is not None and found is not wanted:
                raise VeneerError(
                    f"Expected target PEFT class: {found.__name__}, but you have asked for: {wanted.__name__} make "
                    "sure that you are loading the correct model for your task type."
                )
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    Auto.__name__ = Auto.__qualname__ = ours.__name__
    Auto.__module__ = "peft.auto"
    return Auto


FROM_VENEER = (
    *("ArrowConfig", "BdLoraConfig", "CordaConfig", "EvaConfig", "KasaConfig", "LoftQConfig", "LoraGAConfig"),
    *("MontecloraConfig", "VeloraConfig", "compose_cartridge_adapters", "create_arrow_model"),
    *("create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer", "get_eva_state_dict"),
    *("initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text"),
    *("initialize_lora_eva_weights", "prepare_model_for_compiled_hotswap", "preprocess_corda", "preprocess_loraga"),
    *("prompt_embeddings_from_past_key_values", "reduce_intruder_dimension", "replace_lora_weights_loftq"),
)
"""Functions and settings that are the same here and there."""

VERSIONS = {
    "is_torchao_ge_v0_18_0": ("torchao", "0.18.0"),
    **{
        f"is_transformers_ge_v{version.replace('.', '_')}": ("transformers", version)
        for version in ("5", "5.1.0", "5.4.0", "5.6.0", "5.13.0", "5.17.0")
    },
}
"""Facts of PEFT's import_utils: whether a library is at least of a version."""

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
"""PEFT's modules and what is in them; a star stands for the rest of a name. Those of each method follow its row."""

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
"""What `import peft` itself has."""
