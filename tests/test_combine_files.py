"""`veneer combine`: the same adapter that add_weighted_adapter makes, from files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from veneer import BaseMismatch, IA3Config, LoraConfig, NotMergeable, PeftModel, VeneerError, get_peft_model
from veneer.merging.combine import combine

from . import models
from .forked import veneer
from .models import output, perturb

SETTINGS = {
    "one": dict(r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    "two": dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "k_proj"]),
    "dora": dict(r=2, use_dora=True, target_modules=["q_proj"]),
}


def adapters(tmp_path, *names, base=None):
    found = []
    for name in names:
        model = get_peft_model(base or models.build("llama"), LoraConfig(**SETTINGS[name]))
        perturb(model, seed=3 + len(name) + len(found)).save_pretrained(tmp_path / name)
        found.append(str(tmp_path / name))
    return found


def in_memory(paths, weights, *how, **settings):
    model = PeftModel.from_pretrained(models.build("llama"), paths[0], "0")
    for i, path in enumerate(paths[1:], 1):
        model.load_adapter(path, str(i))
    model.add_weighted_adapter([str(i) for i in range(len(paths))], weights, "sum", *how, **settings)
    model.set_adapter("sum")
    return output(model, models.inputs("llama"))


@pytest.mark.parametrize(
    ("method", "rank", "density"),
    [("cat", None, None), ("svd", None, None), ("linear", 2, None), ("ties", 5, 0.4)],
)
def test_loras_are_added_from_their_files_alone(method, rank, density, tmp_path):
    paths = adapters(tmp_path, "one", "two")
    done = combine(paths, [1.5, -0.7], tmp_path / "out", method, rank, density)
    assert not done.with_base and done.modules == 6
    wanted = in_memory(paths, [1.5, -0.7], method, rank, density=density)
    found = output(PeftModel.from_pretrained(models.build("llama"), tmp_path / "out"), models.inputs("llama"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_dare_drops_follows_the_seed(tmp_path):
    paths = adapters(tmp_path, "one", "two")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        combine(paths, [1, 1], tmp_path / name, "dare_ties", density=0.5, seed=seed)
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(t, b[key]) for key, t in a.items())
    assert any(not torch.equal(t, c[key]) for key, t in a.items())


def test_convolutions_too(tmp_path):
    model = get_peft_model(models.build("conv"), LoraConfig(r=4, target_modules=["first", "third", "head"]), "default")
    perturb(model).save_pretrained(tmp_path / "one")
    perturb(model, seed=9).save_pretrained(tmp_path / "two")
    combine([str(tmp_path / "one"), str(tmp_path / "two")], [1, 2], tmp_path / "out", "cat")
    found = [PeftModel.from_pretrained(models.build("conv"), tmp_path / n) for n in ("one", "two", "out")]
    for path in found[0]._state.layers:
        a, b, c = (m._state.layers[path].adapters["default"].delta() for m in found)
        torch.testing.assert_close(a + 2 * b, c, rtol=1e-4, atol=1e-5)


def test_other_methods_stand_on_their_base(tmp_path):
    models.build("llama").save_pretrained(tmp_path / "base")
    paths = adapters(tmp_path, "one", "dora")
    done = combine(paths, [0.5, 2.0], tmp_path / "out", rank=8, model=str(tmp_path / "base"))
    wanted = in_memory(paths, [0.5, 2.0], "svd", 8)
    found = output(PeftModel.from_pretrained(models.build("llama"), tmp_path / "out"), models.inputs("llama"))
    assert done.with_base
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_refusals_write_nothing(tmp_path):
    paths = adapters(tmp_path, "one", "two")
    models.build("llama").save_pretrained(tmp_path / "base")
    other = adapters(tmp_path / "other", "two", base=models.build("llama", seed=9))
    headed = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(models.build("llama"), headed).save_pretrained(tmp_path / "headed")
    get_peft_model(models.build("llama"), IA3Config()).save_pretrained(tmp_path / "ia3")
    base = dict(model=str(tmp_path / "base"))
    for error, match, names, weights, how in [
        (VeneerError, "each adapter needs one weight", paths, [1], {}),
        (VeneerError, "weights must be finite", paths, [1, float("nan")], {}),
        (VeneerError, "no way to combine called 'tie'", paths, [1, 1], dict(method="tie")),
        (VeneerError, "needs a density", paths, [1, 1], dict(method="ties")),
        (BaseMismatch, "different base models", [paths[0], *other], [1, 1], {}),
        (NotMergeable, "full copy", [paths[0], str(tmp_path / "headed")], [1, 1], base),
        (NotMergeable, "no low-rank factors", [paths[0], str(tmp_path / "ia3")], [1, 1], dict(method="cat", **base)),
    ]:
        with pytest.raises(error, match=match):
            combine(names, weights, tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    paths = adapters(tmp_path, "one", "two")
    done = veneer("combine", *paths, "--weights", "0.7,0.3", "--out", str(tmp_path / "out"), "--json")
    assert json.loads(done.stdout)["modules"] == 6, done.stderr
    done = veneer("combine", *paths, "--weights", "1,-1", "--method", "cat", "--out", str(tmp_path / "two-out"))
    assert done.returncode == 0 and "rank 7" in done.stdout and "files alone" in done.stdout
    done = veneer("combine", *paths, "--weights", "a,b", "--out", str(tmp_path / "x"))
    assert done.returncode == 2
