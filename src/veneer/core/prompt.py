"""The base class of prompt methods, which learn positions in front of the input as embeddings or as cache entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..upstream import cache as caches
from .adapter import Tensors

if TYPE_CHECKING:
    from .config import PromptConfig


@dataclass(frozen=True)
class Spec:
    """The sizes of the model that a prompt is created for."""

    width: int
    layers: int
    heads: int
    """The number of heads in a cache entry: the key-value heads under grouped-query attention."""
    head_dim: int
    submodules: int
    """1, or 2 for an encoder-decoder. Embeddings may have 1 there too, because only the encoder reads them."""


class Prompt(nn.Module):
    """The learned positions of one adapter.

    Subclasses define one of:

    - `embeds(facts) -> (n, width)` or (batch, n, width): embeddings in front of the input embeddings.
    - `key_values(facts) -> [(k, v), ...]`, one pair per layer, each (heads, n, head_dim): the first cache entries.
    """

    def __init__(self, config: PromptConfig, spec: Spec, words: Tensor) -> None:
        """`words` is the base model's input embedding (vocabulary, width), for the initial values."""
        super().__init__()
        self.config: Any = config
        self.spec = spec

    @property
    def n(self) -> int:
        """The number of learned positions."""
        assert self.config.num_virtual_tokens is not None
        return self.config.num_virtual_tokens

    def embeds(self, facts: dict[str, Any]) -> Tensor | None:
        return None

    def key_values(self, facts: dict[str, Any]) -> list[tuple[Tensor, Tensor]] | None:
        return None

    def labels(self, labels: Tensor, facts: dict[str, Any]) -> Tensor:
        """The labels (batch, length) with those of the learned positions in front: -100, so they add no loss."""
        return F.pad(labels, (self.n, 0), value=-100)

    def loss(self, logits: Any, facts: dict[str, Any]) -> Tensor | None:
        """A loss that replaces the model's own; None keeps the model's. Called only if the model returned a loss."""
        return None

    def extra_repr(self) -> str:
        return f"{self.n} positions of {self.spec.width}"

    def export(self) -> Tensors:
        """The tensors to save, by key. Keys of prompts have no prefix."""
        return self.state_dict()

    def absorb(self, tensors: Tensors) -> None:
        """Load tensors from a file: in place, except for placeholder tensors."""
        self.load_state_dict(tensors, strict=False, assign=any(p.is_meta for p in self.parameters()))


def spec_for(model: nn.Module, config: PromptConfig) -> Spec:
    """Read the sizes from the model's config, and set them in `config`, because they are saved with it.

    Raises:
        ConfigError: a size that the user set differs from the model's, or the model cannot use a prompt.
    """
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise ConfigError(f"a prompt needs a transformers model, not {type(model).__name__}")
    if config.fills_cache and caches.argument(model) is None:
        config.refuse_cacheless(type(model).__name__)
    text = model.config.get_text_config()
    sizes = _sizes(text, config.fills_cache)
    if not config.fills_cache:
        # narrower than the stream in RemBERT, ALBERT and OPT-350m, which project it
        sizes["token_dim"] = model.get_input_embeddings().weight.shape[-1]
    encoder_only = config.num_transformer_submodules == 1 and not config.fills_cache
    sizes["num_transformer_submodules"] = (
        2 if getattr(model.config, "is_encoder_decoder", False) and not encoder_only else 1
    )
    for name, size in sizes.items():
        if getattr(config, name) not in (None, size):
            raise ConfigError(f"{name} = {getattr(config, name)}, but {type(model).__name__} has {size}; omit it")
        setattr(config, name, size)
    width, heads, layers, submodules = sizes.values()
    return Spec(width, layers, heads, width // heads, submodules)


def _sizes(text: Any, of_cache: bool) -> dict[str, int]:
    """The width, attention heads and layers; for a cache, width and heads of the keys (grouped-query attention)."""
    width = _read(text, "hidden_size", "n_embd", "d_model")
    names = ("num_attention_heads", "n_head", "num_heads")
    layers = _read(text, "num_hidden_layers", "num_layers", "n_layer")
    has_attention = of_cache or any(getattr(text, name, None) is not None for name in names)
    heads = _read(text, *names) if has_attention else 1  # PEFT rejects a file without this field
    if of_cache:
        first = caches.config_of(text, 0)
        head_dim = getattr(first, "head_dim", None) or getattr(first, "d_kv", None) or width // heads
        heads = getattr(first, "num_key_value_heads", None) or heads
        entries = caches.entries(text, layers, caches.Entry(heads, head_dim))
        kept = [entry for entry in entries if entry is not None]
        if not kept:
            raise ConfigError("a prompt in the cache needs layers that keep keys and values, and this model has none")
        heads = max(entry.heads for entry in kept)
        width = heads * max(entry.head_dim for entry in kept)
    return {"token_dim": width, "num_attention_heads": heads, "num_layers": layers}


def _read(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise ConfigError(f"a prompt needs a size that the model's config lacks: it has none of {', '.join(names)}")
