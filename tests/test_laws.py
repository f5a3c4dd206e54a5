"""The laws every method obeys. They run over the registry: a new method is tested by existing."""

from __future__ import annotations

import copy
import io
import itertools
import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file

from veneer import NotMergeable, VeneerError, get_peft_model
from veneer.core import checkpoint, embeddings
from veneer.core.config import all_methods

from . import models
from .cases import CASES, LAYER_CASES, MERGEABLE, ONE_EACH, Case
from .models import output, perturb

TOLERANCE = dict(rtol=2e-4, atol=2e-5)


def every(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def state(model):
    return models.state(model)


def test_every_method_has_a_case():
    assert {case.method for case in CASES} == set(all_methods())


@every([case for case in CASES if case.noop])
def test_starts_as_a_no_op(case: Case):
    batch = case.inputs()
    torch.testing.assert_close(
        output(case.build(moved=False), batch), output(models.build(case.model), batch), **TOLERANCE
    )


@every(CASES)
def test_does_something_once_moved(case: Case):
    """The guard of the other laws: their adapters change the output by far more than the tolerances."""
    batch, model = case.inputs(), case.build()
    change = output(model, batch)[:, -1] - output(models.build(case.model), batch)[:, -1]
    assert change.abs().max() > 1e-3


@every(MERGEABLE)
def test_activations_and_weight_agree(case: Case):
    model, batch = case.build(), case.inputs()
    active = output(model, batch)
    model.merge_adapter()
    assert all(layer.merged_adapters for layer in state(model).layers.values())
    torch.testing.assert_close(output(model, batch), active, **TOLERANCE)


DROPOUTS = {(c.method, f.name) for c in ONE_EACH for f in fields(c.config_class) if f.name.endswith("dropout")}


@pytest.mark.parametrize(("method", "name"), sorted(DROPOUTS), ids=str)
def test_dropout_acts_in_training_alone(method: str, name: str):
    """In one case of the method at least: some forms have no place for it."""
    acts = []
    for case in (c for c in CASES if c.method == method and not c.settings.get("target_parameters")):
        model, batch = replace(case, settings=case.settings | {name: 0.5}).build(), case.inputs()
        assert torch.equal(output(model, batch), output(model, batch))
        model.train()
        acts.append(any(not torch.equal(output(model, batch), output(model, batch)) for _ in range(3)))
    assert any(acts)


PAIRS = list(itertools.product([c for c in ONE_EACH if c in MERGEABLE], repeat=2))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_any_two_methods_merged_equal_active(first: Case, second: Case):
    """On one model, in either order; where both adapt a module the order of composition shows."""
    reads = first if first.siblings else second
    model = reads.with_siblings(models.build("llama"))
    if model is None:
        model = get_peft_model(models.build("llama"), first.config(), "first")
    else:
        model.add_adapter("first", first.config())
    model.eval().add_adapter("second", second.config())
    perturb(perturb(model, "first", 3), "second", 4)
    batch = models.inputs("llama")
    for order in (["first", "second"], ["second", "first"]):
        model.set_adapter(order)
        active = output(model, batch)
        model.merge_adapter()
        torch.testing.assert_close(output(model, batch), active, **TOLERANCE)
        model.unmerge_adapter()


ALONE = ("alora-llama-dora-bias-rslora", "dora-grouped")
"""A DoRA needs the norm of the weight below it, and these have no form as a weight."""
LAST = ("ln_tuning", "trainable_tokens")
"""They put values in the place of others: those of the last are there."""
PLAIN = [case for case in LAYER_CASES if not case.siblings and not case.needs_experts and case.method not in LAST]


@every([case for case in PLAIN if str(case) not in ALONE])
def test_two_of_a_kind_both_act(case: Case):
    """Active together they give what neither gives alone."""
    model, batch = case.build("one"), case.inputs()
    model.add_adapter("two", case.config())
    perturb(model, "two", 9)
    outs = []
    for names in (["one", "two"], ["one"], ["two"]):
        model.set_adapter(names)
        outs.append(output(model, batch))
    assert not torch.allclose(outs[0], outs[1], **TOLERANCE) and not torch.allclose(outs[0], outs[2], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every(MERGEABLE)
def test_unmerge_is_bit_exact(case: Case, dtype: torch.dtype):
    model = case.build(dtype=dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@every(CASES)
def test_save_load_save_is_the_identity(case: Case, tmp_path):
    model, batch = case.build(), case.inputs()
    model.save_pretrained(tmp_path / "one")
    loaded = case.load(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert (tmp_path / "one" / "adapter_config.json").read_text() == (
        tmp_path / "two" / "adapter_config.json"
    ).read_text()
    assert torch.equal(output(loaded, batch), output(model, batch))
    assert all(p.data_ptr() % 64 == 0 for p in state(loaded).parameters("default") if p.numel()), "slower, less exact"


@every(CASES)
def test_loading_into_a_present_adapter_keeps_its_parameters(case: Case, tmp_path):
    """An optimizer holds the Parameter objects: a resume must fill them, not replace them."""
    model = case.build()
    model.save_pretrained(tmp_path)
    values = {n: p.clone() for n, p in model.named_parameters()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    perturb(model, seed=9)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    for n, p in model.named_parameters():
        assert id(p) == objects[n] and torch.equal(p, values[n]) and p.requires_grad == grads[n], n


@pytest.mark.parametrize("name", ["lora", "weight", "0", "items", "v1.5", "lora_A"])
@every(ONE_EACH)
def test_the_name_does_not_matter(case: Case, name: str, tmp_path):
    batch = case.inputs()
    expected = output(case.build(), batch)
    model = case.build(name)
    assert torch.equal(output(model, batch), expected)
    model.save_pretrained(tmp_path)
    loaded = case.load(tmp_path / name, name)
    assert torch.equal(output(loaded, batch), expected)


TOGETHER = {"lily": "its router averages over the rows of a call, as in the paper's code and PEFT"}
"""Methods whose rows are compared with a call of all rows of the same adapter, and not each with its own."""


@every(LAYER_CASES)
def test_a_mixed_batch_equals_its_rows(case: Case):
    model = case.build()
    model.add_adapter("other", case.config())
    perturb(model, "other", 5)
    if case.model in models.CONVS:
        pytest.skip("adapter_names is an argument of a transformers model's forward")
    batch, names = case.inputs(rows=4), ["default", "__base__", "other", "default"]
    mixed = output(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        rows = [i for i in range(4) if i == row or (case.method in TOGETHER and names[i] == name)]
        own = {k: v[rows] for k, v in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = output(model, own)
        else:
            model.set_adapter(name)
            alone = output(model, own)
        torch.testing.assert_close(mixed[rows], alone, **TOLERANCE)


def loss_of(model, case: Case, dtype: torch.dtype = torch.float32):
    batch = case.inputs(dtype=dtype)
    if "x" in batch:
        return model(batch["x"]).square().mean()
    labels = batch["decoder_input_ids"] if case.model == "t5" else batch["input_ids"]
    return model(**batch, labels=labels).loss


@every(CASES)
def test_only_the_adapter_trains_and_all_of_it(case: Case):
    model = case.build()
    learned = {id(p) for p in state(model).parameters("default")}
    for name, p in model.named_parameters():
        assert p.requires_grad == (id(p) in learned), name
    model.train()
    loss_of(model, case).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert learned
    for p in model.parameters():
        assert not p.requires_grad or p.grad.abs().sum() > 0 or p.numel() == 0


@every(CASES)
def test_a_saved_adapter_is_trained_on(case: Case, tmp_path):
    """It starts where it was saved, a step moves it, and nothing else."""
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.load(tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        saved_loss = loss_of(model, case)
        assert loss_of(loaded, case) == saved_loss
    learned = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert learned.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.clone() for name, p in loaded.named_parameters()}
    optimizer = torch.optim.Adam(loaded.parameters(), lr=1e-3)
    loss_of(loaded.train(), case).backward()
    optimizer.step()
    moved = {name for name, p in loaded.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= learned.keys()


@every(CASES)
def test_parameters_are_contiguous(case: Case):
    assert all(p.is_contiguous() for p in case.build().parameters())


@every(CASES)
def test_a_half_precision_base_keeps_its_dtype(case: Case):
    model = case.build(dtype=torch.bfloat16)
    assert output(model, case.inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in state(model).parameters("default")} == {torch.float32}
    model.train()
    batch = case.inputs(dtype=torch.bfloat16)
    output(model, batch).float().square().mean().backward()


AUTOCAST = {
    "fp32-to-bf16": (torch.float32, torch.bfloat16),
    "fp32-to-fp16": (torch.float32, torch.float16),
    "bf16-to-bf16": (torch.bfloat16, torch.bfloat16),
}
"""(dtype of the base, dtype that autocast computes in)."""


UNDER_AUTOCAST = [(case, dtypes) for dtypes in AUTOCAST for case in (CASES if dtypes == "fp32-to-bf16" else ONE_EACH)]


@pytest.mark.parametrize(("case", "dtypes"), UNDER_AUTOCAST, ids=str)
def test_trains_under_autocast(case: Case, dtypes: str):
    """As under `Trainer(bf16=True)`: near the loss without autocast, and every parameter gets a finite gradient."""
    base, dtype = AUTOCAST[dtypes]
    model = case.build(dtype=base).train()
    torch.manual_seed(3)
    plain = float(loss_of(model, case, base).detach())
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(model, case, base)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(plain, rel=0.05)
    for name, p in model.named_parameters():
        if p.requires_grad and p.numel():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype, name
            assert p.grad.abs().sum() > 0, name


@every(CASES)
def test_disabled_equals_base(case: Case):
    model, batch = case.build(), case.inputs()
    base = output(models.build(case.model).requires_grad_(False), batch)
    with model.disable_adapter():
        assert torch.equal(output(model, batch), base)
    if case in MERGEABLE:
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(output(model, batch), base)


@every(CASES)
def test_unload_leaves_no_trace(case: Case):
    fresh, bare = models.build(case.model).requires_grad_(False), case.build().unload()
    assert [n for n, _ in bare.named_modules()] == [n for n, _ in fresh.named_modules()]
    assert [type(m) for m in bare.modules()] == [type(m) for m in fresh.modules()]
    assert all(torch.equal(p, q) for p, q in zip(bare.parameters(), fresh.parameters(), strict=True))
    assert not bare._forward_pre_hooks and not bare._forward_hooks and "_veneer" not in bare.__dict__
    assert torch.equal(output(bare, case.inputs()), output(fresh, case.inputs()))


@every(ONE_EACH)
def test_delete_leaves_the_others(case: Case):
    alone = case.build()
    model = case.build()
    names = [n for n, _ in model.named_modules()]
    model.add_adapter("other", case.config())
    model.delete_adapter("other")
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(output(model, case.inputs()), output(alone, case.inputs()))


@every(CASES)
def test_survives_deepcopy_and_pickle(case: Case):
    model, batch = case.build(), case.inputs()
    expected = output(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(output(other, batch), expected)
        perturb(other, seed=6)
        assert not torch.equal(output(other, batch), expected)
        assert torch.equal(output(model, batch), expected)


@every([c for c in ONE_EACH if not any(getattr(m, "fills_cache", False) for m in c.config().members())])
def test_gradient_checkpointing_gives_the_same_gradients(case: Case):
    grads = []
    for checkpointing in (False, True):
        model = case.build().train()
        torch.manual_seed(3)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(model, case).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, **TOLERANCE)


def compiles(model, batch) -> bool:
    try:
        output(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    except torch._dynamo.exc.Unsupported:
        return False
    finally:
        torch._dynamo.reset()
    return True


@every(ONE_EACH)
def test_compiles_in_one_graph(case: Case):
    if case.method == "xlora":
        pytest.skip("its gate runs the model a second time inside a hook, which torch does not trace")
    model, batch = case.build(), case.inputs()
    expected = output(model, batch)
    torch._dynamo.reset()
    if case.model == "t5" and not compiles(models.build("t5"), batch):
        pytest.skip("torch does not trace the base model of this transformers: T5 of 5.20 copies its config in a call")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, batch), expected, **TOLERANCE)


def test_a_merge_that_would_change_the_result_is_refused():
    hra, ia3 = (next(c for c in CASES if str(c) == n) for n in ("hra-llama", "ia3-llama"))
    model = get_peft_model(models.build("llama"), hra.config(), "hra").eval()
    model.add_adapter("ia3", ia3.config())
    model.set_adapter(["hra", "ia3"])
    before = output(model, models.inputs("llama"))
    with pytest.raises(NotMergeable, match="merge 'hra' first"):
        model.merge_adapter(["ia3"])
    assert torch.equal(output(model, models.inputs("llama")), before)
    model.merge_adapter(["hra"])
    torch.testing.assert_close(output(model, models.inputs("llama")), before, **TOLERANCE)


@every([c for c in CASES if c not in MERGEABLE])
def test_what_has_no_weight_form_says_so(case: Case):
    with pytest.raises(NotMergeable):
        case.build().merge_adapter()


@every(CASES)
def test_the_plan_counts_what_is_there(case: Case):
    model = case.build()
    plan = model.parameter_plan()
    assert plan.expected == plan.total
    if case.method != "xlora":  # its experts are there, frozen
        assert plan.total == sum(p.numel() for p in {id(p): p for p in state(model).parameters("default")}.values())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) and total > trainable


@every(CASES)
def test_the_file_holds_what_the_slots_say(case: Case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    slots = checkpoint.slots(state(model), "default")
    assert {k for k in tensors if not embeddings.is_one(k)} <= slots.keys()
    assert slots.keys() <= tensors.keys()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def test_a_second_adapter_cannot_share_a_name():
    case = CASES[0]
    with pytest.raises(VeneerError, match="already has an adapter called 'default'"):
        case.build().add_adapter("default", case.config())
