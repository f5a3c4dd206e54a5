"""The names of PEFT 0.21.2's methods: one row per method, from which its modules, classes and mappings are made."""

from __future__ import annotations

from dataclasses import dataclass, field

VERSION = "0.21.2"
"""The version that the drop-in reports, which programs compare."""


@dataclass(frozen=True)
class Row:
    """The names that PEFT gives to the parts of one method."""

    package: str
    """The package in `peft.tuners`."""
    config: str
    """The config class."""
    model: str
    """The tuner class; for a prompt method, the encoder class."""
    prefix: str
    """What the names of its parameters begin with."""
    layers: tuple[str, ...] = ()
    """The layer classes, the general one first."""
    trained: tuple[str, ...] = ()
    """`adapter_layer_names`: attributes of a layer with trainable parameters, by adapter name."""
    other: tuple[str, ...] = ()
    """`other_param_names`: attributes of a layer with settings and fixed tensors, by adapter name."""
    mixes: bool = False
    """Whether `PeftMixedModel` supports it."""
    shares: bool = False
    """Whether its layers share a module, so that it cannot be injected without a tuner."""
    takes_any: bool = False
    """Whether it targets all linear layers of a model that has no default targets."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Attributes of a layer that veneer names differently, each with veneer's name."""


LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
LORA_OTHER = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
LYCORIS = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")
BNB = ("Linear4bit", "Linear8bitLt")
"""Layer classes on bitsandbytes' modules, named as those modules' classes."""

QUANTISED = {
    "Linear4bit": "Linear4bit",
    "Linear8bitLt": "Linear8bitLt",
    "SVDLinear4bit": "Linear4bit",
    "SVDLinear8bitLt": "Linear8bitLt",
    "HqqLoraLinear": "HQQLinear",
    "EetqLoraLinear": "EetqLinear",
    "AqlmLoraLinear": "QuantizedLinear",
}
"""Layer classes on quantised modules, each with the class of those modules."""

LORA_LAYERS = (
    "LoraLayer",
    *BNB,
    "HqqLoraLinear",
    "EetqLoraLinear",
    "AqlmLoraLinear",
    "Linear",
    "Embedding",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "MultiheadAttention",
    "ParamWrapper",
)

