"""`veneer convert`: the layouts of other projects, there and back bit for bit, and what they cannot hold is refused."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import CheckpointError, ConfigError, LoraConfig, PeftModel, VeneerError, get_peft_model
from veneer.formats.conversion import LAYOUTS, convert, detected
from veneer.formats.lora import Hints

from . import models
from .forked import veneer
from .models import output, perturb

TARGETS = ["q_proj", "k_proj", "down_proj"]
PREFIX = "base_model.model.model.layers"


def adapter(tmp_path, name="adapter", model="llama", **settings):
    base = models.build(model)
    base.save_pretrained(tmp_path / "base")
    settings = dict(r=4, lora_alpha=6, target_modules=TARGETS, lora_dropout=0.1, task_type="CAUSAL_LM") | settings
    perturb(get_peft_model(base, LoraConfig(**settings))).save_pretrained(tmp_path / name)
    return tmp_path / name


def hints(tmp_path, **more):
    return Hints(model=str(tmp_path / "base"), **more)


@pytest.mark.parametrize("to", [name for name in LAYOUTS if name != "peft"])
def test_there_and_back_is_bit_exact(to, tmp_path):
    source = adapter(tmp_path)
    convert(source, tmp_path / "there", to, hints=hints(tmp_path))
    assert detected(tmp_path / "there").name == to
    convert(tmp_path / "there", tmp_path / "back", "peft", hints=hints(tmp_path))
    before, after = (load_file(d / "adapter_model.safetensors") for d in (source, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(t, after[key]) for key, t in before.items())
    batch = models.inputs("llama")
    one, two = (PeftModel.from_pretrained(models.build("llama"), d) for d in (source, tmp_path / "back"))
    assert torch.equal(output(one, batch), output(two, batch))


def test_a_layout_of_its_own_is_itself(tmp_path):
    source = adapter(tmp_path, use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5})
    convert(source, tmp_path / "out", "peft")
    batch = models.inputs("llama")
    one, two = (PeftModel.from_pretrained(models.build("llama"), d) for d in (source, tmp_path / "out"))
    torch.testing.assert_close(output(one, batch), output(two, batch))


def test_half_precision_stays_as_it_is(tmp_path):
    file = adapter(tmp_path) / "adapter_model.safetensors"
    save_file({key: t.bfloat16() for key, t in load_file(file).items()}, file)
    for to in LAYOUTS:
        convert(tmp_path / "adapter", tmp_path / to, to, hints=hints(tmp_path))
        convert(tmp_path / to, tmp_path / f"{to}-back", "peft", hints=hints(tmp_path))
        back = load_file(tmp_path / f"{to}-back" / "adapter_model.safetensors")
        assert all(t.dtype == torch.bfloat16 and torch.equal(t, back[key]) for key, t in load_file(file).items())


# What the files look like


def test_mlx(tmp_path):
    source = adapter(tmp_path)
    convert(source, tmp_path / "out", "mlx", hints=hints(tmp_path))
    tensors, peft = (
        load_file(tmp_path / "out" / "adapters.safetensors"),
        load_file(source / "adapter_model.safetensors"),
    )
    a = tensors["model.layers.1.self_attn.q_proj.lora_a"]
    assert torch.equal(a, peft[f"{PREFIX}.1.self_attn.q_proj.lora_A.weight"].T) and len(tensors) == 12
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    keys = ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"]
    assert config["lora_parameters"] == {"rank": 4, "scale": 1.5, "dropout": 0.1, "keys": keys}
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    x = torch.randn(3, 30)
    b = tensors["model.layers.1.self_attn.q_proj.lora_b"]
    model = PeftModel.from_pretrained(models.build("llama"), source)
    layer = model._state.layers["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(1.5 * (x @ a) @ b, layer.adapters["default"].term(x))


def test_torchtune(tmp_path):
    """Against torchtune's rule: its row (head, pair, half) is transformers' row (head, half, pair)."""
    source = adapter(tmp_path)
    convert(source, tmp_path / "out", "torchtune", hints=hints(tmp_path))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    theirs, ours = (
        tensors["layers.0.attn.q_proj.lora_b.weight"],
        load_file(source / "adapter_model.safetensors")[f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"],
    )
    heads, size = 5, 14
    for head in range(heads):
        for i in range(size // 2):
            for half in range(2):
                row = head * size + half * size // 2 + i
                assert torch.equal(theirs[head * size + 2 * i + half], ours[row])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj", "w2"] and "layers.1.mlp.w2.lora_a.weight" in tensors


def test_kohya(tmp_path):
    convert(adapter(tmp_path), tmp_path / "out", "kohya", hints=Hints(prefix="lora_te"))
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    key = "lora_te_model_layers_0_self_attn_q_proj"
    assert {f"{key}.alpha", f"{key}.lora_down.weight", f"{key}.lora_up.weight"} <= tensors.keys()
    assert float(tensors[f"{key}.alpha"]) == 6 and len(tensors) == 18
    save_file(tensors, tmp_path / "out" / "lora.safetensors")  # another program's, without veneer's notes
    with pytest.raises(ConfigError, match="--model"):
        convert(tmp_path / "out", tmp_path / "back", "peft")
    convert(tmp_path / "out", tmp_path / "back", "peft", hints=hints(tmp_path))
    assert (
        load_file(tmp_path / "back" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    )


def test_kohya_holds_convolutions_and_other_ranks(tmp_path):
    settings = dict(r=4, target_modules=["first", "head"], rank_pattern={"head": 3}, alpha_pattern={"head": 0.3})
    model = perturb(get_peft_model(models.build("conv"), LoraConfig(**settings)))
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "out", "kohya")
    convert(tmp_path / "out", tmp_path / "back", "peft")
    batch = models.inputs("conv")
    back = PeftModel.from_pretrained(models.build("conv"), tmp_path / "back")
    assert torch.equal(output(model.eval(), batch), output(back, batch))
    with pytest.raises(ConfigError, match="linear layers"):
        convert(tmp_path / "adapter", tmp_path / "mlx", "mlx")


def test_adapterhub(tmp_path):
    source = adapter(tmp_path, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    convert(source, tmp_path / "out", "adapterhub", hints=hints(tmp_path))
    tensors = load_file(tmp_path / "out" / "adapter.safetensors")
    assert "model.layers.1.self_attn.v_proj.loras.veneer.lora_B" in tensors
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    config = content["config"]
    assert (config["attn_matrices"], config["leave_out"], config["r"], config["alpha"]) == (["q", "v"], [0], 4, 6)
    assert content["model_type"] == "llama" and content["hidden_size"] == 30


def test_loralib_needs_alpha_and_reads_fused_projections(tmp_path):
    """MergedLinear, as loralib computes it: a grouped convolution over the parts' own A."""
    torch.manual_seed(0)
    r, alpha, enabled, base = 3, 7.0, [True, False, True], models.build("gpt2")
    A, B = torch.randn(2 * r, 30), torch.randn(2 * 30, r)
    path = "transformer.h.1.attn.c_attn"
    (tmp_path / "run").mkdir()
    torch.save({f"{path}.lora_A": A, f"{path}.lora_B": B}, tmp_path / "run" / "lora.pt")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        convert(tmp_path / "run", tmp_path / "out", "peft")
    with pytest.raises(ConfigError, match="--alpha"):
        convert(tmp_path / "run", tmp_path / "out", "peft", hints=Hints(allow_pickle=True))
    with pytest.raises(ConfigError, match="--enabled"):
        convert(tmp_path / "run", tmp_path / "out", "peft", hints=Hints(alpha=alpha, allow_pickle=True))
    convert(tmp_path / "run", tmp_path / "out", "peft", hints=Hints(None, alpha, enabled, None, True))
    delta = torch.nn.functional.conv1d(A[None], B[:, :, None], groups=2)[0] * alpha / r
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    found = model._state.layers[path].adapters["default"].delta()
    torch.testing.assert_close(found[:30], delta[:30])
    torch.testing.assert_close(found[60:], delta[30:])
    assert not found[30:60].any()


