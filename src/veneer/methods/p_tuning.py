"""P-tuning: learn embeddings in front of the input through an encoder that ties them to each other.

    [h_1 ... h_n, E(x_1) ... E(x_T)],  h = MLP(e)  or  MLP(BiLSTM(e)),  e learned

Liu et al., 2021, arXiv:2103.10385. Trainable: n x width and the encoder. Not mergeable: it has no weight form. The
prompt stands in front of the input, not between its words as in the paper. The file holds the encoded prompt alone, so
the encoder can be used but not trained on from a file. It is written without the encoder's dropout, which PEFT forgets.
torch.compile breaks its graph at an LSTM; the MLP traces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Tensors
from ..core.config import Name, PromptConfig, check_range
from ..core.prompt import Prompt, Spec
from ..errors import CheckpointError, ConfigError

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
        if config.encoder_reparameterization_type == "LSTM":
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            sizes = (2 * hidden, 2 * hidden, width)
        else:
            sizes = (width, hidden, hidden, width)  # type: ignore[assignment]
        linears = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.mlp_head = nn.Sequential(*(m for linear in linears for m in (linear, nn.ReLU())))[:-1]

    def encoded(self) -> Tensor:
        """(n, width); for an encoder-decoder twice the rows, of which the file's second half is never spliced."""
        if not self.is_encoded:
            return self.prompt_embeddings
        e = self.embedding.weight
        return self.mlp_head(self.lstm_head(e)[0] if hasattr(self, "lstm_head") else e)

    def embeds(self, facts: dict[str, Any]) -> Tensor:
        return self.encoded()[: self.n]

    @torch.enable_grad()  # an LSTM's kernels with and without gradients differ in the last bits
    def export(self) -> Tensors:
        was_training = self.training
        self.eval()
        try:
            return {"prompt_embeddings": self.encoded().detach()}
        finally:
            self.train(was_training)

    def absorb(self, tensors: Tensors) -> None:
        if self.is_encoded:
            raise CheckpointError(
                "the file holds the encoded prompt, from which the encoder cannot be recovered: load it with "
                "is_trainable=False, or train with PromptTuningConfig to be able to resume"
            )
        super().absorb(tensors)


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptConfig):
    encoder_reparameterization_type: str = "MLP"
    """The encoder: "MLP" (three layers) or "LSTM" (bidirectional, then two layers)."""
    encoder_hidden_size: int | None = None
    """Width of the encoder's hidden layers; None: the embeddings' own width."""
    encoder_num_layers: int = 2
    """Layers of the LSTM; the MLP has three whatever this says."""
    encoder_dropout: float = 0.0
    """Between the layers of the LSTM."""

    peft_type, prompt = Name("P_TUNING"), PTuning
    learning_rate = 1e-3

    def __post_init__(self) -> None:
        kind = self.encoder_reparameterization_type
        self.encoder_reparameterization_type = getattr(kind, "value", kind)
        super().__post_init__()
        if self.encoder_reparameterization_type not in ENCODERS:
            raise ConfigError(
                f"encoder_reparameterization_type must be {' or '.join(ENCODERS)}, "
                f"not {self.encoder_reparameterization_type!r}"
            )
        check_range(self, 1, math.inf, "encoder_hidden_size", "encoder_num_layers")
        check_range(self, 0, 1, "encoder_dropout")
