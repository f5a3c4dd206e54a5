"""Context-aware prompt tuning: refine the embeddings of examples in the context, within a small ball around each.

    [w_1 + d_1 ... w_n + d_n, E(x_1) ... E(x_T)],  |d_i| <= eps_i,  d_i = 0 at the examples' answers
    loss: the mean over the labels of the input and of the examples, an example k before the last weighing factor^k

Blau et al., 2024, arXiv:2410.17222. Trainable: n x width, including the answers, which do not change. Not mergeable.
Token types are 4k + 1 for the input format of example k, 4k + 2 for its input, 4k + 3 for its output format and 4k + 4
for its answer. A call passes the types of its own input as `input_type_mask`. PEFT adds the prompt's largest type to
them, which loses every label unless that type is a multiple of 4 (by default it is not); here the next multiple of 4 is
added. Without examples in the context (`cpt_token_ids`) the method gains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import Name, PromptConfig, TaskType, check_range
from ..core.prompt import Prompt, Spec
from ..core.sharding import whole, write_
from ..errors import ConfigError
from ..maths.answers import decay, is_answer


class CPT(Prompt):
    start: Tensor
    types: Tensor
    radius: Tensor

    def __init__(self, config: CPTConfig, spec: Spec, words: Tensor) -> None:
        super().__init__(config, spec, words)
        if spec.submodules > 1 or max(config.cpt_token_ids or ()) >= len(words):
            raise ConfigError(f"CPT needs a decoder, and cpt_token_ids below {len(words)}, its vocabulary's size")
        # These buffers need real values even when the rest is built on the meta device.
        device = words.device
        tokens = torch.tensor(config.cpt_token_ids, device=device)
        types = torch.tensor(config.cpt_tokens_type_mask, device=device)
        self.register_buffer("start", words.detach()[tokens].float(), persistent=False)
        self.register_buffer("types", types, persistent=False)
        self.register_buffer("radius", self.radii(types), persistent=False)
        self.prompt_embeddings = nn.Parameter(torch.empty(self.n, spec.width))
        if not self.prompt_embeddings.is_meta:
            self.prompt_embeddings.data.copy_(self.start)

    def radii(self, types: Tensor) -> Tensor:
        """The radius of the ball around each token: 0 for answers, (n,)."""
        of_format = self.config.opt_projection_format_epsilon
        of_input = self.config.opt_projection_epsilon
        by_part = torch.tensor([0.0, of_format, of_input, of_format], device=types.device)
        by_part = by_part * math.sqrt(self.spec.width / 2048)
        part = types % 4 * (types > 0)
        return by_part[part]

    def embeds(self, facts: dict[str, Any]) -> Tensor:
        """The embeddings; those that must not change get no gradient."""
        is_learned = self.radius[:, None] > 0
        return torch.where(is_learned, self.prompt_embeddings, self.prompt_embeddings.detach())

    @torch.no_grad()
    def step(self, n: int) -> None:
        """Project each embedding back into its ball."""
        change = whole(self.prompt_embeddings) - self.start
        lengths = change.norm(dim=1).clamp_min(1e-12)
        share = (self.radius / lengths).clamp_max(1)
        write_(self.prompt_embeddings, self.start + change * share[:, None])

    def labels(self, labels: Tensor, facts: dict[str, Any]) -> Tensor:
        rows = len(labels)
        prompt_types = self.types.to(labels.device)
        input_types = facts.get("input_type_mask", torch.full_like(labels, 4)).to(labels)
        shift = (prompt_types.max() + 3) // 4 * 4
        input_types = input_types + (input_types > 0) * shift
        types = torch.cat([prompt_types.expand(rows, -1), input_types], dim=1)
        tokens = torch.tensor(self.config.cpt_token_ids, device=labels.device)
        tokens = tokens.expand(rows, -1)
        answers = torch.cat([tokens, labels], dim=1)
        answers = answers.masked_fill(~is_answer(types), -100)
        facts[self] = answers, types
        return answers

    def loss(self, logits: Any, facts: dict[str, Any]) -> Tensor | None:
        if self not in facts:
            return None
        labels, types = facts[self]
        labels = labels[:, 1:].to(logits.device)
        types = types[:, 1:].to(logits.device)
        logits = logits[:, -labels.shape[1] - 1 : -1]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        if self.config.opt_weighted_loss_type == "decay":
            losses = losses * decay(types, self.config.opt_loss_decay_factor)
        return losses[labels != -100].mean()


@dataclass(kw_only=True)
class CPTConfig(PromptConfig):
    cpt_token_ids: list[int] | None = None
    """The n tokens of the examples; None: [0]."""
    cpt_mask: list[int] | None = None
    """Ignored, as in PEFT; kept for PEFT compatibility."""
    cpt_tokens_type_mask: list[int] | None = None
    """The type of each token: 4k + 1 input format, 4k + 2 input, 4k + 3 output format, 4k + 4 answer of example k;
    None: input format."""
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    """"decay": weigh the answers of earlier examples by powers of opt_loss_decay_factor; "none": all equally."""
    opt_loss_decay_factor: float = 1.0
    """The weight of an answer, relative to that of the next one."""
    opt_projection_epsilon: float = 0.1
    """How far an input's embedding may move in a model of width 2048; other widths scale it by sqrt(width / 2048)."""
    opt_projection_format_epsilon: float = 0.1
    """How far the embedding of a format token may move, scaled in the same way."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer of the tokens; ignored, kept for PEFT compatibility."""

    peft_type = Name("CPT")
    prompt = CPT
    example = {"cpt_token_ids": [0, 1], "cpt_tokens_type_mask": [1, 4]}
    facts = ("input_type_mask",)
    learning_rate = 1e-4

    def __post_init__(self) -> None:
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        n = len(self.cpt_token_ids)
        self.num_virtual_tokens = self.num_virtual_tokens or n
        self.cpt_mask = self.cpt_mask or [1] * n
        self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * n
        super().__post_init__()
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ConfigError(f"CPT supports only CAUSAL_LM, not {self.task_type}")
        if not n == self.num_virtual_tokens == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must be num_virtual_tokens long")
        check_range(self, 0, math.inf, "opt_projection_epsilon", "opt_projection_format_epsilon")
        check_range(self, 0, math.inf, "opt_loss_decay_factor")

    def schedule(self, parts: Mapping[str, Any]) -> CPT:
        return parts[""]
