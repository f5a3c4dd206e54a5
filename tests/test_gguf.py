"""GGUF files: each tensor is as llama.cpp expects it, transformers' reader gives the same logits, refusals are clear.

`make test-gguf` compares with llama.cpp itself (`test_llama_cpp.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from veneer import (
    ConfigError,
    LoHaConfig,
    LoraConfig,
    NotMergeable,
    PrefixTuningConfig,
    VeneerError,
    get_peft_model,
)
from veneer.errors import BaseMismatch, CheckpointError
from veneer.files.gguf import vocabulary as words
from veneer.files.gguf.modelfile import Turns, modelfile
from veneer.merging.export import export
from veneer.report.deployment import diagnose

from .chat_templates import TEMPLATES
from .forked import veneer
from .gguf_models import CONFIGS, byte_level, saved, sentencepiece
from .models import perturb
from .test_train_chat import tokenizer

NAMES = list(CONFIGS)
READ_BY_TRANSFORMERS = [name for name in NAMES if name not in ("smollm3", "llama3")]
"""transformers has no SmolLM3 in GGUF, and reads Llama 3's rotary embedding as an unscaled one, without biases."""
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
GEMMAS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, tuple[Path, object]]:
    """The directory and the model of each architecture."""
    made = {}
    for name in NAMES:
        directory = tmp_path_factory.mktemp(name) / name
        made[name] = directory, saved(name, directory)
    return made


