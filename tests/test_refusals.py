"""Bad input gives one clear error, and leaves the model and the files as they were."""

from __future__ import annotations

import json
import os
import random
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import veneer
from veneer import (
    BaseMismatch,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    TargetError,
    VeneerError,
    get_peft_model,
)
from veneer.core import checkpoint
from veneer.core.checkpoint import NEXT_NAME
from veneer.core.config import Config, all_methods
from veneer.model.hotswap import hotswap_adapter

from . import models
from .cases import CASES, ONE_EACH, Case, experts
from .models import output, perturb

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "down_proj"]


def snapshot(model, batch):
    """What a refusal must not change."""
    names = [(name, type(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in base.modules()]
    with torch.no_grad():
        return names, parameters, hooks, "_veneer" in base.__dict__, model.training, output(model, batch)


@contextmanager
def refused(model, *said: str, error=VeneerError, batch=None):
    """Inside, `error` is raised with all of `said` in its message, and the model stays as it is."""
    batch = models.inputs("llama") if batch is None else batch
    before = snapshot(model, batch)
    with pytest.raises(error) as caught:
        yield
    assert isinstance(caught.value, VeneerError) and isinstance(caught.value, ValueError)
    assert all(word in str(caught.value) for word in said), str(caught.value)
    unchanged(model, batch, before)


def unchanged(model, batch, before) -> None:
    after = snapshot(model, batch)
    assert after[0] == before[0] and after[2:5] == before[2:5]
    assert [p[:3] for p in after[1]] == [p[:3] for p in before[1]]
    assert all(torch.equal(p[3], q[3]) for p, q in zip(after[1], before[1], strict=True))
    assert torch.equal(after[5], before[5])


def base(name: str = "llama", seed: int = 0):
    """A model of which some parameters are frozen already: a refusal must not thaw them, nor freeze the others."""
    model = models.build(name, seed)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
    return model


def lora(name: str = "default", **settings):
    settings = dict(r=3, target_modules=TARGETS) | settings
    return perturb(get_peft_model(models.build("llama"), LoraConfig(**settings), name).eval(), name)


def two():
    """A model with two LoRA adapters, the first active."""
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return perturb(model, "other", 5)


@pytest.fixture
def saved(tmp_path) -> Path:
    lora().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(directory: Path, change) -> None:
    """Change the tensors of a weight file, keeping its notes on the base model."""
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata)


def reconfigure(directory: Path, **fields) -> None:
    content = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(content | fields))


def forget(directory: Path) -> None:
    """Make the file one of another library's, without notes on what was written."""
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, {"format": "pt"})


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B1 = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


# Configs


REQUIRED = {
    "adalora": dict(total_step=9),
    "arrow": dict(arrow_config=dict(task_adapter_names=["somewhere"], top_k=1)),
    "alora": dict(alora_invocation_tokens=[5]),
    "trainable_tokens": dict(token_indices=[1]),
    "xlora": dict(adapters={"0": "somewhere"}),
    "prefix_tuning": dict(num_virtual_tokens=2),
    "prompt_tuning": dict(num_virtual_tokens=2),
    "p_tuning": dict(num_virtual_tokens=2),
    "cartridge": dict(num_virtual_tokens=2),
    "adaption_prompt": dict(adapter_len=2, adapter_layers=1),
    "multitask_prompt_tuning": dict(num_virtual_tokens=2),
    "union": dict(configs=[LoraConfig()]),
    "fusion": dict(adapter_names=["one", "two"]),
    "average": dict(adapter_names=["one", "two"]),
    "split": dict(adapter_names=["one", "two"], splits=[3, 4]),
}


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_an_unknown_field_is_refused(method: str):
    """From Python and from a file, with the nearest real name; a file's null or false says nothing and passes."""
    config_class, given = all_methods()[method], REQUIRED.get(method, {})
    own = {f.name for f in fields(config_class)}
    field = next(name for name in ("target_modules", "num_virtual_tokens", "configs") if name in own)
    wrong = field.replace("o", "oo")
    with pytest.raises(ConfigError) as caught:
        config_class(**given, **{wrong: 3})
    assert repr(wrong) in str(caught.value) and f"nearest: {field}" in str(caught.value)
    content = config_class(**given).to_dict()
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(content | {wrong: 3, "zzz": [1], "harmless": None})
    assert all(word in str(caught.value) for word in (wrong, field, "zzz")) and "harmless" not in str(caught.value)
    assert Config.from_dict(content | {wrong: None, "zzz": False}) == Config.from_dict(content)


def test_an_unknown_field_in_a_file_is_refused_at_load(saved):
    reconfigure(saved, lora_alhpa=3)
    model = base()
    with refused(model, "lora_alhpa", "lora_alpha", error=ConfigError):
        PeftModel.from_pretrained(model, saved)


