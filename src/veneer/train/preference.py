"""Training on pairs of answers: `ExactTrainer` with an objective in the place of the model's own loss.

    loss of a step = mean of the objective over all pairs of the step, across its batches and processes

A batch of n pairs is one batch of 2n sequences. In a row without padding, the prompt of a pair is computed once: the
shorter answer continues it from where the longer one does. Log-probabilities are those of the learned tokens, which the
head alone computes.

The reference is the same model with its adapter switched off, or with the adapter that the run started from: there is
no second model. What it says of a pair is computed when the pair is seen first, and kept for later epochs and
evaluations. Checkpoints hold it, so that a resumed run repeats the bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.hooks import loss_terms
from ..data.collate import Collator
from ..data.encode import IGNORED, Encoded, learned_tokens
from ..model.peft_model import PeftModel
from ..ops.attention import by_sequence
from ..ops.cross_entropy import deferred
from ..targets.modules import evaluating
from .objectives.base import Answers, Objective
from .trainer import ExactTrainer

KEPT_NAME = "reference.safetensors"
"""The file of a checkpoint with the log-probabilities of the reference, (pairs, 2); nan for pairs not seen yet."""
OURS = ("labels", "slot", "continued", "pair", "real")
"""Tensors of a batch that are no arguments of the model."""
MEASURES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
"""What is measured of each pair: its loss, whether the chosen answer has the larger reward (half, if both have the
same, as before the first step), by how much, and both rewards."""


class PairCollator:
    """Batches of n pairs: the tensors of `Collator` for 2n sequences, and

    slot, continued: (2n,) for each sequence 2i if it is the chosen answer of pair i, 2i + 1 if it is the rejected one;
        and how many tokens of the sequence before it are its beginning.
    pair: (n,) the number of each pair; -1 in a stream, whose pairs have none.
    real: (n,) whether it is a pair of the data, and no blank one.

    Args:
        shares: leave the prompt out of the second sequence of a pair; needs a collator that joins rows.
    """

    def __init__(self, collator: Collator, shares: bool = False) -> None:
        self.collator = collator
        self.shares = shares

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        sequences: list[Encoded] = []
        slots: list[int] = []
        continued: list[int] = []
        for i, row in enumerate(rows):
            answers = [(row["chosen"], 2 * i), (row["rejected"], 2 * i + 1)]
            (first, slot), (second, other) = sorted(answers, key=_length, reverse=True)
            shared = shared_tokens(first, second) if self.shares else 0
            sequences += [first, _from(second, shared)]
            slots += [slot, other]
            continued += [0, shared]
        batch = self.collator(sequences)
        if self.shares:
            positions: list[int] = []
            for sequence, start in zip(sequences, continued, strict=True):
                positions += range(start, start + len(sequence["input_ids"]))
            batch["position_ids"] = torch.tensor([positions])
        batch["slot"] = torch.tensor(slots)
        batch["continued"] = torch.tensor(continued)
        batch["pair"] = torch.tensor([row.get("number", -1) for row in rows])
        batch["real"] = torch.tensor([learned_tokens(row["chosen"]) > 0 for row in rows])
        return batch


def _length(answer: tuple[Encoded, int]) -> int:
    return len(answer[0]["input_ids"])


def shared_tokens(first: Encoded, second: Encoded) -> int:
    """How many tokens of the first row can be computed for both.

    The last of them that both have is computed for each, because it predicts the first token in which they differ.
    """
    count = 0
    tokens = zip(first["input_ids"], second["input_ids"], first["labels"], second["labels"], strict=False)
    for a, b, label, other in tokens:
        if a != b or label != IGNORED or other != IGNORED:
            break
        count += 1
    return max(0, count - 1)


def _from(row: Encoded, start: int) -> Encoded:
    """A row without its first tokens."""
    return {name: value[start:] if isinstance(value, list) else value for name, value in row.items()}


class PreferenceTrainer(ExactTrainer):
    """Trains on the mean of an objective over the pairs of an optimizer step."""

    objective: Objective

    def __init__(self, *args: Any, objective: Objective, continues: bool = False, **kwargs: Any) -> None:
        """Take `ExactTrainer`'s arguments and our own.

        Args:
            continues: whether the adapter has been trained before. The reference is then the model with the adapter as
                it is now, and not without it.
        """
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.start: list[tuple[Tensor, Tensor]] = []
        """Each parameter of the adapter that is trained on, and a copy of its first value."""
        if continues:
            self.start = [(p, p.detach().clone()) for p in self._adapted().parameters() if p.requires_grad]
        self.kept = torch.full((self._number_pairs(), 2), torch.nan)
        self.measured: list[Tensor] = []
        """Since the last log, (pairs, len(MEASURES)) of each batch."""

    def _number_pairs(self) -> int:
        """Give each pair of training and evaluation a number; returns how many there are."""
        count = 0
        for dataset in (self.train_dataset, self.eval_dataset):
            for row in getattr(dataset, "rows", ()):
                row["number"] = count
                count += 1
        return count

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of a step, and the number of their pairs over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = sum(batch["real"].sum() for batch in batches)
        pairs = torch.as_tensor(pairs, device=self.args.device)
        if self.args.world_size > 1:
            pairs = self.accelerator.reduce(pairs, "sum")
        return batches, pairs

    def continued(self, inputs: Any) -> Sequence[int]:
        return inputs["continued"].tolist()  # type: ignore[no-any-return]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum over the batch's pairs, divided by the number of pairs of the step."""
        real = inputs["real"]
        measures = self._measures(model, inputs)
        self.measured.append(measures[real].detach())
        loss = measures[real, 0].sum() / num_items_in_batch * self.accelerator.num_processes
        term = loss_terms(self._adapted()._state)
        if term is not None:
            term = term.to(loss) * real.sum() / num_items_in_batch * self.accelerator.num_processes
            self.terms.total = self.terms.total + term.detach()
            loss = loss + term
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of a batch, the measures of its pairs in the place of logits, and numbers as their labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            measures = self._measures(model, inputs)[inputs["real"]]
        return measures[:, 0].mean(), measures, inputs["pair"][inputs["real"]]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean measures of the pairs too."""
        if "loss" in logs and self.measured:
            means = torch.cat(self.measured).double().mean(0).tolist()
            self.measured.clear()
            logs = logs | {f"reward_{name}": means[MEASURES.index(name)] for name in ("accuracy", "margin")}
        super().log(logs, start_time)

    # Log-probabilities

    def _adapted(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _measures(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The measures of each pair, (n, len(MEASURES)); the loss has a gradient."""
        reference = self._reference(inputs) if self.objective.has_reference else None
        log_p = log_probabilities(model, self._adapted(), inputs)
        learned = (inputs["labels"][:, 1:] != IGNORED).float()
        tokens = _by_answer(learned, inputs).clamp_min(1)
        references = (None, None) if reference is None else reference.unbind(1)
        chosen, rejected = map(Answers, log_p.unbind(1), references, tokens.unbind(1))
        losses = self.objective.losses(chosen, rejected)
        with torch.no_grad():
            rewards = [self.objective.reward(answers) for answers in (chosen, rejected)]
            margin = rewards[0] - rewards[1]
            preferred = (margin.sign() + 1) / 2
        return torch.stack([losses, preferred, margin, *rewards], dim=1)

    @torch.no_grad()
    def _reference(self, inputs: dict[str, Tensor]) -> Tensor:
        """The log-probabilities of the reference, (n, 2)."""
        numbers = inputs["pair"].cpu()
        kept = self.kept[numbers] if self._keeps() else torch.full((len(numbers), 2), torch.nan)
        if not kept.isnan().any():
            return kept.to(inputs["pair"].device)
        model = self._adapted()
        with self._as_reference(model), evaluating(model):
            reference = log_probabilities(model, model, inputs)
        if self._keeps():
            self.kept[numbers] = reference.cpu()
        return reference

    @contextmanager
    def _as_reference(self, model: PeftModel) -> Iterator[None]:
        """The model without its adapter, or with the adapter that the run started from."""
        if not self.start:
            with model.disable_adapter():
                yield
            return
        now = [p.data for p, _ in self.start]
        try:
            for p, first in self.start:
                p.data = first
            yield
        finally:
            for (p, _), value in zip(self.start, now, strict=True):
                p.data = value

    def _keeps(self) -> bool:
        """Whether pairs have numbers, and every process may decide on its own to leave out a call."""
        return len(self.kept) > 0 and not self.is_sharded

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._keeps():
            save_file({"log_p": self.kept}, Path(output_dir) / KEPT_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / KEPT_NAME).is_file():
            self.kept = load_file(Path(checkpoint) / KEPT_NAME)["log_p"]


