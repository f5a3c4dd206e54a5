"""Cards and uploads, against a hub that is a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from veneer import LoraConfig, get_peft_model
from veneer.model.card import write_card

from . import models


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
    assert "AutoModelForSequenceClassification" in card.text
