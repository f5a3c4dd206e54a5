"""`veneer doctor`: what another program would refuse or run wrongly, the way out, and that the way out is one."""

from __future__ import annotations

import json

import pytest
import torch

from veneer import (
    ConfigError,
    HiraConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    SeqBnConfig,
    all_methods,
    get_peft_model,
)
from veneer.dropin.tables.methods import METHODS as PEFT_METHODS
from veneer.merging.combine import combine
from veneer.report.deployment import diagnose
from veneer.report.environment import environment

from . import models
from .forked import veneer
from .models import output, perturb


def adapter(tmp_path, config=None, **settings):
    base = models.build("llama")
    base.save_pretrained(tmp_path / "base")
    config = config or LoraConfig(**dict(r=4, target_modules=["q_proj"], base_model_name_or_path="base") | settings)
    perturb(get_peft_model(base, config)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def said(path, target):
    found = diagnose(path, target)
    return found.runs, " | ".join(f"{finding.what} -> {finding.fix}" for finding in found.findings)


def test_a_plain_lora_runs_everywhere(tmp_path):
    path = adapter(tmp_path)
    for target in ("vllm", "llama.cpp", "peft"):
        assert diagnose(path, target).runs, target
    assert said(path, "vllm")[1] == ""
    assert f"veneer export {path} --to gguf --out adapter.gguf" in said(path, "llama.cpp")[1]


@pytest.mark.parametrize(
    ("settings", "vllm", "llama"),
    [
        (dict(use_dora=True), "use_dora", "use_dora"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save: lm_head", "modules_to_save: lm_head"),
        (dict(bias="lora_only"), "biases", "biases"),
        (dict(trainable_token_indices=[3]), "trained tokens", "trained tokens"),
        (dict(init_lora_weights="pissa"), "starts from the base's weights", None),
        (dict(use_rslora=True), None, None),
        (dict(alpha_pattern={"0.self_attn.q_proj": 3}), None, None),
        (dict(rank_pattern={"0.self_attn.q_proj": 2}), None, None),
        (dict(rank_pattern={"0.*q_proj": 2}, alpha_pattern={"0.*q_proj": 4}), None, None),
    ],
    ids=str,
)
def test_what_the_servers_do_not_run(settings, vllm, llama, tmp_path):
    path = adapter(tmp_path, lora_alpha=8, **settings)
    for target, wanted in (("vllm", vllm), ("llama.cpp", llama)):
        runs, text = said(path, target)
        assert runs == (wanted is None), (target, text)
        assert (wanted or "") in text and ("veneer " in text or wanted is None)


def test_ranks_have_a_flag_or_a_limit(tmp_path):
    runs, text = said(adapter(tmp_path, r=20), "vllm")
    assert runs and "--max-lora-rank 32" in text
    runs, text = said(adapter(tmp_path, r=600), "vllm")
    assert not runs and "up to 512" in text


def test_other_methods(tmp_path):
    runs, text = said(adapter(tmp_path, HiraConfig(r=3)), "vllm")
    assert not runs and "runs LoRA, not HIRA" in text and "veneer merge" in text
    runs, text = said(adapter(tmp_path, PromptTuningConfig(num_virtual_tokens=2)), "llama.cpp")
    assert not runs and "no form as weights" in text
    assert diagnose(tmp_path / "adapter", "peft").runs
    runs, text = said(adapter(tmp_path, SeqBnConfig(reduction_factor=7)), "peft")
    assert not runs and "PEFT has no SEQ_BN" in text


@pytest.mark.parametrize(
    "settings", [dict(use_rslora=True), dict(init_lora_weights="pissa"), dict(rank_pattern={"0.*q_proj": 2})], ids=str
)
def test_the_way_out_leads_out(settings, tmp_path):
    """`veneer combine ... --weights 1` gives the same model, and then the doctor is content."""
    path = adapter(tmp_path, lora_alpha=6, alpha_pattern={"0.self_attn.q_proj": 5}, **settings)
    assert not diagnose(path, "sglang").runs
    combine([str(path)], [1.0], tmp_path / "plain", model=str(tmp_path / "base"))
    assert diagnose(tmp_path / "plain", "llama.cpp").runs and diagnose(tmp_path / "plain", "vllm").runs
    batch = models.inputs("llama")
    one, two = (PeftModel.from_pretrained(models.build("llama"), p) for p in (path, tmp_path / "plain"))
    torch.testing.assert_close(output(one, batch), output(two, batch), rtol=1e-4, atol=1e-5)


def test_peft_cannot_read_a_lora_on_shared_experts(tmp_path):
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    sizes |= dict(vocab_size=67, num_experts_per_tok=2, moe_intermediate_size=16, n_routed_experts=4, n_group=1)
    base = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, num_key_value_heads=2, topk_group=1))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    runs, text = said(str(tmp_path / "adapter"), "peft")
    assert not runs and "6 tensors of shared experts" in text and "exclude_modules" in text


def test_peft_knows_the_methods_it_is_said_to_know():
    from peft.utils.peft_types import PeftType

    assert set(PEFT_METHODS) == {kind.value for kind in PeftType}
    assert {str(config.peft_type) for config in all_methods().values()} >= set(PEFT_METHODS)


def test_the_environment():
    found = environment()
    assert found.packages["torch"].startswith(torch.__version__.split("+")[0])
    assert found.processors >= 1 and 0 < found.free_bytes < found.memory_bytes and not found.problems


def test_the_command(tmp_path):
    path = str(adapter(tmp_path, use_dora=True))
    done = veneer("doctor", path, "--for", "vllm")
    assert done.returncode == 1 and "does not run in vllm" in done.stdout and "veneer merge" in done.stdout
    done = veneer("doctor", path, "--for", "peft", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["runs"] is True, done.stderr
    done = veneer("doctor", "--json", OMP_NUM_THREADS="1")
    assert done.returncode == 0 and json.loads(done.stdout)["packages"]["torch"]
    assert veneer("doctor", path).returncode == 2
    with pytest.raises(ConfigError, match="nearest: vllm"):
        diagnose(path, "vlm")
