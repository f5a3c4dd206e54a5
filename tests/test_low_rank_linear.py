"""Base and low-rank update in one autograd function: the plain path's numbers, less memory, and when it steps aside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from veneer import LoraConfig, VeraConfig, get_peft_model, ops
from veneer.core.config import all_methods
from veneer.core.state import state_of
from veneer.maths.dropout import drop_bits, mask_of
from veneer.ops.low_rank_linear import LowRankLinear, Update, low_rank_linear, reference, stack, stacked_linear

from . import models

RUNS = [(0, 4, 0), (4, 9, 1), (11, 15, 0)]
"""Of fifteen rows; the first update twice, and two rows without one."""


def problem(dtype=torch.float64, p=0.0):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, dtype=dtype, requires_grad=True)
    W, b = torch.randn(11, 7, dtype=dtype), torch.randn(11, dtype=dtype)
    pairs = [(torch.randn(r, 7), torch.randn(11, r)) for r in (2, 3)]
    learns = torch.float64 if dtype == torch.float64 else torch.float32
    return x, W, b, [Update(*(f.to(learns).requires_grad_() for f in pair), p) for pair in pairs]


def gradients(y, x, updates):
    return torch.autograd.grad(y.square().sum(), [x, *(f for u in updates for f in u[:2])])


@pytest.mark.parametrize("runs", [[(0, 15, 0)], RUNS], ids=["one", "several"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_numbers_and_gradients_are_the_plain_paths(runs, with_bias):
    x, W, b, updates = problem()
    updates = updates[: len({i for *_, i in runs})]
    b = b if with_bias else None
    y, plain = (f(x, W, b, updates, runs) for f in (low_rank_linear, reference))
    torch.testing.assert_close(y, plain)
    for mine, theirs in zip(gradients(y, x, updates), gradients(plain, x, updates), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(low_rank_linear(x, W, b, updates, runs), plain)
        torch.testing.assert_close(stacked_linear(x, W, b, stack(updates, runs, 15, x.dtype)), plain)


def test_dropout_uses_one_mask_for_both_directions():
    x, W, b, (update, _) = problem(p=0.25)
    torch.manual_seed(3)
    y = low_rank_linear(x, W, b, [update], [(0, 15, 0)])
    torch.manual_seed(3)
    mask = mask_of(drop_bits(15 * 7, 0.25, x.device), torch.Size((15, 7))).view_as(x)
    assert 0 < int(mask.sum()) < mask.numel()
    plain = F.linear(x, W, b) + F.linear(F.linear(x * mask / 0.75, update.A), update.B)
    torch.testing.assert_close(y, plain)
    for mine, theirs in zip(gradients(y, x, [update]), gradients(plain, x, [update]), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_keeps_its_share_of_entries(p):
    torch.manual_seed(0)
    n = 400_003
    mask = mask_of(drop_bits(n, p, torch.device("cpu")), torch.Size((n,))).double()
    assert abs(float(mask.mean()) - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5 + 1 / 65536
    neighbours = float((mask[1:] * mask[:-1]).mean())
    assert abs(neighbours - (1 - p) ** 2) < 0.005, "decisions are independent"


def saved_by(function):
    """The floating tensors an autograd graph keeps, each memory once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.setdefault(t.data_ptr(), t), t)[1], lambda t: t):
        out = function()
    return [t for t in kept.values() if t.is_floating_point()], out


def test_half_precision_keeps_no_wide_activations():
    x, W, b, (update, _) = problem(torch.bfloat16, p=0.5)
    x = torch.randn(300, 7, dtype=torch.bfloat16, requires_grad=True)
    kept, y = saved_by(lambda: low_rank_linear(x, W, b, [update], [(0, 300, 0)]))
    activations = [t for t in kept if t.shape[0] == 300]
    assert {t.dtype for t in activations} == {torch.bfloat16}
    assert sum(t.numel() for t in activations) == 300 * (7 + 2), "x and x A^T"
    assert [g.dtype for g in gradients(y, x, [update])] == [torch.bfloat16, torch.float32, torch.float32]


def layer_and_input(dtype=torch.float32, **settings):
    model = get_peft_model(models.build("llama", dtype=dtype), LoraConfig(r=4, target_modules=["q_proj"], **settings))
    models.perturb(model)
    layer = state_of(model.get_base_model()).layers["model.layers.0.self_attn.q_proj"]
    torch.manual_seed(1)
    return layer.train(), torch.randn(2, 6, 30, dtype=dtype, requires_grad=True)


