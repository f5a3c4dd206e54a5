"""Padding left out of the layers: the loss and the gradients of the padded batch, and when it steps aside."""

from __future__ import annotations

import pytest
import torch

from veneer import PromptTuningConfig, get_peft_model, ops
from veneer.ops import padding as op

from . import models
from .test_ops_attention import LENGTHS, MODELS, adapted, gradients, implementation, padded, rows


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """How many tokens went through the layers, for each call without padding."""
    found: list[int] = []
    true = op.with_padding
    monkeypatch.setattr(op, "with_padding", lambda hidden, kept: (found.append(hidden.shape[1]), true(hidden, kept))[1])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_same_loss_and_gradients_as_with_padding(name, seen):
    model, batch = adapted(name), padded(rows())
    before = implementation(model)
    with ops.plain("padding"):
        want, want_grads = gradients(model, batch)
    assert not seen
    loss, grads = gradients(model, batch)
    assert seen == [sum(LENGTHS)] and implementation(model) == before
    torch.testing.assert_close(loss, want)
    for key in want_grads:
        torch.testing.assert_close(grads[key], want_grads[key], rtol=1e-4, atol=1e-5)


def test_trainers_count_of_items_comes_along(seen):
    model, batch = adapted("llama"), padded(rows()) | {"num_items_in_batch": torch.tensor(40)}
    with ops.plain("padding"):
        want, _ = gradients(model, batch)
    loss, _ = gradients(model, batch)
    assert seen == [sum(LENGTHS)]
    torch.testing.assert_close(loss, want)


def test_outputs_have_the_shapes_of_the_batch_and_the_values_of_its_tokens():
    model, batch = adapted("llama"), padded(rows())
    with ops.plain():
        want = model(**batch).logits
    logits, kept = model(**batch).logits, batch["attention_mask"].bool()
    assert logits.shape == want.shape
    torch.testing.assert_close(logits[kept] + 0, want[kept], rtol=1e-4, atol=1e-4)


def left(batch):
    return {key: value.flip(1) for key, value in batch.items()}


def learned_at_padding(batch):
    return batch | {"labels": batch["labels"].where(batch["attention_mask"].bool(), 5)}


def with_hole(batch):
    mask = batch["attention_mask"].clone()
    mask[2, 4] = 0
    return batch | {"attention_mask": mask, "labels": batch["labels"].where(mask.bool(), -100)}


def unmasked(batch):
    return {key: batch[key] for key in ("input_ids", "labels")}


def hidden(batch):
    return batch | {"output_hidden_states": True}


@pytest.mark.parametrize("change", [left, learned_at_padding, with_hole, unmasked, hidden])
def test_other_batches_are_computed_as_ever(change, seen):
    model, batch = adapted("llama"), change(padded(rows()))
    with ops.plain("padding"):
        want, _ = gradients(model, batch)
    loss, _ = gradients(model, batch)
    assert not seen and torch.equal(loss, want)


def test_what_looks_past_its_token_keeps_the_padding(seen):
    model = get_peft_model(MODELS["llama"](), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).train()
    gradients(model, padded(rows()))
    model = adapted("llama")
    model.gradient_checkpointing_enable()
    gradients(model, padded(rows()))
    model = adapted("llama").eval()
    model(**padded(rows()))
    bert = models.build("bert")
    assert not seen and not hasattr(bert.base_model, "_veneer_lent_body")


def test_a_model_that_mixes_neighbours_a_little_keeps_the_padding(seen):
    model = adapted("llama")
    mlp = type(model.get_base_model().model.layers[0].mlp)

    class Shifted(mlp):
        def forward(self, x):
            return super().forward(x) + 1e-2 * x.roll(1, 1)

    model.get_base_model().model.layers[0].mlp.__class__ = Shifted
    gradients(model, padded(rows()))
    assert not seen


def test_the_trial_leaves_the_model_as_it_was(seen):
    model = adapted("llama")
    still = model.get_base_model().model.layers[0]
    still.eval()
    batch, state = padded(rows()), torch.get_rng_state()
    gradients(model, batch)
    assert seen and not still.training and model.training and torch.equal(torch.get_rng_state(), state)
    base = model.unload()
    assert not [key for key in base.__dict__ if key.startswith("_veneer")]
    assert "forward" not in base.base_model.__dict__


def test_an_error_in_a_call_takes_the_loan_back(monkeypatch):
    model = adapted("llama")
    body = model.get_base_model().base_model
    monkeypatch.setattr(op, "without_padding", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(model, padded(rows()))
    assert "forward" not in body.__dict__


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_embedding_see_the_shape_of_the_batch(kind: str, seen):
    """NEFTune scales its noise by the length of a row; the rows end to end are longer."""
    model, batch = adapted("llama"), padded(rows())
    shapes = []
    embedding = model.get_base_model().get_input_embeddings()
    handle = getattr(embedding, kind)(lambda module, given, *output: shapes.append(given[0].shape))
    gradients(model, batch)
    assert shapes == [batch["input_ids"].shape] and not seen
    handle.remove()
    gradients(model, batch)
    assert seen == [sum(LENGTHS)]