METHODS: dict[str, Row] = {
    "LORA": Row(
        package="lora",
        config="LoraConfig",
        model="LoraModel",
        prefix="lora_",
        layers=LORA_LAYERS,
        trained=LORA,
        other=LORA_OTHER,
        mixes=True,
    ),
    "ADALORA": Row(
        package="adalora",
        config="AdaLoraConfig",
        model="AdaLoraModel",
        prefix="lora_",
        layers=("AdaLoraLayer", "SVDLinear4bit", "SVDLinear8bitLt", "SVDLinear", "SVDConv2d"),
        trained=("lora_A", "lora_B", "lora_E"),
        other=(*LORA_OTHER, "ranknum"),
        mixes=True,
    ),
    "ADAMSS": Row(
        package="adamss",
        config="AdamssConfig",
        model="AdamssModel",
        prefix="adamss_",
        layers=("AdamssLayer", "Linear"),
        trained=("adamss_A", "adamss_B"),
        other=("adamss_newB",),
    ),
    "ADAPTION_PROMPT": Row(
        package="adaption_prompt",
        config="AdaptionPromptConfig",
        model="AdaptionPromptModel",
        prefix="adaption_prompt_",
    ),
    "BEFT": Row(
        package="beft",
        config="BeftConfig",
        model="BeftModel",
        prefix="beft_",
        layers=("BeftLayer", "Linear"),
        trained=("beft_bias",),
        mixes=True,
    ),
    "BOFT": Row(
        package="boft",
        config="BOFTConfig",
        model="BOFTModel",
        prefix="boft_",
        layers=("BOFTLayer", "Linear", "Conv2d"),
        trained=("boft_R", "boft_s"),
        other=("boft_block_size", "boft_block_num"),
    ),
    "C3A": Row(
        package="c3a",
        config="C3AConfig",
        model="C3AModel",
        prefix="c3a_",
        layers=("C3ALayer", "C3ALinear"),
        trained=("c3a_kernel",),
        other=("block_size",),
    ),
    "CARTRIDGE": Row(
        package="cartridge",
        config="CartridgeConfig",
        model="CartridgeEncoder",
        prefix="cartridge_",
    ),
    "CPT": Row(package="cpt", config="CPTConfig", model="CPTEmbedding", prefix="cpt_"),
    "DEFT": Row(
        package="deft",
        config="DeftConfig",
        model="DeftModel",
        prefix="deft_",
        layers=("DeftLayer", "DeftLinear"),
        trained=("deft_P", "deft_R"),
        other=("deft_r", "deft_dropout"),
        aliases={"deft_dropout": "dropout", "deft_r": "r"},
    ),
    "DELORA": Row(
        package="delora",
        config="DeloraConfig",
        model="DeloraModel",
        prefix="delora_",
        layers=("DeloraLayer", "DeloraLinear"),
        trained=("delora_A", "delora_B", "delora_lambda"),
        other=("r", "delora_dropout", "delora_w_norm"),
        aliases={"delora_dropout": "dropout"},
    ),
    "FOURIERFT": Row(
        package="fourierft",
        config="FourierFTConfig",
        model="FourierFTModel",
        prefix="fourierft_",
        layers=("FourierFTLayer", "FourierFTLinear"),
        trained=("fourierft_spectrum",),
        other=("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed"),
        aliases={
            "fourierft_n_frequency": "n_frequency",
            "fourierft_scaling": "scaling",
            "fourierft_random_loc_seed": "random_loc_seed",
        },
    ),
    "FROD": Row(
        package="frod",
        config="FrodConfig",
        model="FrodModel",
        prefix="frod_",
        layers=("FrodLayer", "Linear"),
        trained=("frod_lambda_l", "frod_lambda_s_values"),
        other=("r", "frod_dropout"),
        shares=True,
        aliases={"frod_dropout": "dropout"},
    ),
    "GLORA": Row(
        package="glora",
        config="GloraConfig",
        model="GloraModel",
        prefix="glora_",
        layers=("GloraLayer", "GloraLinear"),
        trained=("glora_A", "glora_B", "glora_C", "glora_D", "glora_E"),
        other=("r",),
    ),
    "GRALORA": Row(
        package="gralora",
        config="GraloraConfig",
        model="GraloraModel",
        prefix="gralora_",
        layers=("GraloraLayer", "Linear"),
        trained=("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
        other=("r", "hybrid_r", "alpha", "scaling", "gralora_dropout", "gralora_k"),
        aliases={"gralora_dropout": "dropout", "gralora_k": "k"},
    ),
    "HIRA": Row(
        package="hira",
        config="HiraConfig",
        model="HiraModel",
        prefix="hira_",
        layers=("HiraLayer", *BNB, "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
        trained=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        other=("r", "hira_dropout"),
        mixes=True,
        aliases={"hira_dropout": "dropout"},
    ),
    "HRA": Row(
        package="hra",
        config="HRAConfig",
        model="HRAModel",
        prefix="hra_",
        layers=("HRALayer", "HRALinear", "HRAConv2d"),
        trained=("hra_u",),
        other=("hra_r", "hra_apply_GS"),
        aliases={"hra_r": "r", "hra_apply_GS": "apply_GS"},
    ),
    "IA3": Row(
        package="ia3",
        config="IA3Config",
        model="IA3Model",
        prefix="ia3_",
        layers=("IA3Layer", *BNB, "Linear", "Conv2d", "Conv3d"),
        trained=("ia3_l",),
        mixes=True,
    ),
    "LILY": Row(
        package="lily",
        config="LilyConfig",
        model="LilyModel",
        prefix="lily_",
        layers=("LilyLayer", "Linear"),
        trained=("lily_A", "lily_B", "lily_router"),
        other=("r", "scaling", "stride_A", "num_B"),
    ),
    "LN_TUNING": Row(
        package="ln_tuning",
        config="LNTuningConfig",
        model="LNTuningModel",
        prefix="ln_tuning_",
        layers=("LNTuningLayer",),
    ),
    "LOHA": Row(
        package="loha",
        config="LoHaConfig",
        model="LoHaModel",
        prefix="hada_",
        layers=("LoHaLayer", "Linear", "Conv1d", "Conv2d"),
        trained=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        other=LYCORIS,
        mixes=True,
    ),
    "LOKR": Row(
        package="lokr",
        config="LoKrConfig",
        model="LoKrModel",
        prefix="lokr_",
        layers=("LoKrLayer", "Linear", "Conv1d", "Conv2d"),
        trained=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        other=LYCORIS,
        mixes=True,
    ),
    "MISS": Row(
        package="miss",
        config="MissConfig",
        model="MissModel",
        prefix="miss_",
        layers=("MissLayer", "MissLinear"),
        trained=("miss_block",),
        other=("miss_r", "miss_dropout", "miss_mini_r"),
        aliases={"miss_r": "r", "miss_dropout": "dropout", "miss_mini_r": "mini_r"},
    ),
    "MULTITASK_PROMPT_TUNING": Row(
        package="multitask_prompt_tuning",
        config="MultitaskPromptTuningConfig",
        model="MultitaskPromptEmbedding",
        prefix="multitask_prompt_tuning_",
    ),
    "OFT": Row(
        package="oft",
        config="OFTConfig",
        model="OFTModel",
        prefix="oft_",
        layers=("OFTLayer", "Linear", "Conv2d", "Embedding"),
        trained=("oft_R", "oft_embedding_R"),
        other=("r", "oft_block_size", "oft_dropout"),
        aliases={"oft_dropout": "dropout"},
    ),
    "OSF": Row(
        package="osf",
        config="OSFConfig",
        model="OSFModel",
        prefix="osf_",
        layers=("OSFLayer", "Linear"),
        trained=("osf_svd_params",),
        takes_any=True,
    ),
    "P_TUNING": Row(
        package="p_tuning",
        config="PromptEncoderConfig",
        model="PromptEncoder",
        prefix="p_tuning_",
    ),
    "PEANUT": Row(
        package="peanut",
        config="PeanutConfig",
        model="PeanutModel",
        prefix="peanut_",
        layers=("PeanutLayer", "Linear"),
        trained=("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"),
        other=("r", "res_num", "scaling"),
        aliases={"res_num": "depth"},
    ),
    "POLY": Row(
        package="poly",
        config="PolyConfig",
        model="PolyModel",
        prefix="poly_",
        layers=("PolyLayer", "Linear"),
        trained=("poly_lora_A", "poly_lora_B", "poly_router"),
        other=("r", "n_tasks", "n_skills", "n_splits", "poly_type"),
    ),
    "PREFIX_TUNING": Row(
        package="prefix_tuning",
        config="PrefixTuningConfig",
        model="PrefixEncoder",
        prefix="prefix_tuning_",
    ),
    "PROMPT_TUNING": Row(
        package="prompt_tuning",
        config="PromptTuningConfig",
        model="PromptEmbedding",
        prefix="prompt_tuning_",
    ),
    "PSOFT": Row(
        package="psoft",
        config="PsoftConfig",
        model="PsoftModel",
        prefix="psoft_",
        layers=("PsoftLayer", "Linear"),
        trained=("psoft_R",),
        other=("r", "psoft_alpha", "scaling", "psoft_dropout"),
        aliases={"psoft_dropout": "dropout"},
    ),
    "PVERA": Row(
        package="pvera",
        config="PveraConfig",
        model="PveraModel",
        prefix="pvera_lambda_",
        layers=("PveraLayer", *BNB, "Linear"),
        trained=("pvera_lambda_b", "pvera_lambda_d"),
        other=("pvera_A", "pvera_B", "pvera_dropout", "r"),
        shares=True,
        aliases={"pvera_dropout": "dropout"},
    ),
    "RANDLORA": Row(
        package="randlora",
        config="RandLoraConfig",
        model="RandLoraModel",
        prefix="randlora_",
        layers=("RandLoraLayer", *BNB, "Linear"),
        trained=("randlora_lambda", "randlora_gamma"),
        other=("randlora_A", "randlora_B", "randlora_dropout", "r", "scaling"),
        aliases={"randlora_dropout": "dropout"},
    ),
    "ROAD": Row(
        package="road",
        config="RoadConfig",
        model="RoadModel",
        prefix="road_",
        layers=("RoadLayer", *BNB, "Linear"),
        trained=("road_theta", "road_alpha"),
        other=("variant", "group_size"),
        mixes=True,
    ),
    "SHADOW": Row(
        package="shadow",
        config="ShadowConfig",
        model="ShadowModel",
        prefix="shadow_",
        layers=("ShadowLayer",),
    ),
    "SHIRA": Row(
        package="shira",
        config="ShiraConfig",
        model="ShiraModel",
        prefix="shira_",
        layers=("ShiraLayer", "Linear"),
        trained=("shira_weight",),
        other=("r", "scaling", "shira_indices"),
        mixes=True,
    ),
    "SUPERTUNING": Row(
        package="supertuning",
        config="SupertuningConfig",
        model="SupertuningModel",
        prefix="supertuning_",
        layers=("SupertuningLayer", "Linear"),
        trained=("supertuning_values", "supertuning_lora_A", "supertuning_lora_B"),
        other=("supertuning_indices",),
    ),
    "TINYLORA": Row(
        package="tinylora",
        config="TinyLoraConfig",
        model="TinyLoraModel",
        prefix="tinylora_",
        layers=("TinyLoraLayer", "Linear", "Embedding"),
        trained=("tinylora_v",),
        other=("tinylora_A", "tinylora_B", "tinylora_P"),
        shares=True,
    ),
    "TRAINABLE_TOKENS": Row(
        package="trainable_tokens",
        config="TrainableTokensConfig",
        model="TrainableTokensModel",
        prefix="trainable_tokens_",
        layers=("TrainableTokensLayer",),
        trained=("trainable_tokens_delta",),
        other=("token_indices", "trainable_tokens_original"),
        aliases={"trainable_tokens_original": "originals"},
    ),
    "UNILORA": Row(
        package="unilora",
        config="UniLoraConfig",
        model="UniLoraModel",
        prefix="unilora_",
        layers=("UniLoraLayer", "Linear"),
        trained=("unilora_theta_d",),
        other=("r", "unilora_indices_A", "unilora_indices_B", "unilora_dropout"),
        shares=True,
        aliases={"unilora_dropout": "dropout"},
    ),
    "VBLORA": Row(
        package="vblora",
        config="VBLoRAConfig",
        model="VBLoRAModel",
        prefix="vblora_",
        layers=("VBLoRALayer", "Linear"),
        trained=("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
        other=("r", "topk", "vblora_dropout"),
        shares=True,
        aliases={"vblora_dropout": "dropout"},
    ),
    "VERA": Row(
        package="vera",
        config="VeraConfig",
        model="VeraModel",
        prefix="vera_lambda_",
        layers=("VeraLayer", *BNB, "Linear"),
        trained=("vera_lambda_b", "vera_lambda_d"),
        other=("vera_A", "vera_B", "vera_dropout", "r"),
        shares=True,
        aliases={"vera_dropout": "dropout"},
    ),
    "WAVEFT": Row(
        package="waveft",
        config="WaveFTConfig",
        model="WaveFTModel",
        prefix="waveft_",
        layers=("WaveFTLayer", "WaveFTLinear"),
        trained=("waveft_spectrum",),
        other=("waveft_n_frequency", "waveft_scaling"),
        aliases={"waveft_n_frequency": "n_frequency", "waveft_scaling": "scaling"},
    ),
    "XLORA": Row(
        package="xlora",
        config="XLoraConfig",
        model="XLoraModel",
        prefix="xlora_",
        layers=("XLoraLayer",),
    ),
}

CONVERTS = {
    "C3A",
    "DELORA",
    "FOURIERFT",
    "GRALORA",
    "HIRA",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "PSOFT",
    "RANDLORA",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
}
"""Methods whose linear layers PEFT can convert to LoRA."""

EVERYWHERE = {"lora_dropout": "dropout", "modules_to_save": "module", "original_bias": "bias"}
"""Attributes of layers of any method that veneer names differently, each with veneer's name."""

ABSENT = {
    "ADAMSS": "exclude_modules bias fan_in_fan_out",
    "ADAPTION_PROMPT": "modules_to_save exclude_modules layers_to_transform layers_pattern bias fan_in_fan_out",
    "BEFT": "exclude_modules layers_to_transform layers_pattern bias fan_in_fan_out",
    "C3A": "exclude_modules fan_in_fan_out",
    "DELORA": "fan_in_fan_out",
    "FROD": "exclude_modules",
    "GLORA": "exclude_modules layers_to_transform layers_pattern fan_in_fan_out",
    "GRALORA": "exclude_modules",
    "HIRA": "bias",
    "HRA": "fan_in_fan_out",
    "IA3": "layers_to_transform layers_pattern bias",
    "LILY": "bias fan_in_fan_out",
    "LN_TUNING": "layers_to_transform layers_pattern bias fan_in_fan_out",
    "LOHA": "bias fan_in_fan_out",
    "LOKR": "bias fan_in_fan_out",
    "MISS": "fan_in_fan_out",
    "SHIRA": "exclude_modules layers_to_transform layers_pattern bias",
    "OSF": "exclude_modules layers_to_transform layers_pattern bias fan_in_fan_out",
    "PEANUT": "bias fan_in_fan_out",
    "POLY": "layers_to_transform layers_pattern bias fan_in_fan_out",
    "PSOFT": "bias",
    "PVERA": "exclude_modules",
    "RANDLORA": "exclude_modules",
    "ROAD": "exclude_modules layers_to_transform layers_pattern bias fan_in_fan_out",
    "SHADOW": "bias fan_in_fan_out",
    "SUPERTUNING": "exclude_modules layers_to_transform layers_pattern bias fan_in_fan_out",
    "TINYLORA": "exclude_modules",
    "TRAINABLE_TOKENS": "modules_to_save exclude_modules layers_to_transform layers_pattern bias fan_in_fan_out",
    "UNILORA": "exclude_modules",
    "VERA": "exclude_modules",
    "XLORA": "modules_to_save target_modules exclude_modules layers_to_transform layers_pattern bias fan_in_fan_out",
}
"""The fields common to veneer's configs that PEFT's config of a method lacks, separated by spaces."""

OF_VARIANTS = {"lora_velora_initialized": "has_direction"}
"""Attributes that layers have only with a variant of LoRA, each with veneer's name."""

IN_MODULES = ("lora_magnitude_vector",)
"""Parameters for which PEFT has a module of their own."""

CONSTANTS = {
    "WEIGHTS_NAME": "adapter_model.bin",
    "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
    "CONFIG_NAME": "adapter_config.json",
    "TOKENIZER_CONFIG_NAME": "tokenizer_config.json",
    "EMBEDDING_LAYER_NAMES": ["embed_tokens", "lm_head"],
    "SEQ_CLS_HEAD_NAMES": ["score", "classifier"],
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": "all-linear",
    "DUMMY_TARGET_MODULES": "dummy-target-modules",
    "DUMMY_MODEL_CONFIG": {"model_type": "custom"},
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION": 20,
    "MIN_EXPECTED_CONFIG_KEYS": {"peft_type"},
    "UPCAST_DTYPES": ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"],
    "ALLOWED_COMPUTE_DTYPES": ["float16", "float32", "bfloat16"],
}
"""PEFT's constants by name."""
