"""The architectures that can be written as GGUF, and what llama.cpp computes for each.

Based on the sources of llama.cpp of 2026 (`src/models`) and the tables of gguf-py 0.19. llama.cpp fixes many things
that a config of transformers can set: the activation, which layers have a sliding window, the scale of the attention.
A config that asks for something else is refused, because llama.cpp would compute another model without saying so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError, listing

Problems = Callable[[Any], Iterator[str]]
"""Yields what a config asks for and llama.cpp does not compute."""

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
"""Metadata keys of all architectures, without the architecture's name, and the config's settings."""
GATED = SIZES | {
    "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Metadata keys of architectures with RMS norms and grouped queries."""
CAPPED = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
SILU = ("silu", "swish")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp represents and computes one model type of transformers."""

    title: str
    """Its name for people."""
    name: str
    """Its name in llama.cpp."""
    metadata: Mapping[str, str]
    """Settings of the config by metadata key."""
    activations: tuple[str, ...] = SILU
    """Values of the config's activation that llama.cpp computes."""
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    """Scalings of the rotary embedding that llama.cpp computes; empty without a rotary embedding."""
    interleaved: bool = False
    """The two halves of each head of q and k are interleaved, because llama.cpp rotates neighbouring pairs."""
    transposed: tuple[str, ...] = ()
    """Endings of weights that transformers stores as (in, out)."""
    norm_offset: float = 0.0
    """What llama.cpp expects to be added to the weights of norms: Gemma's norms scale by 1 + w."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the config with the only value that llama.cpp computes; a setting that is not there is skipped."""
    problems: Problems = lambda config: iter(())


def _heads_fill_the_stream(config: Any) -> Iterator[str]:
    """llama.cpp takes the head size of some architectures as embedding size / heads."""
    size = getattr(config, "head_dim", None)
    heads = config.num_attention_heads
    if size is not None and size * heads != config.hidden_size:
        yield f"head_dim = {size}; {heads} heads must be as wide as hidden_size = {config.hidden_size}"


def _gemma_scale(config: Any) -> Iterator[str]:
    """llama.cpp scales the attention of Gemma by its head size; in the 27B models, by the width of the stream."""
    is_27b = config.num_hidden_layers in (46, 62)
    expected = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if config.query_pre_attn_scalar != expected:
        yield f"query_pre_attn_scalar = {config.query_pre_attn_scalar}, not {expected}"


def _window_pattern(period: int) -> Problems:
    """The last of `period` layers sees all tokens, the others have a sliding window."""

    def problems(config: Any) -> Iterator[str]:
        yield from _gemma_scale(config)
        expected = []
        for layer in range(config.num_hidden_layers):
            is_full = (layer + 1) % period == 0
            expected.append("full_attention" if is_full else "sliding_attention")
        if list(config.layer_types) != expected:
            yield f"layer_types other than {period - 1} sliding_attention before each full_attention"

    return problems


def _no_rope_pattern(config: Any) -> Iterator[str]:
    """Each fourth layer of SmolLM3 has no rotary embedding."""
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != expected:
        yield "no_rope_layers other than each fourth layer"


LLAMA = Architecture(
    title="Llama (SmolLM2 too)",
    name="llama",
    metadata=GATED,
    ropes=("default", "linear", "yarn", "llama3"),
    interleaved=True,
)
MISTRAL = Architecture(
    title="Mistral",
    name="llama",
    metadata=GATED,
    ropes=("default", "linear", "yarn"),
    interleaved=True,
)
QWEN2 = Architecture(
    title="Qwen2",
    name="qwen2",
    metadata=GATED,
    fixed={"use_sliding_window": False},
    problems=_heads_fill_the_stream,
)
QWEN3 = Architecture(
    title="Qwen3",
    name="qwen3",
    metadata=GATED,
    fixed={"use_sliding_window": False, "attention_bias": False},
)
GEMMA2 = Architecture(
    title="Gemma 2",
    name="gemma2",
    metadata=GATED | CAPPED,
    activations=TANH_GELU,
    ropes=("default",),
    norm_offset=1.0,
    fixed={"attention_bias": False, "use_bidirectional_attention": (None, False)},
    problems=_window_pattern(2),
)
GEMMA3 = Architecture(
    title="Gemma 3 (text)",
    name="gemma3",
    metadata=GATED | CAPPED,
    activations=TANH_GELU,
    ropes=("default", "linear"),
    norm_offset=1.0,
    fixed={
        "attention_bias": False,
        "use_bidirectional_attention": (None, False),
        "attn_logit_softcapping": None,
    },
    problems=_window_pattern(6),
)
PHI3 = Architecture(
    title="Phi-3",
    name="phi3",
    metadata=GATED | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
    ropes=("default", "longrope"),
    problems=_heads_fill_the_stream,
)
SMOLLM3 = Architecture(
    title="SmolLM3",
    name="smollm3",
    metadata=GATED,
    interleaved=True,
    fixed={"use_sliding_window": False, "mlp_bias": False},
    problems=_no_rope_pattern,
)
GPT2 = Architecture(
    title="GPT-2",
    name="gpt2",
    metadata=SIZES | {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
    activations=TANH_GELU,
    ropes=(),
    transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "gpt2": GPT2,
}
"""The architectures by the config's `model_type`."""
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""Names of the activation in configs."""


def architecture_of(config: Any) -> Architecture:
    """The architecture of a config of transformers.

    Raises:
        ConfigError: it cannot be written as GGUF.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        titles = ", ".join(known.title for known in ARCHITECTURES.values())
        raise ConfigError(f"models of type {config.model_type!r} cannot be exported to GGUF; these can: {titles}")
    return architecture


def check_computed(config: Any) -> None:
    """Raise ConfigError if llama.cpp would compute another model than the one that a config describes."""
    architecture = architecture_of(config)
    problems = list(architecture.problems(config))
    for name in ACTIVATIONS:
        activation = getattr(config, name, None)
        if activation is not None and activation not in architecture.activations:
            problems.append(f"{name} = {activation!r}, not {architecture.activations[0]!r}")
    for name, allowed in architecture.fixed.items():
        values = allowed if isinstance(allowed, tuple) else (allowed,)
        if getattr(config, name, values[0]) not in values:
            problems.append(f"{name} = {getattr(config, name)!r}, not {values[0]!r}")
    if architecture.ropes:
        problems.extend(_rope_problems(config, architecture))
    if problems:
        raise ConfigError(
            f"llama.cpp computes {architecture.title} in one way, and the base model's config asks for another:"
            f"{listing(problems)}"
        )


def rope_of(config: Any) -> dict[str, Any]:
    """The settings of the rotary embedding, of the layers that see all tokens."""
    settings = config.rope_parameters
    return settings.get("full_attention", settings)


def local_rope_of(config: Any) -> dict[str, Any] | None:
    """The settings of the rotary embedding of layers with a sliding window, if they have their own."""
    return config.rope_parameters.get("sliding_attention")


def _rope_problems(config: Any, architecture: Architecture) -> Iterator[str]:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in architecture.ropes:
        yield f"rope_type = {kind!r}, not {' or '.join(architecture.ropes)}"
    if kind == "yarn":
        for name in ("attention_factor", "mscale", "mscale_all_dim", "truncate"):
            if rope.get(name) is not None:
                yield f"{name} = {rope[name]!r} in rope_parameters"
    local = local_rope_of(config)
    if local is not None and local.get("rope_type", "default") != "default":
        yield f"rope_type = {local['rope_type']!r} for layers with a sliding window"
