"""What the parts of a transformer are for, read from its structure: attention, MLP, norms, embedding and head.

The default targets of every method are roles, so a method works on an architecture nobody listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import TargetError
from ..upstream.calls import is_encoder_decoder
from ..upstream.models import is_conv1d
from .target import kind_of
from .walk import bare, walk

FUSED = re.compile(r"c_attn|qkv|query_key_value|in_proj|wqkv|(^|_)kv(_|$)", re.IGNORECASE)
PROJECTIONS = {
    "attention.q": re.compile(r"(^|_)(q|wq|query)(_|$)|^q_?(proj|lin)$", re.IGNORECASE),
    "attention.k": re.compile(r"(^|_)(k|wk|key)(_|$)|^k_?(proj|lin)$", re.IGNORECASE),
    "attention.v": re.compile(r"(^|_)(v|wv|value)(_|$)|^v_?(proj|lin)$", re.IGNORECASE),
}


def is_linear(module: nn.Module) -> bool:
    return kind_of(module).kind == "linear"


def head_paths(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """Paths of the model's output layer, which "all-linear" leaves alone."""
    get = getattr(model, "get_output_embeddings", None)
    head = bare(get()) if get is not None else None
    return {path for path, module in modules.items() if module is head}


def roles(model: nn.Module) -> dict[str, str]:
    """The role of each module that has one, by path.

    Roles: attention, attention.q, .k, .v, .qkv, .out; mlp, mlp.in, mlp.out; norm; embedding.
    """
    modules = dict(walk(model))
    found = {path: "norm" for path, module in modules.items() if kind_of(module).kind == "norm"}
    found |= {path: "embedding" for path, module in modules.items() if isinstance(module, nn.Embedding)}
    for layer in _layers(modules):
        found |= _layer_roles(layer, modules, head_paths(model, modules))
    return found


def layers(model: Any, of_encoder: bool = False) -> list[str]:
    """Paths of the repeated layers; on request those of an encoder-decoder's encoder alone.

    Raises:
        TargetError: the model shows none.
    """
    modules = dict(walk(model))
    found = _layers(modules)
    if of_encoder and is_encoder_decoder(model):
        encoder = {id(bare(module)) for module in model.get_encoder().modules()}
        found = [path for path in found if id(modules[path]) in encoder]
    if not found:
        raise TargetError(f"{type(model).__name__} shows no repeated layers with attention; give target_modules")
    return found


def self_attention(model: nn.Module) -> list[str]:
    """Paths of the attention blocks that fill the cache, one a layer: of an encoder-decoder, the decoder's own."""
    encoders = set(layers(model, of_encoder=True)) if is_encoder_decoder(model) else set()
    blocks = [path for path, role in roles(model).items() if role == "attention"]
    owners = [layer for layer in layers(model) if layer not in encoders]
    return [next(path for path in blocks if path.startswith(owner + ".")) for owner in owners]


