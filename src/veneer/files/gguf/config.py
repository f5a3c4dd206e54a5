"""The config of transformers for a GGUF file, from its metadata and the names of its tensors.

What the file says and the config cannot express would be another model, so it is refused by name. transformers' own
loader passes over what it does not know: Llama 3's rotary embedding, biases, the scaling of long contexts.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, listing, printable
from .architectures import ARCHITECTURES, Architecture, check_computed
from .reader import Settings, Source
from .tensors import ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT, rope_factors

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (True,),
}
"""Values of keys that say nothing about the model; llama.cpp reads `use_parallel_residual` for GPT-NeoX only."""
LARGEST = 2**31
BLOCK = re.compile(r"blk\.(\d+)\.")
FREQ_BASE = 10000.0
"""llama.cpp's base of the rotary embedding's frequencies if a file gives none."""
DEFAULTS = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096},
}
"""llama.cpp's defaults of settings that a file may leave out, by architecture."""
NEAR = 1e-5
"""The largest relative difference of the rotary embedding's factors, which are stored in fp32."""


def model_type_of(source: Source) -> str:
    """The model type of transformers for a file.

    Raises:
        ConfigError: the architecture is not one of `ARCHITECTURES`.
    """
    for model_type, architecture in ARCHITECTURES.items():
        if architecture.name == source.architecture:
            return model_type
    known = list(dict.fromkeys(architecture.name for architecture in ARCHITECTURES.values()))
    raise ConfigError(
        f"{source.shown} holds a model of the architecture {printable(source.architecture, 80)!r}; GGUF files of "
        f"these can be loaded: {', '.join(known)}"
    )


def config_of(source: Source) -> Any:
    """The config of the model in a file.

    Raises:
        ConfigError: transformers has no such model, or would lose something that the file says.
        CheckpointError: the file lacks settings, or its settings do not fit its tensors.
    """
    from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
    from transformers import AutoConfig

    model_type = model_type_of(source)
    architecture = ARCHITECTURES[model_type]
    reading = _Reading(source, architecture)
    values = reading.sizes() | reading.heads() | reading.biases() | reading.of_model_type(model_type)
    if architecture.ropes:
        values["rope_parameters"] = reading.rope(model_type)
    values |= reading.tokens()
    config_class = type(AutoConfig.for_model(model_type))
    renamed = {config_class.attribute_map.get(name, name): value for name, value in values.items()}
    strict = (StrictDataclassClassValidationError, StrictDataclassFieldValidationError)
    try:
        config = config_class(**renamed, architectures=[_class_name(config_class)])
    except (ValueError, TypeError, KeyError, ZeroDivisionError, *strict) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source.shown} has settings that are no model: {printable(reason)}") from None
    reading.check_read()
    _check_rope(source, config)
    check_computed(config)
    return config


