"""Diagnose whether another program can run an adapter: what it refuses, what it computes wrongly, and how to fix it.

Based on the sources of vLLM 0.22 (`vllm/lora`), llama.cpp of 2026 (`src/llama-adapter.cpp`) and PEFT 0.21.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..core import embeddings
from ..core.config import Config, LayerConfig, at, default_of
from ..dropin.tables.methods import METHODS as PEFT_METHODS
from ..errors import ConfigError, nearest
from ..files.find import find_weights
from ..files.read import PREFIX, tensor_shapes
from ..methods.lora import LoRA, LoraConfig
from ..model.catalogue import page_of

Shapes = dict[str, tuple[int, ...]]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Possible values of vLLM's `--max-lora-rank`."""
VLLM_DEFAULT = 16
"""The default of `--max-lora-rank`."""
PAIRS = (".lora_A.weight", ".lora_B.weight")
"""Endings of the keys of a linear layer's LoRA."""
EMBEDDINGS = (".lora_embedding_A", ".lora_embedding_B")
"""Endings of the keys of an embedding's LoRA."""

OF_SHARED_EXPERTS = re.compile(r"\.shared_experts?\.(gate_proj|up_proj|down_proj)\.lora_")
"""Keys of a LoRA on the experts that see every token."""


@dataclass(frozen=True)
class Finding:
    """A reason why a program cannot run an adapter as it is."""

    what: str
    fix: str
    blocks: bool = True
    """The program cannot run the adapter. If False, it can once `fix` is applied on its side."""


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
        target: "vllm", "llama.cpp" or "peft".

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


def _merged(adapter: str) -> str:
    return f"veneer merge {adapter} --out merged, and serve that model"


def _as_lora(adapter: str) -> str:
    return f"veneer combine {adapter} --weights 1 --rank 64 --out as-lora writes the nearest LoRA of a rank"


def _plain(adapter: str) -> str:
    return f"veneer combine {adapter} --weights 1 --out plain puts the scalings into the matrices, at one rank"


def _nothing(config: Config) -> str:
    return f"nothing: {config.peft_type} has no form as weights; run it with veneer or transformers"


def _way_out(adapter: str, config: Config) -> str:
    """The fix for an adapter that is not a plain LoRA."""
    page = page_of(config)
    if not page.mergeable:
        return _nothing(config)
    if "linear" not in page.kinds:
        return _merged(adapter)
    return f"{_as_lora(adapter)}; or {_merged(adapter)}"


def _only_lora(program: str, adapter: str, config: Config) -> Iterator[Finding]:
    """Findings for any program that knows only plain LoRA."""
    if not isinstance(config, LoraConfig):
        yield Finding(f"{program} runs LoRA, not {config.peft_type}", _way_out(adapter, config))
        return
    variants = ", ".join(config.variants())
    adapter_class = type(config).adapter
    if variants:
        yield Finding(f"{program} knows no LoRA with {variants}", _way_out(adapter, config))
    elif adapter_class is not LoRA:
        yield Finding(f"{program} knows no {adapter_class.__name__}", _way_out(adapter, config))
    yield from _only_pairs(program, config, _merged(adapter))
    start = str(config.init_lora_weights)
    if re.match("pissa|olora|loftq", start):
        what = f"it starts from the base's weights ({start}), which {program} would not subtract: wrong in silence"
        yield Finding(what, f"veneer combine {adapter} --weights 1 --out plain; or {_merged(adapter)}")


def _only_pairs(program: str, config: LoraConfig, merged: str) -> Iterator[Finding]:
    """Findings about trained parts other than the pairs A and B; `merged` is the fix that merges them."""
    if config.modules_to_save:
        saved = ", ".join(config.modules_to_save)
        yield Finding(f"{program} takes no trained copies of modules (modules_to_save: {saved})", merged)
    if config.bias != "none":
        yield Finding(f"{program} takes no trained biases (bias={config.bias!r})", merged)
    if config.trainable_token_indices:
        yield Finding(f"{program} takes no trained tokens (trainable_token_indices)", merged)
    if config.target_parameters:
        yield Finding(f"{program} takes no updates of bare parameters (target_parameters)", merged)
    if config.layer_replication:
        yield Finding(f"{program} does not replicate layers", "merge_and_unload() and save_pretrained() in Python")