# Refusals


def refused(tmp_path, to, match, error=ConfigError, source="adapter", **more):
    with pytest.raises(error, match=match):
        convert(tmp_path / source, tmp_path / "out", to, hints=hints(tmp_path, **more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(use_dora=True), "use_dora"),
        (dict(bias="lora_only"), "bias="),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(init_lora_weights="pissa"), "was initialised from the base's weights"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices"),
        (dict(target_modules=["embed_tokens"]), "embedding"),
    ],
    ids=str,
)
def test_more_than_pairs_is_refused(settings, match, tmp_path):
    adapter(tmp_path, **settings)
    refused(tmp_path, "mlx", match)


@pytest.mark.parametrize("to", ["mlx", "torchtune", "adapterhub"])
def test_several_ranks_are_refused_where_there_is_one(to, tmp_path):
    adapter(tmp_path, rank_pattern={"q_proj": 2})
    refused(tmp_path, to, "one rank and one alpha")


def test_what_adapterhub_adapts_is_fixed(tmp_path):
    adapter(tmp_path, target_modules=["o_proj"])
    refused(tmp_path, "adapterhub", "has no LoRA for")
    adapter(tmp_path, target_modules=r".*0.self_attn.q_proj|.*1.self_attn.v_proj")
    refused(tmp_path, "adapterhub", "same modules in each layer")


