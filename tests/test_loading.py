"""Bases and adapters on them are loaded in one place, which says what is wrong with them."""

from __future__ import annotations

import json

import pytest
import torch

from veneer import AutoPeftModelForSequenceClassification, LoraConfig, PromptTuningConfig, get_peft_model
from veneer.core.config import TaskType
from veneer.errors import BaseMismatch, ConfigError, VeneerError
from veneer.model.loading import BASE, load, load_base, named

from . import models
from .chat_templates import TEMPLATES
from .models import perturb
from .test_train_chat import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Two tiny Llamas on disk, the same but for their weights."""
    root = tmp_path_factory.mktemp("bases")
    words = tokenizer(TEMPLATES[0])
    words.pad_token = "<|im_end|>"
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=words.eos_token_id)
        model = models.llama(vocab_size=len(words), max_position_embeddings=256, **ids)
        with torch.no_grad():  # large enough for adapters to show in the output
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.25))
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    return root


def adapter(bases, where, config=None, base="one", seed=0, classes=None):
    """An adapter off its start, saved."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if classes:
        config = LoraConfig(r=2, task_type="SEQ_CLS")
        model = AutoModelForSequenceClassification.from_pretrained(bases / base, num_labels=classes)
    else:
        model = AutoModelForCausalLM.from_pretrained(bases / base)
    config = config or LoraConfig(r=2, task_type="CAUSAL_LM")
    perturb(get_peft_model(model, config), seed=seed, scale=0.3).save_pretrained(where)
    return str(where)


def test_adapters_run_one_at_a_time_on_one_base(bases, tmp_path):
    places = [adapter(bases, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    loaded = load([*places, f"p={adapter(bases, tmp_path / 'long' / 'name', prompt)}"])
    assert loaded.names == (BASE, "a", "b", "p") and loaded.base == str(bases / "one")
    ids = torch.tensor([[5, 6, 7, 8]])
    found = {}
    for name in loaded.names:
        with loaded.running(name), torch.no_grad():
            found[name] = loaded.model(input_ids=ids).logits[:, -4:]
    bare = load(model=str(bases / "one"))
    assert bare.names == (BASE,)
    with bare.running(BASE), torch.no_grad():
        assert torch.equal(bare.model(input_ids=ids).logits, found[BASE])
    for name, place in zip("ab", places, strict=True):
        alone = load([place])
        with alone.running(name), torch.no_grad():
            assert torch.equal(alone.model(input_ids=ids).logits, found[name])
    assert not any(torch.allclose(found[a], found[b]) for a in found for b in found if a < b)
    with (
        pytest.raises(ConfigError, match="there is no model or adapter called 'c'; there are base, a, b, p"),
        loaded.running("c"),
    ):
        pass


def test_names_of_adapters():
    assert named(["x/one", "two/", "three=x/one"]) == {"one": "x/one", "two": "two/", "three": "x/one"}
    for places in (["x/one", "y/one"], ["x/base"], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="choose another name with NAME="):
            named(places)


def test_what_cannot_be_loaded_is_said(bases, tmp_path):
    one = adapter(bases, tmp_path / "a")
    two = adapter(bases, tmp_path / "b", base="two")
    with pytest.raises(ConfigError, match="loaded together if they have the same base model: a on .*b on "):
        load([one, two])
    with pytest.raises(BaseMismatch):
        load([one, two], model=str(bases / "one"))
    with pytest.raises(ConfigError, match="no base model is given"):
        load()
    with pytest.raises(ConfigError, match="the model '/no/where' is not there"):
        load([one], model="/no/where")
    with pytest.raises(ConfigError, match="dtype 'float31' must be auto, float32 or bfloat16; nearest: float32"):
        load([one], dtype="float31")
    nameless = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(nameless))
    with pytest.raises(ConfigError, match="no base model is given, and 'a' names none"):
        load([one])
    classifier = adapter(bases, tmp_path / "c", classes=3)
    with pytest.raises(ConfigError, match="if they have the same task"):
        load([one, classifier], model=str(bases / "one"))
    with pytest.raises(ConfigError, match="the same number of classes: c has 3, d has 4"):
        load([classifier, adapter(bases, tmp_path / "d", classes=4)])


def test_a_classifier_has_as_many_classes_as_its_file(bases, tmp_path):
    """transformers would make it two."""
    place = adapter(bases, tmp_path / "c", classes=5)
    assert load_base(place).num_labels == 5
    assert AutoPeftModelForSequenceClassification.from_pretrained(place).num_labels == 5
    loaded = load([place])
    assert loaded.task is TaskType.SEQ_CLS and loaded.model.num_labels == 5
    assert loaded.labels is None and not loaded.base_is_whole
    assert loaded.model.config.pad_token_id is not None
    assert load([place], labels=list("abcde")).labels == list("abcde")
    with pytest.raises(ConfigError, match="2 class names are given .a, b., but the model has 5"):
        load([place], labels=["a", "b"])
    (tmp_path / "c" / "recipe.yaml").write_text("labels: [v, w, x, y, z]\n")
    assert load([place]).labels == list("vwxyz")
    other = adapter(bases, tmp_path / "d", classes=5)
    (tmp_path / "d" / "recipe.yaml").write_text("labels: [w, v, x, y, z]\n")
    with pytest.raises(ConfigError, match="or in another order: c v, w, x, y, z; d w, v, x, y, z"):
        load([place, other])


def test_an_encoder_decoder_is_refused(tmp_path, bases):
    models.t5().save_pretrained(tmp_path)
    tokenizer(TEMPLATES[0]).save_pretrained(tmp_path)
    with pytest.raises(VeneerError, match="is a t5, for which transformers has no AutoModelForCausalLM"):
        load(model=str(tmp_path))
