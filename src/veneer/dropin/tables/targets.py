"""PEFT's default targets where they differ from the ones veneer chooses, by method and model type."""

from __future__ import annotations

COMMON: dict[str, str | list[str]] = {
    "blip-2": ["q", "q_proj", "v", "v_proj"],
    "chatglm": ["query_key_value"],
    "RefinedWebModel": ["query_key_value"],
    "RefinedWeb": ["query_key_value"],
    "btlm": ["c_attn", "c_proj"],
    "phi": ["fc1", "fc2", "q_proj", "v_proj"],
    "gemma4": ".*language_model\\..*\\.(q_proj|v_proj)",
    "nemotron_h": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "rwkv": ["key", "output", "receptance", "value"],
    "rwkv7": ["k_proj", "key", "o_proj", "r_proj", "v_proj", "value"],
}
"""Default `target_modules` of all methods but those in `NOT_COMMON`, by model type."""

NOT_COMMON = ("LN_TUNING", "IA3", "BEFT", "ADALORA", "VBLORA", "OSF")
"""Methods to which `COMMON` does not apply."""

BY_METHOD: dict[tuple[str, str], dict[str, str | list[str]]] = {
    ("C3A", "target_modules"): {
        "gpt2": ["mlp.c_proj"],
        "gpt_bigcode": ["mlp.c_proj"],
    },
    ("ADAMSS", "target_modules"): {
        "vit": ["query", "value"],
    },
    ("FOURIERFT", "target_modules"): {
        "gpt2": ["mlp.c_proj"],
        "gpt_bigcode": ["mlp.c_proj"],
    },
    ("SHIRA", "target_modules"): {
        "phi": ["q_proj", "v_proj"],
    },
    ("VERA", "target_modules"): {
        "phi": ["q_proj", "v_proj"],
    },
    ("FROD", "target_modules"): {
        "vit": ["query", "value"],
        "phi": ["q_proj", "v_proj"],
    },
    ("PVERA", "target_modules"): {
        "dinov2": ["query", "value"],
        "phi": ["q_proj", "v_proj"],
    },
    ("LN_TUNING", "target_modules"): {
        "bloom": ["input_layernorm", "ln_f", "post_attention_layernorm"],
        "llava": [
            "embed_tokens",
            "input_layernorm",
            "lm_head",
            "multi_modal_projector",
            "norm",
            "post_attention_layernorm",
        ],
        "bart": ["encoder_attn_layer_norm", "final_layer_norm", "self_attn_layer_norm"],
        "blip-2": ["LayerNorm", "final_layer_norm", "layernorm", "self_attn_layer_norm"],
        "gemma3_text": [
            "input_layernorm",
            "norm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "pre_feedforward_layernorm",
        ],
        "qwen2": ["post_attention_layernorm"],
        "qwen3": ["post_attention_layernorm"],
        "phi": ["final_layernorm", "input_layernorm"],
    },
    ("IA3", "target_modules"): {
        "mt5": ["k", "v", "wi_1"],
        "roberta": ["key", "output.dense", "value"],
        "opt": ["fc2", "k_proj", "q_proj"],
        "gptj": ["fc_out", "q_proj", "v_proj"],
        "gpt_neo": ["c_proj", "q_proj", "v_proj"],
        "bart": ["fc2", "q_proj", "v_proj"],
        "llama4": ["down_proj", "q_proj", "v_proj"],
        "mixtral": ["k_proj", "v_proj", "w2"],
        "bert": ["key", "output.dense", "value"],
        "deberta-v2": ["key_proj", "output.dense", "value_proj"],
        "deberta": ["in_proj", "output.dense"],
        "RefinedWebModel": ["dense_4h_to_h", "query_key_value"],
        "RefinedWeb": ["dense_4h_to_h", "query_key_value"],
        "phi": ["fc2", "q_proj", "v_proj"],
        "gemma": ["down_proj", "q_proj", "v_proj"],
        "gemma2": ["down_proj", "q_proj", "v_proj"],
        "gemma3_text": ["down_proj", "q_proj", "v_proj"],
        "qwen2": ["down_proj", "q_proj", "v_proj"],
        "qwen3": ["down_proj", "q_proj", "v_proj"],
    },
    ("BEFT", "target_modules"): {
        "phi": ["v_proj"],
    },
    ("IA3", "feedforward_modules"): {
        "mt5": [],
        "roberta": ["output.dense"],
        "mixtral": ["w2"],
        "bert": ["output.dense"],
        "deberta-v2": ["output.dense"],
        "deberta": ["output.dense"],
        "RefinedWeb": ["dense_4h_to_h"],
        "RefinedWebModel": ["dense_4h_to_h"],
    },
    ("ADALORA", "target_modules"): {
        "t5": ["k", "o", "q", "v", "wi", "wo"],
        "mt5": ["k", "o", "q", "v", "wi_0", "wi_1", "wo"],
        "bart": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        "opt": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        "roberta": ["dense", "key", "query", "value"],
        "deberta-v2": ["dense", "key_proj", "query_proj", "value_proj"],
    },
    ("VBLORA", "target_modules"): {
        "t5": ["k", "o", "q", "v", "wi", "wo"],
        "mt5": ["k", "o", "q", "v", "wi_0", "wi_1", "wo"],
        "bart": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        "opt": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        "deberta-v2": ["dense", "key_proj", "query_proj", "value_proj"],
    },
    ("OSF", "target_modules"): {
        "llama4": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "phi": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "gpt2": ["c_attn", "c_proj"],
        "bloom": ["dense_4h_to_h", "query_key_value"],
        "gpt_neox": ["dense_4h_to_h", "query_key_value"],
        "falcon": ["dense_4h_to_h", "query_key_value"],
        "gpt_bigcode": ["c_attn", "c_proj"],
    },
    ("WAVEFT", "target_modules"): {
        "gpt2": ["mlp.c_proj"],
        "gpt_bigcode": ["mlp.c_proj"],
    },
}
"""Defaults of single methods, by method and field, then by model type; they precede those in `COMMON`."""


def default(kind: str, field: str, model_type: str | None) -> str | list[str] | None:
    """PEFT's default for a method's field, or None where veneer's is the same."""
    targets = BY_METHOD.get((kind, field), {}).get(str(model_type))
    if targets is None and field == "target_modules" and kind not in NOT_COMMON:
        targets = COMMON.get(str(model_type))
    return list(targets) if isinstance(targets, list) else targets
