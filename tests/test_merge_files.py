"""`veneer merge`: from files to files, bit for bit what merge_and_unload gives, and nothing left after a refusal."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import CheckpointError, LoraConfig, NotMergeable, PeftModel, VeneerError, get_peft_model
from veneer.errors import BaseMismatch
from veneer.merging.merge import merge
from veneer.model.loading import load_base

from . import models
from .cases import CASES
from .forked import veneer
from .models import output, perturb

EAGER = {"mixtral": {"experts_implementation": "eager"}}
LABELS = """
lora-llama lora-gpt2-embedding lora-llama-bias-and-head lora-gpt2-all-biases lora-t5 lora-gpt2-tied-tokens lora-tied
lora-gpt2-tied-copy lora-llama-pissa lora-llama-loftq lora-mixtral-experts lora-mixtral-router dora-llama ia3-gpt2
hra-llama oft-llama vera-llama frod-llama osf-llama kasa-llama delora-llama hira-gpt2 ln_tuning-llama bitfit-llama
trainable_tokens-gpt2-tied adalora-llama deft-llama glora-llama-biases
"""
CHOSEN = [case for case in CASES if str(case) in LABELS.split()]


def saved(model, path, **kwargs):
    model.save_pretrained(path, **kwargs)
    return path


def adapter(tmp_path, model="llama", name="adapter", dtype=torch.float32, **settings):
    settings = dict(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]) | settings
    base = models.build(model, dtype=dtype)
    if not (tmp_path / "base").exists():
        saved(base, tmp_path / "base")
    return saved(perturb(get_peft_model(base, LoraConfig(**settings)), scale=0.05), tmp_path / name)


def loaded(path, like, **kwargs):
    """The model in a directory; every tensor found its place."""
    model, info = type(like).from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def test_the_chosen_cases_exist():
    assert {str(case) for case in CHOSEN} == set(LABELS.split())


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_files_hold_what_merging_in_memory_gives(case, tmp_path):
    base, kwargs = models.build(case.model, dtype=torch.bfloat16), EAGER.get(case.model, {})
    saved(base, tmp_path / "base")
    saved(case.build(dtype=torch.bfloat16), tmp_path / "adapter")
    whole = case.load(tmp_path / "adapter", base=type(base).from_pretrained(tmp_path / "base", **kwargs))
    whole = whole.merge_and_unload()
    report = merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))
    again = loaded(tmp_path / "out", whole, **kwargs)
    expected = whole.state_dict()
    assert all(torch.equal(t, expected[key].to(t.dtype)) for key, t in again.state_dict().items())
    batch = models.inputs(case.model)
    if all(p.dtype == torch.bfloat16 for p in whole.parameters()):  # trained copies and T5's `wo` are in fp32 there
        torch.testing.assert_close(output(again.float(), batch), output(whole.float(), batch), rtol=1e-4, atol=1e-5)
    assert 0 < report.lost < 0.2 and again.config.tie_word_embeddings == whole.config.tie_word_embeddings


def test_a_sharded_base_keeps_its_shards(tmp_path):
    adapter(tmp_path)
    saved(models.build("llama"), tmp_path / "shards", max_shard_size="12KB")
    report = merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "shards"))
    names = {p.name for p in (tmp_path / "shards").iterdir()}
    assert sum(name.endswith(".safetensors") for name in names) > 3
    assert set(report.files) == names
    one = merge([tmp_path / "adapter"], tmp_path / "one", str(tmp_path / "base"))
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    again = loaded(tmp_path / "out", models.build("llama")).state_dict()
    assert all(torch.equal(again[key], t) for key, t in tensors.items()) and one.tensors == report.tensors


def test_experts_that_lie_in_several_shards(tmp_path):
    case = next(c for c in CASES if str(c) == "lora-mixtral-experts")
    base = models.build("mixtral")
    saved(base, tmp_path / "base", max_shard_size="8KB")
    saved(case.build(), tmp_path / "adapter")
    whole = case.load(tmp_path / "adapter", base=models.build("mixtral")).merge_and_unload()
    merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))
    again = loaded(tmp_path / "out", base, **EAGER["mixtral"]).state_dict()
    assert all(torch.equal(t, again[key]) for key, t in whole.state_dict().items())


def test_several_adapters_in_order(tmp_path):
    first, second = adapter(tmp_path), adapter(tmp_path, name="two", r=3, use_dora=True)
    merge([first, second], tmp_path / "out", str(tmp_path / "base"))
    model = PeftModel.from_pretrained(models.build("llama"), first, "a")
    model.load_adapter(second, "b")
    model.set_adapter(["a", "b"])
    expected = output(model.merge_and_unload(), models.inputs("llama"))
    again = output(loaded(tmp_path / "out", models.build("llama")), models.inputs("llama"))
    torch.testing.assert_close(again, expected)


def test_a_head_that_the_base_lacks_comes_from_the_adapter(tmp_path):
    """A classifier on a language model's files: another class, a head of its own, as many labels as it has rows."""
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    saved(models.build("llama"), tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5).eval()
    model = perturb(get_peft_model(base, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj"])))
    saved(model, tmp_path / "adapter")
    batch = models.inputs("llama")
    expected = output(model.merge_and_unload(), batch)
    merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))
    again = loaded(tmp_path / "out", base)
    assert torch.equal(output(again, batch), expected) and expected.shape[-1] == 5
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert auto.config.architectures == ["LlamaForSequenceClassification"]
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")


