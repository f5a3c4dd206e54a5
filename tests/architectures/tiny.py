"""A tiny model of every architecture of transformers that generates text, from the defaults of its config class.

A config is made small by the names of its fields. `OWN` holds what an architecture needs beside that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

HIDDEN, HEADS, PAIRED, HEAD, INNER, LAYERS, WORDS, PLACES = 32, 4, 2, 8, 48, 2, 99, 128
"""Sizes: the stream, attention heads, key-value heads, the width of a head, the MLP, layers, words, positions."""
NUMBERS = (
    (
        HIDDEN,
        "hidden_size d_model n_embd embedding_size attention_hidden_size lru_width decoder_hidden_size emb_dim "
        "word_embed_proj_dim d_embed",
    ),
    (
        HEADS,
        "num_attention_heads encoder_attention_heads decoder_attention_heads num_heads n_head n_heads num_experts "
        "num_local_experts n_routed_experts linear_num_value_heads swa_num_attention_heads mamba_dt_rank "
        "time_step_rank rotary_dim moe_num_experts",
    ),
    (
        PAIRED,
        "num_key_value_heads swa_num_key_value_heads linear_num_key_heads index_n_heads num_experts_per_tok "
        "moe_topk moe_top_k type_vocab_size",
    ),
    (
        HEAD,
        "head_dim d_kv qk_rope_head_dim v_head_dim kv_lora_rank qk_nope_head_dim q_lora_rank swa_head_dim "
        "linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_state mamba_d_head mamba_n_heads "
        "mamba_num_heads mamba_head_dim mamba_chunk_size state_size chunk_size sliding_window window_size "
        "query_pre_attn_scalar hidden_size_per_layer_input attention_head_dim",
    ),
    (INNER, "intermediate_size encoder_ffn_dim decoder_ffn_dim d_ff ffn_dim n_inner ffn_hidden_size d_inner"),
    (
        LAYERS,
        "num_hidden_layers encoder_layers decoder_layers num_layers num_decoder_layers num_encoder_layers n_layer "
        "n_layers",
    ),
    (WORDS, "vocab_size vocab_size_per_layer_input"),
    (PLACES, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size qk_head_dim global_head_dim "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    ),
    (1, "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace n_groups mamba_n_groups"),
    (0, "num_nextn_predict_layers num_kv_shared_layers"),
    (64, "index_topk"),
)
SIZES = {name: number for number, names in NUMBERS for name in names.split()}
LAYER_COUNTS = tuple(name for name in SIZES if "layer" in name and SIZES[name] == LAYERS)
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layer_types")
"""Fields with one entry for each layer."""
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_local_experts": 4, "num_key_value_heads": 4, "layer_group_size": 2, "head_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 11},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1, "layer_types": None},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_loop_text": {"unpadded_vocab_size": 99},
    "inkling2_text": {"unpadded_vocab_size": 99},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"num_local_experts": 4, "num_experts_per_token": 2, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 16),
        "attention_head_size": HEAD,
        "feed_forward_size": INNER,
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 99},
    "xlm": {"causal": True, "mask_token_id": 5},
    "xlstm": {"embedding_dim": HIDDEN, "num_blocks": LAYERS},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "use_mamba_kernels": False,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


@cache
def classes() -> dict[str, str]:
    """The `model_type` of each model class of transformers that generates text from text."""
    from transformers.models.auto import modeling_auto

    types: dict[str, str] = {}
    for table in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for model_type, name in table.items():
            # a class may serve a composite model and its text part: the last is the text part
            if types.get(name) is None or model_type.endswith("_text"):
                types[name] = model_type
    return types


def fields_of(model_type: str, default: Any) -> dict[str, Any]:
    """The fields by which a config is tiny, given one with the defaults of its class."""
    values = default.to_dict()
    by_layer = {name: values[name] for name in BY_LAYER if isinstance(values.get(name), list)}
    by_layer |= {name: OWN.get(model_type, {}).get(name, kinds) for name, kinds in by_layer.items()}
    layers = max([LAYERS, *(len(dict.fromkeys(kinds)) for kinds in by_layer.values())])
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name in by_layer:
            distinct = list(dict.fromkeys(by_layer[name]))
            fields[name] = [distinct[i % len(distinct)] for i in range(layers)]
        elif name in TOKENS:
            fields[name] = TOKENS[name]
        elif ("drop" in name or "jitter" in name) and isinstance(value, float):
            fields[name] = 0.0
        elif name in SIZES and not isinstance(value, (bool, list, str)):
            fields[name] = layers if name in LAYER_COUNTS else SIZES[name]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS  # latent attention has as many of both
    return fields | OWN.get(model_type, {})


def config_of(config_class: type) -> Any:
    """A tiny config of a class, and of all that it is composed of."""
    default = config_class()
    fields = fields_of(config_class.model_type, default)
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if hasattr(part, "to_dict"):
            fields[name] = config_of(type(part))
    return config_class(**fields)


def build(class_name: str) -> nn.Module:
    """A tiny model, with the same weights each time."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, class_name)
    config = config_of(CONFIG_MAPPING[classes()[class_name]])
    own = model_class.config_class
    if own is not None and not isinstance(config, own):
        config = config.get_text_config()
    if config.is_encoder_decoder:
        config.decoder_start_token_id = TOKENS["decoder_start_token_id"]
    else:
        config.is_decoder = True
    torch.manual_seed(0)
    model = model_class(config)
    return model.eval()


MOST = 10_000_000
"""Parameters; a model of more is not tiny."""


def why_not(class_name: str) -> str:
    """Why an architecture cannot be tried: one line; empty if it can."""
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build(class_name).parameters())
        if parameters > MOST:
            return f"its config class cannot be made small by names of fields alone ({parameters:,} parameters)"
        model = build(class_name)
        ids = torch.arange(3, 12)[None]
        batch = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids
        with torch.no_grad():
            model(**batch)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
