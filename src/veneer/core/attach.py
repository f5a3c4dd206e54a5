"""Attaching adapters to a model, and detaching them without a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import TargetError, VeneerError, listing
from ..files.limits import Bounded
from ..files.read import WEIGHTS_NAME
from ..targets.quantised import keep_gradients_
from ..targets.target import ParamTarget, Target
from ..targets.walk import walk
from . import checkpoint, trial
from .adapter import Adapter, Additive, Bias, Replace, Tensors, TiedReplace
from .config import CONFIG_NAME, Config, LayerConfig, PromptConfig
from .hooks import install, uninstall
from .layer import AdapterLayer
from .placement import settle
from .prompt import spec_for
from .select import parameters, saved_modules, targets
from .state import BASE, State, state_of


def attach(
    model: nn.Module,
    config: Config,
    name: str,
    *,
    trainable: bool,
    on_meta: bool = False,
    lift: bool = True,
    layer_class: type[AdapterLayer] = AdapterLayer,
) -> State:
    """Attach the adapter that `config` describes to `model` under `name`. An error leaves the model unchanged.

    Args:
        trainable: whether the adapter is trained while it is active.
        on_meta: create placeholder tensors on the meta device, for values that are loaded later.
        lift: keep the adapter in float32 if the base is in half precision.
        layer_class: the class that wraps adapted modules, if `model` has no adapters yet.
    """
    state = state_of(model) or State(layer_class)
    _check_name(name, state)
    reshaped = config.reshape(model)
    state.reshaped += [] if reshaped is None else [reshaped]
    try:
        _put_on(model, config, name, state, trainable=trainable, on_meta=on_meta, lift=lift)
        if not on_meta:
            trial.check(model, state, name)
        return state
    except BaseException:
        detach(model, name, state)
        raise


def _put_on(
    model: nn.Module, config: Config, name: str, state: State, *, trainable: bool, on_meta: bool, lift: bool
) -> None:
    saved = saved_modules(model, config)
    places = []
    for member in config.members():
        paths, bare = _places(model, member, saved)
        places.append((member, paths, bare))
    state.configs[name] = config
    layers = Wrapper(model, state)
    with torch.device("meta") if on_meta else nullcontext(), Bounded(model) if on_meta else nullcontext():
        for member, paths, bare in places:
            _add_member(model, config, member, name, layers, paths)
            _add_to_parameters(member, name, layers, bare)
        for path in saved:
            copied = Replace(layers.wrap(path).target)
            layers.wrap(path).add(name, copied)
            if config.ties() and copied.target.kind in ("linear", "embedding"):
                _add_twins(copied, name, layers, TiedReplace)
    if len(places) > 1:
        _check_keys(state, name)
    install(model, state)
    settle(model, state, name, lift=lift)
    for module in state.modules(name):
        module.train(model.training)
    if trainable:
        state.trainable.add(name)
        keep_gradients_(model)
    state.mark(name)


def _places(model: nn.Module, config: Config, saved: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(module paths, (module path, name) pairs of the bare parameters) that a config adapts."""
    if not isinstance(config, LayerConfig):
        return [], []
    wanted = config.bare_parameters()
    bare = parameters(model, config, wanted) if wanted else []
    if not bare or config.target_modules:
        return targets(model, config, saved, bare), bare
    config.target_modules = []
    return [], bare


def try_on(model: nn.Module, config: Config, name: str, tensors: Tensors, notes: dict[str, Any]) -> list[str]:
    """Raise unless a saved adapter fits `model`; return the paths that it adapts. The model is left unchanged."""
    state = attach(model, config, name, trainable=False, on_meta=True)
    try:
        checkpoint.check_fit(model, state, name, tensors, notes)
        return list(state.adapters(name))
    finally:
        detach(model, name, state)