def test_an_encoder_saved_without_its_prefix(tmp_path):
    from transformers import BertForSequenceClassification

    saved(models.bert().bert, tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"])
    model = perturb(get_peft_model(base, config))
    saved(model, tmp_path / "adapter")
    batch = models.inputs("bert")
    expected = output(model.merge_and_unload(), batch)
    merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))
    assert torch.equal(output(loaded(tmp_path / "out", base), batch), expected)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_larger_vocabulary_comes_with_the_adapter(kind, tmp_path):
    saved(models.build(kind), tmp_path / "base")
    base = models.build(kind)
    base.resize_token_embeddings(71)
    model = perturb(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    batch = {"input_ids": torch.tensor([[3, 69, 70, 5]])}
    expected = output(model.merge_and_unload(), batch)
    merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))
    again = loaded(tmp_path / "out", base)
    torch.testing.assert_close(output(again, batch), expected)
    assert again.config.vocab_size == 71 and again.config.tie_word_embeddings == (kind == "tied")


def test_ties_that_the_config_cannot_undo_are_refused(tmp_path):
    """T5's config says that embeddings are tied whatever it is told."""
    saved(models.build("t5"), tmp_path / "base")
    model = get_peft_model(models.build("t5"), LoraConfig(r=4, target_modules=["shared"], task_type="SEQ_2_SEQ_LM"))
    saved(perturb(model), tmp_path / "adapter")
    refused(tmp_path, NotMergeable, "always ties these weights, regardless of its config")


def test_what_stands_beside_goes_along(tmp_path):
    adapter(tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json", "secrets.json"):
        (tmp_path / "base" / name).write_text("{}")
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"own": 1}')
    report = merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))
    assert "secrets.json" not in report.files and "adapter_config.json" not in report.files
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"own": 1}'
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


@pytest.mark.parametrize(
    "name",
    ["source.spm", "qwen.tiktoken", "tokenization_own.py", "vocab-src.json", "additional_chat_templates/rag.jinja"],
)
def test_the_files_of_every_tokenizer_go_along(name, tmp_path):
    adapter(tmp_path)
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    file = tmp_path / "base" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("its own")
    merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))
    assert (tmp_path / "out" / name).read_text() == "its own"


def test_the_report_measures_what_rounding_takes(tmp_path):
    path = adapter(tmp_path, dtype=torch.bfloat16)
    report = merge([path], tmp_path / "out", str(tmp_path / "base"))
    model = PeftModel.from_pretrained(models.build("llama", dtype=torch.bfloat16), path)
    name = "model.layers.1.mlp.down_proj"
    layer = model._state.layers[name]
    W = layer.base_layer.weight.detach().double()
    exact = W + layer.adapters["default"].delta().detach().double()
    new = loaded(tmp_path / "out", models.build("llama")).state_dict()[f"{name}.weight"]
    found = next(t for t in report.tensors if t.name == f"{name}.weight")
    assert torch.equal(new, exact.float().to(torch.bfloat16))
    assert found.lost == pytest.approx(float((new.double() - exact).norm() / (exact - W).norm()), rel=1e-3)
    assert found.unmoved / found.moved == pytest.approx(float((new.double() == W).float().mean()), abs=1e-6)