WRONG_TYPES = [
    (LoraConfig, "r", "8"),
    (LoraConfig, "r", 8.0),
    (LoraConfig, "r", True),
    (LoraConfig, "r", None),
    (LoraConfig, "lora_alpha", "16"),
    (LoraConfig, "lora_dropout", "0.1"),
    (LoraConfig, "use_rslora", "yes"),
    (LoraConfig, "use_rslora", 1),
    (LoraConfig, "target_modules", 3),
    (LoraConfig, "target_modules", [1]),
    (LoraConfig, "target_modules", {"q_proj": 1}),
    (LoraConfig, "exclude_modules", [None]),
    (LoraConfig, "modules_to_save", "lm_head"),
    (LoraConfig, "layers_to_transform", "0"),
    (LoraConfig, "layers_to_transform", [0.5]),
    (LoraConfig, "rank_pattern", ["q_proj"]),
    (LoraConfig, "rank_pattern", {"q_proj": "4"}),
    (LoraConfig, "alpha_pattern", {3: 4}),
    (LoraConfig, "bias", None),
    (LoraConfig, "bias", True),
    (LoraConfig, "init_lora_weights", 3),
    (LoraConfig, "task_type", 3),
    (veneer.IA3Config, "feedforward_modules", 3),
    (veneer.HRAConfig, "apply_GS", "no"),
    (veneer.OFTConfig, "oft_block_size", 4.0),
    (veneer.VeraConfig, "projection_prng_key", "0"),
    (veneer.FourierFTConfig, "scaling", "150"),
    (veneer.FourierFTConfig, "n_frequency_pattern", {"q_proj": 1.5}),
    (veneer.AdaLoraConfig, "total_step", 9.5),
    (veneer.TrainableTokensConfig, "token_indices", "3"),
    (veneer.TrainableTokensConfig, "token_indices", [1.0]),
    (veneer.XLoraConfig, "adapters", ["somewhere"]),
    (veneer.BottleneckConfig, "reduction_factor", "16"),
    (veneer.PromptTuningConfig, "num_virtual_tokens", 2.0),
    (veneer.PrefixTuningConfig, "prefix_projection", "true"),
]


