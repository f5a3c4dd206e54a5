"""`PeftLayer`: an adapter layer with the attributes and methods of PEFT's layers."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import operator
import re
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
from .absent import NotInDropIn, placeholder, reason_for
from .adamss import WithImportance
from .block_diagonal import as_blocks
from .configs import LoraConfig
from .slots import DropoutSlot, HeldSlot, ModuleSlot, SharedSlot, ShownTokens, TensorSlot, TiedSlot, as_factor
from .tables import methods as table
from .tables import names as pefts_names
from .tables.absent import ABSENT_ATTRIBUTES
from .wording import pefts_words

SHOWN = {own: shown for shown, own in table.EVERYWHERE.items()}
"""PEFT's names of attributes, by veneer's name."""
CONVOLUTION = {1: "Conv1d", 2: "Conv2d", 3: "Conv3d"}
"""Names of PEFT's convolutions, by the number of spatial dimensions."""


def names_of(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class PeftLayer(AdapterLayer):
    """An adapter layer that, like PEFT's layers, exposes its adapters' attributes as containers by adapter name."""

    _merged: tuple[str, ...] = ()
    fan_in_fan_out = False
    frozen_peft_weight_names: tuple[str, ...] = ()
    cast_input_dtype_enabled = True
    quantization_backend = None

    def __init__(self, base_layer: nn.Module, path: str, state: State) -> None:
        super().__init__(base_layer, path, state)
        self.__dict__["adapters"] = self._modules.pop("adapters")
        self.own: tuple[tuple[str, ...], bool] | None = None
        """(active names, enabled) of this layer alone; None while it follows the state of the model."""
        self.__dict__["readings"] = {}

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._merged and self.disable_adapters:
            self.unmerge()
        if self._merged:  # as in PEFT, other active adapters are then ignored
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
            self._show_part(part)
        self._rename()
        self.__class__ = class_for(self)

    def _show_part(self, part: Adapter) -> None:
        """Create the slots that expose the modules and tensors of an adapter."""
        if isinstance(part, LowRank) and hasattr(part, "lora_alpha"):
            self._show("dropout", DropoutSlot, part.key)
        for attribute, child in part._modules.items():
            if child is None:
                continue
            if type(child) is Matrix and attribute == f"lora_{getattr(part, 'side', '')}":
                as_blocks(child, part.config.use_bdlora.nblocks)
            elif type(child) is Matrix and part.target.kind in ("linear", "conv", "param"):
                as_factor(child, self.base_layer)
            self._show(attribute, ModuleSlot, part.key)
        for tensors in (part._parameters, part._buffers):
            for attribute, tensor in tensors.items():
                if tensor is not None:
                    slot_class = HeldSlot if attribute in table.IN_MODULES else TensorSlot
                    self._show(attribute, slot_class, part.key)
        if group_of(part.key) == "token_adapter":
            self.group(part.key)
        if isinstance(part, TiedReplace):
            self._show("module", TiedSlot, part.key)
        if is_flat(part.shared):
            for attribute in (*part.shared._parameters, *part.shared._buffers):
                self._modules.setdefault(attribute, SharedSlot(self.state, attribute))

    def _show(self, attribute: str, slot_class: Any, key: str) -> None:
        shown = self._shown_name(attribute)
        slots = self._modules if not key else self.group(key)._modules
        if shown not in slots:
            slots[shown] = slot_class(self, attribute, key)

    def _shown_name(self, attribute: str) -> str:
        """PEFT's name of an adapter's attribute."""
        row = self.row()
        if row is not None:
            for shown, alias_of in row.aliases.items():
                if alias_of == attribute:
                    return shown
        return SHOWN.get(attribute, attribute)

    def group(self, key: str) -> nn.Module:
        """The child that holds the slots of parts with this key."""
        name = group_of(key)
        if name not in self._modules:
            self._modules[name] = ShownTokens(self) if name == "token_adapter" else nn.Module()
        return self._modules[name]  # type: ignore[return-value]

    def _rename(self) -> None:
        """Name the wrapped module as PEFT does: `original_module` where only copies of it are trained."""
        if all(_is_replacement(self.parts(name)) for name in self.adapters):
            name = "original_module"
            other = "base_layer"
        else:
            name = "base_layer"
            other = "original_module"
        if other in self._modules:
            wrapped = self._modules.pop(other)
            self._modules = {name: wrapped, **self._modules}

    @property
    def base(self) -> nn.Module:
        """The wrapped module."""
        wrapped = self._modules.get("base_layer")
        if wrapped is None:
            wrapped = self._modules["original_module"]
        return wrapped  # type: ignore[return-value]

    def train(self, mode: bool = True) -> PeftLayer:
        super().train(mode)
        adapters = self.__dict__.get("adapters")
        if adapters is not None:  # not yet, while the base class is initialised
            for adapter in adapters.values():
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
            previous = self.__dict__["readings"].pop(name, getattr(self, name))
            previous.keep()
            getattr(self, name).update(value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_modules", {})
        if name == "base_layer" and "original_module" in held:
            return held["original_module"]
        if name in held:
            return held[name]
        if name == "original_module" and held:  # PEFT's name also where an adapter or tokens are trained on the module
            return self.base
        if name.startswith("__"):
            raise AttributeError(name)
        if "original_module" in held and name not in ("adapters", "state", "target"):
            module = self._running_module()
            if module is not None:
                return getattr(module, name)
        row = self.row()
        if row is not None and name in row.other:
            attribute = row.aliases.get(name, table.EVERYWHERE.get(name, name))
            return self.__dict__["readings"].setdefault(name, Reading(self, attribute))
        if row is not None and name in row.trained:
            return followed(self, name) or nn.ParameterDict()
        if name in table.OF_VARIANTS:
            reading = Initialised(self, table.OF_VARIANTS[name])
            if len(reading):
                return reading
        if name == "lora_variant" and self.kinds() == {"LORA"}:
            return {adapter: self.parts(adapter)[0] for adapter in self.adapters}
        if row is not None and RESETS.fullmatch(name):
            return functools.partial(initialise_again, self)
        return super().__getattr__(name)

    def _running_module(self) -> nn.Module | None:
        """On a module with trained copies, the one that runs: the active copy or the original."""
        original = self._modules["original_module"]
        active = next((self.adapters[name] for name in self.active_adapters if name in self.adapters), None)
        if active is None:
            has_own_names = self.own is not None and bool(self.own[0])
            return None if has_own_names else original
        if self.disable_adapters:
            return original
        return getattr(active, "module", None)

    # Type

    def parts(self, name: str) -> tuple[Adapter, ...]:
        adapter = self.adapters.get(name)
        return () if adapter is None else adapter.parts

    def kinds(self) -> set[str]:
        """PEFT's types of the methods on this layer; if all adapters were deleted, of the last ones."""
        configs = self.state.configs
        present = {configs[name].peft_type.value for name in self.adapters if name in configs}
        return present or self.__dict__.get("last_kinds", set())

    def row(self) -> table.Row | None:
        """The row of PEFT's names for the method on this layer."""
        if "state" not in self.__dict__ or "adapters" not in self.__dict__:
            return None
        kinds = self.kinds()
        return table.METHODS.get(min(kinds)) if kinds else None

    @property
    def is_copy(self) -> bool:
        """Whether only whole copies of the module are trained (`modules_to_save`)."""
        return "original_module" in self._modules

    def _get_name(self) -> str:
        row = self.row()
        if self.is_copy or row is None or not row.layers:
            return type(self).__name__
        return f"{row.package}.{shown_class(self, row)}"

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    # PEFT's attributes

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        if self.is_copy:
            return ("modules_to_save",)
        row = self.row()
        return row.trained if row is not None else ()

    @property
    def other_param_names(self) -> tuple[str, ...]:
        row = self.row()
        if row is None or self.is_copy:
            return ()
        return row.other

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
        active, _ = self._current()
        if self.is_copy:
            return [name for name in active if name in self.adapters]
        return list(active)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 and self.is_copy else names

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self._switch(names_of(names), not self.disable_adapters)

    def _current(self) -> tuple[tuple[str, ...], bool]:
        """(active names, enabled): this layer's own, or those of the model."""
        if self.own is not None:
            return self.own
        return self.state.active, self.state.enabled

    @property
    def disable_adapters(self) -> bool:
        _, enabled = self._current()
        return not enabled

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
        """The target of the adapters: the module, or one of its parameters."""
        for adapter in self.adapters.values():
            return adapter.parts[0].target
        return self.target

    @property
    def is_feedforward(self) -> bool:
        """Whether an IA3 on this layer scales the input instead of the output."""
        for adapter in self.adapters.values():
            if any(getattr(part, "is_feedforward", False) for part in adapter.parts):
                return True
        return False

    @property
    def parameter_name(self) -> str:
        """Name of the module's parameter that is adapted directly (`target_parameters`), or ""."""
        return next(iter(bare_targets(self)), "")

    def get_param(self) -> nn.Parameter:
        """The parameter of the module that is adapted directly."""
        return getattr(self.base, self.parameter_name)

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
            self.set_requires_grad(name, name in names and not inference_mode)
        state = self.state
        if inference_mode:
            state.trainable = state.trainable - set(names)
        else:
            state.trainable = state.trainable | set(names)
        self._switch(names, not self.disable_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        self._switch(tuple(self.active_adapters), enabled)
        if enabled:
            self.set_adapter(self.active_adapters)
            return
        for name in self.adapters:
            self.set_requires_grad(name, False)

    def _switch(self, active: tuple[str, ...], enabled: bool) -> None:
        """Switch this layer alone; once all layers agree, the model's state takes over."""
        state = self.state
        self.own = active, enabled
        if all(layer.own == self.own for layer in state.layers.values() if isinstance(layer, PeftLayer)):
            state.active = active
            state.enabled = enabled
            agree(state)
        elif (state.active, state.enabled) == self.own:
            self.own = None

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in names_of(adapter_names):
            for parameter in self.learned(name):
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Any = None) -> None:
        if adapter_name in self.adapters:
            self.__dict__["last_kinds"] = self.kinds()
            del self.adapters[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        active = [name for name in self.active_adapters if name != adapter_name]
        left = self._all_available_adapter_names()
        if not active and left:
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                stacklevel=2,
            )
            active = left[:1]
        self.set_adapter(active)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        adapter = self.adapters.get(adapter_name)
        if adapter is None or any(parameter.is_meta for parameter in adapter.parameters()):
            return
        adapter.to(device or self.target.device)

    # Merging one layer

    @pefts_words()
    def merge(self, safe_merge: Any = False, adapter_names: Any = None) -> None:  # type: ignore[override]
        """Fold adapters into the weight; by default the active ones.

        Veneer's engine calls it in its own way, with the names first and then whether to check the result.
        """
        if isinstance(safe_merge, bool):
            safe = safe_merge
            names = to_merge(self, adapter_names)
        else:
            safe = bool(adapter_names)
            names = to_merge(self, None) if safe_merge is None else safe_merge
        present = [name for name in names if name in self.adapters]
        self._check_tokens(present)
        try:
            super().merge(present, safe)
        except NotMergeable as error:
            if "not finite" not in str(error):
                raise
            raise NotMergeable(
                f"NaNs detected in the merged weights. The adapter {', '.join(present)} seems to be broken"
            ) from error

    def _check_tokens(self, names: Sequence[str]) -> None:
        """Raise NotMergeable if two merged adapters would both write the embedding of a token."""
        written: set[int] = set()
        for name in (*self.merged_adapters, *names):
            for part in self.parts(name):
                if isinstance(part, TrainableTokens):
                    tokens = set(part.index.tolist())  # type: ignore[operator]
                    _check_disjoint(written, tokens)
                    written |= tokens

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        super().unmerge()

    def get_delta_weight(self, adapter: str = "", *, adapter_name: str = "") -> Tensor:
        """What an adapter adds to the weight, in the layout in which the module stores it."""
        adapter = adapter or adapter_name
        deltas = [part.delta() for part in self.parts(adapter) if hasattr(part, "delta")]
        if not deltas:
            raise KeyError(adapter)
        total = deltas[0]
        for delta in deltas[1:]:
            total = total + delta
        return self.target.as_stored(total)

    # LoRA's scaling

    def _scaled_parts(self, names: Sequence[str]) -> list[Any]:
        scaled = []
        for name in names:
            scaled += [part for part in self.parts(name) if hasattr(part, "lora_alpha")]
        return scaled

    def set_scale(self, adapter: str, scale: float) -> None:
        for part in self._scaled_parts([adapter]):
            part.scaling = scale * first_scaling(part)

    def scale_layer(self, scale: float) -> None:
        for part in self._scaled_parts(self.active_adapters):
            part.scaling = part.scaling * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for part in self._scaled_parts(self.active_adapters):
            part.scaling = first_scaling(part) if scale is None else part.scaling / scale

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **settings: Any) -> None:
        """Attach a new LoRA to this layer alone; it replaces an adapter of the same name."""
        config = LoraConfig() if config is None else copy.copy(config)
        config.__dict__.update(r=r, lora_alpha=lora_alpha, rank_pattern={}, alpha_pattern={}, **settings)
        if adapter_name in self.adapters:
            del self.adapters[adapter_name]
        self.state.configs.setdefault(adapter_name, config)
        self.add(adapter_name, config.build(self.target))
        is_active = adapter_name in self.active_adapters
        self.set_requires_grad(adapter_name, is_active and not config.inference_mode)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        config: Any = self.state.configs.get(adapter_name)
        is_kasa = getattr(config, "kasa_config", None) is not None
        return self.target.kind == "linear" and not is_kasa and self.kinds() <= table.CONVERTS


def _is_replacement(parts: Sequence[Adapter]) -> bool:
    return all(isinstance(part, Replace) for part in parts)


def _check_disjoint(written: set[int], tokens: set[int]) -> None:
    both = written & tokens
    if both:
        raise NotMergeable(
            f"Token indices {sorted(both)} are already defined and would result in undefined merging behavior. "
            "Only disjunct token indices are currently supported."
        )


class Reading(Mapping[str, Any]):
    """A setting of a layer's adapters, by adapter name; writing an entry sets it on the adapter."""

    def __init__(self, layer: PeftLayer, attribute: str) -> None:
        self._layer = layer
        self._attribute = attribute
        self._kept: dict[str, Any] | None = None

    def keep(self) -> None:
        """Freeze the current values, because another mapping has been assigned to the layer's attribute."""
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
        names = self._layer.adapters if self._kept is None else self._kept
        for name in list(names):
            try:
                self[name]
            except KeyError:
                continue
            yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class Initialised(Reading):
    """Whether each VeLoRA of a layer has its direction, which the first batch may give it."""

    def __getitem__(self, name: str) -> bool:
        for part in self._layer.parts(name):
            if hasattr(part, self._attribute):
                return bool(part.lora_velora_embed.any())
        raise KeyError(name)


def group_of(key: str) -> str:
    """Name of the child that shows the parts with this key: trained tokens, or further parameters of the module."""
    count = key.count("base_layer.")
    return f"base_layer_{count}" if count else key.strip(".")


def followed(layer: PeftLayer, attribute: str) -> dict[str, Any]:
    """Modules and tensors that a layer exposes although another layer holds them, by adapter."""
    by_adapter: dict[str, Any] = {}
    for name, adapter in layer.adapters.items():
        for part in adapter.parts:
            shown = _transposed(part) if isinstance(part, TiedLoRA) else _borrowed(layer.state, name, part)
            if attribute in shown:
                by_adapter[name] = shown[attribute]
    return by_adapter


def _transposed(part: TiedLoRA) -> dict[str, Any]:
    """The factors of the layer that shares the weight, transposed and swapped, by attribute."""
    A, B = part.shared.matrices()
    shown: dict[str, Any] = {}
    for name, factor in zip(part.names(), (B.T, A.T), strict=True):
        if "." in name:
            shown[name.removesuffix(".weight")] = SimpleNamespace(weight=factor)
        else:
            shown[name] = factor
    return shown


def _borrowed(state: State, name: str, part: Adapter) -> dict[str, Any]:
    """The modules of other layers that hold the tensors of this part, by attribute."""
    shown: dict[str, Any] = {}
    for key, source in part.repeats().items():
        path = source.removesuffix(f".{key}")
        if path in state.layers:
            attribute = key.partition(".")[0]
            shown[attribute] = getattr(state.layers[path], attribute)[name]
    return shown


def is_flat(shared: Any) -> bool:
    """Whether the module that layers share holds only tensors, which each layer can expose."""
    return isinstance(shared, nn.Module) and not isinstance(shared, Adapter) and not shared._modules


def agree(state: State) -> None:
    """Make every layer follow the model's state again."""
    for layer in state.layers.values():
        if isinstance(layer, PeftLayer):
            layer.own = None


def first_scaling(part: Any) -> float:
    """The scaling that a LoRA had when it was made."""
    divisor = math.sqrt(part.r) if part.config.use_rslora else part.r
    return part.lora_alpha / divisor


def to_merge(module: PeftLayer, adapter_names: Sequence[str] | None = None) -> list[str]:
    """The adapters that are not merged yet; PEFT's `check_adapters_to_merge`."""
    layer = module
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


def fits(layer: PeftLayer, name: str) -> bool:
    """Whether the layer class of this name in PEFT ("SVDLinear", "Conv2d", "LoraLayer") suits the wrapped module."""
    target = layer.target
    if name.endswith("Layer"):
        return True
    if name == "ParamWrapper":
        return bool(bare_targets(layer))
    if name == "MultiheadAttention":
        return isinstance(layer.base, nn.MultiheadAttention)
    wrapped = type(layer.base).__name__
    if name in table.QUANTISED or wrapped in table.BNB:
        return table.QUANTISED.get(name) == wrapped
    if target.kind == "conv":
        return name.endswith(CONVOLUTION[target.spatial])
    if target.kind == "linear":
        return name.endswith("Linear")
    return target.kind == "embedding" and name.endswith("Embedding")


class Shown(type):
    """Metaclass of PEFT's layer classes that are no base class of veneer's layer: they show what it has."""

    @property
    def __signature__(cls) -> inspect.Signature:
        """PEFT's parameters. It is a property so that layers, which are called with an input, do not have it."""
        for base in cls.__mro__:  # a program may have made a subclass
            theirs = pefts_names.constructor(base.__module__, base.__name__)
            if theirs is not None:
                return theirs
        raise AttributeError("__signature__")

    def __getattr__(cls, name: str) -> Any:
        """An attribute of every layer, for PEFT's classes that are no base class of veneer's layer."""
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(PeftLayer, name)
        except AttributeError:
            found = by_name(f"{cls.__module__}.{cls.__name__}", name)
        if found is None:
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        return found


class Marker(Shown):
    """Metaclass of the layer classes of methods: a layer is an instance of those that fit its methods and module."""

    kind: str | None = None

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        """A layer around a module that is in no model, as PEFT makes it."""
        bound = inspect.signature(cls).bind(*args, **settings)
        return standing_alone(cls, **bound.arguments)

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        if not isinstance(instance, PeftLayer) or instance.is_copy:
            return False
        if cls.kind is None:
            return True
        kinds = instance.kinds()
        is_subclass = cls.kind == "LORA" and "ADALORA" in kinds
        return (cls.kind in kinds or is_subclass) and fits(instance, cls.__name__)


RESETS = re.compile(r"reset_\w*(parameters|logits)\w*")
"""Names of the methods with which PEFT's layers initialise an adapter again."""


READ_THROUGH = ("weight", "bias")
"""Attributes that a layer reads from the module that it wraps."""
OF_ATTENTION = (
    "embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "in_proj_weight", "in_proj_bias",
    "out_proj", "bias_k", "bias_v", "merge_masks", "add_zero_attn",
)  # fmt: skip
"""The same for a layer around `nn.MultiheadAttention`."""


def by_name(owner: str, name: str) -> Any:
    """A method that PEFT's class has and that is made from its name; None if there is none."""
    if RESETS.fullmatch(name):
        return initialise_again
    if name in READ_THROUGH or (name in OF_ATTENTION and owner.endswith(".MultiheadAttention")):
        return property(operator.attrgetter(f"base.{name}"))
    reason = reason_for(f"{owner}.{name}", ABSENT_ATTRIBUTES)
    return None if reason is None else placeholder(f"{owner}.{name}", "function", reason)


def initialise_again(layer: PeftLayer, adapter_name: str, init_weights: Any = None, *ignored: Any) -> None:
    """Give an adapter of a layer new initial values, which its config determines."""
    if adapter_name not in layer.adapters:
        return
    config = copy.copy(layer.state.configs[adapter_name])
    for field in ("init_weights", "init_lora_weights"):
        if hasattr(config, field) and init_weights is not None:
            setattr(config, field, init_weights)
    for part in layer.parts(adapter_name):
        fresh = config.build(part.target, part.shared)
        for new in fresh.parts:
            part.load_state_dict(new.state_dict(), strict=False)


OF_WHOLE_MODELS = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
"""Fields of configs that choose modules of a model."""


def standing_alone(
    layer_class: Any, base_layer: nn.Module, adapter_name: str = "", config: Any = None, **more: Any
) -> Any:
    """A layer of PEFT's class around a module, with one adapter that is active.

    Args:
        more: further settings as PEFT's class takes them. Those that the config has too replace its own.

    Raises:
        NotInDropIn: no adapter is given.
    """
    from .attach import activate, put_on

    if not adapter_name or config is None:
        path = f"{layer_class.__module__}.{layer_class.__name__}"
        raise NotInDropIn(f"{path} needs an adapter's name and its config: veneer has no layer without an adapter")
    config = copy.copy(config)
    for name, value in {**more.pop("kwargs", {}), **more}.items():
        if value and hasattr(config, name):
            setattr(config, name, value)
    for field in OF_WHOLE_MODELS:
        if hasattr(config, field):
            setattr(config, field, None)
    for field in ("rank_pattern", "alpha_pattern"):
        if hasattr(config, field):
            setattr(config, field, {})
    config.target_modules = ["layer"]
    holder = nn.Module()
    holder.layer = base_layer
    state = put_on(holder, config, adapter_name)
    activate(state, adapter_name, config.inference_mode)
    return holder.layer


class BaseTunerLayer(metaclass=Marker):
    """Any layer with an adapter."""

    adapter_layer_names: Any = ()
    other_param_names: Any = ()


class CopyMarker(Shown):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotInDropIn(f"{cls.__name__} cannot be made alone: set modules_to_save in a config")

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or (isinstance(instance, PeftLayer) and instance.is_copy)


class AuxiliaryMarker(CopyMarker):
    def __instancecheck__(cls, instance: Any) -> bool:
        is_tokens = cls is AuxiliaryTrainingWrapper and isinstance(instance, TrainableTokensWrapper)
        return is_tokens or super().__instancecheck__(instance)


class AuxiliaryTrainingWrapper(metaclass=AuxiliaryMarker):
    """A module with trained copies."""


class ModulesToSaveWrapper(PeftLayer, AuxiliaryTrainingWrapper):
    """A module with trained copies; PEFT has another wrapper for trained tokens, which are an adapter in veneer."""


class TokensMarker(Shown):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotInDropIn(f"{cls.__name__} cannot be made alone: set trainable_token_indices in a config")

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, PeftLayer) and "token_adapter" in instance._modules


