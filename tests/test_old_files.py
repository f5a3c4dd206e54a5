"""Adapters that PEFT 0.3 to 0.21 wrote load: the fields of each of its versions are understood.

`peft_fields.json` holds the fields of every config class, with default and the versions that have them, read off the
wheels of the package index.
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import CheckpointError, ConfigError, LoraConfig, PeftModel, get_peft_model
from veneer.core.config import Config, all_methods, default_of

from . import models
from .cases import ONE_EACH, Case
from .models import output, perturb
from .test_refusals import REQUIRED

FIELDS = json.loads((Path(__file__).parent / "peft_fields.json").read_text())
VERSIONS = FIELDS["versions"]
IN_FILE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "revision", "task_type"}
EXAMPLES = {
    "ADALORA": {"total_step": 9, "lora_alpha": 16, "lora_dropout": 0.1},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1]},
    "XLORA": {"adapters": {"0": "somewhere"}},
    **dict.fromkeys(("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "CARTRIDGE"), {"num_virtual_tokens": 2}),
    "CPT": {"num_virtual_tokens": 2, "cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "LORA": {"lora_alpha": 16, "lora_dropout": 0.1},
}


@cache
def fields_of(version: str) -> dict[str, dict]:
    """Of one version: each method's fields with their defaults."""
    now, found = VERSIONS.index(version), {}
    for method, rows in FIELDS["fields"].items():
        own = {f: v for f, v, first, last in rows if VERSIONS.index(first) <= now <= VERSIONS.index(last)}
        if own:
            found[method] = own
    return found


def written(version: str, method: str, **values) -> dict:
    """The config file that a version writes."""
    own = {name: value for name, value in fields_of(version)[method].items() if name != "runtime_config"}
    return own | {"peft_type": method, "inference_mode": True, "base_model_name_or_path": "base"} | values


EVERY = [(version, method) for version in VERSIONS for method in fields_of(version)]


@pytest.mark.parametrize(("version", "method"), EVERY, ids="-".join)
def test_the_config_of_every_version_is_read(version: str, method: str):
    kind = next((n for n, c in all_methods().items() if c.peft_type == method or method in c.aliases), "")
    needed = EXAMPLES.get(method, REQUIRED.get(kind, {}))
    content = written(version, method, **needed)
    if method == "OFT" and "oft_block_size" not in content:
        with pytest.raises(ConfigError):  # another method then; PEFT itself refuses its files since
            Config.from_dict(content)
        return
    config = Config.from_dict(content)
    assert config.peft_type == method or method in type(config).aliases


def covers(case: Case, version: str) -> bool:
    """The version has the case's method and all that its settings come to."""
    own = fields_of(version).get(str(case.config_class.peft_type), {})
    config = case.config()
    is_own = case.method == config.peft_type.lower()  # not a variant by a config class that PEFT lacks
    return (
        is_own and bool(own) and all(f.name in own for f in fields(config) if getattr(config, f.name) != default_of(f))
    )


OLD = [(c, v) for c in ONE_EACH if not c.siblings for v in ("0.3.0", "0.6.0", "0.10.0", "0.15.0") if covers(c, v)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "version"), OLD, ids=str)
def test_an_adapter_with_an_old_config_gives_the_same_outputs(case: Case, version: str, tmp_path):
    """The tensors' names are what they were; of the config only the version's own fields are left."""
    model, batch = case.build(), case.inputs()
    model.save_pretrained(tmp_path)
    weights, file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(weights), weights)
    content, own = json.loads(file.read_text()), fields_of(version)[str(case.config_class.peft_type)]
    old = {name: content.get(name, value) for name, value in own.items() if name != "runtime_config"}
    file.write_text(json.dumps(old | {name: content[name] for name in IN_FILE if name in content}))
    assert torch.equal(output(case.load(tmp_path), batch), output(model, batch))


# Files for modules that have other names now


def renamed_adapter(tmp_path):
    """A saved adapter whose keys call the attention's `q_proj` by another name; the model that it was saved from."""
    model = perturb(get_peft_model(models.build("llama"), LoraConfig(r=3, target_modules=["q_proj"]))).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key.replace(".q_proj.", ".query."): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    return model


def test_keys_are_mapped_to_other_names(tmp_path):
    model = renamed_adapter(tmp_path)
    batch = models.inputs("llama")
    expected = models.output(model, batch)
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(models.build("llama"), tmp_path)
    mapping = {r"\.query\.": ".q_proj."}
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path, key_mapping=mapping)
    assert torch.equal(models.output(loaded, batch), expected)
    loaded.load_adapter(tmp_path, "second", key_mapping=mapping)
    loaded.set_adapter("second")
    assert torch.equal(models.output(loaded, batch), expected)
    with pytest.raises(CheckpointError, match="into the same key"):
        PeftModel.from_pretrained(models.build("llama"), tmp_path, key_mapping={r"layers\.\d+\.": "layers.0."})


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    """As editors on Windows write it."""
    model = perturb(get_peft_model(models.build("llama"), LoraConfig(r=3, target_modules=["q_proj"]))).eval()
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(models.output(loaded, models.inputs("llama")), models.output(model, models.inputs("llama")))