@pytest.mark.parametrize(
    ("config_class", "field", "value"), WRONG_TYPES, ids=[f"{c.__name__}-{f}-{v}" for c, f, v in WRONG_TYPES]
)
def test_a_value_of_the_wrong_type_is_refused(config_class, field, value):
    """From Python and from a file, naming the field and the value."""
    given = REQUIRED.get(config_class.__module__.rpartition(".")[2], {})
    content = config_class(**given).to_dict() | {field: value}
    for make in (lambda: config_class(**given | {field: value}), lambda: Config.from_dict(content)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert field in str(caught.value) and repr(value) in str(caught.value)


CONTRADICTIONS = [
    (LoraConfig, dict(r=0), "r must"),
    (LoraConfig, dict(r=-4), "-4"),
    (LoraConfig, dict(rank_pattern={"q_proj": 0}), "rank_pattern"),
    (LoraConfig, dict(lora_dropout=1.0), "lora_dropout"),
    (LoraConfig, dict(lora_dropout=-0.1), "lora_dropout"),
    (LoraConfig, dict(init_lora_weights="pisa"), "pissa"),
    (LoraConfig, dict(bias="lora"), "lora_only"),
    (LoraConfig, dict(bias="lroa_only"), "lora_only"),
    (LoraConfig, dict(layers_pattern="layers"), "layers_to_transform"),
    (LoraConfig, dict(target_modules="(q_proj"), "target_modules"),
    (LoraConfig, dict(exclude_modules="*q_proj"), "exclude_modules"),
    (LoraConfig, dict(rank_pattern={"(q_proj": 2}), "rank_pattern"),
    (LoraConfig, dict(alpha_pattern={"*": 2}), "alpha_pattern"),
    (LoraConfig, dict(layers_to_transform=0, layers_pattern="(layers"), "layers_pattern"),
    (LoraConfig, dict(task_type="CAUSAL"), "CAUSAL_LM"),
    (veneer.DoraConfig, dict(use_dora=False), "use_dora"),
    (veneer.IA3Config, dict(target_modules=["k_proj"], feedforward_modules=["down_proj"]), "down_proj"),
    (veneer.IA3Config, dict(feedforward_modules="(down_proj"), "feedforward_modules"),
    (veneer.HRAConfig, dict(r=0), "r must"),
    (veneer.HRAConfig, dict(r=3), "odd"),
    (veneer.OFTConfig, dict(r=4, oft_block_size=8), "oft_block_size"),
    (veneer.OFTConfig, dict(r=0, oft_block_size=0), "oft_block_size"),
    (veneer.OFTConfig, dict(r=-1, oft_block_size=0), "-1"),
    (veneer.OFTConfig, dict(num_cayley_neumann_terms=0), "num_cayley_neumann_terms"),
    (veneer.OFTConfig, dict(module_dropout=1.5), "module_dropout"),
    (veneer.VeraConfig, dict(r=0), "r must"),
    (veneer.VeraConfig, dict(vera_dropout=1.5), "vera_dropout"),
    (veneer.FourierFTConfig, dict(n_frequency=0), "n_frequency"),
    (veneer.AdaLoraConfig, dict(), "total_step"),
    (veneer.AdaLoraConfig, dict(total_step=0), "total_step"),
    (veneer.AdaLoraConfig, dict(total_step=10, tinit=6, tfinal=4), "tinit"),
    (veneer.AdaLoraConfig, dict(total_step=10, use_dora=True), "use_dora"),
    (veneer.AdaLoraConfig, dict(total_step=10, init_lora_weights="pissa"), "init"),
    (veneer.AdaLoraConfig, dict(total_step=10, init_r=0), "init_r"),
    (veneer.AdaLoraConfig, dict(total_step=10, init_r=4, target_r=8), "target_r"),
    (veneer.AdaLoraConfig, dict(total_step=10, deltaT=0), "deltaT"),
    (veneer.AdaLoraConfig, dict(total_step=10, beta1=1.5), "beta1"),
    (veneer.TrainableTokensConfig, dict(), "token_indices"),
    (veneer.TrainableTokensConfig, dict(token_indices=[3, -1]), "token_indices"),
    (veneer.TrainableTokensConfig, dict(token_indices=[3, 3]), "token_indices"),
    (veneer.XLoraConfig, dict(), "adapters"),
    (veneer.XLoraConfig, dict(adapters={"0": "x"}, xlora_depth=0), "xlora_depth"),
    (veneer.XLoraConfig, dict(adapters={"0": "x"}, top_k_lora=2), "top_k_lora"),
    (veneer.XLoraConfig, dict(adapters={"0": "x"}, top_k_lora=0), "top_k_lora"),
    (veneer.XLoraConfig, dict(adapters={"0": "x"}, softmax_temperature=0.0), "softmax_temperature"),
    (veneer.BottleneckConfig, dict(placement="hulsby"), "houlsby"),
    (veneer.BottleneckConfig, dict(non_linearity="relo"), "relu"),
    (veneer.BottleneckConfig, dict(reduction_factor=0), "reduction_factor"),
    (veneer.BottleneckConfig, dict(reduction_factor=-2), "reduction_factor"),
    (veneer.BottleneckConfig, dict(dropout=1.5), "dropout"),
    (veneer.PrefixTuningConfig, dict(), "num_virtual_tokens"),
    (veneer.PrefixTuningConfig, dict(num_virtual_tokens=0), "num_virtual_tokens"),
    (veneer.PrefixTuningConfig, dict(num_virtual_tokens=2, init_weights="ones"), "init_weights"),
    (veneer.PromptTuningConfig, dict(num_virtual_tokens=-1), "num_virtual_tokens"),
    (veneer.PromptTuningConfig, dict(num_virtual_tokens=2, prompt_tuning_init="TXT"), "TEXT"),
    (veneer.PromptTuningConfig, dict(num_virtual_tokens=2, prompt_tuning_init="TEXT"), "prompt_tuning_init_text"),
    (
        veneer.PromptTuningConfig,
        dict(num_virtual_tokens=2, tokenizer_kwargs={"trust_remote_code": True}),
        "trust_remote_code",
    ),
]


@pytest.mark.parametrize(
    ("config_class", "settings", "said"), CONTRADICTIONS, ids=[f"{c.__name__}-{s}" for c, s, _ in CONTRADICTIONS]
)
def test_a_setting_without_sense_is_refused(config_class, settings, said):
    """Before anything is attached or trained, by the config or when it meets the model."""
    model = base()
    with refused(model, said):
        get_peft_model(model, config_class(**settings))


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("llama", LoraConfig(r=20, target_modules=["q_proj", "k_proj"], init_lora_weights="pissa"), "20"),
        ("llama", veneer.FourierFTConfig(n_frequency=500, target_modules=["q_proj", "k_proj"]), "k_proj"),
        ("llama", veneer.TrainableTokensConfig(token_indices=[3, 67]), "67"),
        ("gpt2", veneer.TrainableTokensConfig(token_indices=[67]), "67"),
        ("grouped", LoraConfig(r=3, target_modules=["conv"]), "groups"),
        ("llama", LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_haed"]), "lm_head"),
        ("llama", veneer.PromptTuningConfig(num_virtual_tokens=2, token_dim=7), "token_dim"),
        ("conv", veneer.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"), "transformers"),
        ("conv", veneer.TrainableTokensConfig(token_indices=[1]), "target_modules"),
        ("llama", veneer.PrefixTuningConfig(num_virtual_tokens=2, num_layers=3), "num_layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_does_not_suit_the_model_is_refused(name, config, said):
    """Also when the first targets are attached before the error shows."""
    model = base(name)
    with refused(model, said, batch=models.inputs(name)):
        get_peft_model(model, config)


def test_a_refused_second_adapter_leaves_the_first(saved):
    model = lora()
    with refused(model, "oops", error=TargetError):
        model.add_adapter("other", LoraConfig(target_modules=["oops"]))
    with refused(model, "7", error=ConfigError):
        model.add_adapter("other", veneer.HRAConfig(r=7, target_modules=["q_proj", "v_proj"]))
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]


@pytest.mark.parametrize("config", [dict(r=4), "lora", None, 3])
def test_what_is_no_config_is_refused(config):
    model = base()
    with refused(model, "config", type(config).__name__):
        get_peft_model(model, config)


def test_another_librarys_config_is_refused():
    peft = pytest.importorskip("peft")
    model = base()
    with refused(model, "veneer"):
        get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS))


# Files


def test_a_missing_directory_or_file_is_refused(saved, tmp_path):
    """Saying what was looked for, and what is there."""
    model, empty = base(), tmp_path / "empty"
    empty.mkdir()
    with refused(model, "nowhere", CONFIG, "no such directory", error=CheckpointError):
        PeftModel.from_pretrained(model, tmp_path / "nowhere")
    with refused(model, "empty", CONFIG, "nothing", error=CheckpointError):
        PeftModel.from_pretrained(model, empty)
    with refused(model, WEIGHTS, error=CheckpointError):
        PeftModel.from_pretrained(model, saved / WEIGHTS)
    with refused(model, "elsewhere", "no such directory", error=CheckpointError):
        PeftModel.from_pretrained(model, saved, subfolder="elsewhere")
    (saved / WEIGHTS).rename(saved / "adapter.safetensors")
    with refused(model, WEIGHTS, "adapter.safetensors", error=CheckpointError):
        PeftModel.from_pretrained(model, saved)
    (saved / "adapter.safetensors").rename(saved / WEIGHTS)
    (saved / CONFIG).unlink()
    with refused(model, CONFIG, WEIGHTS, error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


def test_a_name_that_is_neither_here_nor_to_be_had_is_refused():
    model = base()
    with refused(model, "someone/something", "not a local directory", error=CheckpointError):
        PeftModel.from_pretrained(model, "someone/something", local_files_only=True)


def test_a_pickle_is_never_opened(saved):
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    (saved / WEIGHTS).unlink()
    torch.save({"x": Bomb()}, saved / "adapter_model.bin")
    model = base()
    with refused(model, "adapter_model.bin", "pickle", WEIGHTS, error=CheckpointError):
        PeftModel.from_pretrained(model, saved)
    (saved / "adapter_model.bin").rename(saved / WEIGHTS)
    with refused(model, "safetensors", error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"null", b'"LORA"', b"\xff\xfe\x00", b"[" * 100_000, b"{}", b'{"peft_type": null}'],
    ids=lambda c: repr(c[:12]),
)
def test_a_config_file_that_is_no_config_is_refused(saved, content):
    (saved / CONFIG).write_bytes(content)
    model = base()
    with refused(model):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize(("given", "said"), [("LROA", "LORA"), ("lora", "LORA"), (["LORA"], "LORA"), ("LOHO", "LOHA")])
def test_a_method_we_do_not_have_is_refused(saved, given, said):
    reconfigure(saved, peft_type=given)
    model = base()
    with refused(model, said, "peft_type", error=ConfigError):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_weight_file_is_refused(saved, share):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    model = base()
    with refused(model, WEIGHTS, "safetensors", error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize(
    "garbage", [b"\0" * 64, b"\xff" * 64, b"PK\3\4" + b"x" * 90, b"\x02\0\0\0\0\0\0\0{}", b"x" * 9]
)
def test_a_weight_file_of_garbage_is_refused(saved, garbage):
    (saved / WEIGHTS).write_bytes(garbage)
    model = base()
    with refused(model, error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


def test_a_weight_file_with_something_behind_it_is_refused(saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes() + b"more")
    model = base()
    with refused(model, WEIGHTS, error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


def test_flipped_bytes_give_our_error_or_none(saved):
    """One random bit anywhere: loaded (a value changed) or refused, never another exception or a half-loaded model."""
    content, model, rng = (saved / WEIGHTS).read_bytes(), base(), random.Random(0)
    header = int.from_bytes(content[:8], "little") + 8
    before, refusals = snapshot(model, models.inputs("llama")), 0
    for trial in range(150):
        broken = bytearray(content)
        broken[rng.randrange(header if trial % 3 else len(content))] ^= 1 << rng.randrange(8)
        (saved / WEIGHTS).write_bytes(broken)
        try:
            PeftModel.from_pretrained(model, saved).unload()
        except VeneerError:
            refusals += 1
            unchanged(model, models.inputs("llama"), before)
        for p, (_, _, learns, _) in zip(model.parameters(), before[1], strict=True):
            p.requires_grad_(learns)
    assert 60 < refusals < 150


SAMPLES = [json.dumps({"base": {"model.layers.0.self_attn.q_proj": v}}) for v in (["x"], [[1]], [None], 3, [1, 2])]


@pytest.mark.parametrize("notes", ["[" * 100_000, "[]", "3", "{", '{"base": 3}', '{"base": [1]}', *SAMPLES])
def test_notes_that_are_nonsense_are_refused_or_ignored(saved, notes):
    """The file's notes on its base model come from anywhere."""
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS, {"format": "pt", "veneer": notes})
    model = base()
    before = snapshot(model, models.inputs("llama"))
    try:
        PeftModel.from_pretrained(model, saved)
    except VeneerError:
        unchanged(model, models.inputs("llama"), before)


def test_missing_and_unexpected_tensors_are_listed(saved):
    def change(tensors):
        del tensors[A0]
        tensors[A0.replace("q_proj", "k_proj")] = torch.zeros(3, 30)

    rewrite(saved, change)
    model = base()
    with refused(model, "1 missing", A0, "1 unexpected", A0.replace("q_proj", "k_proj"), error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


def test_a_tensor_of_another_shape_is_listed(saved):
    rewrite(saved, lambda tensors: tensors.update({A0: torch.zeros(3, 31), B1: torch.zeros(30, 3, 1)}))
    model = base()
    with refused(model, A0, "(3, 31)", "(3, 30)", B1, "(30, 3, 1)", error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize("r", [4, 10**9])
def test_a_tensor_of_another_rank_is_listed(saved, r):
    """However large: nothing of the size the config asks for is made before it is compared."""
    reconfigure(saved, r=r)
    forget(saved)
    model = base()
    with refused(model, A0, "(3, 30)", f"({r}, 30)", error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("dora", "r"),
        ("hra", "r"),
        ("adalora", "init_r"),
        ("bottleneck", "reduction_factor"),
        ("xlora", "xlora_size"),
        ("prompt_tuning", "num_virtual_tokens"),
        ("prefix_tuning", "num_virtual_tokens"),
    ],
)
def test_an_absurd_size_in_a_config_is_refused_before_it_is_made(method, field, tmp_path):
    case = next(case for case in ONE_EACH if case.method == method)
    case.build().save_pretrained(tmp_path)
    reconfigure(tmp_path, **{field: 1e-9 if field == "reduction_factor" else 10**9})
    forget(tmp_path)
    model = base(case.model)
    with refused(model, "000000000", error=CheckpointError, batch=case.inputs()):
        PeftModel.from_pretrained(model, tmp_path, **case.trust)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_listed(saved, value):
    rewrite(saved, lambda tensors: tensors[A0].view(-1)[-1:].fill_(value))
    model = base()
    with refused(model, A0, "finite", error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


def test_empty_and_integer_tensors_are_listed(saved):
    rewrite(saved, lambda tensors: tensors.update({A0: torch.zeros(0, 30), B1: torch.zeros(30, 3, dtype=torch.long)}))
    model = base()
    with refused(model, A0, "(0, 30)", B1, "int64", error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


def test_a_file_without_tensors_is_refused(saved):
    save_file({}, saved / WEIGHTS)
    model = base()
    with refused(model, "8 missing", A0, error=CheckpointError):
        PeftModel.from_pretrained(model, saved)


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_a_refused_file_leaves_the_values_of_a_present_adapter(saved, damage):
    """Nothing is copied before everything is checked; and a further adapter that fails to load is gone."""
    model = lora(target_modules=TARGETS)
    perturb(model, seed=8)
    if damage == "nan":
        rewrite(saved, lambda tensors: tensors[B1].fill_(float("nan")))
    else:
        rewrite(
            saved, lambda tensors: tensors.update({B1: torch.zeros(2, 2)}) if damage == "shape" else tensors.pop(B1)
        )
    for name in ("default", "other"):
        with refused(model, B1, error=CheckpointError):
            model.load_adapter(saved, name)
    assert list(model.peft_config) == ["default"]


# The base model


@pytest.mark.parametrize("case", [case for case in ONE_EACH if not case.siblings], ids=str)
def test_another_base_model_of_the_same_shape_is_refused(case: Case, tmp_path):
    """By its weights, for every method; `check_base=False` loads all the same."""
    case.build().save_pretrained(tmp_path)
    model = base(case.model, seed=1)
    if case.method == "adamss":  # it is made of the base model's weights, down to the shapes of its tensors
        with refused(model, "of another shape", "adamss_B", error=CheckpointError, batch=case.inputs()):
            PeftModel.from_pretrained(model, tmp_path)
        return
    with refused(model, "another base model", "check_base=False", error=BaseMismatch, batch=case.inputs()):
        PeftModel.from_pretrained(model, tmp_path, **case.trust)
    PeftModel.from_pretrained(model, tmp_path, check_base=False, **case.trust)


def test_a_new_head_is_no_other_base_model(tmp_path):
    """A classification head is random before it is trained: what it was says nothing of the base."""
    settings = dict(task_type="SEQ_CLS", target_modules=["layer.0.attention.self.query"], r=2)
    model = get_peft_model(models.build("bert"), LoraConfig(**settings))
    model.save_pretrained(tmp_path)
    other = models.build("bert")
    torch.nn.init.normal_(other.classifier.weight, std=9.0)
    PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("case", [c for c in ONE_EACH if c.model == "llama" and not c.siblings], ids=str)
def test_a_base_model_of_another_size_is_refused(case: Case, tmp_path):
    """By the shapes in the file, or for a prompt by the sizes in its config."""
    case.build().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = models.llama(hidden_size=40, head_dim=8).eval()
    bounded = case.is_prompt or case.method in ("psoft", "osf")  # the sizes bound what its config may say
    with refused(model, error=VeneerError if bounded else CheckpointError):
        PeftModel.from_pretrained(model, tmp_path, **case.trust)


def test_another_base_model_is_refused_for_a_further_adapter_too(saved):
    other = perturb(get_peft_model(models.build("llama", seed=1), LoraConfig(target_modules=["v_proj"])).eval())
    with refused(other, "another base model", error=BaseMismatch):
        other.load_adapter(saved, "other")


MIXED = ("lora", "dora", "adalora", "loha", "bottleneck", "loreft", "poly", "hira", "tinylora", "frod", "prefix_tuning")
WIDTHS = [c for c in ONE_EACH if c.method in MIXED] + [c for c in CASES if str(c) == "lora-llama-bias-and-head"]


@pytest.mark.parametrize("case", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float16], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_floats_of_any_width_are_computed_with(case: Case, dtype: torch.dtype, step: int, tmp_path):
    """All of a file, or some beside others: nothing is rounded, and nothing fails when the model runs."""
    case.build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    floats = [key for key in sorted(tensors) if tensors[key].is_floating_point()][::step]
    stored = tensors | {key: (tensors[key] / 8).to(dtype) for key in floats}
    save_file({key: t.contiguous() for key, t in stored.items()}, tmp_path / WEIGHTS)
    found = output(case.load(tmp_path), case.inputs())
    save_file(
        {key: t.float().contiguous() if t.is_floating_point() else t for key, t in stored.items()}, tmp_path / WEIGHTS
    )
    torch.testing.assert_close(found, output(case.load(tmp_path), case.inputs()))


# Loading over a present adapter


def test_a_file_of_another_method_is_refused_under_a_present_name(tmp_path):
    model = lora()
    for i, config in enumerate((veneer.IA3Config(), veneer.DoraConfig(r=3, target_modules=TARGETS))):
        get_peft_model(models.build("llama"), config).save_pretrained(tmp_path / str(i))
        with refused(model, "'default'", error=CheckpointError):
            model.load_adapter(tmp_path / str(i), "default")


@pytest.mark.parametrize(
    "settings", [dict(lora_alpha=64), dict(use_rslora=True), dict(alpha_pattern={"q_proj": 64}), dict(r=4)], ids=str
)
def test_a_file_with_other_settings_is_refused_under_a_present_name(settings, tmp_path):
    """Its tensors would mean something else here."""
    lora(**settings).save_pretrained(tmp_path)
    model = lora()
    with refused(model, "'default'", *(key for key in settings if key != "r"), error=CheckpointError):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("load", [PeftModel.load_adapter, hotswap_adapter], ids=["load", "hotswap"])
def test_a_head_that_the_present_adapter_has_no_place_for_is_refused(load, tmp_path):
    """It neither takes the place of the base model's nor is it lost."""
    lora(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = lora()
    with refused(model, "'default'", "modules_to_save", error=CheckpointError):
        load(model, tmp_path, "default")


def test_loading_into_a_merged_adapter_is_refused(saved):
    """The weights hold its old values."""
    model = perturb(lora(), seed=8)
    model.merge_adapter()
    with refused(model, "'default'", "unmerge_adapter()"):
        model.load_adapter(saved, "default")


def test_unknown_arguments_are_refused(saved):
    model = base()
    with refused(model, "subfolde", "subfolder"):
        PeftModel.from_pretrained(model, saved, subfolde="x")
    model = lora()
    with refused(model, "revison", "revision"):
        model.load_adapter(saved, "other", revison="x")


# Names


@pytest.mark.parametrize(
    "name",
    [*("", ".", "..", "a/b", "a\\b", "nul\0", "\ud800", "__base__", 3, None), WEIGHTS, CONFIG, NEXT_NAME, "x" * 256],
    ids=ascii,
)
def test_a_name_that_cannot_be_one_is_refused(name, saved):
    """It is a folder's name, and `__base__` means a row without an adapter."""
    model = base()
    said = repr(name[:60] if isinstance(name, str) else name)
    with refused(model, said):
        get_peft_model(model, LoraConfig(target_modules=TARGETS), name)
    model = lora()
    with refused(model, said):
        model.add_adapter(name, LoraConfig(target_modules=TARGETS))
    with refused(model, said):
        model.load_adapter(saved, name)


def test_a_name_that_is_taken_is_refused():
    model = two()
    with refused(model, "'other'", "already"):
        model.add_adapter("other", veneer.IA3Config())


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.set_adapter("ohter"),
        lambda model: model.set_adapter(["default", "ohter"]),
        lambda model: model.delete_adapter("ohter"),
        lambda model: model.merge_adapter(["ohter"]),
        lambda model: model.merge_and_unload(adapter_names=["ohter"]),
        lambda model: model.set_requires_grad("ohter"),
        lambda model: model.parameter_plan("ohter"),
        lambda model: model.save_pretrained("unused", selected_adapters=["default", "ohter"]),
        lambda model: model(**models.inputs("llama"), adapter_names=["default", "ohter", "default"]),
    ],
    ids=["set", "set-two", "delete", "merge", "merge-and-unload", "requires-grad", "plan", "save", "mixed"],
)
def test_an_unknown_adapter_is_refused(use, tmp_path, monkeypatch):
    """Naming those there are."""
    monkeypatch.chdir(tmp_path)
    model = two()
    with refused(model, "'ohter'", "default", "other"):
        use(model)
    assert not list(tmp_path.iterdir())


def test_naming_an_adapter_twice_is_refused():
    model = two()
    with refused(model, "twice"):
        model.set_adapter(["other", "other"])


def test_deleting_the_last_adapter_is_refused():
    model = lora()
    with refused(model, "'default'", "unload()"):
        model.delete_adapter("default")


def test_wrapping_twice_is_refused(saved):
    model = lora()
    for again in (model, model.get_base_model()):
        with refused(model, "already", "add_adapter()", "unload()"):
            get_peft_model(again, LoraConfig(target_modules=TARGETS))
        with refused(model, "already"):
            PeftModel.from_pretrained(again, saved)


@pytest.mark.parametrize("config", [LoraConfig(target_modules=TARGETS), veneer.IA3Config()], ids=lambda c: c.peft_type)
def test_wrapping_around_adapters_is_refused(config):
    """What is saved of the outer model would be trained on the inner adapters, of which its file says nothing."""
    model = models.build("llama")
    inner = get_peft_model(model.model, LoraConfig(target_modules=TARGETS))
    with refused(model, "a part of it, already", "add_adapter()", "unload()"):
        get_peft_model(model, config)
    inner.unload()
    get_peft_model(model, config)


# Saving


def test_saving_into_a_file_is_refused(tmp_path):
    """Also below a file, or where an adapter's folder would be one; the file is left alone."""
    model, file = two(), tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "other").write_text("mine")
    for path in (file, file / "below", tmp_path):
        with refused(model, "is a file", error=CheckpointError):
            model.save_pretrained(path)
    assert file.read_text() == (tmp_path / "other").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_saving_a_pickle_is_refused(tmp_path):
    model = lora()
    with refused(model, "safetensors", error=CheckpointError):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("survive", [0, 1, 2])
def test_an_error_while_saving_leaves_the_old_files(saved, monkeypatch, survive):
    """Whichever rename it hits: the next load gives the old adapter or the new one, whole."""
    old = {name: (saved / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    model, rename, calls = perturb(lora(lora_alpha=5), seed=8), os.replace, []

    def crash(source, target):
        calls.append(target)
        if len(calls) > survive:
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(saved)
    monkeypatch.undo()
    assert {p.name for p in saved.iterdir()} <= {*old, checkpoint.NEXT_NAME}
    is_old = [(saved / name).read_bytes() == content for name, content in old.items()]
    assert is_old == [survive < 2, True]
    loaded, batch = PeftModel.from_pretrained(models.build("llama"), saved), models.inputs("llama")
    assert torch.equal(output(loaded, batch), output(lora() if survive < 2 else model, batch))


def test_a_crash_while_writing_leaves_the_old_files(saved, monkeypatch):
    old = {name: (saved / name).read_bytes() for name in (WEIGHTS, CONFIG)}

    def crash(handle):
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="input/output"):
        perturb(lora(), seed=8).save_pretrained(saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == old


def test_an_adapter_without_values_is_not_saved(tmp_path):
    model = get_peft_model(models.build("llama"), LoraConfig(target_modules=TARGETS), low_cpu_mem_usage=True)
    with pytest.raises(CheckpointError, match="meta"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / WEIGHTS).exists()


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    """Values that are not finite; a parameter of which another process holds the rest (ZeRO-3), an empty one here."""
    model = lora()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match="(?s)not finite.*lora_A"):
        model.save_pretrained(tmp_path / "new")
    model = lora()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    with pytest.raises(CheckpointError, match="ZeRO-3"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Running


def test_a_mixed_batch_with_the_wrong_names_is_refused():
    """Too few, too many, none, or not a list."""
    model, batch = two(), models.inputs("llama")
    for names, said in (
        (["default", "other"], "2"),
        (["default"] * 4, "4"),
        ([], "0"),
        ("default", "list"),
    ):
        with refused(model, "adapter_names", said):
            model(**batch, adapter_names=names)
        with refused(model, "adapter_names", said):
            model.generate(**batch, adapter_names=names, max_new_tokens=2)


def test_prompts_in_a_mixed_batch_are_refused():
    model, batch = two(), models.inputs("llama")
    model.add_adapter("prompt", veneer.PromptTuningConfig(num_virtual_tokens=2))
    model.add_adapter("prefix", veneer.PrefixTuningConfig(num_virtual_tokens=2))
    for name in ("prompt", "prefix"):
        with refused(model, repr(name), "prompt", "adapter_names"):
            model(**batch, adapter_names=["default", name, "__base__"])


def test_merged_adapters_are_not_mixed_switched_or_deleted():
    model, batch = two(), models.inputs("llama")
    model.merge_adapter()
    with refused(model, "unmerge_adapter()"):
        model(**batch, adapter_names=["default", "other", "__base__"])
    with refused(model, "default", "unmerge_adapter()"):
        model.set_adapter("other")
    with refused(model, "default", "unmerge_adapter()"):
        model.set_adapter(["default", "other"])
    with refused(model, "'default'", "unmerge_adapter()"):
        model.delete_adapter("default")


def test_a_prefix_under_gradient_checkpointing_is_refused():
    model, batch = base(), models.inputs("llama")
    model = get_peft_model(model, veneer.PrefixTuningConfig(num_virtual_tokens=2))
    model.gradient_checkpointing_enable()
    output(model.eval(), batch)
    with pytest.raises(VeneerError, match=r"gradient.checkpointing"):
        model.train()(**batch, labels=batch["input_ids"])


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_a_prefix_on_a_model_without_a_cache_is_refused(head: str):
    torch.manual_seed(0)
    model = models.bert(head).eval()
    with refused(model, "cache", batch={"input_ids": torch.randint(3, 67, (3, 7))}):
        get_peft_model(model, veneer.PrefixTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize("config", [veneer.PromptTuningConfig, veneer.PrefixTuningConfig])
def test_a_static_cache_with_a_prompt_is_refused(config):
    model = get_peft_model(models.build("llama"), config(num_virtual_tokens=2, task_type="CAUSAL_LM")).eval()
    with refused(model, "static cache", "dynamic"):
        model.generate(**models.inputs("llama"), max_new_tokens=2, cache_implementation="static", disable_compile=True)


def test_xlora_mixes_plain_lora_only(tmp_path):
    get_peft_model(models.build("llama"), veneer.IA3Config()).save_pretrained(tmp_path / "ia3")
    get_peft_model(models.build("llama"), veneer.DoraConfig(target_modules=TARGETS)).save_pretrained(tmp_path / "dora")
    model, good = base(), experts("llama")["0"]
    for name, said in (("ia3", "IA3"), ("dora", "use_dora")):
        with refused(model, f"'{name}'", said, "LoRA", error=ConfigError):
            get_peft_model(model, veneer.XLoraConfig(adapters={"good": good, name: str(tmp_path / name)}))
    with refused(model, "nowhere", error=CheckpointError):
        get_peft_model(model, veneer.XLoraConfig(adapters={"good": good, "bad": str(tmp_path / "nowhere")}))


def test_xlora_with_experts_of_another_base_model_is_refused(tmp_path):
    """A missing, mis-shaped or strange tensor of an expert too."""
    lora().save_pretrained(tmp_path / "0")
    model = base(seed=1)
    with refused(model, "another base model", error=BaseMismatch):
        get_peft_model(model, veneer.XLoraConfig(adapters={"0": str(tmp_path / "0")}))
    model = base()
    for damage in (
        lambda tensors: tensors.pop(A0),
        lambda tensors: tensors.update({A0: torch.zeros(3, 31)}),
        lambda tensors: tensors.update({A0.replace("lora_A", "lora_C"): torch.zeros(3, 30)}),
    ):
        lora().save_pretrained(tmp_path / "0")
        rewrite(tmp_path / "0", damage)
        with refused(model, "q_proj.lora_", error=CheckpointError):
            get_peft_model(model, veneer.XLoraConfig(adapters={"0": str(tmp_path / "0")}))


def test_a_projected_prefix_cannot_be_trained_from_its_file_alone(tmp_path):
    settings = dict(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=7)
    get_peft_model(models.build("llama"), veneer.PrefixTuningConfig(**settings)).save_pretrained(tmp_path)
    (tmp_path / "adapter_training.safetensors").unlink()
    model = base()
    with refused(model, "is_trainable=False", error=CheckpointError):
        PeftModel.from_pretrained(model, tmp_path, is_trainable=True)


@pytest.mark.parametrize("stray", ["base_model.model.oops.lm_head.weight", "base_model.model.oops.base_layer.weight"])
def test_a_base_embedding_of_a_module_that_is_not_there_is_refused(stray: str, tmp_path):
    """PEFT's files may hold base embeddings; one without a home is not one of them."""
    case = next(c for c in ONE_EACH if c.method == "lora")
    case.build().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), stray: torch.zeros(67, 30)}, path)
    with pytest.raises(CheckpointError, match="oops"):
        PeftModel.from_pretrained(models.build(case.model), tmp_path)


@pytest.mark.parametrize("name", ["LoraConfig", "LoHaConfig", "DeloraConfig"])
def test_a_rank_in_a_pattern_is_a_rank(name: str):
    with pytest.raises(ConfigError, match="rank_pattern must be at least 1, not 0"):
        getattr(veneer, name)(rank_pattern={"q_proj": 0})
