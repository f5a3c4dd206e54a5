"""PEFT 0.21.2's names for its methods: one row a method, from which its modules, classes and mappings are made."""

from __future__ import annotations

from dataclasses import dataclass, field

VERSION = "0.21.2"
"""What the module says its version is: clients compare it."""


@dataclass(frozen=True)
class Row:
    """How PEFT calls the parts of one method."""

    package: str
    """Of `peft.tuners`."""
    config: str
    model: str
    """Its tuner; of a prompt method its encoder."""
    prefix: str
    layers: tuple[str, ...] = ()
    """Classes of its layers, the general one first."""
    trained: tuple[str, ...] = ()
    """`adapter_layer_names`: attributes of a layer that hold what is learned, by adapter name."""
    other: tuple[str, ...] = ()
    """`other_param_names`: attributes that hold settings and fixed tensors, by adapter name."""
    mixes: bool = False
    """`PeftMixedModel` takes it."""
    shares: bool = False
    """Its layers share a module, which injection without a tuner has no place for."""
    takes_any: bool = False
    """Without targets, on a model that has no default, it takes all linear layers."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Attributes that have another name here."""


LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
LORA_OTHER = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
LYCORIS = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")
BNB = ("Linear4bit", "Linear8bitLt")
"""Classes of layers on bitsandbytes' modules, whose own classes have the same names."""

QUANTISED = {
    **{name: name for name in BNB},
    **{f"SVD{name}": name for name in BNB},
    "HqqLoraLinear": "HQQLinear",
    "EetqLoraLinear": "EetqLinear",
    "AqlmLoraLinear": "QuantizedLinear",
}
"""PEFT's classes of layers on quantised modules, and what those modules are called."""

LORA_LAYERS = (
    *(
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
    ),
    *("MultiheadAttention", "ParamWrapper"),
)

