"""The masked, chunked loss gives what transformers' own code gives, on models that scale, cap and tie their heads."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from veneer import LoraConfig, VeneerError, get_peft_model, ops
from veneer.ops import cross_entropy as op

from . import models

SIZES = dict(hidden_size=30, intermediate_size=45, num_hidden_layers=2, num_attention_heads=5, vocab_size=67)
SIZES |= dict(num_key_value_heads=1, head_dim=6, max_position_embeddings=64, pad_token_id=0)


def _causal(kind: str, **kwargs):
    config = getattr(transformers, f"{kind}Config")(**SIZES | kwargs)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def _t5():
    return models.t5(num_layers=1, num_decoder_layers=1)


HEADS = {
    "untied": models.llama,
    "tied": models.tied,
    "gpt2": models.gpt2,
    "capped": lambda: _causal("Gemma2", final_logit_softcapping=3.0),
    "scaled": lambda: _causal("Cohere", logit_scale=0.3),
    "divided": lambda: _causal("Granite", logits_scaling=2.5),
    "qwen3": lambda: _causal("Qwen3"),
    "mixtral": models.mixtral,
    "t5": _t5,
    "bias": lambda: models.bert("ForMaskedLM"),
}


def adapted(name: str, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    model = HEADS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1) if p.dim() == 1 else p.normal_(std=0.25)
    settings = dict(r=4, target_modules="all-linear", init_lora_weights=False) | kwargs
    return get_peft_model(model.to(dtype), LoraConfig(**settings)).train()


def batch(name: str) -> dict:
    torch.manual_seed(1)
    ids = torch.randint(3, 67, (4, 9))
    labels = torch.where(torch.rand(4, 9) < 0.4, ids, -100)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels[1, 6:] = -100
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, call: dict, plain: bool):
    """Loss, gradients and the model's output, one way or the other."""
    model.zero_grad()
    with ops.plain("cross_entropy") if plain else nullcontext():
        out = model(**call)
        out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, out


