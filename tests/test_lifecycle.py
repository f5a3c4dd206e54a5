"""What may be done with a wrapped model besides training and saving: copied, moved, cast, restored, shared, dropped."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import veneer
from veneer import IA3Config, LoraConfig, VeneerError, get_peft_model
from veneer.core.state import state_of

from . import models, room
from .cases import ONE_EACH, Case
from .models import output, perturb

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "down_proj"]
PLAIN = [case for case in ONE_EACH if not case.siblings]


def lora(name: str = "default", seed: int = 2, **settings):
    config = LoraConfig(**dict(r=3, target_modules=TARGETS) | settings)
    return perturb(get_peft_model(models.build("llama"), config, name).eval(), name, seed)


def two():
    model = lora()
    model.add_adapter("other", IA3Config())
    return perturb(model, "other", 5)


# State dicts


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_state_dict_brings_everything_back(case: Case):
    """Into a model with the same adapter at other values, strictly."""
    model, batch = case.build(), case.inputs()
    other = perturb(case.build(), seed=9)
    for p in other.get_base_model().parameters():
        p.data.add_(0.1)
    assert not torch.equal(output(other, batch), output(model, batch))
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=True)
    assert not missing and not unexpected
    assert torch.equal(output(other, batch), output(model, batch))


def test_a_state_dict_of_other_adapters_is_refused():
    with pytest.raises(RuntimeError, match="adapters.other"):
        lora().load_state_dict(two().state_dict())


@pytest.mark.parametrize("kind", ["LoraConfig", "VeraConfig", "PromptTuningConfig"])
@pytest.mark.parametrize("name", ["v1.5", "default.default", ".hidden", "training", "_modules", "train"])
def test_a_name_does_not_come_in_the_way_of_torch(kind: str, name: str):
    """Of its state dicts, whose keys are split at dots, nor of the attributes that it sets on every module."""
    config = getattr(veneer, kind)
    config = config(num_virtual_tokens=3) if kind == "PromptTuningConfig" else config(target_modules=["q_proj"])
    model, other = (perturb(get_peft_model(models.build("llama"), config, name), name, seed) for seed in (1, 2))
    assert not model.train().eval().training
    other.load_state_dict(model.state_dict(), strict=True)
    batch = models.inputs("llama")
    assert torch.equal(output(other.eval(), batch), output(model, batch))
    stray = next(key for key in model.state_dict() if f".{name}." in key).replace(f".{name}.", ".stray.")
    with pytest.raises(RuntimeError, match="stray"):
        other.load_state_dict(model.state_dict() | {stray: torch.zeros(1)})


# Copies


def test_copies_share_nothing():
    """Switching, merging, training or deleting in a copy leaves the first alone, and the other way round."""
    model, batch = two(), models.inputs("llama")
    expected = output(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert state_of(twin.get_base_model()) is not state_of(model.get_base_model())
        twin.set_adapter("other")
        twin.delete_adapter("default")
        twin.merge_adapter()
        assert model.active_adapters == ["default"] and torch.equal(output(model, batch), expected)
        assert list(model.peft_config) == ["default", "other"]
        model.set_adapter("other")
        torch.testing.assert_close(output(twin, batch), output(model, batch), rtol=1e-4, atol=1e-5)
        model.set_adapter("default")


# Switching, deleting, using the base


def test_deleting_the_active_adapter_makes_the_next_active():
    model, batch = two(), models.inputs("llama")
    model.set_adapter("other")
    expected = output(model, batch)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and torch.equal(output(model, batch), expected)
    with pytest.raises(VeneerError, match="unload"):
        model.delete_adapter("other")


def test_the_base_after_wrapping_is_the_adapted_model():
    """Wrapping is in place: a reference that the caller kept computes with the adapters, until unload()."""
    base, batch = models.build("llama"), models.inputs("llama")
    before = output(base, batch)
    model = perturb(get_peft_model(base, LoraConfig(r=3, target_modules=TARGETS)).eval())
    assert torch.equal(output(base, batch), output(model, batch)) and not torch.equal(output(base, batch), before)
    assert model.unload() is base and torch.equal(output(base, batch), before)
    with pytest.raises(VeneerError, match="no adapters"):
        model.set_adapter("default")


# Devices and dtypes


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_model_may_be_cast_there_and_back(case: Case):
    """To half precision and fp32 again: it runs in each, adapters and all, and its output dtype is the model's."""
    model = case.build()
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
        out = output(model, case.inputs(dtype=dtype))
        assert out.dtype == dtype and torch.isfinite(out).all()


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_model_may_be_moved(case: Case):
    """To the meta device, which stands for any: no tensor of an adapter stays behind."""
    model = case.build().to("meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("saved", [None, ["lm_head"], ["norm"]], ids=str)
@pytest.mark.parametrize("to", ["meta", torch.bfloat16], ids=str)
def test_a_merged_model_may_be_moved(name: str, saved: list[str] | None, to: Any):
    """What it merged with goes along, to be bound back; tied weights are tied again."""
    targets = ["embed_tokens", "q_proj"] if name == "tied" else ["q_proj"]
    model = perturb(get_peft_model(models.build(name), LoraConfig(target_modules=targets, modules_to_save=saved)))
    base = model.get_base_model()
    is_tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    model.merge_adapter()
    model.to(to)
    model.unmerge_adapter()
    assert {(p.device.type, p.dtype) for p in base.parameters()} == {
        ("meta", torch.float32) if to == "meta" else ("cpu", torch.bfloat16)
    }
    if to != "meta":
        assert (base.get_input_embeddings().weight is base.get_output_embeddings().weight) == is_tied
        assert output(model.eval(), models.inputs("llama")).isfinite().all()


# Threads


def test_threads_generate_with_different_adapters_at_once():
    """Each call runs with the adapters that it names, whatever the other threads do."""
    model, batch = two(), models.inputs("llama")
    jobs = [["default"] * 3, ["other"] * 3, ["__base__"] * 3, ["other", "default", "__base__"]]
    settings = dict(max_new_tokens=6, do_sample=False)
    expected = [model.generate(**batch, adapter_names=names, **settings) for names in jobs]
    found: list = [None] * 8

    def work(i: int) -> None:
        found[i] = model.generate(**batch, adapter_names=jobs[i % 4], **settings)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len({tuple(e.flatten().tolist()) for e in expected}) == 4, "adapters that do not differ show nothing"
    assert all(torch.equal(f, expected[i % 4]) for i, f in enumerate(found))


def test_a_thread_waits_while_another_has_the_adapters_disabled():
    model, batch = lora(), models.inputs("llama")
    expected, found = output(model, batch), []
    thread = threading.Thread(target=lambda: found.append(output(model, batch)))
    with model.disable_adapter():
        thread.start()
        thread.join(0.3)
        assert not found
    thread.join(60)
    assert torch.equal(found[0], expected)


# Memory


def test_nothing_holds_the_base_alive():
    """Without the garbage collector: neither a model that goes with its adapters on, nor one that was unloaded."""
    batch = models.inputs("llama")
    models.build("llama")
    gc.collect()
    gc.disable()
    try:
        for unloads in (False, True):
            base = models.build("llama")
            watched = [weakref.ref(m) for m in (base, base.model.layers[0].self_attn.q_proj, base.lm_head)]
            model = get_peft_model(base, LoraConfig(r=3, target_modules=TARGETS, modules_to_save=["lm_head"])).train()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            if unloads:
                model.unload()
            del base, model
            assert [ref() for ref in watched] == [None] * 3, unloads
    finally:
        gc.enable()


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_no_method_holds_the_base_alive(case: Case):
    if case.method in ("p_tuning",) and case.model == "t5":
        pytest.skip("transformers' T5 is in a cycle of its own")
    batch = case.inputs()
    gc.collect()
    gc.disable()
    try:
        model = case.build()
        output(model, batch)
        module = next(m for m in model.get_base_model().modules() if type(m) is torch.nn.Linear or hasattr(m, "nf"))
        watched = weakref.ref(module)
        del model, module
        assert watched() is None
    finally:
        gc.enable()


def test_two_hundred_cycles_leave_memory_flat():
    """Attach, forward, backward, detach; the last hundred and fifty add less than 2 MB to what the process holds."""
    base, batch, process = models.build("llama"), models.inputs("llama"), psutil.Process()
    sizes = []
    for i in range(200):
        config = [LoraConfig(r=16, target_modules="all-linear"), IA3Config()][i % 2]
        model = get_peft_model(base, config).train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        model.unload()
        if i in (49, 199):
            gc.collect()
            sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < 2_000_000
    assert not base._forward_pre_hooks and "_veneer" not in base.__dict__


# Determinism


SCRIPT = """
import hashlib, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from tests.cases import CASES
from veneer.core import checkpoint
from veneer.core.state import state_of
for case in CASES:
    if case.needs_experts:
        continue
    model = case.build(moved=False)
    digest = hashlib.sha256()
    for key, t in sorted(checkpoint.slots(state_of(model.get_base_model()), "default").items()):
        digest.update(key.encode() + t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    print(case, digest.hexdigest())
"""


def test_every_start_is_the_same_in_every_process():
    """The same seed gives the same bits in two processes whose hashes of strings differ."""
    processes = []
    for seed in ("1", "2"):
        environment = {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": room.PYTHONPATH,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        how = dict(
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent, env=environment
        )
        processes.append(subprocess.Popen([sys.executable, "-c", SCRIPT], **how))
    (one, errors), (other, _) = (process.communicate(timeout=room.SECONDS) for process in processes)
    assert not any(process.returncode for process in processes), errors
    assert one == other and one.count("\n") > 150
