"""Multitask prompt tuning: all tasks share one prompt, which each task multiplies by its own low-rank matrix.

    P_k = P * (U_k V_k),  P (n, width) shared, U_k (n, r) and V_k (r, width) for task k

Wang et al., 2023, arXiv:2303.02861. Trainable: n x width + tasks x r x (n + width). Not mergeable: it has no weight
form. A model call takes `task_ids`, a task for each row; they are not needed with a single task. To train one new task,
start from a prompt that was trained on many: from the average of its tasks, from one of them, or from the shared part
only. The paper distils the shared prompt from prompts of single tasks; here, as in PEFT, all tasks are trained
together. For an encoder-decoder, PEFT puts the second half of the rows in front of the decoder's input in training but
not in `generate`; here they are never used.
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

STARTS_ONE_TASK = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK")
FROM_SOURCE = (*STARTS_ONE_TASK, "ONLY_SOURCE_SHARED")


class MultitaskPromptTuning(PromptTuning):
    def __init__(self, config: Any, spec: Spec, words: Tensor) -> None:
        super().__init__(config, spec, words)
        tasks = config.num_tasks
        r = config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.randn(tasks, self.n * spec.submodules, r) * 0.02)
        self.prefix_task_rows = nn.Parameter(torch.randn(tasks, r, spec.width) * 0.02)
        if config.prompt_tuning_init in STARTS_ONE_TASK and not self.prefix_task_cols.is_meta:
            self.copy_task_("prefix_task_cols")
            self.copy_task_("prefix_task_rows")

    @torch.no_grad()
    def copy_task_(self, name: str) -> None:
        """Start a parameter at the source prompt's tensor of the same name, for the task that the config chooses."""
        parameter = getattr(self, name)
        of_all_tasks = self.config.source(name, (None, *parameter.shape[1:]))
        parameter.copy_(self.config.choose(of_all_tasks))

    def start(self, config: Any, rows: int, words: Tensor) -> Tensor:
        if config.prompt_tuning_init in FROM_SOURCE:
            return config.source("prompt_embeddings", (rows, words.shape[1]))
        return super().start(config, rows, words)

    def embeds(self, facts: dict[str, Any]) -> Tensor:
        """(n, width) for a single task, (batch, n, width) for one task in each row."""
        tasks = self.tasks_of_call(facts.get("task_ids"))
        factor = self.prefix_task_cols[tasks, : self.n] @ self.prefix_task_rows[tasks]
        return (super().embeds(facts) * factor).squeeze(0)

    def tasks_of_call(self, task_ids: Any) -> Tensor:
        """The tasks of the rows, after a check: (rows,), or (1,) for a single task."""
        known = len(self.prefix_task_cols)
        if task_ids is None and known > 1:
            raise VeneerError(f"the prompt has {known} tasks; pass task_ids with the call, a number for each row")
        ids = 0 if task_ids is None else task_ids
        tasks = torch.as_tensor(ids, device=self.prefix_task_cols.device).view(-1)
        has_values = not (torch.compiler.is_compiling() or tasks.is_meta)
        if has_values and not 0 <= int(tasks.min()) <= int(tasks.max()) < known:
            raise VeneerError(f"task_ids {tasks.tolist()} must lie between 0 and num_tasks - 1 = {known - 1}")
        return tasks


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    prompt_tuning_init_state_dict_path: str | None = None
    """The trained prompt to start from: its directory or its safetensors file."""
    prompt_tuning_init_task: int | None = 0
    """Index of the task that EXACT_SOURCE_TASK starts from."""
    num_ranks: int = 1
    """Rank r of each task's matrix."""
    num_tasks: int = 1
    """Number of tasks."""

    peft_type = Name("MULTITASK_PROMPT_TUNING")
    prompt = MultitaskPromptTuning
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
        if kind in STARTS_ONE_TASK and self.num_tasks != 1:
            raise ConfigError(f"prompt_tuning_init {kind} starts one task, not num_tasks = {self.num_tasks}")

    def choose(self, of_tasks: Tensor) -> Tensor:
        """The tensor of the task to start from, (1, ...), given the tensor of all source tasks."""
        if self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            return of_tasks.mean(0, keepdim=True)
        task = self.prompt_tuning_init_task or 0
        if task >= len(of_tasks):
            raise ConfigError(f"prompt_tuning_init_task = {task}, but the source has {len(of_tasks)} tasks")
        return of_tasks[task : task + 1]

    def source(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """A tensor of the source prompt; None in `shape` fits any size."""
        tensor = self._source().get(name)
        actual = () if tensor is None else tuple(tensor.shape)
        if tensor is None or not _fits(actual, shape):
            raise CheckpointError(
                f"prompt_tuning_init_state_dict_path: {name!r} is {actual} in the file, but must be {shape} here"
            )
        return tensor.float()

    def _source(self) -> Tensors:
        from safetensors.torch import load_file

        path = Path(str(self.prompt_tuning_init_state_dict_path))
        if path.is_dir():
            path = path / WEIGHTS_NAME
        if path.suffix != ".safetensors" or not path.is_file():
            raise CheckpointError(f"prompt_tuning_init_state_dict_path: {str(path)!r} is no safetensors file")
        return load_file(path)


def _fits(shape: tuple[int, ...], pattern: tuple[int | None, ...]) -> bool:
    """Whether a shape matches a pattern, in which None stands for any size."""
    if len(shape) != len(pattern):
        return False
    return all(wanted in (None, size) for size, wanted in zip(shape, pattern, strict=True))