def detach(model: nn.Module, name: str, state: State) -> None:
    """Remove one adapter. A layer without adapters becomes the plain module again."""
    state.configs.pop(name, None)
    state.trainable.discard(name)
    state.schedules.pop(name, None)
    wrapper = Wrapper(model, state)
    for path, layer in list(state.layers.items()):
        if name in layer.adapters:
            del layer.adapters[name]
        if not len(layer.adapters):
            wrapper.unwrap(path)
    for group in (state.shared, state.prompts):
        if name in group:
            del group[name]
    state.active = tuple(active for active in state.active if active != name)
    if not state.configs:
        uninstall(model)
        while state.reshaped:
            state.reshaped.pop().undo()
    elif state_of(model) is state:
        install(model, state)


class Wrapper:
    """Replaces modules of a model by `AdapterLayer`s and back, in every parent that holds the module."""

    def __init__(self, model: nn.Module, state: State) -> None:
        self.model, self.state = model, state
        self.modules = dict(walk(model))

    def wrap(self, path: str) -> AdapterLayer:
        if path not in self.state.layers:
            module = self.modules[path]
            layer = self.state.layer_class(module, path, self.state)
            self._put(module, layer)
            self.state.layers[path] = layer
        return self.state.layers[path]

    def unwrap(self, path: str) -> nn.Module:
        layer = self.state.layers.pop(path)
        self._put(layer, layer.base_layer)
        return layer.base_layer

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        for parent, name in self._places(old):
            if parent is not new:
                parent._modules[name] = new

    def _places(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        if not hasattr(self, "_index"):
            self._index: dict[int, list[tuple[nn.Module, str]]] = {}
            for parent in self.model.modules():
                for name, child in parent._modules.items():
                    self._index.setdefault(id(child), []).append((parent, name))
        return self._index.get(id(module), [])


def _check_name(name: str, state: State) -> None:
    if not isinstance(name, str):
        raise VeneerError(f"an adapter's name must be a string, not {name!r}")
    if name == BASE:
        raise VeneerError(f"adapter name {name!r} is reserved for rows without an adapter; choose another name")
    if name in ("", ".", "..") or any(c in "/\\\0" or "\ud800" <= c <= "\udfff" for c in name):
        raise VeneerError(f"adapter name {name!r} cannot be a folder's name; choose another name")
    if len(name.encode()) > 255 or name in (CONFIG_NAME, WEIGHTS_NAME, checkpoint.NEXT_NAME):
        raise VeneerError(
            f"adapter name {name[:60]!r} is longer than 255 bytes, or the name of one of an adapter's files; choose "
            "another name"
        )
    if name in state.configs:
        raise VeneerError(f"the model already has an adapter called {name!r}; choose another name or delete it first")


def _add_member(model: nn.Module, config: Config, member: Config, name: str, layers: Wrapper, paths: list[str]) -> None:
    """Attach the adapters, the shared module and the prompt of one member of a config."""
    state, adapted = layers.state, [layers.wrap(path) for path in paths]
    shared = member.build_shared([layer.target for layer in adapted])
    prompt = None
    if isinstance(member, PromptConfig):
        prompt = member.build_prompt(spec_for(model, member), model.get_input_embeddings().weight)
    kind = member.peft_type
    for group, module in ((state.shared, shared), (state.prompts, prompt)):
        if module is not None and name in group:
            raise VeneerError(
                f"{name!r} cannot combine two methods that both have a shared module or a prompt; the second is {kind}"
            )
        if module is not None:
            group[name] = module
    built = []
    for layer in adapted:
        for adapter in _adapters_on(layer, member, shared):
            built.append((layer, adapter))
    for layer, adapter in built:
        layer.add(name, config.join(adapter))
    for _, adapter in built:
        if adapter.follows_ties:
            _add_twins(adapter, name, layers, lambda target, first: member.build(target, None, twin=first))
    _add_biases(model, member, name, layers, paths)


def _adapters_on(layer: AdapterLayer, config: Config, shared: Any) -> list[Adapter]:
    """The adapter of a layer, or one for each parameter that its module reads without calling a submodule."""
    if layer.target.kind in config.adapter.kinds:
        adapter = config.build(layer.target, shared)
        if layer.target.by_weight:
            _check_by_weight(adapter)
        return [adapter]
    built = [config.build(ParamTarget(layer, name), shared) for name in layer.target.inside]
    for adapter, key in zip(built, layer.target.inside.values(), strict=True):
        adapter.key = key
    return built


def _check_by_weight(adapter: Adapter) -> None:
    """Raise where an update of the weight cannot be put into the weight of a module with a forward of its own."""
    if not isinstance(adapter, Additive):
        return
    has_dropout = getattr(adapter, "dropout", None) is not None
    if has_dropout or not adapter.has_fold:
        target = adapter.target
        what = "dropout" if has_dropout else type(adapter).__name__
        raise TargetError(
            f"{target.path!r} ({type(target.base).__name__}) has a forward of its own, so an adapter can change only "
            f"its weight, on which there is no {what}; leave it out with exclude_modules"
        )


def _add_to_parameters(config: Config, name: str, layers: Wrapper, places: Sequence[tuple[str, str]]) -> None:
    """Attach adapters to bare parameters.

    In the file, the keys of a module's last adapter have no prefix, and each earlier one has one more "base_layer.".
    """
    count = Counter(path for path, _ in places)
    for path, parameter in places:
        layer = layers.wrap(path)
        target = _view_of(layer, parameter, name)
        adapter = config.build(target)
        count[path] -= 1
        adapter.key = "base_layer." * count[path]
        is_bare = target.kind == "param"
        if is_bare and ("param" not in adapter.kinds or getattr(adapter, "dropout", None) is not None):
            what = "dropout" if "param" in adapter.kinds else type(adapter).__name__
            raise TargetError(f"target_parameters: {target.path!r} is a bare parameter, which does not support {what}")
        layer.add(name, adapter)


def _view_of(layer: AdapterLayer, parameter: str, name: str) -> Target:
    """The target for an adapter on a parameter. For a linear layer's own weight, this is the target of the layer.

    Raises:
        TargetError: the weight is already adapted, or is not stored as a matrix (out, in).
    """
    target, weight = layer.target, getattr(layer.base_layer, parameter)
    if target.kind == "block" or parameter != "weight":
        return ParamTarget(layer, parameter)
    if name in layer.adapters:
        raise TargetError(f"target_parameters: the weight of {layer.path!r} is already adapted by target_modules")
    if target.kind != "linear" or target.as_matrix(weight) is not weight:
        kind = type(layer.base_layer).__name__
        raise TargetError(f"target_parameters: {layer.path!r} is a {kind}; put the module into target_modules")
    return target


def _check_keys(state: State, name: str) -> None:
    """Raise unless each tensor has a unique key in the file."""
    keys: Counter[str] = Counter()
    for prefix, part in checkpoint.parts(state, name):
        keys.update(prefix + key for key in checkpoint.export(part))
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise VeneerError(f"two methods combined under {name!r} would save the same keys:{listing(twice)}")


def _add_twins(first: Adapter, name: str, layers: Wrapper, build: Callable[[Target, Any], Adapter]) -> None:
    """Attach `build(target, first)` to every other module whose weight is the same Parameter as that of `first`."""
    base = first.target.base
    for path, module in layers.modules.items():
        if module is not base and module._parameters.get("weight") is base.weight:
            layer = layers.wrap(path)
            if name in layer.adapters:
                raise TargetError(
                    f"{first.target.path!r} and {path!r} share one weight; adapt only one of them, and the other one "
                    "uses the same adapter"
                )
            layer.add(name, build(layer.target, first))


def _add_biases(model: nn.Module, config: Config, name: str, layers: Wrapper, paths: list[str]) -> None:
    """Attach trained copies of biases: of all for `bias="all"`, of the adapted modules' for `"<method>_only"`."""
    kind = getattr(config, "bias", "none")
    if kind == "none":
        return
    candidates = [p for p, m in layers.modules.items() if m._parameters.get("bias") is not None]
    for path in candidates if kind == "all" else [p for p in candidates if p in paths]:
        layer = layers.wrap(path)
        layer.add(name, Bias(layer.target, beside=path in paths))