METHODS: dict[str, Row] = {
    "LORA": Row("lora", "LoraConfig", "LoraModel", "lora_", LORA_LAYERS, LORA, LORA_OTHER, mixes=True),
    "ADALORA": Row(
        *("adalora", "AdaLoraConfig", "AdaLoraModel", "lora_"),
        *(
            ("AdaLoraLayer", "SVDLinear4bit", "SVDLinear8bitLt", "SVDLinear", "SVDConv2d"),
            ("lora_A", "lora_B", "lora_E"),
            (*LORA_OTHER, "ranknum"),
        ),
        mixes=True,
    ),
    "ADAMSS": Row(
        *("adamss", "AdamssConfig", "AdamssModel", "adamss_"),
        *(("AdamssLayer", "Linear"), ("adamss_A", "adamss_B"), ("adamss_newB",)),
    ),
    "ADAPTION_PROMPT": Row("adaption_prompt", "AdaptionPromptConfig", "AdaptionPromptModel", "adaption_prompt_"),
    "BEFT": Row("beft", "BeftConfig", "BeftModel", "beft_", ("BeftLayer", "Linear"), ("beft_bias",), mixes=True),
    "BOFT": Row(
        *("boft", "BOFTConfig", "BOFTModel", "boft_"),
        *(("BOFTLayer", "Linear", "Conv2d"), ("boft_R", "boft_s"), ("boft_block_size", "boft_block_num")),
    ),
    "C3A": Row("c3a", "C3AConfig", "C3AModel", "c3a_", ("C3ALayer", "C3ALinear"), ("c3a_kernel",), ("block_size",)),
    "CARTRIDGE": Row("cartridge", "CartridgeConfig", "CartridgeEncoder", "cartridge_"),
    "CPT": Row("cpt", "CPTConfig", "CPTEmbedding", "cpt_"),
    "DEFT": Row(
        *("deft", "DeftConfig", "DeftModel", "deft_"),
        *(("DeftLayer", "DeftLinear"), ("deft_P", "deft_R"), ("deft_r", "deft_dropout")),
        aliases={"deft_dropout": "dropout", "deft_r": "r"},
    ),
    "DELORA": Row(
        *("delora", "DeloraConfig", "DeloraModel", "delora_", ("DeloraLayer", "DeloraLinear")),
        *(("delora_A", "delora_B", "delora_lambda"), ("r", "delora_dropout", "delora_w_norm")),
        aliases={"delora_dropout": "dropout"},
    ),
    "FOURIERFT": Row(
        *("fourierft", "FourierFTConfig", "FourierFTModel", "fourierft_", ("FourierFTLayer", "FourierFTLinear")),
        *(("fourierft_spectrum",), ("fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed")),
        aliases={
            "fourierft_n_frequency": "n_frequency",
            "fourierft_scaling": "scaling",
            "fourierft_random_loc_seed": "random_loc_seed",
        },
    ),
    "FROD": Row(
        *("frod", "FrodConfig", "FrodModel", "frod_", ("FrodLayer", "Linear")),
        *(("frod_lambda_l", "frod_lambda_s_values"), ("r", "frod_dropout")),
        shares=True,
        aliases={"frod_dropout": "dropout"},
    ),
    "GLORA": Row(
        *("glora", "GloraConfig", "GloraModel", "glora_", ("GloraLayer", "GloraLinear")),
        *(("glora_A", "glora_B", "glora_C", "glora_D", "glora_E"), ("r",)),
    ),
    "GRALORA": Row(
        *("gralora", "GraloraConfig", "GraloraModel", "gralora_", ("GraloraLayer", "Linear")),
        ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
        ("r", "hybrid_r", "alpha", "scaling", "gralora_dropout", "gralora_k"),
        aliases={"gralora_dropout": "dropout", "gralora_k": "k"},
    ),
    "HIRA": Row(
        *("hira", "HiraConfig", "HiraModel", "hira_"),
        *(("HiraLayer", *BNB, "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"),),
        *(("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"), ("r", "hira_dropout")),
        mixes=True,
        aliases={"hira_dropout": "dropout"},
    ),
    "HRA": Row(
        *("hra", "HRAConfig", "HRAModel", "hra_", ("HRALayer", "HRALinear", "HRAConv2d")),
        *(("hra_u",), ("hra_r", "hra_apply_GS")),
        aliases={"hra_r": "r", "hra_apply_GS": "apply_GS"},
    ),
    "IA3": Row(
        *("ia3", "IA3Config", "IA3Model", "ia3_", ("IA3Layer", *BNB, "Linear", "Conv2d", "Conv3d"), ("ia3_l",)),
        mixes=True,
    ),
    "LILY": Row(
        *("lily", "LilyConfig", "LilyModel", "lily_", ("LilyLayer", "Linear")),
        *(("lily_A", "lily_B", "lily_router"), ("r", "scaling", "stride_A", "num_B")),
    ),
    "LN_TUNING": Row("ln_tuning", "LNTuningConfig", "LNTuningModel", "ln_tuning_", ("LNTuningLayer",)),
    "LOHA": Row(
        *("loha", "LoHaConfig", "LoHaModel", "hada_", ("LoHaLayer", "Linear", "Conv1d", "Conv2d")),
        *(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), LYCORIS),
        mixes=True,
    ),
    "LOKR": Row(
        *("lokr", "LoKrConfig", "LoKrModel", "lokr_", ("LoKrLayer", "Linear", "Conv1d", "Conv2d")),
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        LYCORIS,
        mixes=True,
    ),
    "MISS": Row(
        *("miss", "MissConfig", "MissModel", "miss_", ("MissLayer", "MissLinear")),
        *(("miss_block",), ("miss_r", "miss_dropout", "miss_mini_r")),
        aliases={"miss_r": "r", "miss_dropout": "dropout", "miss_mini_r": "mini_r"},
    ),
    "MULTITASK_PROMPT_TUNING": Row(
        *("multitask_prompt_tuning", "MultitaskPromptTuningConfig"),
        *("MultitaskPromptEmbedding", "multitask_prompt_tuning_"),
    ),
    "OFT": Row(
        *("oft", "OFTConfig", "OFTModel", "oft_", ("OFTLayer", "Linear", "Conv2d", "Embedding")),
        *(("oft_R", "oft_embedding_R"), ("r", "oft_block_size", "oft_dropout")),
        aliases={"oft_dropout": "dropout"},
    ),
    "OSF": Row(
        *("osf", "OSFConfig", "OSFModel", "osf_", ("OSFLayer", "Linear"), ("osf_svd_params",)),
        takes_any=True,
    ),
    "P_TUNING": Row("p_tuning", "PromptEncoderConfig", "PromptEncoder", "p_tuning_"),
    "PEANUT": Row(
        *("peanut", "PeanutConfig", "PeanutModel", "peanut_", ("PeanutLayer", "Linear")),
        *(("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"), ("r", "res_num", "scaling")),
        aliases={"res_num": "depth"},
    ),
    "POLY": Row(
        *("poly", "PolyConfig", "PolyModel", "poly_", ("PolyLayer", "Linear")),
        ("poly_lora_A", "poly_lora_B", "poly_router"),
        ("r", "n_tasks", "n_skills", "n_splits", "poly_type"),
    ),
    "PREFIX_TUNING": Row("prefix_tuning", "PrefixTuningConfig", "PrefixEncoder", "prefix_tuning_"),
    "PROMPT_TUNING": Row("prompt_tuning", "PromptTuningConfig", "PromptEmbedding", "prompt_tuning_"),
    "PSOFT": Row(
        *("psoft", "PsoftConfig", "PsoftModel", "psoft_", ("PsoftLayer", "Linear")),
        *(("psoft_R",), ("r", "psoft_alpha", "scaling", "psoft_dropout")),
        aliases={"psoft_dropout": "dropout"},
    ),
    "PVERA": Row(
        *("pvera", "PveraConfig", "PveraModel", "pvera_lambda_", ("PveraLayer", *BNB, "Linear")),
        *(("pvera_lambda_b", "pvera_lambda_d"), ("pvera_A", "pvera_B", "pvera_dropout", "r")),
        shares=True,
        aliases={"pvera_dropout": "dropout"},
    ),
    "RANDLORA": Row(
        *("randlora", "RandLoraConfig", "RandLoraModel", "randlora_", ("RandLoraLayer", *BNB, "Linear")),
        ("randlora_lambda", "randlora_gamma"),
        ("randlora_A", "randlora_B", "randlora_dropout", "r", "scaling"),
        aliases={"randlora_dropout": "dropout"},
    ),
    "ROAD": Row(
        *("road", "RoadConfig", "RoadModel", "road_", ("RoadLayer", *BNB, "Linear")),
        *(("road_theta", "road_alpha"), ("variant", "group_size")),
        mixes=True,
    ),
    "SHADOW": Row("shadow", "ShadowConfig", "ShadowModel", "shadow_", ("ShadowLayer",)),
    "SHIRA": Row(
        *("shira", "ShiraConfig", "ShiraModel", "shira_", ("ShiraLayer", "Linear")),
        *(("shira_weight",), ("r", "scaling", "shira_indices")),
        mixes=True,
    ),
    "SUPERTUNING": Row(
        *("supertuning", "SupertuningConfig", "SupertuningModel", "supertuning_", ("SupertuningLayer", "Linear")),
        *(("supertuning_values", "supertuning_lora_A", "supertuning_lora_B"), ("supertuning_indices",)),
    ),
    "TINYLORA": Row(
        *("tinylora", "TinyLoraConfig", "TinyLoraModel", "tinylora_", ("TinyLoraLayer", "Linear", "Embedding")),
        *(("tinylora_v",), ("tinylora_A", "tinylora_B", "tinylora_P")),
        shares=True,
    ),
    "TRAINABLE_TOKENS": Row(
        *("trainable_tokens", "TrainableTokensConfig", "TrainableTokensModel", "trainable_tokens_"),
        *(("TrainableTokensLayer",), ("trainable_tokens_delta",), ("token_indices", "trainable_tokens_original")),
        aliases={"trainable_tokens_original": "originals"},
    ),
    "UNILORA": Row(
        *("unilora", "UniLoraConfig", "UniLoraModel", "unilora_", ("UniLoraLayer", "Linear")),
        *(("unilora_theta_d",), ("r", "unilora_indices_A", "unilora_indices_B", "unilora_dropout")),
        shares=True,
        aliases={"unilora_dropout": "dropout"},
    ),
    "VBLORA": Row(
        *("vblora", "VBLoRAConfig", "VBLoRAModel", "vblora_", ("VBLoRALayer", "Linear")),
        *(("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"), ("r", "topk", "vblora_dropout")),
        shares=True,
        aliases={"vblora_dropout": "dropout"},
    ),
    "VERA": Row(
        *("vera", "VeraConfig", "VeraModel", "vera_lambda_", ("VeraLayer", *BNB, "Linear")),
        *(("vera_lambda_b", "vera_lambda_d"), ("vera_A", "vera_B", "vera_dropout", "r")),
        shares=True,
        aliases={"vera_dropout": "dropout"},
    ),
    "WAVEFT": Row(
        *("waveft", "WaveFTConfig", "WaveFTModel", "waveft_", ("WaveFTLayer", "WaveFTLinear")),
        *(("waveft_spectrum",), ("waveft_n_frequency", "waveft_scaling")),
        aliases={"waveft_n_frequency": "n_frequency", "waveft_scaling": "scaling"},
    ),
    "XLORA": Row("xlora", "XLoraConfig", "XLoraModel", "xlora_", ("XLoraLayer",)),
}

CONVERTS = {
    *("C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "LOHA", "LOKR", "LORA", "MISS", "PSOFT", "RANDLORA"),
    *("TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
"""Methods whose linear layers PEFT can make a LoRA of."""

EVERYWHERE = {"lora_dropout": "dropout", "modules_to_save": "module", "original_bias": "bias"}
"""Attributes of an adapter, by the name that PEFT gives them on a layer; those of one method are in its row."""

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
"""Common fields that PEFT's config of a method does not have."""

IN_MODULES = ("lora_magnitude_vector",)
"""Parameters that PEFT keeps in a module of their own."""

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
