"""GGUF files in llama.cpp itself: the same tokens, logits and text as in transformers. Run by `make test-gguf`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from veneer.merging.export import export

from .gguf_models import CONFIGS, saved
from .room import ROOT
from .test_gguf import adapted, base_of, merged_by_transformers

HOME = Path(os.environ.get("VENEER_GGUF", ""))
"""The environment that has llama-cpp-python, and llama.cpp's programs in `programs`."""
pytestmark = pytest.mark.skipif("VENEER_GGUF" not in os.environ, reason="needs llama.cpp: make test-gguf")
BITS = {"f32": 23, "f16": 11, "bf16": 8, "q8_0": 7, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}
GELU_TABLE = 1e-3
"""The error of llama.cpp's GELU on CPUs, which it looks up in a table in fp16."""
GELUS = ("gpt2", "gemma2", "gemma3_text")
TEXTS = (
    "the thing in a theatre",
    "été: 12 of 7\n\nthe  end",
    "<s>user\nan ant</s>\n<s>assistant\n",
    " a",
    "bthe",
    "<|user|>  an </s> \n a",
)


def run(directory: Path, model: Path, adapter: Path | None = None, **job) -> dict[str, np.ndarray]:
    """What llama.cpp says to a job; see `llama_cpp_runner.py`."""
    (directory / "job.json").write_text(json.dumps({"model": str(model), "adapter": adapter and str(adapter), **job}))
    command = [str(HOME / "bin" / "python"), str(ROOT / "tests" / "llama_cpp_runner.py"), "job.json", "result.npz"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(directory / "result.npz"))