def _ranks(shapes: Shapes) -> dict[str, int]:
    """The rank of each adapted module, by path."""
    ranks = {}
    for key, shape in shapes.items():
        for ending in (PAIRS[0], EMBEDDINGS[0]):
            if key.endswith(ending):
                path = key.removeprefix(PREFIX).removesuffix(ending)
                ranks[path] = shape[0]
    return ranks


def _wrongly_scaled(config: LoraConfig, shapes: Shapes, theirs: Callable[[int], float]) -> list[str]:
    """Paths of the modules whose update a program scales in another way than PEFT.

    Args:
        theirs: the program's scaling for a rank.
    """
    paths = []
    for path, rank in _ranks(shapes).items():
        if not rank:
            continue
        alpha = at(path, config.alpha_pattern, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(scaling, theirs(rank), rel_tol=1e-6):
            paths.append(path)
    return paths


def _other_keys(shapes: Shapes, *endings: str) -> list[str]:
    """Keys of the file that have none of these endings."""
    return [key for key in shapes if not key.endswith(endings)]


def _vllm(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    yield from _only_lora("vLLM", adapter, config)
    if not isinstance(config, LoraConfig) or config.variants():
        return
    others = _other_keys(shapes, *PAIRS, *EMBEDDINGS)
    if others and not config.modules_to_save:
        what = f"vLLM refuses the file's {len(others)} other tensors, {others[0]} first"
        yield Finding(what, _merged(adapter))
    root = math.sqrt(config.r) if config.use_rslora else config.r
    wrong = _wrongly_scaled(config, shapes, lambda rank: config.lora_alpha / root)
    if wrong:
        what = (
            f"vLLM has one scaling, of r and lora_alpha; {len(wrong)} modules have another, {wrong[0]} first: wrong in "
            "silence"
        )
        yield Finding(what, _plain(adapter))
    yield from _vllm_rank(adapter, config, shapes)
    if not config.base_model_name_or_path:
        yield Finding("the config names no base model", "give vLLM the base that it was trained on", False)


def _vllm_rank(adapter: str, config: LoraConfig, shapes: Shapes) -> Iterator[Finding]:
    highest = max(_ranks(shapes).values(), default=config.r)
    needed = max(highest, config.r)
    fitting = next((rank for rank in VLLM_RANKS if rank >= needed), None)
    if fitting is None:
        most = VLLM_RANKS[-1]
        fix = f"veneer combine {adapter} --weights 1 --rank {most} --out lower"
        yield Finding(f"vLLM takes ranks up to {most}; this has {highest}", f"{fix}; or {_merged(adapter)}")
    elif fitting > VLLM_DEFAULT:
        yield Finding(
            f"rank {highest} is above vLLM's usual limit of 16", f"vllm serve --max-lora-rank {fitting}", False
        )


def _llama_cpp(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    export = f"veneer export {adapter} --to gguf --out"
    merged = f"{export} model.gguf --merged, and run that model"
    page = page_of(config)
    if not page.mergeable:
        yield Finding(f"llama.cpp runs LoRA, not {config.peft_type}", _nothing(config))
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
    yield from _only_pairs("llama.cpp", config, merged)
    yield from _only_linear(shapes, merged, bool(variants or config.modules_to_save))
    yield Finding(
        "llama.cpp reads GGUF", f"{export} adapter.gguf, then llama-cli -m BASE.gguf --lora adapter.gguf", False
    )


def _only_linear(shapes: Shapes, merged: str, is_known: bool) -> Iterator[Finding]:
    """Findings about tensors that are not those of linear layers; `is_known` if another finding is about them."""
    others = _other_keys(shapes, *PAIRS)
    if others and not is_known:
        yield Finding(
            f"llama.cpp takes adapters of linear layers only, but the file has {len(others)} other tensors, "
            f"{others[0]} first",
            merged,
        )
    heads = [path for path in _ranks(shapes) if path.rpartition(".")[2] == "lm_head"]
    if heads:
        yield Finding(f"{heads[0]} has no place in llama.cpp if the base ties it to the embedding", merged, False)


def _peft(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    if str(config.peft_type) not in PEFT_METHODS:
        yield Finding(f"PEFT has no {config.peft_type}", _way_out(adapter, config))
        return
    unknown = _unknown_to_peft(config)
    if unknown:
        what = f"PEFT has no {', '.join(unknown)}, which it would ignore: wrong in silence"
        yield Finding(what, _way_out(adapter, config))
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
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "peft": _peft,
}
