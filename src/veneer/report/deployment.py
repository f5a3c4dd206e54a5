"""Can another program run an adapter as it is? What it would refuse, what it would run wrongly, and the way out.

What the programs do was read in their sources: vLLM 0.22 (`vllm/lora`), llama.cpp's `convert_lora_to_gguf.py` of 2026,
PEFT 0.21.2.
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
from ..errors import ConfigError, nearest
from ..files.find import find_weights
from ..files.read import tensor_shapes
from ..methods.lora import LoRA, LoraConfig
from ..model.catalogue import pages

Shapes = dict[str, tuple[int, ...]]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be; 16 unless it is given."""
VLLM_DEFAULT = 16
PEFT_TYPES = """
PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT ADAPTION_PROMPT IA3 BEFT LILY
LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA XLORA HRA VBLORA UNILORA CPT MISS RANDLORA ROAD
TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF DELORA GRALORA CARTRIDGE TINYLORA PSOFT PEANUT SHADOW SUPERTUNING DEFT
"""
PAIRS = (".lora_A.weight", ".lora_B.weight")
EMBEDDINGS = (".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True)
class Finding:
    """Something that stands between an adapter and a program."""

    what: str
    fix: str
    blocks: bool = True
    """False: it runs, with what `fix` says."""


@dataclass(frozen=True)
class Diagnosis:
    adapter: str
    target: str
    method: str
    findings: tuple[Finding, ...]

    @property
    def runs(self) -> bool:
        return not any(finding.blocks for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "runs": self.runs, "findings": [vars(finding) for finding in self.findings]}


def diagnose(adapter: str | Path, target: str) -> Diagnosis:
    """What keeps a program from running an adapter.

    Args:
        adapter: a directory.
        target: "vllm", "llama.cpp" or "peft".

    Raises:
        ConfigError: the program is not known.
    """
    if target not in TARGETS:
        raise ConfigError(f"--for {target!r} is not known; use one of {', '.join(TARGETS)}{nearest(target, TARGETS)}")
    config, shapes = Config.from_pretrained(adapter), tensor_shapes(find_weights(adapter))
    findings = TARGETS[target](str(adapter), config, shapes)
    return Diagnosis(str(adapter), target, str(config.peft_type), tuple(findings))


# Ways out


def _merged(adapter: str) -> str:
    return f"veneer merge {adapter} --out merged, and serve that model"


def _as_lora(adapter: str) -> str:
    return f"veneer combine {adapter} --weights 1 --rank 64 --out as-lora writes the nearest LoRA of a rank"


def _plain(adapter: str) -> str:
    return f"veneer combine {adapter} --weights 1 --out plain puts the scalings into the matrices, at one rank"


def _way_out(adapter: str, config: Config) -> str:
    """For an adapter that is no plain LoRA."""
    name = next(name for name, page in pages().items() if page.config == type(config).__name__)
    if not pages()[name].mergeable:
        return f"nothing: {config.peft_type} has no form as weights; run it with veneer or transformers"
    kinds = set(pages()[name].kinds)
    return f"{_as_lora(adapter)}; or {_merged(adapter)}" if "linear" in kinds else _merged(adapter)


# Programs


def _only_lora(program: str, adapter: str, config: Config) -> Iterator[Finding]:
    """What two programs that know plain LoRA alone have in common."""
    if not isinstance(config, LoraConfig):
        yield Finding(f"{program} runs LoRA, not {config.peft_type}", _way_out(adapter, config))
        return
    variants = config.variants()
    if variants:
        yield Finding(f"{program} knows no LoRA with {', '.join(variants)}", _way_out(adapter, config))
    elif type(config).adapter is not LoRA:
        yield Finding(f"{program} knows no {type(config).adapter.__name__}", _way_out(adapter, config))
    if config.modules_to_save:
        kept = ", ".join(config.modules_to_save)
        yield Finding(f"{program} takes no trained copies of modules (modules_to_save: {kept})", _merged(adapter))
    if config.bias != "none":
        yield Finding(f"{program} takes no trained biases (bias={config.bias!r})", _merged(adapter))
    if config.trainable_token_indices:
        yield Finding(f"{program} takes no trained tokens (trainable_token_indices)", _merged(adapter))
    if config.target_parameters:
        yield Finding(f"{program} takes no updates of bare parameters (target_parameters)", _merged(adapter))
    if config.layer_replication:
        yield Finding(f"{program} does not replicate layers", "merge_and_unload() and save_pretrained() in Python")
    start = str(config.init_lora_weights)
    if re.match("pissa|olora|loftq", start):
        yield Finding(
            f"it starts from the base's weights ({start}), which {program} would not take off: wrong in silence",
            f"veneer combine {adapter} --weights 1 --out plain; or {_merged(adapter)}",
        )


def _places(shapes: Shapes) -> dict[str, int]:
    """The rank of each adapted module, by path."""
    found = {}
    for key, shape in shapes.items():
        for end in (PAIRS[0], EMBEDDINGS[0]):
            if key.endswith(end):
                found[key.removeprefix("base_model.model.").removesuffix(end)] = shape[0]
    return found


def _scalings(config: LoraConfig, shapes: Shapes) -> dict[str, float]:
    """What PEFT multiplies each module's update by."""
    ranks = _places(shapes)
    alphas = {path: at(path, config.alpha_pattern, config.lora_alpha) for path in ranks}
    return {p: alphas[p] / (math.sqrt(r) if config.use_rslora else r) for p, r in ranks.items() if r}


def _wrongly_scaled(config: LoraConfig, shapes: Shapes, theirs: Callable[[int], float]) -> list[str]:
    """Modules that a program would scale otherwise, from the config's alpha and a module's rank."""
    ranks = _places(shapes)
    found = _scalings(config, shapes)
    return [path for path, scale in found.items() if not math.isclose(scale, theirs(ranks[path]), rel_tol=1e-6)]


def _strange(shapes: Shapes, *known: str) -> list[str]:
    return [key for key in shapes if not key.endswith(known)]


def _vllm(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    yield from _only_lora("vLLM", adapter, config)
    if not isinstance(config, LoraConfig) or config.variants():
        return
    strange = _strange(shapes, *PAIRS, *EMBEDDINGS)
    if strange and not config.modules_to_save:
        yield Finding(f"vLLM refuses the file's {len(strange)} other tensors, {strange[0]} first", _merged(adapter))
    root = math.sqrt(config.r) if config.use_rslora else config.r
    wrong = _wrongly_scaled(config, shapes, lambda rank: config.lora_alpha / root)
    if wrong:
        yield Finding(
            f"vLLM has one scaling, of r and lora_alpha; {len(wrong)} modules have another, {wrong[0]} first: wrong in "
            "silence",
            _plain(adapter),
        )
    highest = max(_places(shapes).values(), default=config.r)
    fitting = next((rank for rank in VLLM_RANKS if rank >= max(highest, config.r)), None)
    if fitting is None:
        fix = f"veneer combine {adapter} --weights 1 --rank {VLLM_RANKS[-1]} --out lower"
        yield Finding(f"vLLM takes ranks up to {VLLM_RANKS[-1]}; this has {highest}", f"{fix}; or {_merged(adapter)}")
    elif fitting > VLLM_DEFAULT:
        yield Finding(
            f"rank {highest} is above vLLM's usual limit of 16", f"vllm serve --max-lora-rank {fitting}", False
        )
    if not config.base_model_name_or_path:
        yield Finding("the config names no base model", "give vLLM the base that it was trained on", False)


def _llama_cpp(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    yield from (f for f in _only_lora("llama.cpp", adapter, config) if "alora" not in f.what)
    if not isinstance(config, LoraConfig) or config.variants() not in ([], ["alora_invocation_tokens"]):
        return
    strange = [k for k in _strange(shapes, *PAIRS, *EMBEDDINGS, ".base_layer.weight") if "norm" not in k]
    if strange and not config.modules_to_save:
        what = f"convert_lora_to_gguf.py stops at the file's {len(strange)} other tensors, {strange[0]} first"
        yield Finding(what, _merged(adapter))
    wrong = _wrongly_scaled(config, shapes, lambda rank: config.lora_alpha / rank)
    if wrong:
        yield Finding(
            "llama.cpp scales by lora_alpha / rank; rsLoRA and alpha_pattern are not read, so that "
            f"{len(wrong)} modules would be wrong in silence, {wrong[0]} first",
            _plain(adapter),
        )
    heads = [path for path in _places(shapes) if path.rpartition(".")[2] == "lm_head"]
    if heads:
        yield Finding(f"{heads[0]} is refused where the base ties it to the embedding", _merged(adapter), False)
    yield Finding(
        "llama.cpp reads GGUF",
        f"python convert_lora_to_gguf.py --base DIR-OF-THE-BASE {adapter} (in llama.cpp's sources)",
        False,
    )


def _peft(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    if str(config.peft_type) not in PEFT_TYPES.split():
        yield Finding(f"PEFT has no {config.peft_type}", _way_out(adapter, config))
        return
    unknown = _unknown_to_peft(config)
    if unknown:
        what = f"PEFT has no {', '.join(unknown)}, which it would pass over: wrong in silence"
        yield Finding(what, _way_out(adapter, config))
    twice = isinstance(config, LayerConfig) and any(embeddings.is_one(key) for key in shapes)
    if twice:
        yield Finding(
            "the file holds base embeddings; PEFT takes them when the model has as many words",
            "call model.resize_token_embeddings() before loading, where the vocabulary grew",
            False,
        )


def _unknown_to_peft(config: Config) -> list[str]:
    """Fields that say something and that PEFT's config lacks, where PEFT is installed to be asked."""
    from importlib.util import find_spec

    if find_spec("peft") is None:
        return []
    import inspect

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as THEIRS

    known = set(inspect.signature(THEIRS[str(config.peft_type)]).parameters)  # type: ignore[index]
    said = {k: v for k, v in config.to_dict().items() if k != "peft_type" and v not in (None, False, "", [], {})}
    return [name for name, value in said.items() if name not in known and value != _default(config, name)]


def _default(config: Config, name: str) -> Any:
    return next(default_of(f) for f in fields(config) if f.name == name)


TARGETS: dict[str, Callable[[str, Config, Shapes], Iterator[Finding]]] = {
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "peft": _peft,
}