def test_another_method_is_refused(tmp_path):
    from veneer import IA3Config

    perturb(get_peft_model(models.build("llama"), IA3Config())).save_pretrained(tmp_path / "adapter")
    refused(tmp_path, "mlx", "only LoRA")


def test_damaged_files_are_refused(tmp_path):
    convert(adapter(tmp_path), tmp_path / "mlx", "mlx", hints=hints(tmp_path))
    file = tmp_path / "mlx" / "adapters.safetensors"
    tensors = load_file(file)
    first = next(key for key in tensors if key.endswith("lora_a"))
    half = {key: t for key, t in tensors.items() if key != first}
    for faulty, match in (
        (half, "A or B is missing"),
        (tensors | {first: tensors[first][:, :2].contiguous()}, "do not fit together"),
        (tensors | {first: tensors[first] * torch.nan}, "not finite"),
        (tensors | {"rope.freqs": torch.ones(2)}, "do not belong to a LoRA"),
    ):
        save_file(faulty, file)
        refused(tmp_path, "peft", match, CheckpointError, "mlx")
    save_file(tensors, file)
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
    refused(tmp_path, "peft", "not a whole safetensors file", CheckpointError, "mlx")
    (tmp_path / "mlx" / "adapter_config.json").write_text('{"lora_parameters": {"scale": -1}}')
    refused(tmp_path, "peft", "positive number", CheckpointError, "mlx")


@pytest.mark.parametrize("shape", [(), (3,), (0, 30), (4, 0)], ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_factor_that_is_no_matrix_is_refused(layout: str, shape: tuple[int, ...], tmp_path):
    convert(adapter(tmp_path), tmp_path / "there", layout, hints=hints(tmp_path))
    (file,) = (tmp_path / "there").glob("*.safetensors")
    tensors = load_file(file)
    factors = [key for key in tensors if "lora" in key and tensors[key].dim() == 2]
    for side in (factors[0], factors[1]):
        save_file(tensors | {side: torch.ones(shape)}, file)
        with pytest.raises(VeneerError):
            convert(tmp_path / "there", tmp_path / "out", "mlx", hints=hints(tmp_path, alpha=6.0))
        assert not (tmp_path / "out").exists()


class Exploit:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def test_a_pickle_that_runs_code_does_not(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lora.pt").write_bytes(pickle.dumps({"a.lora_A": Exploit()}))
    refused(tmp_path, "peft", "not a pickle of tensors", CheckpointError, "run", allow_pickle=True, alpha=1.0)


def test_what_is_no_adapter_and_what_is_no_layout(tmp_path):
    with pytest.raises(CheckpointError, match="is not an adapter in any known layout"):
        convert(tmp_path, tmp_path / "out", "peft")
    adapter(tmp_path)
    with pytest.raises(ConfigError, match="nearest: torchtune"):
        convert(tmp_path / "adapter", tmp_path / "out", "torchtun")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(VeneerError, match="nothing is overwritten"):
        convert(tmp_path / "adapter", tmp_path / "out", "mlx")


def test_the_command(tmp_path):
    source = str(adapter(tmp_path))
    done = veneer("convert", source, str(tmp_path / "out"), "--to", "mlx", "--json")
    assert json.loads(done.stdout)["modules"] == 6, done.stderr
    done = veneer("convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "peft")
    assert done.returncode == 0 and "6 modules" in done.stdout
    done = veneer("convert", source, str(tmp_path / "x"), "--to", "adapterhub")
    assert done.returncode == 2 and "--model" in done.stderr and len(done.stderr.splitlines()) == 1
