"""Diagnose whether another program can run an adapter: what it refuses, what it computes wrongly, and how to fix it.

Based on the sources of llama.cpp of 2026 (`src/llama-adapter.cpp`) and PEFT 0.21.2; `servers.py` has vLLM and SGLang.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..core import embeddings
from ..core.config import Config, LayerConfig, default_of
from ..dropin.tables.methods import METHODS as PEFT_METHODS
from ..errors import ConfigError, nearest
from ..files.find import find_weights
from ..files.read import tensor_shapes
from ..methods.lora import LoRA, LoraConfig
from ..model.catalogue import page_of
from . import servers
from .findings import PAIRS, Finding, Shapes, nothing, only_pairs, other_keys, ranks_of, way_out

OF_SHARED_EXPERTS = re.compile(r"\.shared_experts?\.(gate_proj|up_proj|down_proj)\.lora_")
"""Keys of a LoRA on the experts that see every token."""


@dataclass(frozen=True)
class Diagnosis:
    """Whether a program can run an adapter."""

    adapter: str
    target: str
    method: str
    findings: tuple[Finding, ...]

    @property
    def runs(self) -> bool:
        return not any(finding.blocks for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        content = dict(vars(self))
        content["findings"] = [vars(finding) for finding in self.findings]
        content["runs"] = self.runs
        return content


def diagnose(adapter: str | Path, target: str) -> Diagnosis:
    """Diagnose whether a program can run an adapter.

    Args:
        adapter: a directory.
        target: "vllm", "sglang", "llama.cpp" or "peft".

    Raises:
        ConfigError: `target` is unknown.
    """
    if target not in TARGETS:
        known = ", ".join(TARGETS)
        raise ConfigError(f"--for {target!r} is not known; use one of {known}{nearest(target, TARGETS)}")
    config = Config.from_pretrained(adapter)
    shapes = tensor_shapes(find_weights(adapter))
    findings = TARGETS[target](str(adapter), config, shapes)
    return Diagnosis(str(adapter), target, str(config.peft_type), tuple(findings))


def _llama_cpp(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    export = f"veneer export {adapter} --to gguf --out"
    merged = f"{export} model.gguf --merged, and run that model"
    page = page_of(config)
    if not page.mergeable:
        yield Finding(f"llama.cpp runs LoRA, not {config.peft_type}", nothing(config))
        return
    nearest_lora = f"{export} adapter.gguf writes the nearest LoRA and says what it lacks; or {merged}"
    fix = nearest_lora if "linear" in page.kinds else merged
    if not isinstance(config, LoraConfig):
        yield Finding(f"llama.cpp runs LoRA, not {config.peft_type}", fix)
        return
    variants = [name for name in config.variants() if name != "alora_invocation_tokens"]
    adapter_class = type(config).adapter
    if variants:
        yield Finding(f"llama.cpp knows no LoRA with {', '.join(variants)}", fix)
    elif not config.variants() and adapter_class is not LoRA:
        yield Finding(f"llama.cpp knows no {adapter_class.__name__}", fix)
    yield from only_pairs("llama.cpp", config, merged)
    if config.modules_to_save:
        saved = ", ".join(config.modules_to_save)
        yield Finding(f"llama.cpp takes no trained copies of modules (modules_to_save: {saved})", merged)
    if config.target_parameters:
        yield Finding("llama.cpp takes no updates of bare parameters (target_parameters)", merged)
    yield from _only_linear(shapes, merged, bool(variants or config.modules_to_save))
    yield Finding(
        "llama.cpp reads GGUF", f"{export} adapter.gguf, then llama-cli -m BASE.gguf --lora adapter.gguf", False
    )


def _only_linear(shapes: Shapes, merged: str, is_known: bool) -> Iterator[Finding]:
    """Findings about tensors that are not those of linear layers; `is_known` if another finding is about them."""
    others = other_keys(shapes, *PAIRS)
    if others and not is_known:
        yield Finding(
            f"llama.cpp takes adapters of linear layers only, but the file has {len(others)} other tensors, "
            f"{others[0]} first",
            merged,
        )
    heads = [path for path in ranks_of(shapes) if path.rpartition(".")[2] == "lm_head"]
    if heads:
        yield Finding(f"{heads[0]} has no place in llama.cpp if the base ties it to the embedding", merged, False)


def _peft(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    if str(config.peft_type) not in PEFT_METHODS:
        yield Finding(f"PEFT has no {config.peft_type}", way_out(adapter, config))
        return
    unknown = _unknown_to_peft(config)
    if unknown:
        what = f"PEFT has no {', '.join(unknown)}, which it would ignore: wrong in silence"
        yield Finding(what, way_out(adapter, config))
    shared = [key for key in shapes if OF_SHARED_EXPERTS.search(key)]
    if shared:
        yield Finding(
            f"PEFT takes gate_proj, up_proj and down_proj of a mixture of experts for the fused parameters of all "
            f"experts; it loads none of the {len(shared)} tensors of shared experts, {shared[0]} first, with a warning",
            "train with exclude_modules for the shared experts; run this one with veneer, under PEFT's name too",
        )
    has_embeddings = isinstance(config, LayerConfig) and any(embeddings.is_one(key) for key in shapes)
    if has_embeddings:
        yield Finding(
            "the file holds base embeddings; PEFT loads them only into a model of the same vocabulary size",
            "call model.resize_token_embeddings() before loading, if the vocabulary has grown",
            False,
        )


def _unknown_to_peft(config: Config) -> list[str]:
    """Fields that are set and that PEFT's config lacks; empty if PEFT is not installed."""
    from importlib.util import find_spec

    if find_spec("peft") is None:
        return []
    import inspect

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as THEIRS

    known = inspect.signature(THEIRS[str(config.peft_type)]).parameters  # type: ignore[index]
    defaults = {f.name: default_of(f) for f in fields(config)}
    unknown = []
    for name, value in config.to_dict().items():
        if name == "peft_type" or name in known or value in (None, False, "", [], {}):
            continue
        if value != defaults[name]:
            unknown.append(name)
    return unknown


TARGETS: dict[str, Callable[[str, Config, Shapes], Iterator[Finding]]] = {
    "vllm": servers.vllm,
    "sglang": servers.sglang,
    "llama.cpp": _llama_cpp,
    "peft": _peft,
}
