"""Regular expressions from configs: what `re` reads they read, and no expression takes the process with it."""

from __future__ import annotations

import json
import re
import time

import pytest
from safetensors.torch import load_file, save_file

from veneer import ConfigError, LoraConfig, PeftModel, get_peft_model
from veneer.files import regex as patterns
from veneer.files.regex import fits, pattern

from . import models
from .room import at_most

HANGS = "".join(f"(?P<{name}>.*)" for name in "abcdefghij") + "(?P=a)(?P=b)(?P=c)(?P=d)(?<=zz)"
"""Takes minutes over a path of forty characters."""
EXPRESSIONS = [
    "q_proj",
    r".*q_proj",
    r"model\.layers\.(0|1)\.self_attn\.(q|v)_proj",
    r".*\.layers\.[01]\..*(?:attn|mlp).*",
    r"(?!.*lm_head).*proj",
    r"^model\.layers\.\d{1,2}\.mlp\.[a-z]+_proj$",
    r"(?P<part>self_attn|mlp)\.\w+",
    r"layers\.0",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_means_what_it_means_to_re(expression: str):
    for path, _ in models.build("llama").named_modules():
        for text in (expression, rf"(.*\.)?({expression})"):
            assert fits(text, path, "target_modules") == (re.fullmatch(text, path) is not None), path


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_an_expression_that_hangs_is_refused_in_time(field: str, tmp_path, monkeypatch):
    """From the file of an adapter as from Python."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    pattern.cache_clear()
    settings = {
        "target_modules": dict(target_modules=HANGS),
        "exclude_modules": dict(target_modules="all-linear", exclude_modules=HANGS),
        "rank_pattern": dict(target_modules="all-linear", rank_pattern={HANGS: 3}),
        "layers_pattern": dict(target_modules="all-linear", layers_to_transform=[0], layers_pattern=[HANGS]),
    }[field]
    get_peft_model(models.build("llama"), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    weights, file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(weights), weights)  # without notes on the settings, which would be compared first
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    for use in (
        lambda: get_peft_model(models.build("llama"), LoraConfig(**settings)),
        lambda: PeftModel.from_pretrained(models.build("llama"), tmp_path),
    ):
        pattern.cache_clear()
        with at_most(10), pytest.raises(ConfigError, match="too long to match"):
            use()


@pytest.mark.parametrize(
    "expression", ["(?:(?:(?:a{1000}){1000}){1000}){1000}", "a" * 100_000, "(a{99999999999999999999})", "(" * 5000]
)
def test_an_expression_too_large_to_be_honest_is_refused(expression: str):
    with at_most(5), pytest.raises(ConfigError, match="target_modules"):
        LoraConfig(target_modules=expression)


def test_waiting_for_the_processor_is_not_time_spent(monkeypatch):
    """On a busy machine the library's limit, which is of time on the clock, may strike a match that has hardly run."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    honest = patterns.Pattern("a+b", "target_modules")
    real, waits = honest.compiled, iter([True, True, False])

    class Busy:
        def match(self, text: str, timeout: float):
            if next(waits):
                time.sleep(0.1)
                raise TimeoutError
            return real.match(text, timeout=timeout)

    honest.compiled = Busy()
    assert honest.match("aaab")[0] == "aaab" and honest.left > 0.04
