"""vLLM and SGLang: what is exported for them gives the same logits when it is read as they read it.

`make test-vllm` asks vLLM itself. `in_vllm` and `in_sglang` are written from what their sources do with an adapter's
files (vLLM 0.33.0, SGLang 0.5.23), and share no code with veneer's rules: both must agree on which files are read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer import (
    ConfigError,
    HiraConfig,
    LoHaConfig,
    LoraConfig,
    NotMergeable,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from veneer.core import checkpoint
from veneer.merging.export import export
from veneer.report.deployment import diagnose

from . import models
from .forked import veneer
from .models import perturb

IDS = torch.tensor([[5, 40, 7, 60, 31, 8, 22, 13]])
SIZES = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MOE = SIZES | dict(moe_intermediate_size=16, head_dim=8, vocab_size=67, num_experts=4, num_experts_per_tok=2)
MIXTRAL = SIZES | dict(vocab_size=67, num_local_experts=3, num_experts_per_tok=2)
VLLM_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


class Refused(Exception):
    """What a server raises."""


def files(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def matched(pattern: dict[str, Any], name: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def in_vllm(directory: Path, model: Any, max_lora_rank: int = 512) -> Any:
    """The model with an adapter added as vLLM adds it."""
    config, tensors = files(directory)
    if config["peft_type"] != "LORA":
        raise Refused(config["peft_type"])
    for name in ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"):
        if config.get(name):
            raise Refused(name)
    if set(config.get("modules_to_save") or ()) - {"classifier", "score"}:
        raise Refused("modules_to_save")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in VLLM_STARTS:
        raise Refused("init_lora_weights")
    if config.get("bias", "none") != "none":
        raise Refused("bias")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if max([config["r"], *ranks.values()]) > max_lora_rank:
        raise Refused("max_lora_rank")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key)
        if found is None:
            raise Refused(f"{key} is unsupported LoRA weight")
        pairs.setdefault(found[1], {})[found[2]] = tensor.float()

    def scaling(name: str) -> float:
        if name.endswith(".experts.base_layer"):
            name = name.removesuffix(".base_layer") + ".gate_up_proj"
        elif name.endswith(".experts"):
            name += ".down_proj"
        rank, alpha = matched(ranks, name, config["r"]), matched(alphas, name, config["lora_alpha"])
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    add(model, pairs, scaling)
    return model


def in_sglang(directory: Path, model: Any) -> Any:
    """The model with an adapter added as SGLang adds it."""
    config, tensors = files(directory)
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        raise Refused(config["peft_type"])
    targets = config["target_modules"]
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        raise Refused("target_modules")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if ".lora_" not in key:
            raise Refused(f"no place for {key}")
        path, half = key.removeprefix("base_model.model.").split(".lora_")
        pairs.setdefault(path, {})[half[0]] = tensor.float()
    for path in list(pairs):
        if ".experts" in path and not re.search(r"experts\.\d+\.", path):
            del pairs[path]  # skipped with a warning
            continue
        if pairs[path]["A"].shape[0] != config["r"]:
            raise Refused("LoRA buffer shape does not match")
        parent, _, leaf = path.rpartition(".")
        if leaf == "q_proj" and f"{parent}.v_proj" not in pairs:
            raise Refused("KeyError: v_proj")
        if leaf in ("k_proj", "v_proj") and f"{parent}.q_proj" not in pairs:
            del pairs[path]
        if leaf == "up_proj" and f"{parent}.gate_proj" not in pairs:
            del pairs[path]
    add(model, pairs, lambda name: config["lora_alpha"] / config["r"])
    return model


@torch.no_grad()
def add(model: Any, pairs: dict[str, dict[str, torch.Tensor]], scaling: Any) -> None:
    """Add the updates to the weights; single experts must be whole."""
    modules = dict(model.named_modules())
    if model.config.model_type == "mixtral":  # the servers' model has the names of the files
        modules = {path.replace(".mlp", ".block_sparse_moe"): module for path, module in modules.items()}
    counts: dict[str, set[str]] = {}
    for path, pair in pairs.items():
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", path)
        if expert is not None:
            experts, number, projection = modules[expert[1]], int(expert[2]), expert[3]
            counts.setdefault(expert[1], set()).add(path)
            W = scaling(path) * pair["B"] @ pair["A"]
            width = experts.gate_up_proj.shape[1] // 2
            place = {
                "gate_proj": experts.gate_up_proj[number, :width],
                "up_proj": experts.gate_up_proj[number, width:],
                "down_proj": experts.down_proj[number],
            }
            place |= {"w1": place["gate_proj"], "w3": place["up_proj"], "w2": place["down_proj"]}
            place[projection] += W
        elif path.endswith((".experts", ".base_layer")):
            stack = modules[path.removesuffix(".base_layer")]
            name = "gate_up_proj" if path.endswith(".base_layer") else "down_proj"
            weight = getattr(stack, name)
            A = pair["A"].reshape(len(weight), -1, pair["A"].shape[-1])
            B = pair["B"].reshape(pair["B"].shape[0], -1, len(weight)).permute(2, 0, 1)
            weight += scaling(path) * B @ A
        else:
            modules[path].weight += scaling(path) * pair["B"] @ pair["A"]
    for path, seen in counts.items():
        if len(seen) != 3 * len(modules[path].gate_up_proj):
            raise Refused(f"some experts of {path} have no LoRA")


READERS = {"vllm": in_vllm, "sglang": in_sglang}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS % 67).logits


@pytest.fixture
def base(request, tmp_path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = getattr(request, "param", "llama")
    torch.manual_seed(0)
    if kind == "llama":
        model = models.build("llama")
    else:
        settings = {"qwen3_moe": MOE, "mixtral": MIXTRAL, "gpt_oss": MOE | dict(num_local_experts=4)}[kind]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fresh(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def adapter(base: Path, config: Any) -> Path:
    config.task_type = "CAUSAL_LM"
    perturb(get_peft_model(fresh(base), config)).save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


def read(program: str, directory: Path, base: Path) -> torch.Tensor:
    return logits(READERS[program](directory, fresh(base)))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = [
    dict(),
    dict(use_rslora=True),
    dict(alpha_pattern={"0.self_attn.q_proj": 9}),
    dict(rank_pattern={"1.mlp.*": 2}),
    dict(lora_alpha=6, rank_pattern={"1.mlp.*": 2}, alpha_pattern={"1.mlp.*": 4}),
    dict(init_lora_weights="pissa"),
    dict(target_modules=["q_proj"]),
    dict(target_modules=["v_proj"]),
    dict(target_modules=["up_proj", "down_proj"]),
    dict(target_modules=r".*\.(q|v)_proj"),
    dict(use_dora=True),
    dict(bias="lora_only"),
    dict(modules_to_save=["lm_head"]),
]


@pytest.mark.parametrize("program", READERS)
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_doctor_agrees_with_the_reader(settings, program, base):
    """An adapter that the doctor lets pass has its own logits in the server; one that it stops is refused or wrong."""
    path = adapter(base, LoraConfig(**dict(r=3, lora_alpha=5, target_modules=ALL) | settings))
    expected = logits(PeftModel.from_pretrained(fresh(base), path))
    try:
        is_right = torch.allclose(read(program, path, base), expected, atol=1e-5)
    except Refused:
        is_right = False
    diagnosis = diagnose(path, program)
    assert diagnosis.runs == is_right, diagnosis.findings


@pytest.mark.parametrize("program", READERS)
@pytest.mark.parametrize("settings", KINDS[:10], ids=str)
def test_what_is_exported_runs(settings, program, base):
    path = adapter(base, LoraConfig(**dict(r=3, lora_alpha=5, target_modules=ALL) | settings))
    expected = logits(PeftModel.from_pretrained(fresh(base), path))
    report = export(str(path), base.parent / "served", str(base), to=program)
    assert report.lost == 0 and torch.allclose(read(program, base.parent / "served", base), expected, atol=1e-5)
    assert diagnose(base.parent / "served", program).runs


def test_a_plain_lora_keeps_its_bits(base):
    path = adapter(base, LoraConfig(r=3, lora_alpha=5, target_modules=ALL))
    export(str(path), base.parent / "served", str(base), to="vllm")
    old, new = (files(directory) for directory in (path, base.parent / "served"))
    assert (new[0]["r"], new[0]["lora_alpha"]) == (3, 5) and old[1].keys() == new[1].keys()
    assert all(torch.equal(old[1][key], new[1][key]) for key in old[1])
    assert checkpoint.read(base.parent / "served")[1]["base"] == checkpoint.read(path)[1]["base"] != {}


@pytest.mark.parametrize("program", READERS)
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=ALL, use_dora=True),
        HiraConfig(r=2, target_modules=ALL),
        LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]),
        OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj", "v_proj"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_another_method_becomes_the_nearest_lora(config, program, base):
    path = adapter(base, config)
    expected = logits(PeftModel.from_pretrained(fresh(base), path))
    report = export(str(path), base.parent / "served", str(base), to=program)
    assert report.lost < 1e-4  # the rank that is tried first holds all of these sizes
    assert torch.allclose(read(program, base.parent / "served", base), expected, atol=1e-4)
    lower = export(str(path), base.parent / "lower", str(base), to=program, rank=1)
    assert lower.rank == 1 and lower.lost > 0.01


@pytest.mark.parametrize("base", ["qwen3_moe", "mixtral"], indirect=True)
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids=str)
def test_experts_are_written_one_by_one(parameters, base):
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        target_parameters=[f"experts.{name}" for name in parameters],
        rank_pattern={f"0.mlp.experts.{parameters[0]}": 2},
    )
    path = adapter(base, config)
    expected = logits(PeftModel.from_pretrained(fresh(base), path))
    assert not torch.allclose(expected, logits(fresh(base)), atol=1e-3)
    assert not diagnose(path, "sglang").runs
    for program in READERS:
        export(str(path), base.parent / program, str(base), to=program)
        assert torch.allclose(read(program, base.parent / program, base), expected, atol=1e-5)
        assert diagnose(base.parent / program, program).runs
    _, tensors = files(base.parent / "vllm")
    projections = {key.split(".experts.")[1].split(".")[1] for key in tensors if ".experts." in key}
    assert projections in ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})


@pytest.mark.parametrize("base", ["qwen3_moe"], indirect=True)
def test_what_the_doctor_says_of_fused_experts(base):
    both = ["experts.gate_up_proj", "experts.down_proj"]
    path = adapter(base, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], target_parameters=both))
    expected = logits(PeftModel.from_pretrained(fresh(base), path))
    assert torch.allclose(read("vllm", path, base), expected, atol=1e-5)  # with --enable-mixed-moe-lora-format
    diagnosis = diagnose(path, "vllm")
    assert diagnosis.runs and "--enable-mixed-moe-lora-format" in diagnosis.findings[0].fix
    half = adapter(base, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], target_parameters=both[:1]))
    assert not diagnose(half, "vllm").runs and "both gate_up_proj and down_proj" in str(diagnose(half, "vllm").findings)


@pytest.mark.parametrize("base", ["gpt_oss"], indirect=True)
def test_experts_that_are_fused_in_the_files_stay_so(base):
    both = ["experts.gate_up_proj", "experts.down_proj"]
    path = adapter(base, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=both))
    report = export(str(path), base.parent / "served", str(base), to="vllm")
    assert "stay fused" in report.notes[0]
    old, new = (files(directory)[1] for directory in (path, base.parent / "served"))
    assert old.keys() == new.keys()
    again = PeftModel.from_pretrained(fresh(base), base.parent / "served")
    expected = logits(PeftModel.from_pretrained(fresh(base), path))
    assert torch.allclose(logits(again), expected, atol=1e-4)


def test_ranks(base):
    path = adapter(base, LoraConfig(r=600, target_modules=["q_proj", "v_proj"]))
    for program in READERS:
        report = export(str(path), base.parent / program, str(base), to=program)
        assert report.rank <= 512 and report.lost < 1e-5  # the weights of this model have no higher rank
    with pytest.raises(ConfigError, match="up to 512"):
        export(str(path), base.parent / "other", str(base), to="vllm", rank=513)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (PromptTuningConfig(num_virtual_tokens=2), "no form as an update of weights"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "trained otherwise than by an update"),
        (LoraConfig(target_modules=["embed_tokens"]), "only adapters of linear layers"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_form_as_a_lora_is_refused(config, told, base):
    path = adapter(base, config)
    with pytest.raises((NotMergeable, ConfigError), match=told):
        export(str(path), base.parent / "served", str(base), to="vllm")
    assert not (base.parent / "served").exists()


def test_added_tokens_in_sglang(base):
    path = adapter(base, LoraConfig(target_modules=ALL, base_model_name_or_path=str(base)))
    assert diagnose(path, "sglang").runs
    (path / "added_tokens.json").write_text('{"<new>": 66, "<other>": 67}')
    config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    findings = diagnose(path, "sglang").findings
    assert "adds tokens (1 in added_tokens.json)" in findings[0].what


def test_the_command(base):
    path = adapter(base, LoraConfig(r=3, target_modules=["v_proj"], use_dora=True))
    out = base.parent / "served"
    for program in ("vllm", "sglang"):
        done = veneer("doctor", str(path), "--for", program)
        assert done.returncode == 1 and f"veneer export {path} --to {program} --out served" in done.stdout
    done = veneer("export", str(path), "--to", "vllm", "--out", str(out), "--model", str(base))
    assert done.returncode == 0 and "LoRA of rank" in done.stdout, done.stderr
    done = veneer("export", str(path), "--to", "vllm", "--out", str(out), "--model", str(base))
    assert done.returncode == 2 and "nothing is overwritten" in done.stderr and done.stderr.count("\n") == 1
    done = veneer("export", str(path), "--to", "sglang", "--out", str(base.parent / "x"), "--merged")
    assert done.returncode == 2 and "without --merged" in done.stderr and not (base.parent / "x").exists()
