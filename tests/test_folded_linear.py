"""Updates that are a whole matrix go through the weight they fold into: the plain path's numbers, and less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer import FourierFTConfig, GloraConfig, HiraConfig, WaveFTConfig, get_peft_model, ops
from veneer.methods.fourierft import hermitian_half
from veneer.ops.folded_linear import folded_linear, reference

from . import models

CONFIGS = {
    "hira": HiraConfig(r=4, target_modules="all-linear"),
    "glora": GloraConfig(r=4, target_modules="all-linear"),
    "fourierft": FourierFTConfig(n_frequency=50, target_modules="all-linear"),
    "waveft": WaveFTConfig(n_frequency=50, target_modules="all-linear"),
}


def problem(with_bias=True):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, dtype=torch.float64) if with_bias else None
    A, s, idle = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (7, 11, 2))

    def fold(W, b):
        return W * A + s[:, None], None if b is None else b * s

    return (x, W, b, fold, [A, s, idle])


@pytest.mark.parametrize("with_bias", [True, False])
def test_numbers_and_gradients_are_the_plain_paths(with_bias):
    given = problem(with_bias)
    y, plain = folded_linear(*given), reference(*given)
    torch.testing.assert_close(y, plain)
    leaves = [given[0], *given[4][:2]]
    for mine, theirs in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
    folded_linear(*given).sum().backward()
    assert given[4][2].grad is None
    with torch.no_grad():
        torch.testing.assert_close(folded_linear(*given), plain)


def test_a_parameter_that_changed_before_the_backward_pass_is_an_error():
    given = problem()
    y = folded_linear(*given)
    with torch.no_grad():
        given[4][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def trained(name, *switched_off, checkpointing=False):
    model = models.perturb(get_peft_model(models.build("llama"), CONFIGS[name])).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with ops.plain(*switched_off) if switched_off else ops.plain("optimizer"):
        model(**models.inputs("llama"), labels=models.inputs("llama")["input_ids"]).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_methods_learn_as_on_the_plain_path(name, checkpointing, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "veneer.ops.folded_linear.folded_linear", lambda *given: calls.append(0) or folded_linear(*given)
    )
    fast = trained(name, checkpointing=checkpointing)
    assert len(calls) >= 14
    calls.clear()
    plain = trained(name, "folded_linear")
    assert not calls and fast.keys() == plain.keys()
    for key in plain:
        assert (fast[key] - plain[key]).norm() < 1e-4 * plain[key].norm(), key


@pytest.mark.parametrize("name", CONFIGS)
def test_no_matrix_is_kept_for_the_backward_pass(name):
    kept = []
    model = models.perturb(get_peft_model(models.build("llama"), CONFIGS[name])).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**models.inputs("llama")).logits.sum()
    matrices = {tuple(p.shape) for n, p in model.named_parameters() if "base_layer.weight" in n}
    assert not [t for t in kept if tuple(t.shape) in matrices and t.untyped_storage().data_ptr() not in own]


def test_half_precision_adds_the_update_beside_the_weight(monkeypatch):
    """Folded, it would be rounded with the weight."""
    monkeypatch.setattr("veneer.ops.folded_linear.folded_linear", None)
    model = get_peft_model(models.build("llama").bfloat16(), CONFIGS["hira"])
    model(**models.inputs("llama"))


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 4), (8, 1)])
def test_half_a_spectrum_says_it_all(size):
    places = torch.randperm(size[0] * size[1])[: (size[0] * size[1] + 1) // 2]
    values = torch.randn(len(places), dtype=torch.float64)
    whole = torch.zeros(size[0] * size[1], dtype=torch.float64).index_put((places,), values).view(size)
    entries, half = hermitian_half(places, *size)
    S = torch.zeros(size[0] * (size[1] // 2 + 1), dtype=torch.float64).index_add(0, half, values[entries] / 2)
    torch.testing.assert_close(torch.fft.irfft2(S.view(size[0], -1), size), torch.fft.ifft2(whole).real)