class TrainableTokensWrapper(metaclass=TokensMarker):
    """A layer with trained tokens next to another method."""


MIXINS: dict[str, type] = {"ADAMSS": WithImportance}
"""Further methods of the layers of some methods."""


def layer_classes(kind: str, row: table.Row) -> dict[str, Any]:
    """PEFT's layer classes of one method, by name: the general mixin first, then the concrete classes."""
    namespace = {
        "kind": kind,
        "__module__": f"peft.tuners.{row.package}.layer",
        "adapter_layer_names": OfClass("adapter_layer_names", row.trained),
        "other_param_names": OfClass("other_param_names", row.other),
    }
    classes: dict[str, Any] = {}
    for name in row.layers:
        general = classes[row.layers[0]] if classes else BaseTunerLayer
        is_mixin = not classes and len(row.layers) > 1
        bases: tuple[type, ...] = (general,) if is_mixin else (PeftLayer, general)
        if is_mixin and kind in MIXINS:
            bases = (MIXINS[kind], general)
        classes[name] = Marker(name, bases, dict(namespace))
    return classes


class OfClass:
    """An attribute that has the method's value on the class, and on a layer a value that depends on its adapters."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value

    def __get__(self, layer: Any, owner: type) -> Any:
        if isinstance(layer, PeftLayer):
            return getattr(PeftLayer, self.name).fget(layer)
        return self.value


def bare_targets(layer: PeftLayer) -> list[str]:
    """Names of the module's parameters that `target_parameters` match."""
    entries: list[str] = []
    for name in layer.adapters:
        config = layer.state.configs.get(name)
        entries += getattr(config, "target_parameters", None) or ()
    matched = []
    for name in layer.base._parameters:
        path = f"{layer.path}.{name}"
        if any(matches(path, entry) for entry in entries):
            matched.append(name)
    return matched


def shown_class(layer: PeftLayer, row: table.Row) -> str:
    """The name of a layer's class in PEFT."""
    if "ParamWrapper" in row.layers and fits(layer, "ParamWrapper"):
        return "ParamWrapper"
    general, *concrete = row.layers
    return next((name for name in concrete if fits(layer, name)), general)


def class_for(layer: PeftLayer) -> type[PeftLayer]:
    """The class of a layer in PEFT, by its method and its module."""
    if layer.is_copy:
        return ModulesToSaveWrapper
    row = layer.row()
    if row is None or not row.layers:
        return PeftLayer
    layer_class = LAYERS[min(layer.kinds())][shown_class(layer, row)]
    return layer_class if issubclass(layer_class, PeftLayer) else PeftLayer


LAYERS = {kind: layer_classes(kind, row) for kind, row in table.METHODS.items()}