def adapted(base: Path, directory: Path, config=None, **settings) -> Path:
    """A trained adapter on the model in a directory."""
    from transformers import AutoModelForCausalLM

    if config is None:
        linear = "all-linear" if "gpt2" not in str(base) else ["c_attn", "c_fc", "c_proj"]
        config = LoraConfig(**dict(r=3, lora_alpha=5, target_modules=linear, task_type="CAUSAL_LM") | settings)
    config.base_model_name_or_path = str(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    perturb(model).save_pretrained(directory)
    return directory


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, in fp32 and with torch's order of dimensions."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def fields(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def base_of(adapter: Path) -> str:
    """The directory of an adapter's base model, which it may name by a name that `veneer pull` knows."""
    from veneer import pull

    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    return name if Path(name).is_dir() else pull(name)


def merged_by_transformers(adapter: Path):
    from transformers import AutoModelForCausalLM

    from veneer import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base_of(adapter), attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


# Tensors


def expected_name(name: str, architecture: str) -> str:
    """llama.cpp's name of a parameter, written down here once more."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    path, _, leaf = rest.rpartition(".")
    table = LAYERS | (GEMMAS if "gemma" in architecture else {"post_attention_layernorm": "ffn_norm"})
    return f"blk.{layer}.{table[path]}.{leaf}"


def expected_value(name: str, value: np.ndarray, model) -> np.ndarray:
    """The value as llama.cpp stores it, entry by entry."""
    kind, config = model.config.model_type, model.config
    if kind == "gpt2" and value.ndim == 2 and ".h." in name:
        return value.T
    if "gemma" in kind and value.ndim == 1:
        return value + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    part = name.split(".")[-2]
    if kind not in ("llama", "mistral", "smollm3") or part not in heads:
        return value
    size = len(value) // heads[part]
    stored = np.empty_like(value)
    for head in range(heads[part]):
        for i in range(size // 2):
            stored[head * size + 2 * i] = value[head * size + i]
            stored[head * size + 2 * i + 1] = value[head * size + size // 2 + i]
    return stored


@pytest.mark.parametrize("name", NAMES)
def test_each_tensor_of_a_merged_model(name, bases, tmp_path):
    base, _ = bases[name]
    adapter = adapted(base, tmp_path / "adapter")
    report = export(str(adapter), tmp_path / "m.gguf", merged=True, dtype="f32")
    model = merged_by_transformers(adapter)
    stored = read(tmp_path / "m.gguf")
    rope = stored.pop("rope_freqs.weight", None)
    assert (rope is not None) == (name == "llama3")
    parameters = dict(model.named_parameters())  # tied ones once
    assert len(stored) == len(parameters)
    for key, value in parameters.items():
        expected = expected_value(key, value.detach().numpy(), model)
        np.testing.assert_allclose(stored[expected_name(key, name)], expected, rtol=1e-5, atol=1e-6, err_msg=key)
    assert report.rounding < 1e-6 and report.kind == "model" and report.bytes == (tmp_path / "m.gguf").stat().st_size


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_logits(name, bases, tmp_path):
    from transformers import AutoModelForCausalLM

    base, _ = bases[name]
    adapter = adapted(base, tmp_path / "adapter")
    export(str(adapter), tmp_path / "m.gguf", merged=True, dtype="f32")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = merged_by_transformers(adapter)(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=1e-3, atol=1e-3)
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_what_the_merged_model_has_more(name, bases, tmp_path):
    """W + alpha / rank * b a, as llama.cpp adds them, is the merged weight."""
    base, _ = bases[name]
    adapter = adapted(base, tmp_path / "adapter")
    export(str(base), tmp_path / "base.gguf", dtype="f32")
    export(str(adapter), tmp_path / "a.gguf")
    export(str(adapter), tmp_path / "m.gguf", merged=True, dtype="f32")
    before, after, lora = (read(tmp_path / f"{file}.gguf") for file in ("base", "m", "a"))
    facts = fields(tmp_path / "a.gguf")
    assert facts["general.type"] == "adapter" and facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == fields(tmp_path / "base.gguf")["general.architecture"]
    adapted_names = {key.removesuffix(".lora_a").removesuffix(".lora_b") for key in lora}
    assert len(lora) == 2 * len(adapted_names)
    for key, weight in before.items():
        if key in adapted_names:
            a, b = lora[f"{key}.lora_a"], lora[f"{key}.lora_b"]
            update = facts["adapter.lora.alpha"] / len(a) * b @ a
            assert np.abs(update).max() > 1e-3
            np.testing.assert_allclose(after[key], weight + update, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(after[key], weight)


def test_a_lora_keeps_its_bits(bases, tmp_path):
    from safetensors.torch import load_file

    base, _ = bases["qwen2"]
    adapter = adapted(base, tmp_path / "adapter", target_modules=["v_proj"])
    report = export(str(adapter), tmp_path / "a.gguf")
    stored = read(tmp_path / "a.gguf")
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        layer, end = key.split(".")[4], key.split(".")[-2]
        np.testing.assert_array_equal(stored[f"blk.{layer}.attn_v.weight.{end.lower()}"], tensor.numpy())
    assert fields(tmp_path / "a.gguf")["adapter.lora.alpha"] == 5 and (report.rank, report.lost) == (3, 0.0)


@pytest.mark.parametrize(
    "settings",
    [
        dict(use_rslora=True),
        dict(alpha_pattern={"0.self_attn.q_proj": 11}),
        dict(rank_pattern={"0.self_attn.q_proj": 2}),
        dict(init_lora_weights="pissa"),
        dict(use_dora=True),
    ],
    ids=str,
)
def test_scalings_and_variants_of_lora(settings, bases, tmp_path):
    base, _ = bases["llama"]
    adapter = adapted(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **settings)
    report = export(str(adapter), tmp_path / "a.gguf")
    assert report.lost < 1e-5 and diagnose(adapter, "llama.cpp").runs == ("use_dora" not in settings)
    export(str(base), tmp_path / "base.gguf", dtype="f32")
    export(str(adapter), tmp_path / "m.gguf", merged=True, dtype="f32")
    before, after, lora = (read(tmp_path / f"{file}.gguf") for file in ("base", "m", "a"))
    alpha = fields(tmp_path / "a.gguf")["adapter.lora.alpha"]
    for key in ("blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.1.attn_v.weight"):
        a, b = lora[f"{key}.lora_a"], lora[f"{key}.lora_b"]
        np.testing.assert_allclose(after[key] - before[key], alpha / len(a) * b @ a, rtol=1e-3, atol=1e-4)


def test_another_method_becomes_the_nearest_lora_and_the_loss_is_told(bases, tmp_path):
    base, _ = bases["llama"]
    adapter = adapted(base, tmp_path / "adapter", LoHaConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    exact = export(str(adapter), tmp_path / "exact.gguf")
    assert exact.lost < 1e-5 and exact.rank == 64
    low = export(str(adapter), tmp_path / "low.gguf", rank=2)
    export(str(base), tmp_path / "base.gguf", dtype="f32")
    export(str(adapter), tmp_path / "m.gguf", merged=True, dtype="f32")
    before, after, lora = (read(tmp_path / f"{file}.gguf") for file in ("base", "m", "low"))
    alpha = fields(tmp_path / "low.gguf")["adapter.lora.alpha"]
    squared_rest, squared_update = 0.0, 0.0
    for layer in range(2):
        key = f"blk.{layer}.attn_v.weight"
        update = after[key] - before[key]
        squared_update += np.square(update).sum()
        squared_rest += np.square(update - alpha / 2 * lora[f"{key}.lora_b"] @ lora[f"{key}.lora_a"]).sum()
    assert low.rank == 2 and low.lost > 0.1
    assert low.lost == pytest.approx(np.sqrt(squared_rest / squared_update), rel=1e-3)


def test_alora_brings_its_invocation(bases, tmp_path):
    base, _ = bases["llama"]
    adapter = adapted(base, tmp_path / "adapter", target_modules=["q_proj"], alora_invocation_tokens=[7, 300, 9])
    report = export(str(adapter), tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    field = reader.fields["adapter.alora.invocation_tokens"]
    assert field.contents() == [7, 300, 9] and field.types[1] == gguf.GGUFValueType.UINT32
    assert "llama-server" in report.notes[0]
    with pytest.raises(NotMergeable, match="cannot be merged"):
        export(str(adapter), tmp_path / "m.gguf", merged=True)
    with pytest.raises(NotMergeable, match="without --rank"):
        export(str(adapter), tmp_path / "m.gguf", rank=1)


@pytest.mark.parametrize("dtype", TYPES)
def test_types(dtype, bases, tmp_path):
    base, _ = bases["llama3"]
    adapter = adapted(base, tmp_path / "adapter")
    report = export(str(adapter), tmp_path / "m.gguf", merged=True, dtype=dtype)
    export(str(adapter), tmp_path / "exact.gguf", merged=True, dtype="f32")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    exact = read(tmp_path / "exact.gguf")
    bits = {"f32": 23, "f16": 11, "bf16": 8, "q8_0": 7, "q5_1": 4, "q5_0": 4, "q4_1": 3, "q4_0": 3}[dtype]
    for name, value in exact.items():
        is_matrix = value.ndim == 2
        expected = dtype.upper() if is_matrix else "F32"
        if name == "token_embd.weight" and bits < 7:  # the output matrix, because the two are tied
            expected = "Q8_0"
        assert stored[name].tensor_type.name == expected, name
        error = np.abs(gguf.dequantize(stored[name].data, stored[name].tensor_type) - value)
        assert (error <= np.abs(value).max() * 2.0**-bits).all(), name
    assert report.rounding < 2.0**-bits
    facts = fields(tmp_path / "m.gguf")
    assert gguf.LlamaFileType(facts["general.file_type"]).name.endswith(dtype.upper())
    assert facts["general.base_model.0.name"] == str(base)


def test_the_base_in_half_precision_is_rounded_once(tmp_path):
    saved("llama", tmp_path / "base", torch.bfloat16)
    adapter = adapted(tmp_path / "base", tmp_path / "adapter", target_modules=["v_proj"])
    export(str(adapter), tmp_path / "m.gguf", merged=True, dtype="f32")
    export(str(adapter), tmp_path / "a.gguf")
    export(str(tmp_path / "base"), tmp_path / "base.gguf", dtype="f32")
    before, after, lora = (read(tmp_path / f"{file}.gguf") for file in ("base", "m", "a"))
    key = "blk.1.attn_v.weight"
    update = 5 / 3 * lora[f"{key}.lora_b"] @ lora[f"{key}.lora_a"]
    np.testing.assert_allclose(after[key], before[key] + update, rtol=1e-6, atol=1e-7)


def test_an_untied_head_and_saved_modules_are_merged(bases, tmp_path):
    base, _ = bases["qwen2"]
    adapter = adapted(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    export(str(adapter), tmp_path / "m.gguf", merged=True, dtype="f32")
    model = merged_by_transformers(adapter)
    stored = read(tmp_path / "m.gguf")
    np.testing.assert_array_equal(stored["output.weight"], model.lm_head.weight.detach().numpy())
    np.testing.assert_array_equal(stored["token_embd.weight"], model.model.embed_tokens.weight.detach().numpy())
    assert np.abs(stored["output.weight"] - stored["token_embd.weight"]).max() > 0.01


# Tokenizers


def regex(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def digits() -> dict:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}


@pytest.mark.parametrize(
    ("steps", "whole_words", "name"),
    [
        (None, False, "gpt-2"),
        (digits(), False, "smollm"),
        (regex(words.LLAMA3), True, "llama-bpe"),
        (regex(words.LLAMA3), False, "dbrx"),
        (regex(words.QWEN2), False, "qwen2"),
        (regex(words.TEKKEN), True, "tekken"),
        (regex(words.GPT4O), False, "gpt-4o"),
    ],
    ids=str,
)
def test_pre_tokenizers(steps, whole_words, name):
    made = words.vocabulary(byte_level(steps, ignore_merges=whole_words), 400, [])
    assert (made.model, made.pre, made.scores) == ("gpt2", name, None)


@pytest.mark.parametrize(
    ("name", "pre", "prefix", "notes"),
    [
        ("Qwen2Tokenizer", "qwen2", None, 0),
        ("GPT2Tokenizer", "gpt-2", None, 0),
        ("LlamaTokenizer", "default", True, 1),
        ("GemmaTokenizer", "default", False, 0),
    ],
)
def test_the_tokenizers_that_transformers_builds(name, pre, prefix, notes):
    import transformers

    like = byte_level() if prefix is None else sentencepiece()
    model = json.loads(like.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made = words.vocabulary(getattr(transformers, name)(vocab=model["vocab"], merges=merges), 400, [])
    assert (made.pre, made.add_space_prefix, len(made.notes)) == (pre, prefix, notes)


def test_a_pre_tokenizer_without_a_name_is_refused():
    with pytest.raises(ConfigError, match=r"no name for the tokenizer's pre-tokenizer: \\w\+ \+ bytes"):
        words.vocabulary(byte_level(regex(r"\w+")), 400, [])
    with pytest.raises(ConfigError, match="no name"):  # the expression is known, taking whole words is not
        words.vocabulary(byte_level(regex(words.QWEN2), ignore_merges=True), 400, [])


def test_the_tokens_of_a_byte_level_tokenizer():
    made = words.vocabulary(byte_level(), 300, [2, 5])
    content = json.loads(byte_level().backend_tokenizer.to_str())
    assert made.tokens[1] == "<s>" and made.types[1] == gguf.TokenType.CONTROL
    assert made.tokens[299] == "[PAD299]" and made.types[299] == gguf.TokenType.UNUSED
    assert made.merges == [" ".join(pair) for pair in content["model"]["merges"]]
    assert made.special == {"bos": 1, "eos": 2, "unknown": 3, "padding": 0, "eot": 5}
    assert (made.add_bos, made.add_eos) == (False, False) and "add_generation_prompt" in made.chat_template


@pytest.mark.parametrize("prefix", [True, False])
def test_the_tokens_of_sentencepiece(prefix):
    """Merging the neighbours with the highest score gives the tokens that the list of merges gives."""
    made = words.vocabulary(sentencepiece(prefix), 400, [])
    assert (made.model, made.pre, made.merges, made.add_bos) == ("llama", "default", None, True)
    assert made.add_space_prefix is prefix
    assert made.types[made.tokens.index("<0x41>")] == gguf.TokenType.BYTE
    assert made.types[made.tokens.index("<unk>")] == gguf.TokenType.UNKNOWN
    for text in ("the thing in a theatre", "tthe", " an ant, anthing a", "naïve  A", "bthe"):
        ids = sentencepiece(prefix)(text, add_special_tokens=False)["input_ids"]
        assert merged_by_scores(made, f" {text}" if prefix else text) == ids, text


def merged_by_scores(made: words.Vocabulary, text: str) -> list[int]:
    """llama.cpp's tokenizer of SentencePiece's kind, in its slow form."""
    ids = {token: i for i, token in enumerate(made.tokens)}
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (-made.scores[ids[a + b]], i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in ids
        ]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    tokens = []
    for part in parts:
        tokens += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return tokens


def test_tokens_that_take_the_spaces_after_them():
    """llama.cpp knows them by the model's name, so other models must not be called Phi-3."""
    assert words.vocabulary(sentencepiece(strips=True), 400, []).named("mine") == "mine (Phi-3)"
    assert words.vocabulary(sentencepiece(), 400, []).named("like-phi3-and-Phi-3") == "like-Phi 3-and-Phi 3"


def test_transformers_reads_the_same_tokens(bases, tmp_path):
    from transformers import AutoTokenizer

    base, _ = bases["gpt2"]
    export(str(base), tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = AutoTokenizer.from_pretrained(base)
    for text in ("the theatre 12 7  sings\n\nan été", "<s>user\nthe</s>"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == ours.chat_template


# Ollama


@pytest.mark.parametrize("stock", TEMPLATES, ids=str)
def test_templates_for_ollama(stock):
    """A template that is turned into Ollama's language says the same on a conversation that it was not made from."""
    made = tokenizer(stock)
    turns = Turns.of(made, adds_bos=False)
    if stock.name in ("chatml", "zephyr", "phi-3"):
        assert turns is not None, stock.name
    if turns is None:
        return
    messages = [("user", "Why?"), ("assistant", "So."), ("user", "And?")]
    if "system" in turns.before:
        messages.insert(0, ("system", "Be brief."))
    rows = [{"role": role, "content": content} for role, content in messages]
    assert turns.render(messages) == made.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)


def test_a_modelfile(bases, tmp_path):
    base, _ = bases["llama"]
    report = export(str(base), tmp_path / "m.gguf", ollama=True)
    assert report.modelfile == str(tmp_path / "Modelfile")
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith("FROM ./m.gguf\n") and 'PARAMETER stop "</s>"\n' in text
    assert '{{ if eq .Role "system" }}<s>system\n{{ .Content }}</s>\n{{ else if eq .Role "user" }}' in text
    assert text.count('"""') == 2 and '<s>assistant\n"""' in text


def test_a_template_that_is_more_than_turns_is_left_out():
    made = byte_level()
    made.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    assert Turns.of(made, adds_bos=False) is None
    assert "TEMPLATE" not in modelfile("m.gguf", None, made, [])
    made.chat_template = "{% for m in messages %}[{{ loop.index }}]{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    assert Turns.of(made, adds_bos=False) is None


# Refusals


def nothing_left(directory: Path) -> bool:
    return not [path for path in directory.iterdir() if path.name.startswith((".m.gguf", "m.gguf", "Modelfile"))]


def test_an_unknown_architecture(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=300)
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(tmp_path / "base")
    byte_level().save_pretrained(tmp_path / "base")
    adapter = adapted(tmp_path / "base", tmp_path / "adapter")
    for source, merged in ((tmp_path / "base", False), (adapter, True), (adapter, False)):
        with pytest.raises(ConfigError, match=r"'gpt_neox' cannot be exported to GGUF; these can: Llama .*, GPT-2"):
            export(str(source), tmp_path / "m.gguf", merged=merged)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act = 'gelu', not 'silu'"),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rope_type = 'dynamic'"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True"),
        ("gemma2", dict(query_pre_attn_scalar=100), "query_pre_attn_scalar = 100, not 256"),
        ("gemma3_text", dict(layer_types=["full_attention"] * 7), "layer_types other than 5 sliding_attention"),
        ("smollm3", dict(no_rope_layer_interval=2), "no_rope_layers"),
        ("qwen2", dict(use_sliding_window=True), "use_sliding_window = True"),
        ("qwen2", dict(head_dim=32), "head_dim = 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_that_llama_cpp_computes_otherwise(name, settings, problem, tmp_path):
    saved(name, tmp_path / "base", **settings)
    with pytest.raises(ConfigError, match="computes .* in one way") as error:
        export(str(tmp_path / "base"), tmp_path / "m.gguf")
    assert problem in str(error.value) and nothing_left(tmp_path)


def test_a_missing_base(bases, tmp_path):
    adapter = adapted(bases["llama"][0], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for merged in (False, True):
        with pytest.raises(VeneerError, match="gone.* is not there: no such directory"):
            export(str(adapter), tmp_path / "m.gguf", merged=merged)
    assert nothing_left(tmp_path)


def test_an_adapter_of_another_base(bases, tmp_path):
    adapter = adapted(bases["llama"][0], tmp_path / "adapter", target_modules=["v_proj"])
    for merged in (False, True):
        with pytest.raises(BaseMismatch):
            export(str(adapter), tmp_path / "m.gguf", str(bases["mistral"][0]), merged=merged)
        with pytest.raises(CheckpointError):
            export(str(adapter), tmp_path / "m.gguf", str(bases["qwen3"][0]), merged=merged, check_base=False)
    assert nothing_left(tmp_path)


def test_a_base_without_all_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    saved("llama", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="no values for:\n  model.norm.weight"):
        export(str(tmp_path / "base"), tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        export(str(tmp_path / "base"), tmp_path / "m.gguf")
    assert nothing_left(tmp_path)


def test_methods_without_a_form_as_weights(bases, tmp_path):
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    adapter = adapted(bases["llama"][0], tmp_path / "adapter", config)
    for merged in (False, True):
        with pytest.raises(NotMergeable, match="PREFIX_TUNING has no form as"):
            export(str(adapter), tmp_path / "m.gguf", merged=merged)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        dict(modules_to_save=["lm_head"]),
        dict(bias="lora_only"),
        dict(trainable_token_indices=[3, 4]),
        dict(target_modules=["embed_tokens", "v_proj"]),
    ],
    ids=str,
)
def test_adapters_that_are_more_than_updates_of_linear_layers(settings, bases, tmp_path):
    adapter = adapted(bases["llama3"][0], tmp_path / "adapter", **dict(target_modules=["q_proj"]) | settings)
    with pytest.raises(VeneerError, match="--merged"):
        export(str(adapter), tmp_path / "m.gguf")
    assert nothing_left(tmp_path) and not diagnose(adapter, "llama.cpp").runs
    export(str(adapter), tmp_path / "m.gguf", merged=True)


def test_a_tied_head_has_no_place_in_llama_cpp(bases, tmp_path):
    adapter = adapted(bases["qwen2"][0], tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="ties its head"):
        export(str(adapter), tmp_path / "a.gguf")
    adapter = adapted(bases["gemma2"][0], tmp_path / "other", target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="Gemma 2 has no tensor for 'lm_head.weight'"):
        export(str(adapter), tmp_path / "m.gguf", merged=True)


def test_nothing_is_overwritten(bases, tmp_path):
    base = str(bases["llama"][0])
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(VeneerError, match=r"m.gguf' exists"):
        export(base, tmp_path / "m.gguf")
    with pytest.raises(VeneerError, match="is a directory"):
        export(base, tmp_path)
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(VeneerError, match=r"Modelfile' exists"):
        export(base, tmp_path / "other.gguf", ollama=True)
    assert (tmp_path / "m.gguf").read_text() == (tmp_path / "Modelfile").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "m.gguf"]


@pytest.mark.parametrize("merged", [False, True])
def test_a_disk_that_fills_up_leaves_nothing(merged, bases, tmp_path, monkeypatch):
    adapter = adapted(bases["llama"][0], tmp_path / "adapter")
    write, written = gguf.GGUFWriter.write_tensor_data, []

    def failing(self, tensor, *arguments):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(tensor)
        write(self, tensor, *arguments)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    with pytest.raises(OSError, match="No space left"):
        export(str(adapter), tmp_path / "m.gguf", merged=merged, ollama=merged)
    assert len(written) == 3 and nothing_left(tmp_path)


def test_a_disk_that_is_too_small(bases, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(VeneerError, match="the disk has only 0.0 GB left"):
        export(str(bases["llama"][0]), tmp_path / "m.gguf")
    assert nothing_left(tmp_path)


def test_a_source_that_is_no_adapter(bases, tmp_path):
    done = veneer("export", str(tmp_path), "--out", str(tmp_path / "m.gguf"))
    assert done.returncode == 2 and "holds no adapter_config.json" in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(ConfigError, match="is a model itself"):
        export(str(bases["llama"][0]), tmp_path / "m.gguf", str(bases["qwen2"][0]))
    assert nothing_left(tmp_path)


def test_values_that_fp16_cannot_hold(tmp_path):
    from safetensors.torch import load_file, save_file

    saved("llama", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight holds values up to 1e\+05, too large for f16"):
        export(str(tmp_path / "base"), tmp_path / "m.gguf")
    export(str(tmp_path / "base"), tmp_path / "other.gguf", dtype="bf16")
    assert nothing_left(tmp_path)


def test_a_tokenizer_that_is_missing_or_too_large(tmp_path):
    saved("llama", tmp_path / "base", vocab_size=20)
    with pytest.raises(ConfigError, match="embedding only 20 rows"):
        export(str(tmp_path / "base"), tmp_path / "m.gguf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        export(str(tmp_path / "base"), tmp_path / "m.gguf")
    assert nothing_left(tmp_path)


# The command


def test_the_command(bases, tmp_path):
    base, _ = bases["llama"]
    adapter = adapted(base, tmp_path / "adapter")
    done = veneer("export", str(adapter), "--to", "gguf", "--out", str(tmp_path / "a.gguf"))
    assert done.returncode == 0 and "none: the file holds the whole update" in done.stdout, done.stderr
    arguments = ["--merged", "--ollama", "--dtype", "Q8_0", "--json"]
    done = veneer("export", str(adapter), "--to", "gguf", "--out", str(tmp_path / "m.gguf"), *arguments)
    report = json.loads(done.stdout)
    assert report["dtype"] == "q8_0" and report["tensors"] == len(read(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merged", "--dtype", "q4_k_m"], "llama-quantize model-f16.gguf model.gguf Q4_K_M"),
        (["--merged", "--dtype", "f61"], "is not one of f32, f16"),
        (["--dtype", "q8_0"], "is not one of f32, f16, bf16"),
        (["--ollama"], "--ollama needs --merged"),
        (["--merged", "--rank", "3"], "--rank is the rank of an adapter's LoRA"),
        (["--rank", "0"], "rank must be at least 1"),
        (["--to", "onnx"], "--to 'onnx' is not one of gguf, vllm, sglang"),
        (["--dtype", "f32", "--out", "adapter"], "is a directory; give the name of a new file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_requests_get_one_line(arguments, message, bases, tmp_path):
    adapter = adapted(bases["llama"][0], tmp_path / "adapter", target_modules=["v_proj"])
    arguments = [str(adapter) if argument == "adapter" else argument for argument in arguments]
    done = veneer("export", str(adapter), "--out", str(tmp_path / "m.gguf"), *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert nothing_left(tmp_path)
