"""What vLLM and SGLang make of an adapter's files.

Read in the sources of vLLM 0.33.0 (in `vllm/lora`: `peft_helper.py`, `lora_model.py`, `utils.py`, `lora_weights.py`,
`model_manager.py`; `vllm/config/lora.py`) and of SGLang 0.5.23 (in `sglang/srt/lora`: `lora.py`, `lora_config.py`,
`lora_manager.py`, `mem_pool.py`, `utils.py`). `docs/guides/deploy.md` lists the facts with their files.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ..core import embeddings
from ..core.config import Config, at
from ..files.pretrained import vocabulary_size
from ..files.read import PREFIX
from ..methods.lora import LoraConfig
from .findings import EMBEDDINGS, PAIRS, Finding, Shapes, merged, only_lora, other_keys, ranks_of, wrongly_scaled

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Possible values of vLLM's `--max-lora-rank`."""
VLLM_DEFAULT = 16
"""The default of `--max-lora-rank`."""
VLLM_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Names of starts after which A and B are the whole update; other names mean that the start must be subtracted."""
HEADS = ("classifier", "score")
"""Trained copies of modules that vLLM takes."""
PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that SGLang stacks into one: an adapter of one of them needs the first of the group, q also v."""
ADDED_TOKENS = "added_tokens.json"
ONE_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)")
FUSED = re.compile(r"\.experts(\.base_layer)*\.lora_[AB]\.weight$")
"""Keys of a LoRA on the stacked weights of experts."""