def default_targets(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """Name endings that match exactly the modules with one of the `wanted` roles."""
    wanted = set(wanted)
    found = roles(model)
    paths = [path for path, role in found.items() if role in wanted]
    language = language_model(model)
    paths = [path for path in paths if path.startswith(language)] or paths
    if not paths:
        raise TargetError(
            f"{type(model).__name__} shows no modules that are {', '.join(sorted(wanted))}; give target_modules"
        )
    return endings(paths, dict(walk(model)))


def language_model(model: Any) -> str:
    """The prefix of the language model inside a model that writes about images or sound; "" where it is all of it."""
    config = getattr(model, "config", None)
    generates = hasattr(model, "can_generate") and model.can_generate()
    if not generates or not hasattr(config, "get_text_config") or is_encoder_decoder(model):
        return ""
    text = config.get_text_config()
    inside = (path for path, module in walk(model) if path and getattr(module, "config", None) is text)
    return "" if text is config else next((f"{path}." for path in inside), "")


def blocks(model: nn.Module) -> list[str]:
    """Paths of the transformer's layers, in order.

    Raises:
        TargetError: there is no list of modules that hold attention.
    """
    found = _layers(dict(walk(model)))
    if not found:
        raise TargetError(f"{type(model).__name__} shows no list of layers with attention; give target_modules")
    return found


def endings(paths: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The shortest name endings that match all of `paths` and no other module."""
    wanted, names = set(paths), []
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if all(p in wanted for p in modules if p == ending or p.endswith("." + ending)):
                break
        names.append(ending)
    return list(dict.fromkeys(names))


def layer_list(model: nn.Module) -> str:
    """The path of the list of a model's layers.

    Raises:
        TargetError: there is none, or more than one.
    """
    lists = {path.rpartition(".")[0] for path in _layers(dict(walk(model)))}
    if len(lists) != 1:
        raise TargetError(
            f"{type(model).__name__} shows {len(lists)} lists of layers, not one: {', '.join(sorted(lists))}"
        )
    return lists.pop()


def _layers(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the repeated layers: members of a ModuleList that hold an attention module."""
    lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
    members = [p for p in modules if p.rpartition(".")[0] in lists and p.rpartition(".")[2].isdigit()]
    layers = [p for p in members if any(_is_attention(m) for q, m in modules.items() if q.startswith(p + "."))]
    return [p for p in layers if not any(p.startswith(q + ".") for q in layers)]


def _is_attention(module: nn.Module) -> bool:
    return bool(re.search(r"attention|attn", type(module).__name__, re.IGNORECASE))


def _layer_roles(layer: str, modules: dict[str, nn.Module], heads: set[str]) -> dict[str, str]:
    inside = {p: m for p, m in modules.items() if p.startswith(layer + ".")}
    linears = [p for p, m in inside.items() if is_linear(m) and p not in heads]
    outer = [p for p, m in inside.items() if _is_attention(m) and _holds(p, linears)]
    outer = [_tightest(p, outer, linears) for p in outer if not any(p.startswith(q + ".") for q in outer)]
    found: dict[str, str] = {}
    for attention in outer:
        found |= _attention_roles(attention, [p for p in linears if p.startswith(attention + ".")])
    rest = [p for p in linears if not any(p.startswith(q + ".") for q in outer)]
    stream = next(_sizes(inside[p])[0] for p in linears if p not in rest) if outer else 0
    return found | _mlp_roles(layer, rest, inside, stream)


def _tightest(block: str, attentions: list[str], linears: list[str]) -> str:
    """The innermost attention module that holds every linear layer of `block` (T5's has a residual around it)."""
    own = [p for p in linears if p.startswith(block + ".")]
    return max((p for p in attentions if all(q.startswith(p + ".") for q in own)), key=len, default=block)


def _attention_roles(block: str, linears: list[str]) -> dict[str, str]:
    found = {block: "attention"}
    for path in linears:
        name = path.rpartition(".")[2]
        role = next((role for role, pattern in PROJECTIONS.items() if pattern.search(name)), None)
        found[path] = "attention.qkv" if FUSED.search(name) else role or "attention.other"
    others = [path for path in linears if found[path] == "attention.other"]
    if others:
        found[others[-1]] = "attention.out"
    return found


def projections(attention: nn.Module) -> dict[str, str]:
    """The linear layers below an attention module by their role: attention.q, .k, .v or .qkv, and attention.out."""
    linears = [path for path, module in walk(attention) if is_linear(module)]
    return {role: path for path, role in _attention_roles("", linears).items() if path}


def _mlp_roles(layer: str, linears: list[str], modules: dict[str, nn.Module], stream: int) -> dict[str, str]:
    """Outside attention, what reads the stream (of width `stream`) comes first and what writes to it last."""
    found = {}
    for path in linears:
        width_in, width_out = _sizes(modules[path])
        writes = width_out == stream and (width_in != stream or path == linears[-1])
        found[path] = "mlp.out" if writes else "mlp.in"
    for block in _common_blocks(layer, linears):
        if not any(_is_attention(m) for p, m in modules.items() if p.startswith(block + ".")):
            found[block] = "mlp"
    return found


def _common_blocks(layer: str, linears: list[str]) -> list[str]:
    """The smallest modules below the layer that hold both a reader and a writer of the stream."""
    parents: dict[str, list[str]] = {}
    for path in linears:
        parents.setdefault(path.rpartition(".")[0], []).append(path)
    return [parent for parent, inside in parents.items() if parent != layer and len(inside) > 1]


def _sizes(module: Any) -> tuple[int, int]:
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def _holds(path: str, linears: list[str]) -> bool:
    return any(p.startswith(path + ".") for p in linears)
