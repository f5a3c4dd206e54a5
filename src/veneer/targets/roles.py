"""The roles of a transformer's modules, found by structure: attention, MLP, norms, embedding and head.

The default targets of every method are roles, so a method works on an architecture that no table lists.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import TargetError, listing, warn
from ..upstream.calls import is_encoder_decoder
from ..upstream.models import is_conv1d
from .target import kind_of
from .walk import bare, matches, walk

FUSED = re.compile(r"c_attn|qkv|query_key_value|in_proj|wqkv|(^|_)kv(_|$)", re.IGNORECASE)
"""Names of projections that compute several of q, k and v."""
PROJECTIONS = {
    "attention.q": re.compile(r"(^|_)(q|wq|query)(_|$)|^q_?(proj|lin)$", re.IGNORECASE),
    "attention.k": re.compile(r"(^|_)(k|wk|key)(_|$)|^k_?(proj|lin)$", re.IGNORECASE),
    "attention.v": re.compile(r"(^|_)(v|wv|value)(_|$)|^v_?(proj|lin)$", re.IGNORECASE),
}
"""Names of the projections to q, k and v."""


def is_linear(module: nn.Module) -> bool:
    """Whether adapters see the module as a linear layer: `nn.Linear`, GPT-2's Conv1D, quantised ones."""
    return kind_of(module).kind == "linear"


