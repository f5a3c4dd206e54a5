"""GGUF files as base models: the right model or one clear error, converted once, and named in what is saved."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch

from veneer import LoraConfig, PeftModel, VeneerError, get_peft_model
from veneer.errors import BaseMismatch, CheckpointError, ConfigError
from veneer.files.gguf import cache
from veneer.files.gguf.cache import directory_of, is_gguf, on_hub
from veneer.files.gguf.directory import Plan
from veneer.files.pull import hub_id, name_anywhere, resolve, where
from veneer.merging.export import export
from veneer.model.loading import load_model, load_tokenizer

from .forked import veneer
from .gguf_models import CONFIGS, byte_level, saved
from .models import perturb

NAMES = list(CONFIGS)
TEXTS = ("the thing  ing a", "été 12 the  \n\n 7", "<s>an</s> ing a\n<pad>ABT.", "<|user|>  the")
IDS = torch.tensor([[5, 40, 7, 260, 31, 8] * 20])
"""Longer than the sliding windows and the original context lengths of the tiny models."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, Path, Any]]:
    """(GGUF file in F32, directory, model) of each architecture."""
    made = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        model = saved(name, folder / name)
        export(str(folder / name), folder / "model.gguf", dtype="f32")
        made[name] = folder / "model.gguf", folder / name, model
    return made