def vllm(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    """What keeps vLLM from running an adapter."""
    export = _export(adapter, "vllm")
    yield from only_lora("vLLM", adapter, config, export)
    if not isinstance(config, LoraConfig) or config.variants():
        return
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() not in VLLM_STARTS:
        yield Finding(f"vLLM refuses an adapter that starts from the base's weights ({start})", export)
    saved = [name for name in config.modules_to_save or () if name not in HEADS]
    if saved:
        what = f"vLLM takes trained copies of classifier and score only (modules_to_save: {', '.join(saved)})"
        yield Finding(what, merged(adapter))
    yield from _embeddings("vLLM", adapter, shapes, "would leave them out: wrong in silence")
    others = [key for key in other_keys(shapes, *PAIRS, *EMBEDDINGS) if not embeddings.is_one(key)]
    others = [key for key in others if not _is_saved(key, config)]
    if others:
        yield Finding(f"vLLM refuses the file's {len(others)} other tensors, {others[0]} first", merged(adapter))
    yield from _only_linear("vLLM", adapter, shapes)
    plain = {key: shape for key, shape in shapes.items() if not FUSED.search(key)}
    wrong = wrongly_scaled(config, plain, lambda path, rank: _scaling_of_config(config, path))
    if wrong:
        what = (
            f"vLLM scales by the rank and the alpha of the config; {len(wrong)} modules have another rank in the file, "
            f"{wrong[0]} first: wrong in silence"
        )
        yield Finding(what, export)
    yield from _experts_in_vllm(adapter, config, shapes)
    yield from _rank_in_vllm(adapter, config, shapes)
    if not config.base_model_name_or_path:
        yield Finding("the config names no base model", "give vLLM the base that it was trained on", False)


def _export(adapter: str, program: str) -> str:
    return f"veneer export {adapter} --to {program} --out served; or {merged(adapter)}"


def _is_saved(key: str, config: LoraConfig) -> bool:
    """Whether a key belongs to a trained copy of a module."""
    path = key.removeprefix(PREFIX).rpartition(".")[0]
    return path.rpartition(".")[2] in (config.modules_to_save or ())


def _scaling_of_config(config: LoraConfig, path: str) -> float:
    rank = at(path, config.rank_pattern, config.r)
    alpha = at(path, config.alpha_pattern, config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _embeddings(program: str, adapter: str, shapes: Shapes, what_it_does: str) -> Iterator[Finding]:
    saved = [key for key in shapes if embeddings.is_one(key)]
    if saved:
        yield Finding(
            f"the file holds base embeddings ({saved[0]} first), and {program} {what_it_does}", merged(adapter)
        )


def _only_linear(program: str, adapter: str, shapes: Shapes) -> Iterator[Finding]:
    others = [key for key, shape in shapes.items() if key.endswith(PAIRS) and len(shape) != 2]
    if others:
        what = f"{program} takes LoRA of linear layers, not of convolutions ({others[0]} first)"
        yield Finding(what, merged(adapter))


def _experts_in_vllm(adapter: str, config: LoraConfig, shapes: Shapes) -> Iterator[Finding]:
    fused = sorted({key.rpartition(".lora_")[0] for key in shapes if FUSED.search(key)})
    parameters = config.target_parameters or ()
    others = [name for name in parameters if not name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    if others:
        what = f"vLLM takes no updates of bare parameters other than those of experts (target_parameters: {others[0]})"
        yield Finding(what, merged(adapter))
        return
    whole = {path for path in fused if path.endswith(".experts")}
    halves = {path.removesuffix(".base_layer") for path in fused if path.endswith(".base_layer")}
    if whole != halves or any(name.endswith(".base_layer.base_layer") for name in fused):
        what = "vLLM reads fused experts only if both gate_up_proj and down_proj are adapted"
        yield Finding(what, _export(adapter, "vllm"))
    elif fused:
        yield Finding(
            "the experts are fused into one tensor, which vLLM reads only where its model keeps them so (GPT-OSS, "
            "Qwen3.5-MoE, Qwen3-VL-MoE, Qwen3-Omni-MoE, InternS1-Pro)",
            f"for others `veneer export {adapter} --to vllm --out served` writes them one by one; or vllm serve "
            "--enable-mixed-moe-lora-format with is_3d_lora_weight in the request",
            False,
        )
    yield from _whole_experts("vLLM", adapter, shapes)


def _whole_experts(program: str, adapter: str, shapes: Shapes) -> Iterator[Finding]:
    """A finding if single experts of a layer are adapted in part, which the packing does not expect."""
    numbers: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in ranks_of(shapes):
        expert = ONE_EXPERT.fullmatch(path)
        if expert is not None:
            numbers[expert["experts"]][expert["projection"]].add(int(expert["number"]))
    for path, projections in numbers.items():
        sets = list(projections.values())
        is_whole = len(sets) in (2, 3) and all(one == set(range(len(one))) for one in sets)
        if not is_whole or any(one != sets[0] for one in sets):
            what = f"{program} takes a LoRA on all experts and projections of a layer, or on none ({path})"
            yield Finding(what, merged(adapter))
            return


def _rank_in_vllm(adapter: str, config: LoraConfig, shapes: Shapes) -> Iterator[Finding]:
    plain = {key: shape for key, shape in shapes.items() if not FUSED.search(key)}
    needed = max([config.r, *config.rank_pattern.values(), *ranks_of(plain).values()])
    fitting = next((rank for rank in VLLM_RANKS if rank >= needed), None)
    if fitting is None:
        what = f"vLLM takes ranks up to {VLLM_RANKS[-1]}; this has {needed}"
        yield Finding(what, _export(adapter, "vllm"))
    elif fitting > VLLM_DEFAULT:
        what = f"rank {needed} is above vLLM's usual limit of {VLLM_DEFAULT}"
        yield Finding(what, f"vllm serve --max-lora-rank {fitting}", False)


# SGLang


def sglang(adapter: str, config: Config, shapes: Shapes) -> Iterator[Finding]:
    """What keeps SGLang from running an adapter."""
    export = _export(adapter, "sglang")
    yield from only_lora("SGLang", adapter, config, export)
    if not isinstance(config, LoraConfig) or config.variants():
        return
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() not in VLLM_STARTS:
        what = f"it starts from the base's weights ({start}), which SGLang would not subtract: wrong in silence"
        yield Finding(what, export)
    if config.modules_to_save:
        saved = ", ".join(config.modules_to_save)
        what = f"SGLang takes no trained copies of modules (modules_to_save: {saved})"
        yield Finding(what, merged(adapter))
    yield from _embeddings("SGLang", adapter, shapes, "knows none")
    others = [key for key in other_keys(shapes, *PAIRS, *EMBEDDINGS) if not embeddings.is_one(key)]
    if others and not config.modules_to_save:
        what = f"SGLang has no place for the file's {len(others)} other tensors, {others[0]} first"
        yield Finding(what, merged(adapter))
    yield from _only_linear("SGLang", adapter, shapes)
    if any(FUSED.search(key) for key in shapes):
        yield Finding("SGLang skips fused experts with a warning: it reads them one by one", export)
    elif config.target_parameters:
        yield Finding("SGLang takes no updates of bare parameters (target_parameters)", merged(adapter))
    else:
        yield from _scaling_in_sglang(config, shapes, export)
    yield from _whole_experts("SGLang", adapter, shapes)
    yield from _targets_in_sglang(config, export)
    yield from _stacked_in_sglang(shapes, export)
    yield from _tokens_in_sglang(adapter, config)
    yield Finding(
        f"rank {config.r} must be allowed when SGLang starts",
        f"python -m sglang.launch_server --enable-lora --max-lora-rank {config.r}; or name the adapter in --lora-paths",
        False,
    )


def _scaling_in_sglang(config: LoraConfig, shapes: Shapes, export: str) -> Iterator[Finding]:
    ranks = ranks_of(shapes)
    uneven = [path for path, rank in ranks.items() if rank != config.r]
    if uneven:
        what = f"SGLang takes one rank; {len(uneven)} modules have another than r = {config.r}, {uneven[0]} first"
        yield Finding(what, export)
        return
    wrong = wrongly_scaled(config, shapes, lambda path, rank: config.lora_alpha / config.r)
    if wrong:
        reason = "rsLoRA" if config.use_rslora else "alpha_pattern"
        what = (
            f"SGLang scales by lora_alpha / r and passes over {reason}; {len(wrong)} modules have another scaling, "
            f"{wrong[0]} first: wrong in silence"
        )
        yield Finding(what, export)


def _targets_in_sglang(config: LoraConfig, export: str) -> Iterator[Finding]:
    targets = config.target_modules
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield Finding(f"SGLang takes a list of names as target_modules, not the regular expression {targets!r}", export)


def _stacked_in_sglang(shapes: Shapes, export: str) -> Iterator[Finding]:
    """A finding if only some of the projections are adapted that SGLang stacks into one."""
    leaves: dict[str, set[str]] = defaultdict(set)
    for path in ranks_of(shapes):
        parent, _, leaf = path.rpartition(".")
        leaves[parent].add(leaf)
    for parent, names in leaves.items():
        attention, gated = ({name for name in group if name in names} for group in PACKED)
        if attention and not {"q_proj", "v_proj"} <= attention:
            there = ", ".join(sorted(attention))
            what = f"SGLang stacks q_proj, k_proj and v_proj and needs q_proj and v_proj; {parent} has {there}"
            yield Finding(what, export)
            return
        if gated == {"up_proj"}:
            what = f"SGLang stacks gate_proj and up_proj and skips up_proj alone ({parent})"
            yield Finding(what, export)
            return


def _tokens_in_sglang(adapter: str, config: LoraConfig) -> Iterator[Finding]:
    path = Path(adapter) / ADDED_TOKENS
    try:
        added = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    size = vocabulary_size(config.base_model_name_or_path, config.revision)
    new = [name for name, token in added.items() if size is not None and isinstance(token, int) and token >= size]
    if new:
        yield Finding(f"SGLang takes no adapter that adds tokens ({len(new)} in {ADDED_TOKENS})", merged(adapter))
