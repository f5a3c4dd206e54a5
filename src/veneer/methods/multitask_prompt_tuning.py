"""Multitask prompt tuning: one prompt that all tasks share, times a low-rank matrix of each task's own.

    P_k = P * (U_k V_k),  P (n, width) shared, U_k (n, r) and V_k (r, width) for task k

Wang et al., 2023, arXiv:2303.02861. Trainable: n x width + tasks x r x (n + width). Not mergeable: it has no weight
form. `task_ids` is an argument of the model call, a task for each row; a single task needs none. For one new task,
start from a prompt trained on many: the average of its tasks, one of them, or the shared part alone. The paper distils
the shared prompt from single ones; here, as in PEFT, tasks are trained together. For an encoder-decoder PEFT puts the
second half of the rows in front of the decoder in training and nowhere in `generate`; here they are never read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Tensors
from ..core.config import Name, check_range
from ..core.prompt import Spec
from ..errors import CheckpointError, ConfigError, VeneerError
from ..files.read import WEIGHTS_NAME
from .prompt_tuning import INITS, PromptTuning, PromptTuningConfig

FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


class MultitaskPromptTuning(PromptTuning):
    def __init__(self, config: Any, spec: Spec, words: Tensor) -> None:
        super().__init__(config, spec, words)
        tasks, r = config.num_tasks, config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.randn(tasks, self.n * spec.submodules, r) * 0.02)
        self.prefix_task_rows = nn.Parameter(torch.randn(tasks, r, spec.width) * 0.02)
        if config.prompt_tuning_init in FROM_SOURCE[:2] and not self.prefix_task_cols.is_meta:
            for name in ("prefix_task_cols", "prefix_task_rows"):
                of_tasks = config.source(name, (None, *getattr(self, name).shape[1:]))
                with torch.no_grad():
                    getattr(self, name).copy_(config.choose(of_tasks))

    def start(self, config: Any, rows: int, words: Tensor) -> Tensor:
        if config.prompt_tuning_init in FROM_SOURCE:
            return config.source("prompt_embeddings", (rows, words.shape[1]))
        return super().start(config, rows, words)

    def embeds(self, facts: dict[str, Any]) -> Tensor:
        """(n, width) for one task, (batch, n, width) for a task in each row."""
        tasks = facts.get("task_ids")
        known = len(self.prefix_task_cols)
        if tasks is None and known > 1:
            raise VeneerError(f"the prompt knows {known} tasks; pass task_ids with the call, a number for each row")
        chosen = torch.as_tensor(0 if tasks is None else tasks, device=self.prefix_task_cols.device).view(-1)
        has_values = not (torch.compiler.is_compiling() or chosen.is_meta)
        if has_values and not 0 <= int(chosen.min()) <= int(chosen.max()) < known:
            raise VeneerError(f"task_ids {chosen.tolist()} must lie between 0 and num_tasks - 1 = {known - 1}")
        of_tasks = self.prefix_task_cols[chosen, : self.n] @ self.prefix_task_rows[chosen]
        return (super().embeds(facts) * of_tasks).squeeze(0)


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    prompt_tuning_init_state_dict_path: str | None = None
    """The adapter to start from: its directory or its safetensors file."""
    prompt_tuning_init_task: int | None = 0
    """Which of its tasks EXACT_SOURCE_TASK takes."""
    num_ranks: int = 1
    """Rank r of each task's matrix."""
    num_tasks: int = 1
    """How many tasks there are."""

    peft_type, prompt = Name("MULTITASK_PROMPT_TUNING"), MultitaskPromptTuning
    inits = (*INITS, *FROM_SOURCE)
    facts = ("task_ids",)
    learning_rate = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, math.inf, "num_ranks", "num_tasks")
        check_range(self, 0, math.inf, "prompt_tuning_init_task")
        kind = self.prompt_tuning_init
        if kind in FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(f"prompt_tuning_init {kind} needs prompt_tuning_init_state_dict_path")
        if kind in FROM_SOURCE[:2] and self.num_tasks != 1:
            raise ConfigError(f"prompt_tuning_init {kind} starts one task, not num_tasks = {self.num_tasks}")

    def choose(self, of_tasks: Tensor) -> Tensor:
        """One task's tensor, (1, ...), out of those of all source tasks."""
        if self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            return of_tasks.mean(0, keepdim=True)
        task = self.prompt_tuning_init_task or 0
        if task >= len(of_tasks):
            raise ConfigError(f"prompt_tuning_init_task = {task}, but the source has {len(of_tasks)} tasks")
        return of_tasks[task : task + 1]

    def source(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """A tensor of the source prompt; None in `shape` fits any size."""
        tensor = self._source().get(name)
        found = () if tensor is None else tuple(tensor.shape)
        fits = len(found) == len(shape) and all(size in (None, own) for size, own in zip(shape, found, strict=True))
        if tensor is None or not fits:
            raise CheckpointError(
                f"prompt_tuning_init_state_dict_path: {name!r} is {found} in the file, and has to be {shape} here"
            )
        return tensor.float()

    def _source(self) -> Tensors:
        from safetensors.torch import load_file

        path = Path(str(self.prompt_tuning_init_state_dict_path))
        path = path / WEIGHTS_NAME if path.is_dir() else path
        if path.suffix != ".safetensors" or not path.is_file():
            raise CheckpointError(f"prompt_tuning_init_state_dict_path: {str(path)!r} is no safetensors file")
        return load_file(path)