def refused(tmp_path, error, match, adapters=("adapter",), **kwargs):
    with pytest.raises(error, match=match):
        merge([tmp_path / a for a in adapters], tmp_path / "out", str(tmp_path / "base"), **kwargs)
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_tensor_without_a_home_is_refused(tmp_path):
    file = adapter(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.model.layers.9.q_proj.lora_A.weight": torch.ones(4, 30)}, file)
    refused(tmp_path, CheckpointError, "unexpected")


def test_a_method_without_a_weight_form_is_refused(tmp_path):
    for method in ("prompt_tuning-llama", "bottleneck-llama"):
        case = next(c for c in CASES if str(c).startswith(method))
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        saved(models.build("llama"), tmp_path / "base")
        saved(case.build(), tmp_path / "adapter")
        refused(tmp_path, NotMergeable, "no form as a weight")


def test_another_base_is_refused(tmp_path):
    adapter(tmp_path)
    saved(models.build("llama", seed=5), tmp_path / "base")
    refused(tmp_path, BaseMismatch, "another base model")
    merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"), check_base=False)


def test_a_base_without_some_weight_is_refused(tmp_path):
    adapter(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({key: t for key, t in tensors.items() if key != "model.norm.weight"}, file)
    refused(tmp_path, CheckpointError, "model.norm.weight needs values of shape")


def test_values_that_overflow_are_refused_and_nothing_is_left(tmp_path):
    adapter(tmp_path, dtype=torch.float16)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: t * 1e4 for key, t in tensors.items()}, file)
    refused(tmp_path, NotMergeable, "not finite in torch.float16")


def test_nothing_is_overwritten(tmp_path):
    adapter(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(VeneerError, match="thesis.txt.*nothing is overwritten"):
        merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_an_index_cannot_lead_elsewhere(tmp_path):
    adapter(tmp_path)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names a file outside of its directory"):
        merge([tmp_path / "adapter"], tmp_path / "out", str(tmp_path / "base"))


@pytest.mark.parametrize("length", [8, 2**40])
def test_a_damaged_base_is_refused(length, tmp_path):
    adapter(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(length.to_bytes(8, "little") + content[8:])
    refused(tmp_path, CheckpointError, "not a whole safetensors file")


def test_the_command(tmp_path):
    adapter(tmp_path, dtype=torch.bfloat16)
    words = ("merge", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"))
    done = veneer(*words, "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "of the change lost" in done.stdout, done.stderr
    report = json.loads(veneer(*words, "--out", str(tmp_path / "two"), "--json").stdout)
    assert len(report["tensors"]) == 6 and 0 < report["lost"] < 0.1
    done = veneer(*words, "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "nothing is overwritten" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def composite(tmp_path_factory) -> str:
    """A model of vision and language on disk, which transformers also loads as the language model alone."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    text |= dict(num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"])
    text |= dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    vision = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32)
    tokens = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("composite")
    config = Qwen3_5Config(text_config=text, vision_config=vision | {"num_position_embeddings": 16}, **tokens)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(where)
    return str(where)


@pytest.mark.parametrize("auto", ["AutoModelForImageTextToText", "AutoModelForCausalLM"])
def test_an_adapter_of_a_composite_model_is_merged_into_the_class_it_was_trained_on(composite, auto: str, tmp_path):
    """Whatever its task says: TRL and others write CAUSAL_LM for both."""
    import transformers

    base = getattr(transformers, auto).from_pretrained(composite)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    model = models.perturb(get_peft_model(base, config), "default", 3).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    merge([tmp_path / "adapter"], tmp_path / "merged")
    merged = getattr(transformers, auto).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(merged) is type(base)
    assert load_base(tmp_path / "adapter").__class__ is type(base)
