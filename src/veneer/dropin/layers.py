"""`PeftLayer`: an adapter layer under the names and the methods that code written for PEFT uses on one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter, LowRank, Replace, TiedReplace
from ..core.layer import AdapterLayer
from ..core.state import State
from ..errors import NotMergeable
from ..methods.families.tied import TiedLoRA
from ..methods.trainable_tokens import TrainableTokens
from ..targets.target import Matrix, Target
from ..targets.walk import matches
from .slots import DropoutSlot, HeldSlot, ModuleSlot, SharedSlot, ShownTokens, TensorSlot, TiedSlot, as_factor
from .tables import methods as table

SHOWN = {own: shown for shown, own in table.EVERYWHERE.items()}
CONVOLUTION = {1: "Conv1d", 2: "Conv2d", 3: "Conv3d"}


def names_of(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class PeftLayer(AdapterLayer):
    """Shows an attribute of its adapters as a container by adapter name, and takes PEFT's calls on one layer."""

    _merged: tuple[str, ...] = ()
    fan_in_fan_out = False
    cast_input_dtype_enabled = True
    quantization_backend = None

    def __init__(self, base_layer: nn.Module, path: str, state: State) -> None:
        super().__init__(base_layer, path, state)
        self.__dict__["adapters"] = self._modules.pop("adapters")
        self.own: tuple[tuple[str, ...], bool] | None = None
        self.__dict__["readings"] = {}

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._merged and self.disable_adapters:
            self.unmerge()
        if self._merged:  # PEFT's layers then run their weight alone, whatever else is active
            return self.base_layer(*args, **kwargs)
        if self.own is None:
            return super().forward(*args, **kwargs)
        state = self.state
        before = state.active, state.enabled
        state.active, state.enabled = self.own
        try:
            return super().forward(*args, **kwargs)
        finally:
            state.active, state.enabled = before

    # Holding adapters

    def add(self, name: str, adapter: Adapter) -> None:
        super().add(name, adapter)
        for part in self.adapters[name].parts:
            if isinstance(part, LowRank) and hasattr(part, "lora_alpha"):
                self._show("dropout", DropoutSlot, part.key)
            for attribute, child in part._modules.items():
                if child is None:
                    continue
                if type(child) is Matrix and part.target.kind in ("linear", "conv", "param"):
                    as_factor(child, self.base_layer)
                self._show(attribute, ModuleSlot, part.key)
            for attribute, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is not None:
                    self._show(attribute, HeldSlot if attribute in table.IN_MODULES else TensorSlot, part.key)
            if group_of(part.key) == "token_adapter":
                self.group(part.key)
            if isinstance(part, TiedReplace):
                self._show("module", TiedSlot, part.key)
            if is_flat(part.shared):
                for attribute in (*part.shared._parameters, *part.shared._buffers):
                    self._modules.setdefault(attribute, SharedSlot(self.state, attribute))
        self._rename()
        self.__class__ = class_for(self)

    def _show(self, attribute: str, kind: Any, key: str = "") -> None:
        row = self.row()
        own = {mine: shown for shown, mine in row.aliases.items()} if row is not None else {}
        shown = own.get(attribute, SHOWN.get(attribute, attribute))
        slots = self._modules if not key else self.group(key)._modules
        if shown not in slots:
            slots[shown] = kind(self, attribute, key)

    def group(self, key: str) -> nn.Module:
        """What holds the tensors of parts whose keys begin with `key`."""
        name = group_of(key)
        if name not in self._modules:
            self._modules[name] = ShownTokens(self) if name == "token_adapter" else nn.Module()
        return self._modules[name]  # type: ignore[return-value]

    def _rename(self) -> None:
        """A module of which whole copies are trained is PEFT's `original_module`, beside `modules_to_save`."""
        copies = all(isinstance(part, Replace) for adapter in self.adapters.values() for part in adapter.parts)
        key = "original_module" if copies else "base_layer"
        other = "base_layer" if copies else "original_module"
        if other in self._modules:
            first = self._modules.pop(other)
            rest, self._modules = self._modules, {}
            self._modules.update({key: first, **rest})

    @property
    def base(self) -> nn.Module:
        found = self._modules.get("base_layer")
        return found if found is not None else self._modules["original_module"]  # type: ignore[return-value]

    def train(self, mode: bool = True) -> PeftLayer:
        super().train(mode)
        for adapter in self.__dict__["adapters"].values() if "adapters" in self.__dict__ else ():
            adapter.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for adapter in self.adapters.values():
            for part in adapter.parts:
                part.forget_dtype()
        return super()._apply(fn, recurse)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer" and "original_module" in self.__dict__.get("_modules", {}):
            self._modules["original_module"] = value
        elif isinstance(value, Mapping) and name in self.other_param_names:
            self.__dict__["readings"].pop(name, getattr(self, name)).keep()
            getattr(self, name).update(value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_modules", {})
        if name == "base_layer" and "original_module" in held:
            return held["original_module"]
        if name in held:
            return held[name]
        if name == "original_module" and held:  # PEFT's name where copies, or tokens, are trained beside it
            return self.base
        if name.startswith("__"):
            raise AttributeError(name)
        if "original_module" in held and name not in ("adapters", "state", "target"):
            active = next((self.adapters[n] for n in self.active_adapters if n in self.adapters), None)
            if active is not None and not self.disable_adapters and hasattr(active, "module"):
                return getattr(active.module, name)
            if (active is None or self.disable_adapters) and not (self.own and self.own[0] and active is None):
                return getattr(held["original_module"], name)
        kind = self.row()
        if kind is not None and name in kind.other:
            attribute = kind.aliases.get(name, table.EVERYWHERE.get(name, name))
            return self.__dict__["readings"].setdefault(name, Reading(self, attribute))
        if kind is not None and name in kind.trained and name not in self._modules:
            return followed(self, name) or nn.ParameterDict()
        return super().__getattr__(name)

    # What it is

    def parts(self, name: str) -> tuple[Adapter, ...]:
        adapter = self.adapters.get(name)
        return () if adapter is None else adapter.parts

    def kinds(self) -> set[str]:
        """The methods on it, as PEFT calls their types."""
        return {
            self.state.configs[n].peft_type.value for n in self.adapters if n in self.state.configs
        } or self.__dict__.get("was", set())

    def row(self) -> table.Row | None:
        kinds = self.kinds() if "state" in self.__dict__ and "adapters" in self.__dict__ else set()
        return table.METHODS.get(min(kinds)) if kinds else None

    @property
    def is_copy(self) -> bool:
        return "original_module" in self._modules

    def _get_name(self) -> str:
        row = self.row()
        name = type(self).__name__
        return name if self.is_copy or row is None or not row.layers else f"{row.package}.{shown_class(self, row)}"

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    # PEFT's attributes

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        row = self.row()
        return ("modules_to_save",) if self.is_copy else row.trained if row is not None else ()

    @property
    def other_param_names(self) -> tuple[str, ...]:
        row = self.row()
        return row.other if row is not None and not self.is_copy else ()

    @property
    def merged_adapters(self) -> Any:  # type: ignore[override]
        return list(self._merged)

    @merged_adapters.setter
    def merged_adapters(self, names: Sequence[str]) -> None:
        self.__dict__["_merged"] = tuple(names)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def active_adapters(self) -> list[str]:
        names = list(self.own[0] if self.own is not None else self.state.active)
        return [name for name in names if name in self.adapters] if self.is_copy else names

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 and self.is_copy else names

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self._keep(names_of(names), not self.disable_adapters)

    @property
    def disable_adapters(self) -> bool:
        return not (self.own[1] if self.own is not None else self.state.enabled)

    _disable_adapters = disable_adapters

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters.keys())

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapters.keys())

    @property
    def _adapters(self) -> set[str]:
        return set(self.adapters.keys())

    @property
    def in_features(self) -> int:
        return self._adapted().in_channels

    @property
    def out_features(self) -> int:
        return self._adapted().out_features

    def _adapted(self) -> Target:
        """What the adapters see: the module, or one of its parameters."""
        return next((part.target for adapter in self.adapters.values() for part in adapter.parts), self.target)

    @property
    def is_feedforward(self) -> bool:
        """Of IA3: it scales the input."""
        return any(getattr(part, "is_feedforward", False) for a in self.adapters.values() for part in a.parts)

    @property
    def parameter_name(self) -> str:
        """Which parameter of the module is adapted by itself."""
        return next(iter(bare_targets(self)), "")

    def get_base_layer(self) -> nn.Module:
        return self.base

    def get_base_weight(self) -> Tensor:
        return self.base.weight.data  # type: ignore[union-attr, return-value]

    def set_base_weight(self, weight_data: Tensor) -> None:
        self.base.weight.data = weight_data  # type: ignore[union-attr]

    # Switching one layer

    def learned(self, name: str) -> Iterator[nn.Parameter]:
        if name in self.adapters:
            yield from self.adapters[name].learned()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = names_of(adapter_names)
        for name in self.adapters:
            for parameter in self.learned(name):
                parameter.requires_grad_(name in names and not inference_mode)
        state = self.state
        state.trainable = state.trainable - set(names) | (set() if inference_mode else set(names))
        self._keep(names, not self.disable_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        self._keep(tuple(self.active_adapters), enabled)
        if enabled:
            self.set_adapter(self.active_adapters)
            return
        for name in self.adapters:
            for parameter in self.learned(name):
                parameter.requires_grad_(False)

    def _keep(self, names: tuple[str, ...], enabled: bool) -> None:
        """Note what is active here; once all layers agree, the model's own state says it."""
        state = self.state
        self.own = names, enabled
        if any(layer.own != self.own for layer in state.layers.values() if isinstance(layer, PeftLayer)):
            if (state.active, state.enabled) == self.own:
                self.own = None
            return
        state.active, state.enabled = names, enabled
        agree(state)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in names_of(adapter_names):
            for parameter in self.learned(name):
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str, *ignored: Any, **also_ignored: Any) -> None:
        if adapter_name in self.adapters:
            self.__dict__["was"] = self.kinds()
            del self.adapters[adapter_name]
        if adapter_name in self.active_adapters:
            rest = [name for name in self.active_adapters if name != adapter_name]
            left = self._all_available_adapter_names()
            if not rest and left:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                    stacklevel=2,
                )
            self.set_adapter(rest or left[:1])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        adapter = self.adapters.get(adapter_name)
        if adapter is not None and not any(p.is_meta for p in adapter.parameters()):
            adapter.to(device or self.target.device)

    # Merging one layer

    def merge(
        self,
        names: Any = None,
        safe: bool = False,
        *,
        safe_merge: bool | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Fold adapters into the weight. PEFT's first argument is `safe_merge`, ours the names."""
        if isinstance(names, bool):
            names, safe = (safe or None), names  # type: ignore[assignment]
        if names is None:
            names = to_merge(self, adapter_names)
        wanted = [n for n in names if n in self.adapters]
        check_tokens([p for n in (*self.merged_adapters, *wanted) for p in self.parts(n)])
        try:
            super().merge(wanted, safe if safe_merge is None else safe_merge)
        except NotMergeable as error:
            if "not finite" not in str(error):
                raise
            raise NotMergeable(
                f"NaNs detected in the merged weights. The adapter {', '.join(wanted)} seems to be broken"
            ) from error

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        super().unmerge()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, as the module stores it."""
        deltas = [part.delta() for part in self.parts(adapter) if hasattr(part, "delta")]
        if not deltas:
            raise KeyError(adapter)
        return self.target.as_stored(sum(deltas[1:], deltas[0]))

    # LoRA's scaling

    def _scalings(self, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        for name in names:
            yield from ((name, part) for part in self.parts(name) if hasattr(part, "lora_alpha"))

    def set_scale(self, adapter: str, scale: float) -> None:
        for _, part in self._scalings([adapter]):
            part.scaling = scale * first_scaling(part)

    def scale_layer(self, scale: float) -> None:
        for _, part in self._scalings(self.active_adapters):
            part.scaling = part.scaling * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for _, part in self._scalings(self.active_adapters):
            part.scaling = first_scaling(part) if scale is None else part.scaling / scale

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any = None, **settings: Any) -> None:
        """Put a new LoRA under a name on this layer alone."""
        import copy

        from .configs import LoraConfig

        config = copy.copy(config) if config is not None else LoraConfig()
        config.__dict__.update(r=r, lora_alpha=lora_alpha, rank_pattern={}, alpha_pattern={}, **settings)
        if adapter_name in self.adapters:
            del self.adapters[adapter_name]
        self.state.configs.setdefault(adapter_name, config)
        self.add(adapter_name, config.build(self.target))
        for parameter in self.learned(adapter_name):
            parameter.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        config: Any = self.state.configs.get(adapter_name)
        is_kasa = getattr(config, "kasa_config", None) is not None
        return self.target.kind == "linear" and not is_kasa and self.kinds() <= table.CONVERTS


def check_tokens(parts: Sequence[Adapter]) -> None:
    """Raise where two adapters would each write the same tokens' embeddings."""
    seen: set[int] = set()
    for part in (p for p in parts if isinstance(p, TrainableTokens)):
        both = seen & set(part.index.tolist())  # type: ignore[operator]
        if both:
            raise NotMergeable(
                f"Token indices {sorted(both)} are already defined and would result in undefined merging behavior. "
                "Only disjunct token indices are currently supported."
            )
        seen |= set(part.index.tolist())  # type: ignore[operator]


class Reading(Mapping[str, Any]):
    """A setting of a layer's adapters by name; what can be written goes to the adapter."""

    def __init__(self, layer: PeftLayer, attribute: str) -> None:
        self._layer, self._attribute = layer, attribute
        self._kept: dict[str, Any] | None = None

    def keep(self) -> None:
        """Stay as it is: another dict has taken its place on the layer."""
        self._kept = dict(self)

    def __getitem__(self, name: str) -> Any:
        if self._kept is not None:
            return self._kept[name]
        if name not in self._layer.adapters:
            raise KeyError(name)
        for holder in (*self._layer.parts(name), self._layer.state.configs.get(name)):
            if hasattr(holder, self._attribute):
                value = getattr(holder, self._attribute)
                return nn.Identity() if value is None and self._attribute == "dropout" else value
        if self._attribute == "dropout":
            return nn.Identity()
        raise KeyError(name)

    def __setitem__(self, name: str, value: Any) -> None:
        for part in self._layer.parts(name):
            if hasattr(part, self._attribute):
                setattr(part, self._attribute, value)

    def update(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self[name] = value

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __iter__(self) -> Iterator[str]:
        for name in list(self._layer.adapters.keys() if self._kept is None else self._kept):
            try:
                self[name]
            except KeyError:
                continue
            yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def group_of(key: str) -> str:
    """Where adapters stand whose tensors have a further part in their names: tokens, or a module's other parameters."""
    count = key.count("base_layer.")
    return f"base_layer_{count}" if count else key.strip(".")


def followed(layer: PeftLayer, attribute: str) -> dict[str, Any]:
    """By adapter: what a layer shows under a name, but another layer holds."""
    found: dict[str, Any] = {}
    for name, adapter in layer.adapters.items():
        for part in adapter.parts:
            shown = _transposed(part) if isinstance(part, TiedLoRA) else _borrowed(layer.state, name, part)
            found |= {name: shown[attribute]} if attribute in shown else {}
    return found


def _transposed(part: TiedLoRA) -> dict[str, Any]:
    """The other layer's factors, each in the place of the other."""
    A, B = part.shared.matrices()
    shown = zip(part.names(), (B.T, A.T), strict=True)
    return {n.removesuffix(".weight"): SimpleNamespace(weight=t) if "." in n else t for n, t in shown}


def _borrowed(state: State, name: str, part: Adapter) -> dict[str, Any]:
    """Modules of the same name on the layers whose tensors this one's would repeat."""
    owners = {key: whose.removesuffix(f".{key}") for key, whose in part.repeats().items()}
    names = {key.partition(".")[0]: path for key, path in owners.items() if path in state.layers}
    return {attribute: getattr(state.layers[path], attribute)[name] for attribute, path in names.items()}


def is_flat(shared: Any) -> bool:
    """What layers share is tensors alone, which each of them can show."""
    return isinstance(shared, nn.Module) and not isinstance(shared, Adapter) and not shared._modules


def agree(state: State) -> None:
    """Let every layer follow the model's state again."""
    for layer in state.layers.values():
        if isinstance(layer, PeftLayer):
            layer.own = None


def first_scaling(part: Any) -> float:
    return part.lora_alpha / (math.sqrt(part.r) if part.config.use_rslora else part.r)


def to_merge(layer: PeftLayer, adapter_names: Sequence[str] | None) -> list[str]:
    """PEFT's `check_adapters_to_merge`: those that are not merged yet."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
    merged = layer.merged_adapters
    rest = [name for name in names if name not in merged]
    if merged and rest:
        warnings.warn(
            f"Already following adapters were merged {','.join(merged)}. "
            f"You are now additionally merging {','.join(rest)}.",
            stacklevel=3,
        )
    elif merged:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return rest


# What PEFT's layer classes mean


def fits(layer: PeftLayer, name: str) -> bool:
    """Whether one of PEFT's class names ("Linear", "SVDLinear", "Conv2d", "LoraLayer") fits what a layer wraps."""
    target = layer.target
    if name.endswith("Layer"):
        return True
    if name == "ParamWrapper":
        return bool(bare_targets(layer))
    if name == "MultiheadAttention":
        return isinstance(layer.base, nn.MultiheadAttention)
    if name in table.QUANTISED or type(layer.base).__name__ in table.BNB:
        return table.QUANTISED.get(name) == type(layer.base).__name__
    if target.kind == "conv":
        return name.endswith(CONVOLUTION[target.spatial])
    return (target.kind == "linear" and name.endswith("Linear")) or (
        target.kind == "embedding" and name.endswith("Embedding")
    )


class Marker(type):
    """The type of PEFT's layer classes: a layer is an instance of those that fit its methods and its module."""

    kind: str | None = None

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        if not isinstance(instance, PeftLayer) or instance.is_copy:
            return False
        if cls.kind is None:
            return True
        kinds = instance.kinds() | ({"LORA"} if "ADALORA" in instance.kinds() else set())
        return cls.kind in kinds and fits(instance, cls.__name__)


class BaseTunerLayer(metaclass=Marker):
    """Any layer with an adapter on it."""

    adapter_layer_names: Any = ()
    other_param_names: Any = ()


class CopyMarker(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or (isinstance(instance, PeftLayer) and instance.is_copy)


class AuxiliaryTrainingWrapper(metaclass=CopyMarker):
    """A module of which copies are trained."""


class ModulesToSaveWrapper(PeftLayer, AuxiliaryTrainingWrapper):
    """The same; PEFT has another one for tokens, which is an adapter here."""


class TokensMarker(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, PeftLayer) and "token_adapter" in instance._modules


class TrainableTokensWrapper(metaclass=TokensMarker):
    """A layer with trained tokens beside another method."""


def layer_classes(kind: str, row: table.Row) -> dict[str, Any]:
    """PEFT's layer classes of one method, by name: a general one to mix in, and those of which layers are made."""
    module = f"peft.tuners.{row.package}.layer"
    names = {"kind": kind, "__module__": module, "adapter_layer_names": OfClass("adapter_layer_names", row.trained)}
    names["other_param_names"] = OfClass("other_param_names", row.other)
    made: dict[str, Any] = {}
    for name in row.layers:
        general = (made[row.layers[0]],) if made else (BaseTunerLayer,)
        is_mixin = not made and len(row.layers) > 1
        made[name] = Marker(name, general if is_mixin else (PeftLayer, *general), dict(names))
    return made


class OfClass:
    """An attribute that a class has as such, and a layer by the adapters it holds."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def __get__(self, layer: Any, owner: type) -> Any:
        return getattr(PeftLayer, self.name).fget(layer) if isinstance(layer, PeftLayer) else self.value


def bare_targets(layer: PeftLayer) -> list[str]:
    """Names of the module's parameters that `target_parameters` mean, in any form."""
    wanted = [
        n for name in layer.adapters for n in getattr(layer.state.configs.get(name), "target_parameters", None) or ()
    ]
    return [n for n in layer.base._parameters if any(matches(f"{layer.path}.{n}", entry) for entry in wanted)]


def shown_class(layer: PeftLayer, row: table.Row) -> str:
    """The name of PEFT's class for a layer."""
    if "ParamWrapper" in row.layers and fits(layer, "ParamWrapper"):
        return "ParamWrapper"
    return next((name for name in row.layers[1:] if fits(layer, name)), row.layers[0])


def class_for(layer: PeftLayer) -> type[PeftLayer]:
    """The class that a layer is of in PEFT, by its method and its module."""
    row = layer.row()
    if layer.is_copy or row is None or not row.layers:
        return ModulesToSaveWrapper if layer.is_copy else PeftLayer
    found = LAYERS[min(layer.kinds())][shown_class(layer, row)]
    return found if issubclass(found, PeftLayer) else PeftLayer


LAYERS = {kind: layer_classes(kind, row) for kind, row in table.METHODS.items()}
