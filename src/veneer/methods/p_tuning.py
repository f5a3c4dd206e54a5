"""P-tuning: learn embeddings in front of the input, computed by an encoder that relates them to each other.

    [h_1 ... h_n, E(x_1) ... E(x_T)],  h = MLP(e)  or  MLP(BiLSTM(e)),  e learned

Liu et al., 2021, arXiv:2103.10385. Trainable: n x width and the encoder. Not mergeable: it has no weight form. The
prompt is placed before the input, not between its words as in the paper. The file holds the encoded prompt, and the
file beside it (`core/remainder.py`) the encoder, for training on. The prompt is encoded for the file with dropout off;
PEFT leaves dropout on. torch.compile breaks the graph at the LSTM; the MLP is compiled without a graph break.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Tensors
from ..core.config import Name, PromptConfig, check_range
from ..core.prompt import Prompt, Spec
from ..errors import ConfigError, NotResumable
from ..maths.precision import without_autocast
from ..targets.modules import evaluating

ENCODERS = ("MLP", "LSTM")


class PTuning(Prompt):
    def __init__(self, config: PromptEncoderConfig, spec: Spec, words: Tensor) -> None:
        super().__init__(config, spec, words)
        rows = self.n * spec.submodules
        config.encoder_hidden_size = config.encoder_hidden_size or spec.width
        self.is_encoded = not config.inference_mode
        if self.is_encoded:
            self.embedding = nn.Embedding(rows, spec.width)
            self._add_encoder(config, spec.width, config.encoder_hidden_size)
        else:
            self.prompt_embeddings = nn.Parameter(torch.randn(rows, spec.width))

    def _add_encoder(self, config: PromptEncoderConfig, width: int, hidden: int) -> None:
        sizes: tuple[int, ...]
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                width,
                hidden,
                config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            sizes = (2 * hidden, 2 * hidden, width)
        else:
            sizes = (width, hidden, hidden, width)
        layers: list[nn.Module] = []
        for in_features, out_features in pairwise(sizes):
            layers.append(nn.Linear(in_features, out_features))
            layers.append(nn.ReLU())
        self.mlp_head = nn.Sequential(*layers[:-1])

    def encoded(self) -> Tensor:
        """The prompt, (n, width); for an encoder-decoder (2 n, width) as in PEFT's files, the second half unused."""
        if not self.is_encoded:
            return self.prompt_embeddings
        e = self.embedding.weight
        with without_autocast(e):  # not every CPU has an LSTM in half precision
            if hasattr(self, "lstm_head"):
                e, _ = self.lstm_head(e)
            return self.mlp_head(e)

    def embeds(self, facts: dict[str, Any]) -> Tensor:
        return self.encoded()[: self.n]

    @torch.enable_grad()  # an LSTM's kernels with and without gradients differ in the last bits
    def export(self) -> Tensors:
        with evaluating(self):
            return {"prompt_embeddings": self.encoded().detach()}

    def remainder(self) -> Tensors:
        return self.state_dict() if self.is_encoded else {}

    def absorb(self, tensors: Tensors) -> None:
        if self.is_encoded and "embedding.weight" not in tensors:
            raise NotResumable.because("the encoded prompt", "the encoder", "PromptTuningConfig")
        super().absorb(tensors)


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptConfig):
    encoder_reparameterization_type: str = "MLP"
    """The encoder: "MLP" (three layers) or "LSTM" (bidirectional, then two layers)."""
    encoder_hidden_size: int | None = None
    """Width of the encoder's hidden layers; None: the width of the embeddings."""
    encoder_num_layers: int = 2
    """Layers of the LSTM. The MLP always has three."""
    encoder_dropout: float = 0.0
    """Dropout between the layers of the LSTM during training."""

    peft_type = Name("P_TUNING")
    prompt = PTuning
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        encoder = self.encoder_reparameterization_type
        self.encoder_reparameterization_type = getattr(encoder, "value", encoder)
        super().__post_init__()
        if self.encoder_reparameterization_type not in ENCODERS:
            raise ConfigError(
                f"encoder_reparameterization_type must be {' or '.join(ENCODERS)}, "
                f"not {self.encoder_reparameterization_type!r}"
            )
        check_range(self, 1, math.inf, "encoder_hidden_size", "encoder_num_layers")
        check_range(self, 0, 1, "encoder_dropout")