def is_fused(layer, x) -> bool:
    y, seen, todo = layer(x), set(), []
    todo.append(y.grad_fn)
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    return any(type(node).__name__ == LowRankLinear.__name__ + "Backward" for node in seen)


def test_the_layer_takes_it_and_it_can_be_switched_off():
    layer, x = layer_and_input()
    fast = layer(x)
    assert is_fused(layer, x)
    with ops.plain("low_rank_linear"):
        assert not is_fused(layer, x)
        torch.testing.assert_close(layer(x), fast)


def test_it_steps_aside_for_whatever_hangs_on_the_base_layer():
    def hook(*_):
        calls.append(1)

    calls: list[int] = []
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        layer, x = layer_and_input()
        handle = getattr(layer.base_layer, register)(hook)
        assert not is_fused(layer, x)
        layer(x).sum().backward()
        assert calls.pop()
        handle.remove()
        assert is_fused(layer, x)
    layer.base_layer.forward = lambda x: nn.Linear.forward(layer.base_layer, x) + 1
    assert not is_fused(layer, x)
    del layer.base_layer.forward
    layer.base_layer.weight.requires_grad_()
    assert not is_fused(layer, x)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None


def test_it_steps_aside_for_other_weights_and_under_autocast():
    class Wrapped(torch.Tensor):
        pass

    layer, x = layer_and_input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_fused(layer, x)
    assert layer.target.direct() is not None
    layer.base_layer._parameters["weight"] = layer.base_layer.weight.detach().as_subclass(Wrapped)
    assert layer.target.direct() is None


