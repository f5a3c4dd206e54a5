"""Gated MLPs and written-out activations: recognised by trying, equal in values and gradients, with less kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from veneer import LoraConfig, get_peft_model, ops
from veneer.ops import gated_mlp as op

from . import models

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_agree(name, dtype):
    torch.manual_seed(0)
    g, u = torch.randn(3, 7).to(dtype), torch.randn(3, 7).to(dtype)
    act, found = ACT2FN[name], []
    for function in (op.Gated.apply, op.reference):
        a, b = g.clone().requires_grad_(), u.clone().requires_grad_()
        y = function(a, b, act)
        (y.float() * torch.arange(7.0).cos()).sum().backward()
        found.append((y.detach(), a.grad, b.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **({} if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)))


def kept(function) -> int:
    """Elements kept for the backward pass, each storage once."""
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        out = function()
    assert out is not None
    return sum(t.numel() for t in found.values())


def test_less_is_kept():
    g, u = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    assert kept(lambda: op.Gated.apply(g, u, nn.functional.silu)) == 2 * 21
    assert kept(lambda: op.reference(g, u, nn.functional.silu)) == 3 * 21


def mlp(kind=LlamaMLP, **kwargs):
    return kind(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=1, **kwargs)).train()


def test_gated_mlps_are_found_by_trying():
    class Other(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.slope

    learned = mlp()
    learned.act_fn = Learned()
    assert op.recognised(mlp()) and op.recognised(mlp(hidden_act="gelu_new"))
    assert not op.recognised(mlp(Other)) and not op.recognised(learned) and not op.recognised(nn.Linear(2, 2))
    assert op.recognised(mlp(GemmaMLP, hidden_act="gelu_pytorch_tanh"))


def test_activations_are_found_by_trying():
    assert op.torchs_own(ACT2FN["silu"]) is op.TORCH["silu"]
    assert op.torchs_own(ACT2FN["gelu_new"]) is op.TORCH["gelu_tanh"]
    assert op.torchs_own(ACT2FN["quick_gelu"]) is None and op.torchs_own(ACT2FN["relu"]) is None
    assert op.is_written_out(ACT2FN["gelu_new"])
    assert not op.is_written_out(ACT2FN["silu"]), "it is torch's own already"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_on_a_model(name):
    model = get_peft_model(models.build(name), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.train()
    ids = torch.randint(3, 67, (2, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for plain in ((), ("gated_mlp",)):
        model.zero_grad()
        with ops.plain(*plain or ("allocator",)):
            model(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n in found[0]:
        torch.testing.assert_close(found[0][n], found[1][n], rtol=1e-4, atol=1e-5)
    fast = op.forward if name == "llama" else op.activate
    assert any(getattr(m.__dict__.get("forward"), "func", None) is fast for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.unload().modules())


def test_gradient_checkpointing_recomputes_the_same():
    model = get_peft_model(models.build("llama"), LoraConfig(r=4, init_lora_weights=False)).train()
    ids = torch.randint(3, 67, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids=ids, labels=ids).loss.backward()
    for a, b in zip(want, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, b)