def loaded(path: Path) -> Any:
    model, missing = load_model(str(path), "AutoModelForCausalLM", attn_implementation="eager", dtype=torch.float32)
    assert not missing
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def rewritten(
    path: Path,
    out: Path,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    architecture: str | None = None,
) -> Path:
    """A copy of a GGUF file with other metadata and tensors; None takes an entry away."""
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    old = values.pop("general.architecture")
    writer = gguf.GGUFWriter(out, architecture or old)
    for key, value in (values | (metadata or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    arrays: dict[str, Any] = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, array in (arrays | (tensors or {})).items():
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# The right model


@pytest.mark.parametrize("name", NAMES)
def test_the_model_and_the_tokenizer_come_back(name, files):
    path, directory, model = files[name]
    again = loaded(path)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    ours, theirs = load_tokenizer(str(path)), load_tokenizer(str(directory))
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (
        ours.special_tokens_map == {key: theirs.special_tokens_map[key] for key in ours.special_tokens_map}
        and ours.bos_token == theirs.bos_token
    )
    turns = [{"role": "user", "content": "the"}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(turns, tokenize=False)
    assert again.generation_config.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ("llama", {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 20.0}),
        (
            "llama",
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 256,
            },
        ),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "original_max_position_embeddings": 64,
                "long_factor": [1.0 + 0.5 * i for i in range(8)],
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
            },
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else value,
)
def test_scaled_rotary_embeddings(name, rope, tmp_path):
    rope = {"rope_theta": 10000.0} | rope
    settings: dict[str, Any] = {"rope_parameters": rope}
    if name == "phi3":
        settings["original_max_position_embeddings"] = 64
    model = saved(name, tmp_path / name, **settings)
    export(str(tmp_path / name), tmp_path / "model.gguf", dtype="f32")
    plain = saved(name, tmp_path / "plain")
    plain.load_state_dict(model.state_dict())
    expected = logits(model)
    assert not torch.allclose(logits(plain), expected, atol=1e-2)  # the scaling matters
    assert torch.allclose(logits(loaded(tmp_path / "model.gguf")), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_types(dtype, files, tmp_path):
    """Each weight is the stored value, in the order that transformers has; q and k are interleaved in the file."""
    _, directory, _ = files["llama"]
    export(str(directory), tmp_path / "model.gguf", dtype=dtype)
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    model = loaded(tmp_path / "model.gguf")
    layer = model.model.layers[1]
    assert np.array_equal(layer.mlp.up_proj.weight.float().detach().numpy(), stored["blk.1.ffn_up.weight"])
    rows = layer.self_attn.q_proj.weight.float().detach().numpy().reshape(4, 2, 16, 64)  # heads, halves
    assert np.array_equal(rows.transpose(0, 2, 1, 3).reshape(128, 64), stored["blk.1.attn_q.weight"])
    home = Path(resolve(tmp_path / "model.gguf"))
    kinds = {"f16": "float16", "bf16": "bfloat16"}
    assert json.loads((home / "config.json").read_text())["dtype"] == kinds.get(dtype, "float32")


def test_a_missing_bias_is_zero(files, tmp_path):
    path, _, model = files["llama3"]
    without = {f"blk.{i}.attn_output.bias": None for i in range(2)}
    again = loaded(rewritten(path, tmp_path / "m.gguf", tensors=without))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


# What would be lost


@pytest.mark.parametrize(
    ("name", "metadata", "tensors", "told"),
    [
        ("llama", {"llama.attention.clamp_kqv": 8.0}, {}, "llama.attention.clamp_kqv = 8.0"),
        ("llama", {"llama.expert_count": 4}, {}, "llama.expert_count = 4"),
        ("llama", {"llama.logit_scale": 0.5}, {}, "llama.logit_scale"),
        ("llama", {"llama.rope.dimension_count": 16}, {}, "rope.dimension_count"),
        ("llama", {"llama.rope.scale_linear": 4.0}, {}, "rope.scale_linear"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type = 'longrope'"),
        ("llama", {"llama.attention.head_count_kv": [1, 2]}, {}, "each block its own num_key_value_heads"),
        ("llama", {}, {"blk.1.attn_q_norm.weight": np.ones(32, np.float32)}, "blk.1.attn_q_norm.weight"),
        ("llama", {}, {"rope_freqs.weight": np.geomspace(1, 9, 16).astype(np.float32)}, "rope_freqs.weight"),
        ("qwen2", {}, {"blk.0.attn_output.bias": np.ones(64, np.float32)}, "blk.0.attn_output.bias"),
        ("qwen2", {"qwen2.attention.sliding_window": 16}, {}, "sliding_window"),
        ("qwen3", {"qwen3.attention.value_length": 64}, {}, "attention.value_length"),
        ("gpt2", {}, {"output.bias": np.ones(276, np.float32)}, "output.bias"),
        ("gemma3_text", {"gemma3.attn_logit_softcapping": 30.0}, {}, "attn_logit_softcapping"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_transformers_cannot_express_is_refused_by_name(name, metadata, tensors, told, files, tmp_path):
    path = rewritten(files[name][0], tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(ConfigError) as caught:
        loaded(path)
    assert told in str(caught.value)
    assert nothing_converted(tmp_path)


@pytest.mark.parametrize("key", ["llama.expert_count", "llama.expert_used_count"])
def test_a_key_that_says_nothing_is_no_obstacle(key, files, tmp_path):
    loaded(rewritten(files["llama"][0], tmp_path / "m.gguf", {key: 0}))


def test_llama_cpp_s_default_caps_of_gemma2(files, tmp_path):
    """A file without them is computed with 50 and 30."""
    caps = {f"gemma2.{name}_logit_softcapping": None for name in ("attn", "final")}
    config = loaded(rewritten(files["gemma2"][0], tmp_path / "m.gguf", caps)).config
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)


# Files that are no model


def nothing_converted(tmp_path: Path) -> bool:
    cached = tmp_path / "cache" / "gguf"
    return not [entry for entry in cached.glob("*") if entry.is_dir() and entry.name != "known"]


def not_gguf(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 a zip")


def bare(path: Path, **values: Any) -> None:
    writer = gguf.GGUFWriter(path, values.pop("architecture", "llama"))
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (not_gguf, "is not a GGUF file: it does not begin with 'GGUF'"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (
            lambda path: bare(path, architecture="mamba"),
            "architecture 'mamba'; GGUF files of these can be loaded: llama,",
        ),
        (
            lambda path: bare(path, general__type="adapter"),
            "is an adapter, not a model; give the GGUF file of its base",
        ),
        (lambda path: bare(path, general__type="mmproj"), "holds a GGUF of type 'mmproj'"),
        (lambda path: bare(path, split__count=3, split__no=1), "is part 2 of 3; join the parts with `llama-gguf-split"),
        (lambda path: bare(path), "lacks the setting llama.context_length"),
    ],
    ids=["zip", "empty", "architecture", "adapter", "mmproj", "split", "bare"],
)
def test_one_clear_error(write, told, tmp_path):
    path = tmp_path / "m.gguf"
    write(path)
    for verb in (["plan", "--model"], ["generate", "the", "--model"]):
        done = veneer(*verb, str(path))
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert nothing_converted(tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    bare(tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match=r"there is no GGUF file .*GGUF files there: other.gguf"):
        load_tokenizer(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("architecture", ["llama3", "gemma2", "gpt2"])
def test_truncated_and_damaged_files(architecture, files, tmp_path):
    """Wherever a file is cut or changed, it is a model or one of our errors."""
    whole = files[architecture][0].read_bytes()
    header = whole.find(b"output_norm.weight") + 200
    path = tmp_path / "m.gguf"
    generator = random.Random(architecture)
    for _ in range(12):
        path.write_bytes(whole[: generator.randrange(8, len(whole) - 64)])
        with pytest.raises(CheckpointError, match="is damaged or truncated"):
            Plan(path)
    for _ in range(25):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(max(0, header - 2500), header)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            Plan(path)
        except VeneerError as error:
            assert str(path) in str(error) or "llama.cpp" in str(error)


@pytest.mark.parametrize(
    ("metadata", "tensors", "told"),
    [
        ({"llama.block_count": 10**6}, {}, "says that it has 1000000 blocks, but holds tensors of 2"),
        ({"llama.embedding_length": 2**31}, {}, "is no size"),
        ({"llama.attention.head_count": 0}, {}, "is no size"),
        ({"llama.feed_forward_length": 128}, {}, "wrong shapes"),
        ({"llama.vocab_size": 99}, {}, "its vocabulary has 99 tokens"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "lacks the setting llama.attention.layer_norm_rms"),
        ({}, {"blk.1.ffn_up.weight": None}, "lacks tensors"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, {}, "bos_token is 1000000"),
        ({"tokenizer.ggml.token_type": [1, 1]}, {}, "types of 2"),
    ],
)
def test_settings_that_do_not_fit_the_tensors(metadata, tensors, told, files, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        Plan(rewritten(files["llama"][0], tmp_path / "m.gguf", metadata, tensors))
    assert told in str(caught.value)


def test_a_disk_that_is_too_small(files, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(VeneerError, match="make room"):
        resolve(files["llama"][0])
    assert nothing_converted(tmp_path)


# Tokenizers


@pytest.mark.parametrize(
    ("name", "metadata", "told"),
    [
        ("llama", {"tokenizer.ggml.pre": "poro-chat"}, "names the pre-tokenizer 'poro-chat'"),
        ("llama", {"tokenizer.ggml.pre": None}, "names no pre-tokenizer"),
        ("llama", {"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ("llama", {"tokenizer.ggml.model": None}, "kind 'None'"),
        ("llama", {"tokenizer.ggml.merges": None}, "no merges"),
        ("phi3", {"tokenizer.ggml.scores": None}, "no scores"),
    ],
)
def test_tokenizers_that_cannot_be_built(name, metadata, told, files, tmp_path):
    with pytest.raises(ConfigError) as caught:
        Plan(rewritten(files[name][0], tmp_path / "m.gguf", metadata))
    assert told in str(caught.value)


def test_a_pre_tokenizer_that_splits_digits(tmp_path):
    """SmolLM's; transformers' loader splits as GPT-2 does."""
    digits = {"type": "Digits", "individual_digits": True}
    of_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    saved("llama", tmp_path / "base")
    words = byte_level({"type": "Sequence", "pretokenizers": [digits, of_bytes]}, words=("12", "the"))
    words.save_pretrained(tmp_path / "base")
    export(str(tmp_path / "base"), tmp_path / "m.gguf")
    tokens = load_tokenizer(str(tmp_path / "m.gguf"))
    assert tokens.tokenize("the 12") == words.tokenize("the 12") == ["the", "Ġ", "1", "2"]


def test_several_chat_templates(files, tmp_path):
    added = {"tokenizer.chat_templates": ["tools"], "tokenizer.chat_template.tools": "{{ tools }}"}
    path = rewritten(files["llama"][0], tmp_path / "m.gguf", added)
    assert load_tokenizer(str(path)).chat_template["tools"] == "{{ tools }}"


def test_the_token_that_ends_a_turn_ends_a_generation(files, tmp_path):
    path = rewritten(files["llama"][0], tmp_path / "m.gguf", {"tokenizer.ggml.eot_token_id": 7})
    assert loaded(path).generation_config.eos_token_id == [2, 7]


# The cache


def test_a_file_is_converted_once(files, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(files["llama"][0].read_bytes())
    assert where(str(path)) == path
    home = Path(resolve(path))
    conversions = []
    monkeypatch.setattr(cache, "_convert", lambda *arguments: conversions.append(arguments))
    assert Path(resolve(path)) == home == where(str(path))
    copied = tmp_path / "copy.gguf"
    copied.write_bytes(path.read_bytes())
    assert Path(resolve(copied)) == home and name_anywhere(str(home)) == str(copied)
    assert not conversions
    (home / "model.safetensors").write_bytes(b"cut")
    resolve(path)
    assert len(conversions) == 1


def test_a_changed_file_is_another_base(files, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(files["llama"][0].read_bytes())
    first = resolve(path)
    rewritten(files["llama"][0], path, tensors={"output_norm.weight": np.full(64, 3.0, np.float32)})
    assert resolve(path) != first
    assert float(loaded(path).model.norm.weight[0]) == 3.0


def test_names_on_the_hub(files, tmp_path, monkeypatch):
    asked = []

    def hf_hub_download(repository: str, file: str, **settings: Any) -> str:
        asked.append((repository, file, settings.get("revision")))
        return str(files["llama"][0])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    for name in ("makers/tiny-GGUF:tiny.f32.gguf", "makers/tiny-GGUF/tiny.f32.gguf"):
        assert on_hub(name) == ("makers/tiny-GGUF", "tiny.f32.gguf") and hub_id(name) == "makers/tiny-GGUF"
        model, _ = load_model(name, "AutoModelForCausalLM", revision="v1")
        assert name_anywhere(model.config.name_or_path) == name
    assert set(asked) == {("makers/tiny-GGUF", "tiny.f32.gguf", "v1")}
    assert on_hub(str(files["llama"][0])) is None and on_hub("./a/b.gguf") is None and on_hub("b.gguf") is None
    assert not is_gguf("makers/tiny-GGUF")


# Adapters


def trained(base: Path, directory: Path, **settings: Any) -> Path:
    config = LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings)
    perturb(get_peft_model(loaded(base), config)).save_pretrained(directory)
    return directory


def test_an_adapter_names_the_file_and_its_hash(files, tmp_path):
    from safetensors import safe_open

    path = files["llama"][0]
    adapter = trained(path, tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(path)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        noted = json.loads(file.metadata()["veneer"])["file"]
    assert noted == {"name": "model.gguf", "sha256": directory_of(str(path)).name}
    from veneer.model.card import write_card

    write_card(adapter, LoraConfig.from_pretrained(adapter))
    card = (adapter / "README.md").read_text()
    assert f"the GGUF file `model.gguf` with the SHA-256 `{noted['sha256']}`" in card and str(path) not in card
    assert noted["sha256"] in veneer("inspect", str(adapter)).stdout.replace("\n", "")


def test_an_adapter_on_another_file(files, tmp_path):
    path, directory, _ = files["llama"]
    adapter = trained(path, tmp_path / "adapter")
    renamed = rewritten(path, tmp_path / "renamed.gguf", {"general.name": "another name"})
    for same in (renamed, directory):
        PeftModel.from_pretrained(loaded(same), adapter)
    changed: dict[str, Any] = {}
    for i in range(2):
        for part, shape in (("attn_q", (128, 64)), ("ffn_down", (64, 96))):
            changed[f"blk.{i}.{part}.weight"] = np.random.default_rng(i).normal(size=shape).astype(np.float32)
    other = rewritten(path, tmp_path / "other.gguf", tensors=changed)
    with pytest.raises(BaseMismatch):
        PeftModel.from_pretrained(loaded(other), adapter)


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_there_and_back(dtype, files, tmp_path, monkeypatch):
    """Merged to GGUF, that file trained on, evaluated, merged and exported again: the same logits on each way."""
    monkeypatch.chdir(tmp_path)
    first = trained(files["llama3"][1], tmp_path / "first")
    export(str(first), "base.gguf", merged=True, dtype=dtype)
    rows = [json.dumps({"prompt": f"the {i}", "completion": f"ing 12 a {i}"}) for i in range(12)]
    Path("rows.jsonl").write_text("\n".join(rows))
    Path("recipe.yaml").write_text(
        "model: base.gguf\ndata: rows.jsonl\noutput: run\nmax_steps: 3\nbatch_size: 2\nsamples: 0\n"
        "learning_rate: 0.01\n"
    )
    run = {"VENEER_CACHE": str(tmp_path / "cache")}
    for arguments in (
        ["plan", "--model", "base.gguf"],
        ["train", "recipe.yaml"],
        ["eval", "--adapter", "run", "--data", "rows.jsonl"],
        ["generate", "the", "--adapter", "run", "--max-new-tokens", "3"],
        ["merge", "run", "--out", "merged"],
        ["export", "run", "--out", "lora.gguf"],
        ["export", "run", "--out", "again.gguf", "--merged", "--dtype", "f32"],
    ):
        done = veneer(*arguments, **run)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
    assert "The base model is the GGUF file `base.gguf`" in Path("run/README.md").read_text()
    tuned = PeftModel.from_pretrained(loaded(Path("base.gguf")), "run").eval()
    expected = logits(tuned)
    assert not torch.allclose(expected, logits(loaded(Path("base.gguf"))), atol=1e-3)
    assert torch.allclose(logits(loaded(Path("again.gguf"))), expected, atol=1e-4)
    rounding = {"f16": 0.05}.get(dtype, 1e-4)
    assert torch.allclose(logits(loaded(Path("merged"))), expected, atol=rounding)