@pytest.mark.parametrize("config", [LoraConfig(r=4, lora_dropout=0.3), VeraConfig(r=8, vera_dropout=0.3)], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_draws_the_same_mask(config, reentrant):
    found = []
    for recompute in (False, True):
        model = get_peft_model(models.build("llama"), config)
        models.perturb(model).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        batch = models.inputs("llama")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_compiles_whole(name):
    target = ["q_proj", "down_proj"] if name == "llama" else ["c_attn"]
    config = LoraConfig(r=4, target_modules=target, lora_dropout=0.3)
    model, batch = models.perturb(get_peft_model(models.build(name), config)).train(), models.inputs(name)
    model.train()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    whole(**batch).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    torch.testing.assert_close(whole(**batch).logits, model(**batch).logits)


NAMES = ["one", "two", "three"]


def three(dropout=0.0):
    """A model with three adapters of unequal ranks and targets, all active."""
    targets = [["q_proj", "down_proj"], ["q_proj", "up_proj"], ["down_proj"]]
    model = None
    for i, (name, target) in enumerate(zip(NAMES, targets, strict=True)):
        config = LoraConfig(r=2 + i, target_modules=target, lora_dropout=dropout)
        if model is None:
            model = get_peft_model(models.build("llama"), config, name)
        else:
            model.add_adapter(name, config)
        models.perturb(model, name, 30 + i)
    model.set_adapter(NAMES)
    return model.train()


def trained(model, names, batches):
    """The adapters' parameters after a few steps on the mean losses of each adapter's rows."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    for ids in batches:
        logits = model(input_ids=ids, adapter_names=names).logits
        losses = [
            F.cross_entropy(logits[rows, :-1].flatten(0, 1), ids[rows, 1:].flatten())
            for rows in ([i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names))
        ]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("names", [["one", "one", "two", "three"], ["two", "one", "three", "one"]], ids=str)
def test_adapters_trained_together_are_those_trained_alone(names):
    torch.manual_seed(0)
    batches = torch.randint(3, 67, (3, 4, 7))
    together = trained(three(), names, batches)
    for name in NAMES:
        model = three()
        model.set_adapter(name)
        rows = [i for i, n in enumerate(names) if n == name]
        alone = trained(model, [name] * len(rows), batches[:, rows])
        assert alone
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_what_generate_keeps_ends_with_it():
    model = three().eval()
    ids = models.inputs("llama", rows=4)["input_ids"]
    names = ["one", "__base__", "two", "three"]
    settings = dict(max_new_tokens=4, do_sample=False)
    first = model.generate(input_ids=ids, adapter_names=names, **settings)
    assert state_of(model.get_base_model()).memo is None
    with ops.plain():
        assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **settings), first)
    layer = state_of(model.get_base_model()).layers["model.layers.0.mlp.down_proj"]
    layer.lora_B["three"].weight.data.mul_(-30)
    assert not torch.equal(model.generate(input_ids=ids, adapter_names=names, **settings), first)


# What is smaller than a rounding error


class Wide(nn.Module):
    """A linear layer of which a call gives enough outputs to see the mean of what is below their rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(64, 256)

    def forward(self, x):
        return self.lin(x)


ROWS = 128


def slope(found, exact, update) -> float:
    """How much of an update the rounded results hold in the mean: 1 is all of it, 0 nothing."""
    found, exact, update = found.double().flatten(), exact.flatten(), update.flatten()
    return float((found - (exact - update)) @ update / (update @ update))


def small(config, **facts):
    """(a model in bfloat16, the same in float64), with an update far below a rounding error of the output."""
    x = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    for halvings in range(20):
        model = get_peft_model(Wide().bfloat16(), copy.deepcopy(config))
        models.perturb(model).eval()
        with torch.no_grad():
            for parameter in model._state.parameters("default"):
                parameter.mul_(0.5**halvings)
        exact = copy.deepcopy(model).double()
        with torch.no_grad(), exact.disable_adapter():
            base = exact(x, **facts)
        with torch.no_grad():
            update = exact(x, **facts) - base
        if update.std() < 5e-4:
            break
    assert 5e-5 < update.std() < 5e-4 and base.std() > 0.3
    return model, exact, x, update


SIZES = {"c3a": {"block_size": 32}, "vblora": {"vector_length": 32}}


NOT_SMALL = ("adalora", "adapter_plus", "bdlora", "delora", "frod", "kasa", "osf", "psoft")
"""Methods whose update is not made small by small parameters, or that need more than one layer."""


def adds_only(name: str, kind) -> bool:
    adapter = getattr(kind, "adapter", None)
    is_linear = "linear" in getattr(adapter, "kinds", ())
    return name not in NOT_SMALL and is_linear and bool(getattr(adapter, "only_adds", False))


ADDING = [name for name, kind in all_methods().items() if adds_only(name, kind)]


@pytest.mark.parametrize("name", ADDING)
def test_an_update_below_the_rounding_of_the_base_is_not_lost(name):
    """x W^T rounded first would swallow it: half precision would learn less, and always less."""
    config = all_methods()[name](target_modules=["lin"], **SIZES.get(name, {}))
    facts = {"task_ids": torch.zeros(ROWS, dtype=torch.long)} if "task_ids" in config.facts else {}
    model, exact, x, update = small(config, **facts)
    with torch.no_grad():
        assert slope(model(x.bfloat16(), **facts), exact(x, **facts), update) == pytest.approx(1, abs=0.2)


def test_methods_that_only_add_are_found():
    assert {"lora", "loha", "lokr", "miss", "vera", "fourierft"} <= set(ADDING)


@pytest.mark.parametrize("how", ["training", "dropout", "mixed", "generation", "gradient"])
def test_an_update_below_the_rounding_is_not_lost_on_any_path(how):
    model, exact, x, update = small(LoraConfig(r=4, target_modules=["lin"]))
    rows = x.bfloat16()
    if how == "training":
        assert slope(model.train()(rows).detach(), exact(x), update) == pytest.approx(1, abs=0.2)
    elif how == "dropout":
        model._state.layers["lin"].adapters["default"].set_dropout(1e-6)
        assert slope(model.train()(rows).detach(), exact(x), update) == pytest.approx(1, abs=0.2)
    elif how == "mixed":
        names = ["default"] * (ROWS // 2) + ["__base__"] * (ROWS // 2)
        found = model(rows, adapter_names=names)[: ROWS // 2].detach()
        half = slice(0, ROWS // 2)
        assert slope(found, exact(x)[half], update[half]) == pytest.approx(1, abs=0.2)
    elif how == "generation":
        with torch.no_grad(), model._state.remembering({}):
            assert slope(model(rows), exact(x), update) == pytest.approx(1, abs=0.2)
    else:
        dy = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
        leaves = []
        for adapted, leaf in ((model.train(), rows.clone()), (exact.train(), x.clone())):
            leaf.requires_grad_()
            adapted(leaf).backward(dy.to(leaf.dtype))
            leaves.append(leaf.grad)
        of_update = leaves[1] - dy.double() @ exact._state.layers["lin"].base_layer.weight
        assert slope(leaves[0], leaves[1], of_update) == pytest.approx(1, abs=0.2)
