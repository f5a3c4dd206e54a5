"""A shadow on its own gives what the shadow gives beside its model."""

from __future__ import annotations

import pytest
import torch

import veneer
from veneer import LoraConfig, ShadowConfig, VeneerError, get_peft_model
from veneer.core.state import state_of

from . import models
from .models import perturb

BATCH = models.inputs("llama")


def shadowed(**settings):
    config = ShadowConfig(task_type="CAUSAL_LM", shadow_num_hidden_layers=2, **settings)
    return perturb(get_peft_model(models.build("llama"), config).eval())


@pytest.mark.parametrize("settings", [{}, dict(shadow_hidden_size=20)], ids=["as wide", "narrower"])
def test_its_logits_are_the_heads_on_the_shadows_states(settings):
    model = shadowed(**settings)
    base = model.get_base_model()
    network = state_of(base).shared["default"]
    with torch.no_grad():
        expected = base.get_output_embeddings()(network(base, dict(BATCH)))
        for small in (veneer.unload_shadow(model), veneer.unload_shadow(model, copy=True)):
            torch.testing.assert_close(small(**BATCH).logits, expected)
            loss = small(**BATCH, labels=BATCH["input_ids"]).loss
            torch.testing.assert_close(loss, network.loss(network(base, BATCH), base, {"labels": BATCH["input_ids"]}))


def test_it_generates_with_its_cache_as_without():
    model = shadowed()
    model.get_base_model().set_attn_implementation("sdpa")
    state_of(model.get_base_model()).shared["default"].shadow_backbone["default"].set_attn_implementation("sdpa")
    small = veneer.unload_shadow(model)
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    with_cache = small.generate(**BATCH, **settings)
    assert torch.equal(with_cache, small.generate(**BATCH, **settings, use_cache=False))
    assert with_cache.shape[1] == BATCH["input_ids"].shape[1] + 5


def test_a_copy_is_whole_and_independent():
    model = shadowed()
    shared, copied = veneer.unload_shadow(model), veneer.unload_shadow(model, copy=True)
    assert "backbone.embed_tokens.weight" in copied.state_dict()
    assert "backbone.embed_tokens.weight" not in shared.state_dict()
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in copied.parameters()}
    assert mine >= {p.data_ptr() for p in shared.parameters()}


def test_other_adapters_have_no_shadow():
    with pytest.raises(VeneerError, match="No shadow backbone"):
        veneer.unload_shadow(get_peft_model(models.build("llama"), LoraConfig(target_modules=["q_proj"])))
