"""RMSNorm as its own autograd function: every kind that transformers has, in values, gradients and memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from veneer import LNTuningConfig, LoraConfig, get_peft_model, ops
from veneer.ops import norm as op

from . import models

KINDS = {"llama": (LlamaRMSNorm, 0.0, False), "gemma": (GemmaRMSNorm, 1.0, True), "late": (GptOssRMSNorm, 0.0, True)}


def module(name: str, dtype=torch.float32, learns: bool = True):
    torch.manual_seed(0)
    found = KINDS[name][0](7, eps=1e-5)
    torch.nn.init.normal_(found.weight)
    return found.to(dtype).train().requires_grad_(learns)


def run(function, x, weight):
    x = x.detach().requires_grad_()
    weight.grad = None
    y = function(x)
    (y.float() * torch.arange(7.0).cos()).sum().backward()
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_agree(name, learns, dtype):
    own = module(name, dtype, learns)
    x = torch.randn(2, 3, 7).to(dtype)
    got = run(lambda x: op.forward(own, x), x, own.weight)
    want = run(own, x, own.weight)
    bound = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **bound)


def test_a_half_precision_stream_meets_a_wide_weight():
    own, x = module("llama"), torch.randn(2, 3, 7).bfloat16()
    got = op.forward(own, x)
    assert got.dtype == own(x).dtype == torch.float32
    torch.testing.assert_close(got, own(x))


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_found_by_trying(name):
    assert op._kind_of(module(name)) == KINDS[name][1:]
    torch.testing.assert_close(
        op.reference(torch.ones(1, 7), module(name).weight, 1e-5, *KINDS[name][1:]), module(name)(torch.ones(1, 7))
    )


def test_other_modules_are_not_taken_for_one():
    class Louder(LlamaRMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    for other in (Louder(7), torch.nn.LayerNorm(7), torch.nn.RMSNorm(7), torch.nn.Linear(7, 7), torch.nn.PReLU(7)):
        assert not op.recognised(other)


def test_gradients_by_difference():
    w = torch.randn(5, dtype=torch.float32, requires_grad=True)
    x = torch.randn(3, 5, requires_grad=True)
    for offset, late in ((0.0, False), (1.0, True)):
        torch.autograd.gradcheck(
            lambda x, w, o=offset, b=late: op.RMSNorm.apply(x, w, 1e-5, o, b), (x, w), eps=1e-2, atol=2e-2, rtol=2e-2
        )


def adapted(config=None):
    return get_peft_model(models.build("llama"), config or LoraConfig(r=4, init_lora_weights=False)).train()


def call():
    ids = torch.randint(3, 67, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_a_model_has_it_while_it_trains_and_loses_it_with_the_adapter():
    model = adapted()
    base = model.get_base_model()
    assert "forward" not in base.model.norm.__dict__
    model(**call())
    assert base.model.norm.forward.func is op.forward
    plain = model.unload()
    assert not any("forward" in m.__dict__ for m in plain.modules()) and not plain.__dict__.get("_veneer_fast")


def test_a_hook_and_a_forward_of_ones_own_are_respected():
    model = adapted()
    norm, other = model.get_base_model().model.norm, model.get_base_model().model.layers[0].input_layernorm
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    other.forward = lambda x: x
    model(**call())
    assert seen == [1] and other.__dict__["forward"].__name__ == "<lambda>"
    model.unload()
    assert other.__dict__["forward"].__name__ == "<lambda>"


def test_a_tuned_norm_agrees():
    model = adapted(LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm", "input_layernorm"]))
    found = []
    for plain in (False, True):
        model.zero_grad()
        with ops.plain(*(() if plain else ("allocator",))):
            model(**call()).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_their_own(again):
    model = adapted()
    want = model(**call()).loss
    twin = again(model)
    twin.get_base_model().model.norm.weight.data.mul_(3)
    torch.testing.assert_close(model(**call()).loss, want)
    assert not torch.allclose(twin(**call()).loss, want)
    assert not any("forward" in m.__dict__ for m in twin.unload().modules())
