"""AdamW over a flat buffer is AdamW: step by step, through saving and loading, and with its parameters the same."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from veneer import ConfigError
from veneer.ops.optimizer import FlatAdamW

SHAPES = [(3, 5), (7,), (2, 2, 2), (1,)]


def parameters(seed: int = 0, dtype=torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in SHAPES]


def groups(ps):
    return [{"params": ps[:3], "weight_decay": 0.1}, {"params": ps[3:], "weight_decay": 0.0}]


def train(optimizer, ps, steps, start=0, skip=()):
    for n in range(start, start + steps):
        draw = torch.Generator().manual_seed(n)
        for i, p in enumerate(ps):
            p.grad = None if i in skip else torch.randn(p.shape, generator=draw).to(p)
        optimizer.step()
        optimizer.zero_grad()


def same(a, b, **bound):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, **bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_steps_as_torchs_does(dtype):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    identities = [id(p) for p in ours]
    flat, plain = FlatAdamW(groups(ours), lr=0.1), torch.optim.AdamW(groups(theirs), lr=0.1, fused=True)
    train(flat, ours, 5), train(plain, theirs, 5)
    same(ours, theirs)
    assert [id(p) for p in ours] == identities
    assert len({p.untyped_storage().data_ptr() for p in ours}) == 2, "one buffer for each group"


def test_some_without_a_gradient_and_back():
    ours, theirs = parameters(), parameters()
    flat, plain = FlatAdamW(groups(ours), lr=0.1), torch.optim.AdamW(groups(theirs), lr=0.1, fused=True)
    for skip in ((), (1,), (), (0, 1, 2, 3), (3,), ()):
        train(flat, ours, 2, skip=skip), train(plain, theirs, 2, skip=skip)
    same(ours, theirs)


@pytest.mark.parametrize("first,second", [(FlatAdamW, FlatAdamW), (torch.optim.AdamW, FlatAdamW), (FlatAdamW, None)])
def test_either_resumes_what_the_other_began(first, second):
    whole = parameters()
    train(FlatAdamW(groups(whole), lr=0.1), whole, 6)
    ps = parameters()
    optimizer = first(groups(ps), lr=0.1)
    train(optimizer, ps, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [nn.Parameter(p.detach().clone()) for p in ps]
    resumed = (second or torch.optim.AdamW)(groups(again), lr=0.1)
    resumed.load_state_dict(torch.load(file))
    train(resumed, again, 3, start=3)
    if first is second:
        assert all(torch.equal(p, q) for p, q in zip(again, whole, strict=True)), "bit for bit"
    same(again, whole)


def test_parameters_that_are_moved_or_replaced_are_followed():
    ours, theirs = parameters(), parameters()
    flat, plain = FlatAdamW(groups(ours), lr=0.1), torch.optim.AdamW(groups(theirs), lr=0.1, fused=True)
    train(flat, ours, 2), train(plain, theirs, 2)
    for p in (ours[1], theirs[1]):
        p.data = p.data * 2
    with torch.no_grad():
        ours[0].mul_(3), theirs[0].mul_(3)
    train(flat, ours, 2, start=2), train(plain, theirs, 2, start=2)
    same(ours, theirs)


def test_copies_and_closures():
    ours = parameters()
    flat = FlatAdamW(groups(ours), lr=0.1)
    train(flat, ours, 1)
    twin = copy.deepcopy(ours)
    assert len({p.untyped_storage().data_ptr() for p in twin}) == 4

    def closure():
        loss = sum(p.square().sum() for p in ours)
        loss.backward()
        return loss

    before = float(closure())
    assert float(flat.step(closure)) == pytest.approx(before) and float(closure()) < before


def test_a_group_of_several_kinds_steps_too():
    ours, theirs = parameters()[:2] + parameters(dtype=torch.float64)[2:], None
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    flat, plain = FlatAdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    train(flat, ours, 3), train(plain, theirs, 3)
    same(ours, theirs)


def test_what_it_has_not_is_refused():
    with pytest.raises(ConfigError, match="amsgrad"):
        FlatAdamW(parameters(), amsgrad=True)