def logits_of(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The difference relative to the size of the logits, as root mean squares."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


# Every architecture, on a tiny model


@pytest.mark.parametrize("name", CONFIGS)
def test_an_architecture(name, tmp_path):
    """An adapter on its base, and the merged model, give transformers' logits; the text gives its tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / name
    saved(name, base)
    adapter = adapted(base, tmp_path / "adapter")
    export(str(base), tmp_path / "base.gguf", dtype="f32")
    export(str(adapter), tmp_path / "a.gguf")
    export(str(adapter), tmp_path / "m.gguf", merged=True, dtype="f32")
    ids = [[*range(3, 43)], [7, 250, 9, 4]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    merged = merged_by_transformers(adapter)
    on_base = run(tmp_path, tmp_path / "base.gguf", ids=ids, texts=TEXTS)
    on_adapter = run(tmp_path, tmp_path / "base.gguf", tmp_path / "a.gguf", ids=ids)
    on_merged = run(tmp_path, tmp_path / "m.gguf", ids=ids)
    bound = GELU_TABLE if name in GELUS else 1e-5
    for i, prompt in enumerate(ids):
        assert error(on_base[f"logits{i}"], logits_of(plain, prompt)) < bound
        expected = logits_of(merged, prompt)
        assert error(on_merged[f"logits{i}"], expected) < bound
        assert error(on_adapter[f"logits{i}"], expected) < bound
        assert error(on_base[f"logits{i}"], expected) > 0.05  # the adapter acts
    for i, text in enumerate(TEXTS):
        assert on_base[f"tokens{i}"].tolist() == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_a_type(name, dtype, tmp_path):
    """Each type is read as what was written: the rest is llama.cpp's rounding of activations."""
    base = tmp_path / name
    saved(name, base)
    adapter = adapted(base, tmp_path / "adapter")
    export(str(adapter), tmp_path / "m.gguf", merged=True, dtype=dtype)
    ids = [[*range(3, 43)]]
    found = run(tmp_path, tmp_path / "m.gguf", ids=ids)["logits0"]
    distance = error(found, logits_of(merged_by_transformers(adapter), ids[0]))
    print(name, dtype, distance)
    assert distance < max(GELU_TABLE if name in GELUS else 1e-5, 3 * 2.0 ** -BITS[dtype])


SCALED = {
    "linear": ("mistral", dict(factor=4.0)),
    "yarn": ("qwen3", dict(factor=4.0, original_max_position_embeddings=128)),
    "longrope": (
        "phi3",
        dict(long_factor=[1.0 + i / 3 for i in range(8)], short_factor=[1.0] * 8, original_max_position_embeddings=64),
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_rotary_embedding(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    name, settings = SCALED[kind]
    rope = dict(rope_type=kind, rope_theta=10000.0, **settings)
    extra = dict(original_max_position_embeddings=64) if kind == "longrope" else {}
    saved(name, tmp_path / "base", rope_parameters=rope, **extra)
    export(str(tmp_path / "base"), tmp_path / "m.gguf", dtype="f32")
    ids = [*range(3, 200)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    found = run(tmp_path, tmp_path / "m.gguf", ids=[ids])["logits0"]
    assert error(found, logits_of(model, ids)) < 1e-5


# SmolLM2


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A LoRA on SmolLM2-135M-Instruct, after a few steps on a small file."""
    from .forked import veneer

    directory = tmp_path_factory.mktemp("smollm2")
    lines = []
    for i in range(40):
        question = f"What comes after {i}, and what after {i + 1}?"
        lines.append(json.dumps({"prompt": question, "completion": f"Ahoy! {i + 1}, and then {i + 2}, me hearty."}))
    (directory / "data.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["--model", "smollm2-135m-instruct", "--data", str(directory / "data.jsonl"), "--method", "lora"]
    arguments += ["--output", str(directory / "run"), "--max-steps", "15", "--batch-size", "4", "--set", "samples=0"]
    done = veneer("train", *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return directory / "run"


PROMPTS = (
    "What comes after 7, and what after 8?",
    "What comes after 120, and what after 121?",
    "Who are you?",
    "Name three colours.",
    "Write a haiku about the sea.",
    "What is 12 * 12?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "List the planets of the solar system.",
    "Tell me a joke.",
    "How do I boil an egg?",
    "What is the capital of Japan?",
    "Explain gravity to a child.",
    "def fibonacci(n):",
    "Give me a synonym of 'quick'.",
    "What is the opposite of hot?",
    "Schreib einen Satz über Bäume.",
    "Résume : l'été est chaud.",
    "Count from 1 to 10.",
    "日本の首都はどこですか？ 🙂",
)


class Expected(NamedTuple):
    """What transformers says to one prompt, with the adapter merged in."""

    text: str
    ids: list[int]
    logits: np.ndarray
    greedy: list[int]


@pytest.fixture(scope="module")
def expected(trained) -> list[Expected]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_of(trained))
    model = merged_by_transformers(trained)
    results = []
    for prompt in PROMPTS:
        rows = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        results.append(Expected(text, ids, logits_of(model, ids), greedy_of(model, ids)))
    return results


def greedy_of(model, ids: list[int], new: int = 32) -> list[int]:
    """The most probable continuation, beyond an end of the text too."""
    inputs = torch.tensor([ids])
    cache = None
    added: list[int] = []
    with torch.no_grad():
        while len(added) < new:
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            inputs = out.logits[:, -1:].argmax(-1)
            added.append(int(inputs))
    return added


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_smollm2_says_the_same_as_in_transformers(dtype, trained, expected, tmp_path):
    """20 prompts: the same tokens of the prompt, the same 32 of the answer, logits within the type's rounding."""
    export(base_of(trained), tmp_path / "base.gguf", dtype=dtype)
    export(str(trained), tmp_path / "a.gguf")
    export(str(trained), tmp_path / "m.gguf", merged=True, dtype=dtype)
    job = dict(ids=[prompt.ids for prompt in expected], texts=[prompt.text for prompt in expected], new=32)
    plain = run(tmp_path, tmp_path / "base.gguf", **job | {"new": 8})
    with_adapter = run(tmp_path, tmp_path / "base.gguf", tmp_path / "a.gguf", **job)
    merged = run(tmp_path, tmp_path / "m.gguf", **job)
    worst = 0.0
    changed = 0
    for i, prompt in enumerate(expected):
        for outcome in (with_adapter, merged):
            assert outcome[f"tokens{i}"].tolist() == prompt.ids, prompt.text
            assert outcome[f"greedy{i}"].tolist() == prompt.greedy, prompt.text
            worst = max(worst, error(outcome[f"logits{i}"], prompt.logits))
        changed += plain[f"greedy{i}"].tolist() != prompt.greedy[:8]
    print(dtype, "error", worst, "answers that the adapter changes", changed)
    assert worst < max(1e-5, 8 * 2.0 ** -BITS[dtype])
    assert changed >= 10


# The commands of the guide


def program(name: str, *arguments: str | Path) -> str:
    """What a program of llama.cpp prints."""
    command = [str(HOME / "programs" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def answer(prompt: str, *model: str | Path) -> str:
    """The greedy answer of a model in llama-cli, which applies the chat template itself."""
    printed = program("llama-cli", *model, "-p", prompt, "-n", "16", "--temp", "0", "--single-turn", "--threads", "1")
    return printed.partition(f"> {prompt}\n")[2].partition("\n[ Prompt:")[0].strip()


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_llama_cli_answers_as_the_trained_model(prompt, trained, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_of(trained))
    rows = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=True)["input_ids"]
    added = greedy_of(merged_by_transformers(trained), ids, 16)
    ends = [i for i, token in enumerate(added) if token == tokenizer.eos_token_id]
    expected = tokenizer.decode(added[: ends[0]] if ends else added).strip()
    export(base_of(trained), tmp_path / "base.gguf", dtype="f32")
    export(str(trained), tmp_path / "a.gguf")
    export(str(trained), tmp_path / "m.gguf", merged=True, dtype="f16")
    assert answer(prompt, "-m", tmp_path / "base.gguf", "--lora", tmp_path / "a.gguf") == expected
    assert answer(prompt, "-m", tmp_path / "m.gguf") == expected
    assert answer(prompt, "-m", tmp_path / "base.gguf") != expected


def test_a_k_quant_of_the_merged_model(trained, tmp_path):
    export(str(trained), tmp_path / "m.gguf", merged=True, dtype="f16")
    program("llama-quantize", tmp_path / "m.gguf", tmp_path / "q4.gguf", "Q4_K_M")
    assert (tmp_path / "q4.gguf").stat().st_size < (tmp_path / "m.gguf").stat().st_size / 2
    assert answer(PROMPTS[0], "-m", tmp_path / "q4.gguf")
