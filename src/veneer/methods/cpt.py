"""Context-aware prompt tuning: refine the embeddings of examples in the context, within a small ball around each.

    [w_1 + d_1 ... w_n + d_n, E(x_1) ... E(x_T)],  |d_i| <= eps_i,  d_i = 0 at the examples' answers
    loss: the mean over the labels of the input and of the examples, an example k before the last weighing factor^k

Blau et al., 2024, arXiv:2410.17222. Trainable: n x width, of which the answers stay. Not mergeable. Types of tokens:
4k + 1 an example's input format, + 2 its input, + 3 its output format, + 4 its answer; the input's come with a call as
`input_type_mask`. PEFT shifts them by the largest of the prompt's, which loses every label unless that is a multiple of
4 (by default it is not); here by the next multiple. Without examples in the context (`cpt_token_ids`) it gains nothing.
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
        # on the words' device by name: these are needed whole where the rest is built without memory
        types = torch.tensor(config.cpt_tokens_type_mask, device=words.device)
        near, far = config.opt_projection_format_epsilon, config.opt_projection_epsilon
        radii = torch.tensor([0.0, near, far, near], device=words.device) * math.sqrt(spec.width / 2048)
        tokens = torch.tensor(config.cpt_token_ids, device=words.device)
        self.register_buffer("start", words.detach()[tokens].float(), persistent=False)
        self.register_buffer("types", types, persistent=False)
        self.register_buffer("radius", radii[types % 4 * (types > 0)], persistent=False)
        self.prompt_embeddings = nn.Parameter(torch.empty(self.n, spec.width))
        if not self.prompt_embeddings.is_meta:
            self.prompt_embeddings.data.copy_(self.start)

    def embeds(self, facts: dict[str, Any]) -> Tensor:
        """Gradients reach what may move."""
        return torch.where(self.radius[:, None] > 0, self.prompt_embeddings, self.prompt_embeddings.detach())

    @torch.no_grad()
    def step(self, n: int) -> None:
        """Project each embedding back into its ball."""
        moved = whole(self.prompt_embeddings) - self.start
        share = (self.radius / moved.norm(dim=1).clamp_min(1e-12)).clamp_max(1)
        write_(self.prompt_embeddings, self.start + moved * share[:, None])

    def labels(self, labels: Tensor, facts: dict[str, Any]) -> Tensor:
        rows, own = len(labels), self.types.to(labels.device)
        given = facts.get("input_type_mask", torch.full_like(labels, 4)).to(labels)
        types = torch.cat([own.expand(rows, -1), given + (given > 0) * (own.max() + 3) // 4 * 4], dim=1)
        tokens = torch.tensor(self.config.cpt_token_ids, device=labels.device).expand(rows, -1)
        answers = torch.cat([tokens, labels], dim=1).masked_fill(~is_answer(types), -100)
        facts[self] = answers, types
        return answers

    def loss(self, logits: Any, facts: dict[str, Any]) -> Tensor | None:
        if self not in facts:
            return None
        labels, types = (t[:, 1:].to(logits.device) for t in facts[self])
        logits = logits[:, -labels.shape[1] - 1 : -1]
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        if self.config.opt_weighted_loss_type == "decay":
            each = each * decay(types, self.config.opt_loss_decay_factor)
        return each[labels != -100].mean()


@dataclass(kw_only=True)
class CPTConfig(PromptConfig):
    cpt_token_ids: list[int] | None = None
    """The tokens of the examples, n of them; None: [0]."""
    cpt_mask: list[int] | None = None
    """Kept for the file; PEFT does not read it either."""
    cpt_tokens_type_mask: list[int] | None = None
    """What each of them is, as above; None: all format."""
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    """"decay" weighs the examples' answers, "none" all the same."""
    opt_loss_decay_factor: float = 1.0
    """The weight of an answer over that of the next one."""
    opt_projection_epsilon: float = 0.1
    """How far an input's embedding may move in a model 2048 wide; elsewhere by the root of the width."""
    opt_projection_format_epsilon: float = 0.1
    """The same for those of the formats."""
    tokenizer_name_or_path: str | None = None
    """Whose tokens these are; kept for the file."""

    peft_type, prompt, example = Name("CPT"), CPT, {"cpt_token_ids": [0, 1], "cpt_tokens_type_mask": [1, 4]}
    facts = ("input_type_mask",)
    learning_rate = 1e-4

    def __post_init__(self) -> None:
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        n = len(self.cpt_token_ids)
        self.num_virtual_tokens = self.num_virtual_tokens or n
        self.cpt_mask = self.cpt_mask or [1] * n
        self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * n
        super().__post_init__()
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ConfigError(f"CPT trains CAUSAL_LM alone, not {self.task_type}")
        if not n == self.num_virtual_tokens == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must be num_virtual_tokens long")
        ranges = "opt_projection_epsilon", "opt_projection_format_epsilon", "opt_loss_decay_factor"
        check_range(self, 0, math.inf, *ranges)

    def schedule(self, parts: Mapping[str, Any]) -> CPT:
        return parts[""]