def _class_name(config_class: Any) -> str:
    """The name of the language model of a config's class."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    return str(mapping[config_class].__name__)


class _Reading:
    """Reads the settings of one file."""

    def __init__(self, source: Source, architecture: Architecture) -> None:
        self.source = source
        self.architecture = architecture
        self.settings = Settings(source.metadata, architecture.name)
        self.names = set(source.names)

    def sizes(self) -> dict[str, Any]:
        """The settings that the architecture's table names."""
        values: dict[str, Any] = {}
        defaults = DEFAULTS.get(self.architecture.name, {})
        for key, setting in self.architecture.metadata.items():
            value = self.settings.read(key, defaults.get(key))
            if key == "vocab_size":
                value = self._rows_of_embedding()
            if key == "attention.head_count_kv" and value is None:
                value = self.settings.read("attention.head_count")
            if value is None and key not in OPTIONAL:
                raise self._lacks(key)
            values[setting] = _plain(value)
        for setting in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            self._check_count(setting, values[setting])
        self._check_count("num_key_value_heads", values.get("num_key_value_heads", 1))
        blocks = {int(found.group(1)) for found in map(BLOCK.match, self.names) if found}
        if blocks != set(range(values["num_hidden_layers"])):
            raise CheckpointError(
                f"{self.source.shown} says that it has {values['num_hidden_layers']} blocks, but holds tensors of "
                f"{len(blocks)}"
            )
        self.hidden_size = values["hidden_size"]
        self.count_heads = values["num_attention_heads"]
        values["tie_word_embeddings"] = "output.weight" not in self.names
        return values

    def _rows_of_embedding(self) -> int:
        if "token_embd.weight" not in self.names:
            raise CheckpointError(f"{self.source.shown} has no tensor token_embd.weight")
        rows = self.source.shape("token_embd.weight")[0]
        said = self.settings.read("vocab_size", rows)
        if said != rows:
            raise CheckpointError(
                f"{self.source.shown} says that its vocabulary has {said} tokens, but its embedding has {rows} rows"
            )
        return rows

    def _lacks(self, key: str) -> CheckpointError:
        return CheckpointError(f"{self.source.shown} lacks the setting {self.architecture.name}.{key}")

    def _check_count(self, setting: str, value: Any) -> None:
        if isinstance(value, list):
            raise ConfigError(
                f"{self.source.shown} gives each block its own {setting}, which a {self.architecture.title} of "
                "transformers cannot have"
            )
        if not isinstance(value, int) or not 0 < value < LARGEST:
            raise CheckpointError(f"{self.source.shown} says {setting} = {value!r}, which is no size")

    def heads(self) -> dict[str, Any]:
        """The size of an attention head."""
        default = self.hidden_size // self.count_heads
        size = self.settings.read("attention.key_length", default)
        self._check_count("attention.key_length", size)
        if self.settings.read("attention.value_length", size) != size:
            raise ConfigError(f"{self.source.shown} has values of another size than keys (attention.value_length)")
        self.head_size = size
        if self.architecture.name in FIXED_HEADS:
            if size != default:
                raise ConfigError(
                    f"{self.source.shown} has heads of {size} entries; a {self.architecture.title} of transformers "
                    f"has {default}"
                )
            return {}
        return {"head_dim": size}

    def biases(self) -> dict[str, Any]:
        """Whether layers have biases, where the config can say so."""
        values = {}
        if self.architecture.name in WITH_BIASES:
            values["attention_bias"] = any(".attn_" in name and name.endswith(".bias") for name in self.names)
            values["mlp_bias"] = any(".ffn_" in name and name.endswith(".bias") for name in self.names)
        return values

    def of_model_type(self, model_type: str) -> dict[str, Any]:
        """Settings that llama.cpp fixes for an architecture, or that only one has."""
        if model_type in ("gemma2", "gemma3_text"):
            is_27b = self.settings.read("block_count") in (46, 62)
            return {"query_pre_attn_scalar": self.hidden_size // self.count_heads if is_27b else self.head_size}
        if model_type == "phi3":
            window = self.settings.read("attention.sliding_window")
            return {"sliding_window": window or None}
        if model_type == "gpt2":
            return {"n_inner": self.settings.read("feed_forward_length")}
        return {}

    # The rotary embedding

    def rope(self, model_type: str) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default"}
        rope["rope_theta"] = _plain(self.settings.read("rope.freq_base", FREQ_BASE))
        rotated = self.settings.read("rope.dimension_count", self.head_size)
        if rotated != self.head_size:
            if model_type != "phi3":
                raise ConfigError(
                    f"{self.source.shown} rotates {rotated} of {self.head_size} entries of each head, which a "
                    f"{self.architecture.title} of transformers does not do (rope.dimension_count)"
                )
            rope["partial_rotary_factor"] = rotated / self.head_size
        rope |= self._scaling()
        if model_type == "gemma3_text":
            local = _plain(self.settings.read("rope.freq_base_swa", FREQ_BASE))
            return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        return rope

    def _scaling(self) -> dict[str, Any]:
        if ROPE_LONG in self.names and ROPE_SHORT in self.names:
            return self._longrope()
        if ROPE_FREQUENCIES in self.names:
            return _llama3(self.source.value(ROPE_FREQUENCIES).float())
        kind = self._kind_of_scaling("none", "linear", "yarn")
        if kind == "none":
            return {}
        factor = self.settings.read("rope.scaling.factor")
        if factor is None:
            raise self._lacks("rope.scaling.factor")
        scaling: dict[str, Any] = {"rope_type": kind, "factor": _plain(factor)}
        if kind == "yarn":
            original = self.settings.read("rope.scaling.original_context_length")
            if original is None:
                raise self._lacks("rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = original
            for name in ("beta_fast", "beta_slow"):
                value = self.settings.read(f"rope.scaling.yarn_{name}")
                if value is not None:
                    scaling[name] = _plain(value)
        return scaling

    def _kind_of_scaling(self, *known: str) -> str:
        kind = self.settings.read("rope.scaling.type", "none")
        if kind not in known:
            raise ConfigError(
                f"{self.source.shown} scales its rotary embedding as no {self.architecture.title} of transformers "
                f"with its tensors does: {self.architecture.name}.rope.scaling.type = {kind!r}"
            )
        return str(kind)

    def _longrope(self) -> dict[str, Any]:
        self._kind_of_scaling("none", "longrope")
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": [_plain(value) for value in self.source.value(ROPE_LONG).float().tolist()],
            "short_factor": [_plain(value) for value in self.source.value(ROPE_SHORT).float().tolist()],
        }
        original = self.settings.read("rope.scaling.original_context_length")
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        attention = self.settings.read("rope.scaling.attn_factor")
        if attention is not None:
            scaling["attention_factor"] = _plain(attention)
        return scaling

    # Tokens

    def tokens(self) -> dict[str, Any]:
        """Ids of special tokens."""
        values: dict[str, Any] = {}
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        for setting, name in names.items():
            values[setting] = self.source.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return values

    def check_read(self) -> None:
        """Raise ConfigError if the file says something about the model that the config does not."""
        lost = []
        for key, value in self.settings.unread():
            if key not in NEUTRAL or value not in NEUTRAL[key]:
                lost.append(f"{self.architecture.name}.{key} = {value!r}")
        if lost:
            raise ConfigError(
                f"{self.source.shown} says what a {self.architecture.title} of transformers cannot express, and "
                f"would be another model without:{listing(lost)}"
            )


OPTIONAL = ("attn_logit_softcapping", "final_logit_softcapping", "rope.scaling.original_context_length")
"""Settings that a file may leave out because the model has none."""
FIXED_HEADS = ("qwen2", "phi3", "gpt2")
"""Architectures whose heads together are as wide as the stream."""
WITH_BIASES = ("llama", "smollm3")
"""Architectures whose config says whether there are biases."""


def _plain(value: Any) -> Any:
    """A number in its shortest form: 1e-06 instead of 9.999999974752427e-07, which is the same in fp32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama3(factors: Tensor) -> dict[str, Any]:
    """Llama 3's scaling from the divisors of its frequencies; (d / 2), all 1 without scaling.

    The factor is the largest divisor; `_check_rope` finds the other settings.
    """
    if torch.equal(factors, torch.ones_like(factors)):
        return {}
    return {"rope_type": "llama3", "factor": _digits(float(factors.max()))} | KNOWN


def _digits(value: float) -> float:
    """A number with four digits: the factors are quotients of fp32 numbers."""
    return float(f"{value:.4g}")


def _check_rope(source: Source, config: Any) -> None:
    """Find the settings of Llama 3's rotary embedding; raise ConfigError if no settings give the file's factors."""
    if ROPE_FREQUENCIES not in source.names:
        return
    if config.rope_parameters["rope_type"] != "llama3":
        return
    expected = source.value(ROPE_FREQUENCIES).float()
    for settings in (KNOWN, _fitted(config, expected)):
        config.rope_parameters |= settings
        if torch.allclose(rope_factors(config)[ROPE_FREQUENCIES], expected, rtol=NEAR):
            return
    raise ConfigError(
        f"{source.shown} scales its rotary embedding ({ROPE_FREQUENCIES}) in a way that no settings of Llama 3's "
        "scaling give"
    )


KNOWN = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The settings of Meta's models."""


def _fitted(config: Any, factors: Tensor) -> dict[str, Any]:
    """Settings of Llama 3's scaling with a `low_freq_factor` of 1 that fit the factors between its two wavelengths.

    There 1 / factor = (1 - s) / F + s with s = (original / wavelength - 1) / (high - 1), a line over 1 / wavelength.
    """
    rope = config.rope_parameters
    size = 2 * len(factors)
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    turns = rope["rope_theta"] ** -exponents / (2 * torch.pi)  # 1 / wavelength
    if not (rope["factor"] > 1 and turns.isfinite().all()):
        return {}
    least = 1 / rope["factor"]
    smooth = (1 / factors.double() - least) / (1 - least)
    between = (smooth > NEAR) & (smooth < 1 - NEAR)
    if between.sum() < 2:
        return {}
    line = np.polyfit(turns[between].numpy(), smooth[between].numpy(), 1)
    if line[1] == 0:
        return {}
    high = 1 - 1 / line[1]
    return {
        "low_freq_factor": 1.0,
        "high_freq_factor": _digits(high),
        "original_max_position_embeddings": round(line[0] * (high - 1)),
    }