def same(model, call: dict, rtol=2e-5, atol=2e-6):
    (loss, grads, fast), (true_loss, true_grads, plain) = run(model, call, False), run(model, call, True)
    assert isinstance(fast.logits, op.Logits) and not isinstance(plain.logits, op.Logits)
    torch.testing.assert_close(loss, true_loss, rtol=rtol, atol=atol)
    assert grads.keys() == true_grads.keys() and grads
    for name in grads:
        torch.testing.assert_close(grads[name], true_grads[name], rtol=1e-4, atol=atol, msg=name)
    return fast, plain


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_agree(name, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", 67 * 4 * 3)  # three rows at a time
    fast, plain = same(adapted(name), batch(name))
    assert not fast.logits.is_computed()
    assert fast.logits.shape == plain.logits.shape and fast.logits.dtype == plain.logits.dtype


@pytest.mark.parametrize("name", HEADS)
def test_logits_can_still_be_read(name):
    fast, plain = same(adapted(name), batch(name))
    torch.testing.assert_close(fast.logits.argmax(-1), plain.logits.argmax(-1))
    torch.testing.assert_close(fast["logits"] + 0, plain.logits)


def test_only_supervised_rows_reach_the_head_and_a_chunk_at_a_time(monkeypatch):
    model, call = adapted("untied"), batch("untied")
    seen, before = [], op._gradient
    monkeypatch.setattr(op, "CHUNK_BYTES", 67 * 4 * 3)
    monkeypatch.setattr(op, "_gradient", lambda z, *rest: (seen.append(len(z)), before(z, *rest))[1])
    model(**call)
    assert sum(seen) == int((call["labels"][:, 1:] != -100).sum()) and max(seen) == 3


def test_items_of_the_whole_step_are_the_divisor():
    same(adapted("untied"), batch("untied") | {"num_items_in_batch": torch.tensor(31)})
    same(adapted("gpt2"), batch("gpt2") | {"num_items_in_batch": 31})


def test_labels_may_be_shifted_by_the_caller():
    call = batch("untied")
    same(adapted("untied"), call | {"shift_labels": call["labels"].roll(-1, 1)})


@pytest.mark.parametrize("settings", [dict(target_modules=["lm_head", "q_proj"]), dict(modules_to_save=["lm_head"])])
@pytest.mark.parametrize("name", ["untied", "capped", "divided"])
def test_a_head_that_learns_goes_through_its_module(name, settings, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", 67 * 4 * 3)
    model = adapted(name, **settings)
    fast, _ = same(model, batch(name))
    assert not fast.logits.is_computed()
    assert any("lm_head" in n for n, p in model.named_parameters() if p.grad is not None)


def test_gradients_reach_logits_that_were_read():
    """A loss of the user's own on top of the model's."""
    model, call = adapted("untied"), batch("untied")
    found = []
    for plain in (False, True):
        with ops.plain("cross_entropy") if plain else nullcontext():
            model.zero_grad()
            out = model(**call)
            (out.loss + out.logits.float().logsumexp(-1).square().mean()).backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-5)


def test_writing_into_the_logits_is_seen():
    model, call = adapted("untied"), batch("untied")
    logits = model(**call).logits
    flat = logits.view(-1, 67)
    with torch.no_grad():
        logits[0, 0] = 5.0
    assert (flat[0] == 5.0).all() and (logits[0, 0] == 5.0).all()
    zeros = torch.zeros(36, dtype=torch.long)
    torch.testing.assert_close(cross_entropy(flat, zeros), cross_entropy((logits + 0).view(-1, 67), zeros))


@pytest.mark.parametrize("kwargs", [dict(label_smoothing=0.2), dict(reduction="sum"), dict(ignore_index=5)])
@pytest.mark.parametrize("name", ["untied", "capped"])
def test_the_loss_of_torch_with_its_options(name, kwargs):
    """Also what is left to torch: weights, probabilities, no reduction. Every row is judged, so none may be padded."""
    model, call = adapted(name), batch(name)
    del call["attention_mask"]
    labels = call["labels"].clamp(min=3).view(-1)
    for more in ({}, {"weight": torch.rand(67)}, {"reduction": "none"}):
        got = model(**call).logits.reshape(-1, 67)
        with ops.plain():
            want = model(**call).logits.reshape(-1, 67)
        settings = kwargs | more
        torch.testing.assert_close(cross_entropy(got, labels, **settings), cross_entropy(want, labels, **settings))


@pytest.mark.parametrize("settings", [{}, dict(modules_to_save=["lm_head"])], ids=["frozen", "learned"])
@pytest.mark.parametrize("name", ["untied", "capped", "divided", "tied"])
def test_the_loss_of_each_position(name, settings, monkeypatch):
    """Every position gets a weight of its own from above, and calls need no labels."""
    monkeypatch.setattr(op, "CHUNK_BYTES", 67 * 4 * 3)
    model, call = adapted(name, **settings), batch(name)
    labels = call.pop("labels")[:, 1:].flatten()
    weights = torch.linspace(-1, 2, len(labels))
    found = []
    for plain in (False, True):
        model.zero_grad()
        with ops.plain("cross_entropy") if plain else nullcontext(), op.deferred(model.get_base_model()):
            logits = model(**call).logits
            losses = cross_entropy(logits[:, :-1].float().reshape(-1, 67), labels, reduction="none")
        assert isinstance(logits, op.Logits) == (not plain) and losses.shape == labels.shape
        assert plain or not logits.is_computed()
        (losses * weights).sum().backward()
        found.append((losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (losses, grads), (true_losses, true_grads) = found
    torch.testing.assert_close(losses, true_losses, rtol=2e-5, atol=2e-6)
    assert grads.keys() == true_grads.keys() and grads
    for key, grad in grads.items():
        torch.testing.assert_close(grad, true_grads[key], rtol=1e-4, atol=2e-6, msg=key)


def test_the_losses_of_each_position_without_gradients(monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", 67 * 4 * 3)
    model, call = adapted("untied").eval(), batch("untied")
    labels = call.pop("labels")[:, 1:].flatten()
    with torch.no_grad():
        want = cross_entropy(model(**call).logits[:, :-1].reshape(-1, 67), labels, reduction="none")
        with op.deferred(model.get_base_model()):
            logits = model(**call).logits
        got = cross_entropy(logits[:, :-1].reshape(-1, 67), labels, reduction="none")
    assert isinstance(logits, op.Logits) and not logits.is_computed()
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    assert not isinstance(model(**call).logits, op.Logits)


def test_shifts_are_noted_and_other_views_computed():
    model, call = adapted("untied"), batch("untied")
    logits = model(**call).logits
    shifted = logits[..., :-1, :].contiguous().view(-1, 67)
    assert isinstance(shifted, op.Logits) and shifted.shape == (32, 67)
    assert not isinstance(logits[..., :-1], op.Logits) and logits[..., :-1].shape == (4, 9, 66)
    torch.testing.assert_close(shifted + 0, (logits + 0)[:, :-1].reshape(-1, 67))


def test_nothing_supervised_is_as_with_transformers():
    model, call = adapted("untied"), batch("untied")
    call["labels"] = torch.full_like(call["labels"], -100)
    model._state.watchers.clear()  # the training guard refuses such a batch
    assert model(**call).loss.isnan()
    assert model(**call, num_items_in_batch=3).loss == 0


def test_half_precision():
    model, call = adapted("untied", dtype=torch.bfloat16), batch("untied")
    same(model, call, rtol=1e-2, atol=3e-2)


def test_autocast():
    model, call = adapted("untied"), batch("untied")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, plain = same(model, call, rtol=1e-2, atol=3e-2)
    assert fast.logits.dtype == plain.logits.dtype == torch.bfloat16


def test_the_head_is_whole_again_after_the_call():
    model, call = adapted("untied"), batch("untied")
    head = model.get_output_embeddings()
    model(**call)
    assert "forward" not in head.__dict__
    with pytest.raises(IndexError):
        model(**call | {"input_ids": torch.full_like(call["input_ids"], 999)})
    assert "forward" not in head.__dict__ and "_veneer_lent" not in model.get_base_model().__dict__
    assert not isinstance(model.eval()(**call).logits, op.Logits)


@pytest.mark.parametrize("without", ["labels", "gradients", "training"])
def test_only_training_calls_are_served(without):
    model, call = adapted("untied"), batch("untied")
    if without == "labels":
        call.pop("labels")
    model.train(without != "training")
    with torch.set_grad_enabled(without != "gradients"):
        assert not isinstance(model(**call).logits, op.Logits)


def test_a_head_with_hooks_is_left_alone():
    model, call = adapted("untied"), batch("untied")
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert not isinstance(model(**call).logits, op.Logits) and seen == [(4, 9, 67)]


def test_logits_of_a_head_that_has_changed_are_refused():
    model, call = adapted("untied", modules_to_save=["lm_head"]), batch("untied")
    out = model(**call)
    out.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    with pytest.raises(VeneerError, match="read outputs.logits before"):
        out.logits.sum()


def test_adapters_with_dropout_on_the_head_draw_once():
    model = adapted("untied", target_modules=["lm_head"], lora_dropout=0.5)
    assert not isinstance(model(**batch("untied")).logits, op.Logits)


def test_a_mixed_batch_on_the_head_keeps_its_rows():
    model, call = adapted("untied", target_modules=["lm_head"]), batch("untied")
    names = ["default", "__base__", "default", "__base__"]
    assert not isinstance(model(**call, adapter_names=names).logits, op.Logits)


def test_accumulated_and_checkpointed_steps_agree():
    model, call = adapted("untied"), batch("untied")
    model.gradient_checkpointing_enable()
    same(model, call)
