"""Cards and uploads, against a hub that is a folder; what the files say of the base model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from veneer import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, pull
from veneer.files.pull import MARKER, MODELS
from veneer.merging.merge import base_of
from veneer.model.card import write_card

from . import models
from .forked import forked
from .test_train import ROWS, base, run  # noqa: F401 (fixtures)

PULLED = "smollm2-135m-instruct"


@pytest.fixture
def uploads(monkeypatch, tmp_path) -> Path:
    """Where a repository's files land."""

    def upload(*, repo_id, folder_path, **settings):
        shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **settings: repo_id)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return tmp_path


def test_an_adapter_is_uploaded_with_a_card(uploads):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="some/base")
    get_peft_model(models.build("llama"), config).push_to_hub("me/adapter", private=True)
    there = uploads / "me" / "adapter"
    assert {file.name for file in there.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    data = ModelCard.load(there / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("some/base", "peft", "text-generation")


def test_a_card_does_not_tell_where_the_base_lies(tmp_path):
    write_card(tmp_path, LoraConfig(base_model_name_or_path=str(tmp_path), task_type="SEQ_CLS"))
    card = ModelCard.load(tmp_path / "README.md")
    assert str(tmp_path) not in card.content and card.data.base_model is None
    assert "AutoPeftModelForSequenceClassification" in card.text


DATA = {
    "chat": [{**row, "question": f'{row["question"]} ü "', "answer": row["answer"]} for row in ROWS],
    "text": [{"text": f"{row['question']} {row['answer']}"} for row in ROWS],
    "classes": [{"text": row["question"], "label": ["odd", 'even "'][i % 2]} for i, row in enumerate(ROWS)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", DATA)
def test_the_code_of_a_card_runs_when_pasted(shape: str, base, tmp_path, monkeypatch):  # noqa: F811
    """In the directory that holds the adapter's; nowhere do the card and config say where this machine has what."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in DATA[shape]))
    run(base, str(rows), tmp_path / 'my "adapter"', max_steps=1, samples=1)
    text = (tmp_path / 'my "adapter"' / "README.md").read_text()
    assert str(tmp_path) not in text and base not in text
    code = re.findall("```python\n(.*?)```", text, re.DOTALL)[0]
    assert "AutoTokenizer" in code and "print" in code
    monkeypatch.chdir(tmp_path)
    done = forked(lambda: exec(code, {}))
    assert done.returncode == 0, done.stderr
    if shape == "classes":
        assert done.stdout.strip() in ("odd", 'even "')


@pytest.fixture
def pulled(base, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """The cache of pulled models, with the tests' base in the place of a real one."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / PULLED
    shutil.copytree(base, home)
    sizes = {file.name: file.stat().st_size for file in home.iterdir()}
    (home / MARKER).write_text(json.dumps({"gguf_sha256": MODELS[PULLED].gguf_sha256, "files": sizes}))
    assert pull(PULLED) == home
    return home


def named(directory: Path) -> str | None:
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]


def adapter_on(where: Path, out: Path, tokens: int = 0) -> None:
    model = AutoModelForCausalLM.from_pretrained(where)
    if tokens:
        model.resize_token_embeddings(model.config.vocab_size + tokens)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    models.perturb(get_peft_model(model, config)).save_pretrained(out)


def test_a_pulled_base_is_saved_by_its_name(pulled, tmp_path):
    adapter_on(pulled, tmp_path / "out")
    assert named(tmp_path / "out") == PULLED
    assert str(tmp_path).encode() not in (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    assert named(tmp_path / "again") == PULLED
    write_card(tmp_path / "out", LoraConfig.from_pretrained(tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "# out: lora on smollm2-135m-instruct" in card.text and "rounded to 4 bits" in card.text
    old, new = (LoraConfig(base_model_name_or_path=name) for name in (str(pulled), PULLED))
    assert base_of([old, new], None) == PULLED


def test_new_tokens_on_a_pulled_base_are_saved(pulled, tmp_path):
    """By its name as by its path, the base says how many tokens it had."""
    adapter_on(pulled, tmp_path / "out", tokens=3)
    base = AutoModelForCausalLM.from_pretrained(pulled)  # noqa: F811
    base.resize_token_embeddings(base.config.vocab_size + 3)
    base.config.name_or_path = PULLED
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    for directory in ("out", "again"):
        assert b"embed_tokens" in (tmp_path / directory / "adapter_model.safetensors").read_bytes()


def test_a_base_in_the_hubs_cache_is_saved_by_its_id(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--some--base" / "snapshots" / ("0" * 40)
    shutil.copytree(base, snapshot)
    adapter_on(snapshot, tmp_path / "out")
    assert named(tmp_path / "out") == "some/base"


def test_a_base_in_a_directory_is_found_again_and_not_uploaded(base, uploads):  # noqa: F811
    adapter_on(Path(base), uploads / "out")
    assert named(uploads / "out") == base
    loaded = AutoPeftModelForCausalLM.from_pretrained(uploads / "out")
    loaded.push_to_hub("me/adapter")
    there = uploads / "me" / "adapter"
    assert named(there) is None
    for file in there.iterdir():
        assert base.encode() not in file.read_bytes(), file
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), there)
    assert again.peft_config["default"].r == 2
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in (there / "README.md").read_text()


def test_a_relative_path_stays_as_it_was_given(base, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(base, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    adapter_on(Path("models/mine"), tmp_path / "out")
    assert named(tmp_path / "out") == "models/mine"
