"""LoRA's own optimizers: their formulas in NumPy, one step beside PEFT's, and under transformers' Trainer."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from veneer import (
    ConfigError,
    LoraConfig,
    PeftModel,
    TargetError,
    VeneerError,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    get_peft_model,
)

from . import models
from .models import output
from .test_numpy import arr, state
from .test_trainer import losses, trainer

peft = pytest.importorskip("peft")
pefts = importlib.import_module("peft.optimizers")
pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = dict(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 4})


def loss_of(model, name: str = "llama"):
    return output(model, models.inputs(name)).square().mean()


def steep(model):
    """A loss beside whose gradients AdamW's epsilon is nothing, wherever it is added."""
    return 1e4 * loss_of(model)


def adapted(name: str = "llama", **more):
    torch.manual_seed(0)
    return models.perturb(get_peft_model(models.build(name), LoraConfig(**SETTINGS | more)))


def values(model) -> dict[str, np.ndarray]:
    """The trained parameters by name."""
    return {name: arr(p) for name, p in model.named_parameters() if "adapters" in name}


def gradients(model, name: str = "llama") -> dict[str, np.ndarray]:
    loss_of(model, name).backward()
    found = {name: arr(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def stepped(model, optimizer, name: str = "llama", times: int = 1, loss=None) -> dict[str, np.ndarray]:
    """The parameters after steps on one batch."""
    for _ in range(times):
        (loss_of(model, name) if loss is None else loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def names_of_pairs(found) -> list[tuple[str, str]]:
    return [(name, name.replace("lora_A", "lora_B")) for name in found if "lora_A" in name]


# Formulas


@pytest.mark.parametrize("reg", [1e-2, 0.5])
@pytest.mark.parametrize("name", ["llama", "conv"])
def test_riemannian(name: str, reg: float):
    """g_A <- (B^T B + reg I)^-1 g_A, g_B <- g_B (A A^T + reg I)^-1, then plain descent."""
    more = {} if name == "llama" else dict(target_modules=["first", "third", "head"], rank_pattern={})
    model = adapted(name, **more)
    before, grads = values(model), gradients(model, name)
    after = stepped(model, create_riemannian_optimizer(model, torch.optim.SGD, lr=0.01, reg=reg), name)
    for a, b in names_of_pairs(before):
        A, B = before[a].reshape(len(before[a]), -1), before[b].reshape(len(before[b]), -1)
        eye = reg * np.eye(len(A))
        g_A = np.linalg.inv(B.T @ B + eye) @ grads[a].reshape(A.shape)
        g_B = grads[b].reshape(B.shape) @ np.linalg.inv(A @ A.T + eye)
        for key, old, step in ((a, A, g_A), (b, B, g_B)):
            scale = np.abs(step).max()
            np.testing.assert_allclose((old - after[key].reshape(old.shape)) / 0.01 / scale, step / scale, atol=2e-3)


def test_riemannian_steps_do_not_depend_on_how_the_product_is_shared():
    """A R and R^-1 B give the same next product, with no damping."""
    products = []
    for share in (1.0, 5.0):
        model = adapted()
        for adapter in state(model).adapters("default").values():
            with torch.no_grad():
                adapter.lora_A.weight.mul_(share)
                adapter.lora_B.weight.div_(share)
        stepped(model, create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=0.0))
        with torch.no_grad():
            products.append([adapter.delta() for adapter in state(model).adapters("default").values()])
    for one, two in zip(*products, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_lorafa():
    """g_B <- g_B (A A^T)^-1 / s^2 into AdamW; A does not move."""
    model = adapted()
    before, grads = values(model), gradients(model)
    after = stepped(model, create_lorafa_optimizer(model, 3, 7, lr=0.01, weight_decay=0.1))
    for a, b in names_of_pairs(before):
        A, s = before[a], 7 / len(before[a])
        g = grads[b] @ np.linalg.inv(A @ A.T) / s**2
        np.testing.assert_array_equal(after[a], A)
        expected = before[b] * (1 - 0.01 * 0.1) - 0.01 * g / (np.abs(g) + 1e-6)
        np.testing.assert_allclose(after[b], expected, atol=2e-5)


def test_lorafas_gradient_is_the_nearest_to_the_full_one():
    """Of all steps of B, the one whose s g_B A is the full gradient projected on the rows of A."""
    model = adapted()
    adapter = next(iter(state(model).adapters("default").values()))
    weight = adapter.target.base.weight.requires_grad_(True)
    loss_of(model).backward()
    optimizer = create_lorafa_optimizer(model, lr=0.0)
    optimizer.step()
    A, G = arr(adapter.lora_A.weight), arr(weight.grad)
    projected = G @ A.T @ np.linalg.inv(A @ A.T) @ A
    mine = adapter.scaling * arr(adapter.lora_B.weight.grad) @ A
    np.testing.assert_allclose(mine, projected, atol=1e-3 * np.abs(projected).max())


def test_lorafa_needs_no_gradient_for_A():
    model = adapted(bias="all")
    create_lorafa_optimizer(model, lr=0.01)
    loss_of(model).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_B" in name or ("adapters" in name and name.endswith("bias"))), name


def test_loraplus():
    """Four groups: A, embeddings, B, and what is not decayed; B's rate is the ratio times A's."""
    more = dict(target_modules=["c_attn", "wte"], rank_pattern={}, bias="all", use_dora=True)
    model = adapted("gpt2", **more)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5
    )
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3, 1e-5, 0.016, 0.016])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    assert all("lora_A" in n for n in groups[0]) and len(groups[0]) == 2
    assert all("lora_embedding_" in n for n in groups[1]) and len(groups[1]) == 2
    assert all("lora_B" in n or "magnitude" in n for n in groups[2]) and len(groups[2]) == 5
    assert all(n.endswith("bias") for n in groups[3]) and groups[3]
    assert sum(map(len, groups)) == sum(p.requires_grad for p in model.parameters())


