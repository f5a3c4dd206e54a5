"""What keeps a program from running an adapter, and what all programs that know only plain LoRA have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..core.config import Config, at
from ..files.read import PREFIX
from ..methods.lora import LoRA, LoraConfig
from ..model.catalogue import page_of

Shapes = dict[str, tuple[int, ...]]
"""The shapes of an adapter's tensors by key."""
PAIRS = (".lora_A.weight", ".lora_B.weight")
"""Endings of the keys of a linear layer's LoRA."""
EMBEDDINGS = (".lora_embedding_A", ".lora_embedding_B")
"""Endings of the keys of an embedding's LoRA."""


@dataclass(frozen=True)
class Finding:
    """A reason why a program cannot run an adapter as it is."""

    what: str
    fix: str
    blocks: bool = True
    """The program cannot run the adapter. If False, it can once `fix` is applied on its side."""


def merged(adapter: str) -> str:
    return f"veneer merge {adapter} --out merged, and serve that model"


def as_lora(adapter: str) -> str:
    return f"veneer combine {adapter} --weights 1 --rank 64 --out as-lora writes the nearest LoRA of a rank"


def nothing(config: Config) -> str:
    return f"nothing: {config.peft_type} has no form as weights; run it with veneer or transformers"


def way_out(adapter: str, config: Config) -> str:
    """The fix for an adapter that is not a plain LoRA."""
    page = page_of(config)
    if not page.mergeable:
        return nothing(config)
    if "linear" not in page.kinds:
        return merged(adapter)
    return f"{as_lora(adapter)}; or {merged(adapter)}"


def only_lora(program: str, adapter: str, config: Config, export: str) -> Iterator[Finding]:
    """Findings for any server that knows only plain LoRA.

    Args:
        export: the fix that writes the adapter as a LoRA for this server.
    """
    fix = export
    if not page_of(config).mergeable:
        fix = nothing(config)
    elif "linear" not in page_of(config).kinds:
        fix = merged(adapter)
    if not isinstance(config, LoraConfig):
        yield Finding(f"{program} runs LoRA, not {config.peft_type}", fix)
        return
    variants = ", ".join(config.variants())
    adapter_class = type(config).adapter
    if variants:
        yield Finding(f"{program} knows no LoRA with {variants}", fix)
    elif adapter_class is not LoRA:
        yield Finding(f"{program} knows no {adapter_class.__name__}", fix)
    yield from only_pairs(program, config, merged(adapter))


def only_pairs(program: str, config: LoraConfig, fix: str) -> Iterator[Finding]:
    """Findings about trained parts that neither servers nor llama.cpp take; `fix` merges them."""
    if config.bias != "none":
        yield Finding(f"{program} takes no trained biases (bias={config.bias!r})", fix)
    if config.trainable_token_indices:
        yield Finding(f"{program} takes no trained tokens (trainable_token_indices)", fix)
    if config.layer_replication:
        yield Finding(f"{program} does not replicate layers", "merge_and_unload() and save_pretrained() in Python")


def ranks_of(shapes: Shapes) -> dict[str, int]:
    """The rank of each adapted module, by path."""
    ranks = {}
    for key, shape in shapes.items():
        for ending in (PAIRS[0], EMBEDDINGS[0]):
            if key.endswith(ending):
                path = key.removeprefix(PREFIX).removesuffix(ending)
                ranks[path] = shape[0]
    return ranks


def wrongly_scaled(config: LoraConfig, shapes: Shapes, theirs: Callable[[str, int], float]) -> list[str]:
    """Paths of the modules whose update a program scales in another way than PEFT.

    Args:
        theirs: the program's scaling for a module and its rank in the file.
    """
    paths = []
    for path, rank in ranks_of(shapes).items():
        if not rank:
            continue
        alpha = at(path, config.alpha_pattern, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(scaling, theirs(path, rank), rel_tol=1e-6):
            paths.append(path)
    return paths


def other_keys(shapes: Shapes, *endings: str) -> list[str]:
    """Keys of the file that have none of these endings."""
    return [key for key in shapes if not key.endswith(endings)]