def log_probabilities(model: Any, adapted: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """The summed log-probabilities of the answers' tokens, (n, 2).

    Args:
        model: what is called: the adapted model, or what accelerate wraps around it.
        inputs: a batch of `PairCollator`.
    """
    labels = inputs["labels"]
    call = {name: value for name, value in inputs.items() if name not in OURS}
    with deferred(adapted.get_base_model()):
        logits = model(**call, use_cache=False).logits
        logits = logits[:, -labels.shape[1] :]  # a learned prompt comes before the tokens
        scores = logits[:, :-1].float().reshape(-1, logits.shape[-1])
        losses = cross_entropy(scores, labels[:, 1:].reshape(-1), reduction="none", ignore_index=IGNORED)
    return _by_answer(-losses.view(labels[:, 1:].shape), inputs)


@torch.no_grad()
def shares_prompts(model: PeftModel, pair: Encoded, flat: Collator) -> bool:
    """Whether a pair gives the same with its prompt computed once as with two whole sequences, by a trial."""
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for shares in (False, True):
            batch = {name: t.to(device) for name, t in PairCollator(flat, shares)([pair]).items()}
            with by_sequence(model, batch["continued"].tolist()):
                found.append(log_probabilities(model, model, batch))
    whole, shared = found
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 1e-2
    return torch.allclose(whole, shared, rtol=tolerance, atol=tolerance)


def _by_answer(values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The sums over the tokens after the first, (rows, length - 1), of the answers of each pair: (n, 2).

    Sequences are the rows or, in a batch without padding, the parts of the only row.
    """
    positions = inputs.get("position_ids")
    if positions is None:
        sums = values.sum(1)
    else:
        starts = positions[0, 1:] != positions[0, :-1] + 1
        sequence = starts.cumsum(0)
        sums = values.new_zeros(len(inputs["slot"])).index_add(0, sequence, values[0])
    return torch.zeros_like(sums).index_copy(0, inputs["slot"], sums).view(-1, 2)


def metrics(prediction: Any) -> dict[str, float]:
    """The mean measures over all pairs."""
    means = np.asarray(prediction.predictions, dtype=np.float64).mean(axis=0)
    measures = dict(zip(MEASURES, map(float, means), strict=True))
    return {"exact_loss": measures.pop("loss"), **measures}