# Beside PEFT


def both(tmp_path, name: str = "llama", **more):
    """The same adapter in both libraries."""
    theirs = peft.get_peft_model(models.build(name), peft.LoraConfig(**SETTINGS | more))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path / "start")
    return PeftModel.from_pretrained(models.build(name), tmp_path / "start", is_trainable=True), theirs


def agree(ours, theirs, tmp_path, moved: tuple[str, ...] = ("lora_A", "lora_B"), **tolerance):
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    start, mine, reference = (
        load_file(tmp_path / which / "adapter_model.safetensors") for which in ("start", "ours", "theirs")
    )
    assert mine.keys() == reference.keys()
    for key in mine:
        assert torch.equal(mine[key], start[key]) != any(part in key for part in moved), key
        torch.testing.assert_close(mine[key], reference[key], **tolerance)


def pefts_step(theirs, optimizer, times: int = 3, loss=loss_of):
    for _ in range(times):
        loss(theirs).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_beside_peft(kind, tmp_path):
    ours, theirs = both(tmp_path)
    stepped(ours, create_riemannian_optimizer(ours, kind, lr=1e-3, weight_decay=0.1), times=3)
    pefts_step(theirs, pefts.create_riemannian_optimizer(theirs, kind, lr=1e-3, weight_decay=0.1))
    agree(ours, theirs, tmp_path, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_lorafa_beside_peft(rslora: bool, tmp_path, monkeypatch):
    monkeypatch.setattr(pefts.lorafa, "is_bf16_available", lambda: False)  # else it rounds its gradients
    ours, theirs = both(tmp_path, use_rslora=rslora)
    stepped(ours, create_lorafa_optimizer(ours, 3, 7, lr=1e-3), times=3, loss=steep)
    pefts_step(theirs, pefts.create_lorafa_optimizer(theirs, 3, 7, lr=1e-3), loss=steep)
    agree(ours, theirs, tmp_path, moved=("lora_B",), rtol=1e-3, atol=3e-5)


def test_loraplus_beside_peft(tmp_path):
    ours, theirs = both(tmp_path, use_dora=True)
    how = dict(lr=1e-3, loraplus_lr_ratio=4, loraplus_weight_decay=0.1)
    stepped(ours, create_loraplus_optimizer(ours, torch.optim.AdamW, **how), times=3)
    pefts_step(theirs, pefts.create_loraplus_optimizer(theirs, torch.optim.AdamW, **how))
    agree(ours, theirs, tmp_path, moved=("lora_",), rtol=1e-3, atol=1e-4)


# Under Trainer


def make(kind: str, model, lr: float = 5e-3):
    if kind == "lorafa":
        return create_lorafa_optimizer(model, lr=lr)
    if kind == "loraplus":
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr / 2, loraplus_lr_ratio=4)
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr)


def fresh():
    torch.manual_seed(5)
    return get_peft_model(models.build("gpt2").train(), LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ["lorafa", "loraplus", "riemannian"])
def test_trainer_takes_them_and_resumes(kind: str, tmp_path):
    """The loss falls, and a run that stops half way ends where an unbroken one does."""
    from transformers import Trainer

    def run(model, where, **more):
        made = trainer(model, where, max_steps=20, save_steps=10, lr_scheduler_type="constant", **more)
        return Trainer(
            model=model,
            args=made.args,
            train_dataset=made.train_dataset,
            optimizers=(make(kind, model), None),
        )

    model = fresh()
    A = [p.A.detach().clone() for p in pairs_of(model)]
    whole = run(model, tmp_path)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0] - 0.2
    assert all(torch.equal(a, p.A) == (kind == "lorafa") for a, p in zip(A, pairs_of(model), strict=True))
    again = fresh()
    run(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for one, two in zip(state(model).parameters("default"), state(again).parameters("default"), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def pairs_of(model):
    from veneer.train.optimizers.pairs import pairs

    return pairs(model)


# Refusals


def test_what_has_no_pairs_is_refused():
    model = get_peft_model(models.build("llama"), models_config())
    for make_one in (
        lambda: create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.1),
        lambda: create_lorafa_optimizer(model, lr=0.1),
        lambda: create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=4),
    ):
        with pytest.raises(VeneerError, match="no active LoRA"):
            make_one()


def models_config():
    from veneer import IA3Config

    return IA3Config(target_modules=["q_proj"], feedforward_modules=[])


def test_closures_are_refused():
    model = adapted()
    with pytest.raises(VeneerError, match="LBFGS"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
    for call in (lambda: optimizer.step(lambda: loss_of(model)), lambda: optimizer.step(closure=lambda: 0)):
        with pytest.raises(VeneerError, match="closure"):
            call()
    optimizer.step(None)


def test_settings_that_contradict_the_adapter_are_refused():
    model = adapted()
    for given in (dict(r=4), dict(lora_alpha=3), dict(use_rslora=True)):
        with pytest.raises(ConfigError, match=next(iter(given))):
            create_lorafa_optimizer(model, lr=0.1, **given)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=0)
    embedding = get_peft_model(models.build("gpt2"), LoraConfig(r=3, target_modules=["wte"]))
    with pytest.raises(TargetError, match="wte"):
        create_lorafa_optimizer(embedding, lr=0.1)
    assert all(p.requires_grad for p in state(embedding).parameters("default"))