def head_paths(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """Paths of the model's output layer, which "all-linear" leaves out."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else bare(get_head())
    return {path for path, module in modules.items() if module is head}


def roles(model: nn.Module) -> dict[str, str]:
    """The role of each module that has one, by path.

    Roles: attention, attention.q, .k, .v, .qkv, .out; mlp, mlp.in, mlp.out; norm; embedding.
    """
    modules = dict(walk(model))
    role_of: dict[str, str] = {}
    for path, module in modules.items():
        if kind_of(module).kind == "norm":
            role_of[path] = "norm"
    for path, module in modules.items():
        if isinstance(module, nn.Embedding):
            role_of[path] = "embedding"
    heads = head_paths(model, modules)
    for layer in _layers(modules):
        role_of |= _layer_roles(layer, modules, heads)
    return role_of


def layers(model: Any, of_encoder: bool = False) -> list[str]:
    """Paths of the repeated layers; with `of_encoder`, only those of an encoder-decoder's encoder.

    Raises:
        TargetError: the model has no repeated layers.
    """
    modules = dict(walk(model))
    paths = _layers(modules)
    if of_encoder and is_encoder_decoder(model):
        encoder = {bare(module) for module in model.get_encoder().modules()}
        paths = [path for path in paths if modules[path] in encoder]
    if not paths:
        raise TargetError(f"{type(model).__name__} has no recognisable layers with attention; give target_modules")
    return paths


def self_attention(model: nn.Module) -> list[str]:
    """Paths of the attention blocks that fill the cache, one per layer; in an encoder-decoder, the decoder's."""
    encoder_layers: set[str] = set()
    if is_encoder_decoder(model):
        encoder_layers.update(layers(model, of_encoder=True))
    attentions = _with_role(model, {"attention"})
    first_attentions = []
    for layer in layers(model):
        if layer not in encoder_layers:
            first_attentions.append(_below(layer, attentions)[0])
    return first_attentions


def default_targets(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """Name endings that match exactly the modules with one of the `wanted` roles."""
    wanted = set(wanted)
    paths = _with_role(model, wanted)
    prefix = language_model(model)
    paths = [path for path in paths if path.startswith(prefix)] or paths
    if not paths:
        raise TargetError(
            f"{type(model).__name__} has no recognisable {', '.join(sorted(wanted))} modules; give target_modules"
        )
    modules = dict(walk(model))
    names = endings(paths, modules)
    _tell_of_layers_without(paths, names, modules, type(model).__name__)
    return names


def _tell_of_layers_without(
    paths: list[str], names: list[str], modules: dict[str, nn.Module], model_class: str
) -> None:
    """Warn if some layers of a hybrid have no target: those with linear attention or a state in place of attention."""
    lists = {layer.rpartition(".")[0] for layer in _layers(modules) if _below(layer, paths)}
    without = []
    count = 0
    for path in modules:
        parent, _, name = path.rpartition(".")
        if parent in lists and name.isdigit():
            count += 1
            if not _below(path, paths):
                without.append(path)
    if without:
        warn(
            f"the default targets of {model_class}, {', '.join(names)}, lie in {count - len(without)} of its {count} "
            f'layers. To adapt the others too, give target_modules, for example "all-linear". Without a target:'
            f"{listing(without)}"
        )


def language_model(model: Any) -> str:
    """The path prefix of the language model inside a multimodal model; "" if the whole model is one."""
    config = getattr(model, "config", None)
    generates = hasattr(model, "can_generate") and model.can_generate()
    if not generates or not hasattr(config, "get_text_config") or is_encoder_decoder(model):
        return ""
    text_config = config.get_text_config()
    if text_config is config:
        return ""
    for path, module in walk(model):
        if path and getattr(module, "config", None) is text_config:
            return f"{path}."
    return ""


def blocks(model: nn.Module) -> list[str]:
    """Paths of the transformer's layers, in order; in a multimodal model, those of its language model.

    Raises:
        TargetError: there is no list of modules that hold attention.
    """
    paths = _layers(dict(walk(model)))
    prefix = language_model(model)
    paths = [path for path in paths if path.startswith(prefix)] or paths
    if not paths:
        raise TargetError(f"{type(model).__name__} has no list of layers with attention; give target_modules")
    return paths


def endings(paths: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The shortest name endings that match all of `paths` and no other module."""
    wanted = set(paths)
    names: dict[str, None] = {}  # an ordered set
    for path in paths:
        name = _shortest_ending(path, wanted, modules)
        names[name] = None
    return list(names)


def _shortest_ending(path: str, wanted: set[str], modules: Iterable[str]) -> str:
    """The shortest ending of `path` that only `wanted` modules have."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if all(p in wanted for p in modules if matches(p, ending)):
            return ending
    return path


def layer_list(model: nn.Module) -> str:
    """The path of the list of a model's layers.

    Raises:
        TargetError: the model has none, or more than one.
    """
    lists = {path.rpartition(".")[0] for path in _layers(dict(walk(model)))}
    if len(lists) != 1:
        raise TargetError(
            f"{type(model).__name__} has {len(lists)} lists of layers instead of one: {', '.join(sorted(lists))}"
        )
    return lists.pop()


def projections(attention: nn.Module) -> dict[str, str]:
    """Paths of the linear layers in an attention module by role: attention.q, .k, .v or .qkv, and attention.out."""
    linears = [path for path, module in walk(attention) if is_linear(module)]
    path_of: dict[str, str] = {}
    for path, role in _attention_roles("", linears).items():
        if path:
            path_of[role] = path
    return path_of


def _with_role(model: nn.Module, wanted: set[str]) -> list[str]:
    """Paths of the modules with one of the `wanted` roles."""
    return [path for path, role in roles(model).items() if role in wanted]


def _below(block: str, paths: Iterable[str]) -> list[str]:
    """The paths in `paths` that are inside the module at path `block`."""
    return [path for path in paths if path.startswith(block + ".")]


def _outermost(paths: list[str]) -> list[str]:
    """The paths in `paths` that are not inside another one of them."""
    nested: set[str] = set()
    for path in paths:
        nested.update(_below(path, paths))
    return [path for path in paths if path not in nested]


def _layers(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the repeated layers: members of a ModuleList that hold an attention module."""
    attentions = [path for path, module in modules.items() if _is_attention(module)]
    members = []
    for path in modules:
        parent, _, name = path.rpartition(".")
        in_list = isinstance(modules.get(parent), nn.ModuleList) and name.isdigit()
        if in_list and _below(path, attentions):
            members.append(path)
    return _outermost(members)


def _is_attention(module: nn.Module) -> bool:
    return bool(re.search(r"attention|attn", type(module).__name__, re.IGNORECASE))


def _layer_roles(layer: str, modules: dict[str, nn.Module], heads: set[str]) -> dict[str, str]:
    """The roles of the modules inside one layer, by path."""
    inside = {path: modules[path] for path in _below(layer, modules)}
    linears = [path for path, module in inside.items() if is_linear(module) and path not in heads]
    role_of: dict[str, str] = {}
    in_attention: list[str] = []
    for attention in _attention_blocks(inside, linears):
        attention_linears = _below(attention, linears)
        role_of |= _attention_roles(attention, attention_linears)
        in_attention += attention_linears
    width = 0
    if in_attention:
        first = next(path for path in linears if path in in_attention)
        width, _ = _sizes(inside[first])
    outside = [path for path in linears if path not in in_attention]
    return role_of | _mlp_roles(layer, outside, inside, width)


def _attention_blocks(modules: dict[str, nn.Module], linears: list[str]) -> list[str]:
    """Paths of a layer's attention blocks. One inside another counts only if it holds the same linear layers."""
    attentions = []
    for path, module in modules.items():
        if _is_attention(module) and _below(path, linears):
            attentions.append(path)
    return [_tightest(path, attentions, linears) for path in _outermost(attentions)]


def _tightest(block: str, attentions: list[str], linears: list[str]) -> str:
    """The innermost attention module with all linear layers of `block` (T5 has a residual module around it)."""
    block_linears = _below(block, linears)
    candidates = [path for path in attentions if _below(path, block_linears) == block_linears]
    return max(candidates, key=len, default=block)


def _attention_roles(block: str, linears: list[str]) -> dict[str, str]:
    """Roles of an attention block and its linear layers, by name; the last one with an unknown name is the output."""
    role_of = {block: "attention"}
    last_unknown = None
    for path in linears:
        name = path.rpartition(".")[2]
        role_of[path] = _projection_role(name)
        if role_of[path] == "attention.other":
            last_unknown = path
    if last_unknown is not None:
        role_of[last_unknown] = "attention.out"
    return role_of


def _projection_role(name: str) -> str:
    """The role of a linear layer of this name in an attention block."""
    if FUSED.search(name):
        return "attention.qkv"
    for role, pattern in PROJECTIONS.items():
        if pattern.search(name):
            return role
    return "attention.other"


def _mlp_roles(layer: str, linears: list[str], modules: dict[str, nn.Module], stream: int) -> dict[str, str]:
    """Roles outside attention: a linear layer that writes to the stream (of width `stream`) is mlp.out."""
    role_of: dict[str, str] = {}
    for path in linears:
        width_in, width_out = _sizes(modules[path])
        writes = width_out == stream and (width_in != stream or path == linears[-1])
        role_of[path] = "mlp.out" if writes else "mlp.in"
    for block in _common_blocks(layer, linears):
        if not any(_is_attention(modules[path]) for path in _below(block, modules)):
            role_of[block] = "mlp"
    return role_of


def _common_blocks(layer: str, linears: list[str]) -> list[str]:
    """Paths of the modules below the layer that are the parent of more than one of the linear layers."""
    linears_in: Counter[str] = Counter()
    for path in linears:
        parent = path.rpartition(".")[0]
        linears_in[parent] += 1
    return [parent for parent, count in linears_in.items() if parent != layer and count > 1]


def _sizes(module: Any) -> tuple[int, int]:
    """(input width, output width) of a linear layer."""
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features
