"""Modules that compute something else than their class: adapted and merged agree, or the method refuses by name."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from veneer import HiraConfig, LoraConfig, NotMergeable, PeftModel, TargetError, VeneerError, get_peft_model

from .cases import LAYER_CASES, ONE_EACH, Case
from .models import perturb


class Scaled(nn.Linear):
    """A linear layer with a learned gain."""

    def __init__(self):
        super().__init__(16, 24)
        self.gain = nn.Parameter(torch.rand(24) + 0.5)

    def forward(self, x):
        return super().forward(x) * self.gain


class Router(nn.Linear):
    """As Llama 4's: two outputs."""

    def forward(self, x):
        logits = super().forward(x)
        scores = logits.topk(2, dim=-1)
        return torch.zeros_like(logits).scatter(-1, scores.indices, scores.values.sigmoid()), logits


class Grouped(nn.Linear):
    """As DeepSeek-V4's output projection: the rows of the weight belong to groups of the input."""

    def forward(self, x):
        weight = self.weight.view(3, -1, 16).transpose(1, 2)
        groups = x.reshape(-1, 3, 16).transpose(0, 1)
        return torch.bmm(groups, weight).transpose(0, 1).reshape(*x.shape[:-2], 3, -1)


class Normed(nn.Embedding):
    def forward(self, ids):
        return F.normalize(super().forward(ids), dim=-1)


class Gained(nn.Embedding):
    """Rows times a number: computed as an embedding."""

    def forward(self, ids):
        return super().forward(ids) * 1.5


class Causal(nn.Conv1d):
    """As in Gemma 4's audio tower."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Standardised(nn.Conv2d):
    """As BiT's."""

    def forward(self, x):
        W = self.weight
        W = (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, W, self.bias)


def bound():
    """A plain class whose instance has another forward."""
    module = nn.Linear(16, 24)
    module.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias).tanh(), module)
    return module


MODULES = {
    "scaled": (Scaled, torch.randn(2, 3, 16)),
    "router": (lambda: Router(16, 24), torch.randn(2, 3, 16)),
    "grouped": (lambda: Grouped(16, 24, bias=False), torch.randn(2, 5, 3, 16)),
    "normed": (lambda: Normed(24, 16), torch.randint(24, (2, 5))),
    "gained": (lambda: Gained(24, 16), torch.randint(24, (2, 5))),
    "causal": (lambda: Causal(4, 6, 3), torch.randn(2, 4, 9)),
    "standardised": (lambda: Standardised(4, 6, 3), torch.randn(2, 4, 6, 6)),
    "bound": (bound, torch.randn(2, 3, 16)),
}


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y[0] if isinstance(y, tuple) else y


def net(name: str) -> Net:
    torch.manual_seed(0)
    model = Net(MODULES[name][0]())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


METHODS = [case for case in ONE_EACH if case in LAYER_CASES and not case.siblings and not case.needs_experts]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("case", METHODS, ids=str)
def test_merged_equals_adapted_or_is_refused(case: Case, name: str):
    x = MODULES[name][1]
    settings = {key: value for key, value in case.settings.items() if key != "target_parameters"}
    settings |= {"target_modules": ["inner"]}
    try:
        model = get_peft_model(net(name), case.config_class(**settings)).eval()
        adapted = perturb(model, "default", 3)(x).detach()
        merged = model.merge_and_unload()(x).detach()
    except VeneerError:
        return
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_lora_acts_on_each(name: str, tmp_path):
    x = MODULES[name][1]
    model = perturb(get_peft_model(net(name), LoraConfig(r=2, target_modules=["inner"])).eval(), "default", 3)
    adapted = model(x).detach()
    assert (adapted - net(name)(x)).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net(name), tmp_path)(x), adapted)
    model.train()(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net(name)(x))


@pytest.mark.parametrize("name", ["scaled", "grouped", "causal"])
def test_dropout_there_is_refused(name: str):
    with pytest.raises(TargetError, match="a forward of its own.*no dropout; leave it out with exclude_modules"):
        get_peft_model(net(name), LoraConfig(r=2, target_modules=["inner"], lora_dropout=0.1))


@pytest.mark.parametrize("parametrise", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
@pytest.mark.parametrize("config", [LoraConfig, HiraConfig])
def test_a_computed_weight_is_adapted_and_not_merged(config, parametrise):
    torch.manual_seed(0)
    base = Net(parametrise(nn.Linear(16, 16)))
    x = torch.randn(3, 16)
    model = perturb(get_peft_model(base, config(r=2, target_modules=["inner"])).eval(), "default", 3)
    adapted = model(x).detach()
    with pytest.raises(NotMergeable, match="remove_parametrizations"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), adapted)
    module = model.get_base_model().inner.base_layer
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    if "weight" not in module._parameters:  # one of several originals
        W = module.weight.detach()
        del module.weight
        module.weight = nn.Parameter(W, requires_grad=False)
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
