"""Tiny models of every kind. Sizes are odd and unequal, so that a transposed or swapped dimension cannot pass."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn


def llama(**kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA | kwargs))


LLAMA = dict(
    hidden_size=30,
    intermediate_size=45,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=1,
    head_dim=14,
    vocab_size=67,
    attention_bias=True,
    mlp_bias=False,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation="eager",
)


def tied(**kwargs):
    """A Llama whose head is its embedding."""
    return llama(tie_word_embeddings=True, **kwargs)


def gpt2(**kwargs):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=30, n_layer=2, n_head=5, n_inner=45, vocab_size=67, n_positions=64)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes | off | kwargs))


def mixtral(**kwargs):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(hidden_size=30, intermediate_size=22, num_hidden_layers=2, num_attention_heads=5, head_dim=14)
    sizes |= dict(num_key_value_heads=1, vocab_size=67, num_local_experts=3, max_position_embeddings=64, pad_token_id=0)
    sizes |= dict(experts_implementation="eager")  # torch's grouped product takes only aligned sizes
    return MixtralForCausalLM(MixtralConfig(**sizes | kwargs))


def mistral(**kwargs):
    """Heads that together are as wide as the stream, and no biases: what some of the reference's methods need."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {name: size for name, size in LLAMA.items() if name not in ("attention_bias", "mlp_bias")}
    return MistralForCausalLM(MistralConfig(**sizes | dict(head_dim=6) | kwargs))


def t5(**kwargs):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=30, d_kv=6, d_ff=45, num_layers=3, num_decoder_layers=3, num_heads=5, vocab_size=67)
    return T5ForConditionalGeneration(
        T5Config(**sizes | dict(dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1) | kwargs)
    )


def bert(head="ForSequenceClassification", **kwargs):
    import transformers

    sizes = dict(hidden_size=30, intermediate_size=45, num_hidden_layers=2, num_attention_heads=5, vocab_size=67)
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64)
    off["num_labels"] = 2 if head == "ForQuestionAnswering" else 3
    return getattr(transformers, f"Bert{head}")(transformers.BertConfig(**sizes | off | kwargs))


class ConvNet(nn.Module):
    """A ConvNet with non-square, strided, grouped and one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0))
        self.second = nn.Conv2d(6, 9, kernel_size=(2, 3), bias=False)
        self.third = nn.Conv1d(9, 10, kernel_size=3, padding=1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.third(x.flatten(2)).relu().mean(-1))


class Grouped(nn.Module):
    """A grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, kernel_size=(3, 2), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Dilated(nn.Module):
    """A dilated convolution with circular padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, kernel_size=(2, 3), dilation=(1, 2), padding=(1, 2), padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Square(nn.Module):
    """Square kernels, where the reference sizes its rotations right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Volume(nn.Module):
    """A three-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 5, kernel_size=(1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


CONVS = {"conv": ConvNet, "grouped": Grouped, "dilated": Dilated, "square": Square, "volume": Volume}
BUILDERS = {
    "llama": llama,
    "tied": tied,
    "gpt2": gpt2,
    "mistral": mistral,
    "mixtral": mixtral,
    "t5": t5,
    "bert": bert,
    **CONVS,
}
SHAPES = {
    "conv": (3, 3, 9, 8),
    "grouped": (3, 6, 7, 8),
    "dilated": (3, 3, 7, 8),
    "square": (3, 3, 7, 8),
    "volume": (3, 3, 4, 5, 6),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model; the same seed gives the same weights.

    Weights are large enough for adapters to show in the output; norms and biases are off their trivial starts.
    """
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1) if p.dim() == 1 else p.normal_(std=0.25)
    return model.eval().to(dtype)


def inputs(name: str, seed: int = 1, rows: int = 3, dtype: torch.dtype = torch.float32) -> dict:
    """A batch for the model called `name`."""
    torch.manual_seed(seed)
    if name in SHAPES:
        return {"x": torch.randn(rows, *SHAPES[name][1:], dtype=dtype)}
    ids = torch.randint(3, 67, (rows, 7))
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": torch.randint(3, 67, (rows, 5))}
    return {"input_ids": ids}


FACTS = ("task_ids",)
"""Entries of a batch that belong to adapters; a bare model knows nothing of them."""


def output(model: nn.Module, batch: dict, **facts) -> Tensor:
    """The model's logits on a batch (those of the answer's start, for question answering)."""
    is_adapted = hasattr(model, "peft_config")
    model_inputs = {k: v for k, v in batch.items() if k != "x" and (is_adapted or k not in FACTS)}
    out = model(batch["x"], **facts) if "x" in batch else model(**model_inputs, **facts)
    return out if isinstance(out, Tensor) else out.get("logits", out[0])


KEPT: deque = deque(maxlen=16)


def state(model):
    """Its State. That does not keep a model alive, so the last few are kept for tests that hold nothing but layers."""
    from veneer.core.state import state_of

    KEPT.append(model)
    return state_of(model.get_base_model())


def perturb(model: nn.Module, name: str = "default", seed: int = 2, scale: float = 0.1) -> nn.Module:
    """Move an adapter off its start, as training would."""
    from veneer.core.state import state_of

    generator = torch.Generator().manual_seed(seed)
    state = state_of(model.get_base_model())
    with torch.no_grad():
        for parameter in state.parameters(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model
