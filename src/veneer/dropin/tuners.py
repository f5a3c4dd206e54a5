"""PEFT's tuners: what stands between a `PeftModel` and the model, and puts the adapters on by itself too."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.config import PromptConfig
from ..core.state import State, state_of
from ..errors import NotMergeable, VeneerError
from ..model.adapted import Adapted
from ..model.peft_model import PeftModel
from .attach import activate, enable, put_on, set_requires_grad, take_off
from .configs import CONFIGS, PeftType
from .layers import LAYERS, BaseTunerLayer, agree, bare_targets, is_flat
from .matching import check_target_module_exists, tied_modules
from .shadow import WithShadow
from .slots import SharedSlot
from .tables import methods as table
from .xlora import WithGate


class BaseTuner(Adapted):
    """`PeftModel.base_model`: the adapted model as `.model`, and what is done to its adapters."""

    prefix: str = ""
    tuner_layer_cls: Any = BaseTunerLayer
    uses_shared_state = False
    peft_type: Any = None

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__(model)
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        if state_of(model) is not None:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in "
                "the model. Make sure to know what you are doing!",
                stacklevel=3,
            )
        lift = autocast_adapter_dtype
        state = put_on(model, config, adapter_name, on_meta=low_cpu_mem_usage, lift=lift, state_dict=state_dict)
        self.__dict__["_state_kept"] = state
        self.note_targets()
        activate(state, adapter_name, config.inference_mode)
        self.__dict__["_set"] = [adapter_name]

    def _init_tinylora_v(self, config: Any, adapter_name: str) -> None:
        self._draw(adapter_name, config.init_v_bound)

    def _init_vblora_vector_bank(self, config: Any, adapter_name: str) -> None:
        self._draw(adapter_name, config.init_vector_bank_bound)

    def _draw(self, adapter_name: str, bound: float) -> None:
        """Give what the layers share new values, uniform between minus the bound and the bound."""
        for parameter in self.state.shared[adapter_name].parameters():
            nn.init.uniform_(parameter, -bound, bound)

    # Access

    @property
    def state(self) -> State:
        """The model's state; after its last adapter has gone, what is left of it."""
        found = state_of(self.model)
        if found is not None:
            self.__dict__["_state_kept"] = found
        return self.__dict__["_state_kept"]

    @property
    def peft_config(self) -> dict[str, Any]:
        return self.state.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self.state.active)

    @active_adapters.setter
    def active_adapters(self, names: Any) -> None:
        self.state.activate((names,) if isinstance(names, str) else tuple(names))

    @property
    def _active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_adapter(self) -> str | list[str]:
        names, given = self.active_adapters, self.__dict__["_set"]
        return given if names == ([given] if isinstance(given, str) else list(given)) else names

    def note_targets(self) -> None:
        for shared in self.state.shared.values():
            for attribute in (*shared._parameters, *shared._buffers) if is_flat(shared) else ():
                self._modules.setdefault(attribute, SharedSlot(self.state, attribute))
        paths = [p for p, layer in self.state.layers.items() if not getattr(layer, "is_copy", False)]
        self.__dict__["targeted_module_names"] = paths
        self.__dict__["targeted_parameter_names"] = [
            f"{path}.{name}"
            for path, layer in self.state.layers.items()
            for name in bare_targets(layer)  # type: ignore[arg-type]
        ]

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        config = getattr(model, "config", None) or dict(table.CONSTANTS["DUMMY_MODEL_CONFIG"])  # type: ignore[call-overload]
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return dataclasses.asdict(config)
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return check_target_module_exists(peft_config, key)

    # Adapters

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
        *,
        config: Any = None,
    ) -> None:
        """Put on the adapter that `peft_config[adapter_name]` describes; what is active stays so."""
        state, active = self.state, self.state.active
        if any(layer.merged_adapters for layer in state.layers.values()):
            activate(state, active)
        config = config if config is not None else self.peft_config[adapter_name]
        flags = [(p, p.requires_grad) for name in state.configs for p in state.parameters(name)]
        state = put_on(model, config, adapter_name, on_meta=low_cpu_mem_usage, lift=autocast_adapter_dtype)
        state.active = active
        for parameter in state.parameters(adapter_name):
            parameter.requires_grad_(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if not active:
            activate(state, adapter_name, config.inference_mode)
        self.note_targets()
        agree(state)

    def add_adapter(self, adapter_name: str, peft_config: Any, low_cpu_mem_usage: bool = False) -> None:
        self.inject_adapter(self.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, config=peft_config)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        activate(self.state, adapter_name, inference_mode)
        self.__dict__["_set"] = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        set_requires_grad(self.model, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise VeneerError(f"Adapter {adapter_name} does not exist")
        take_off(self.model, adapter_name, self.state)

    def enable_adapter_layers(self) -> None:
        enable(self.state, True)

    def disable_adapter_layers(self) -> None:
        for name in self.active_adapters:
            bias = getattr(self.peft_config[name], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption.",
                    stacklevel=2,
                )
        enable(self.state, False)

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        merge(self.state, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        for layer in self.state.layers.values():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The model with its adapters folded in and gone."""
        names = adapter_names if adapter_names is not None else self.active_adapters
        names = [name for name in names if name in self.peft_config]
        return finish(self, names, progressbar, safe_merge)

    def unload(self) -> nn.Module:
        """The model without its adapters; what is merged, and trained copies of whole modules, stay, as in PEFT."""
        for layer in self.state.layers.values():
            if getattr(layer, "is_copy", False):
                layer.merge([n for n in self.state.active if n in layer.adapters])
            layer.kept, layer.kept_module, layer.merged_adapters = {}, None, ()
        model = PeftModel.unload(self)  # type: ignore[arg-type]
        model.__dict__.pop("peft_config", None)
        return model

    _state = property(lambda self: self.state)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return tied_modules(self.model)

    def get_base_model(self) -> nn.Module:
        return self.model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        layers = [layer for layer in self.state.layers.values() if not getattr(layer, "is_copy", False)]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)  # type: ignore[operator]


def merge(state: State, names: Sequence[str] | None, safe: bool, progressbar: bool = False) -> None:
    """Fold adapters into all layers, or into none where one of them cannot.

    Raises:
        TypeError: one name where a list of them is expected.
    """
    from tqdm import tqdm

    from .layers import to_merge

    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
    layers = [layer for layer in state.layers.values() if not getattr(layer, "is_copy", False)]
    before = [layer.snapshot() for layer in layers]
    try:
        for layer in tqdm(layers, desc="merging", disable=not progressbar):
            wanted = [n for n in to_merge(layer, names) if n in layer.adapters]  # type: ignore[arg-type]
            layer.check_merge(wanted)
            layer.merge(wanted, safe)
    except BaseException as error:
        for layer, snapshot in zip(layers, before, strict=True):
            layer.revert(snapshot)
        if isinstance(error, NotMergeable):
            raise CannotMerge(str(error)) from error
        raise


class CannotMerge(NotMergeable, NotImplementedError):
    """PEFT's methods that cannot be merged raise any of ValueError, RuntimeError and NotImplementedError."""


def finish(tuner: BaseTuner, names: list[str], progressbar: bool, safe: bool) -> nn.Module:
    """Merge for good: the modules keep the new weights, and the wrappers go."""
    from ..upstream.models import note_untied

    state = tuner.state
    merge(state, names, safe, progressbar)
    state.reshaped.clear()
    model = tuner.unload()
    note_untied(model)
    return model


class WithWeightedSums:
    """What PEFT's LoRA and its relatives have besides."""

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        from ..model.combine import add_weighted_adapter

        for name in args[0] if args else kwargs.get("adapters", ()):
            if name not in self.peft_config:  # type: ignore[attr-defined]
                raise VeneerError(f"Adapter {name} does not exist")
        add_weighted_adapter(self, *args, **kwargs)  # type: ignore[arg-type]

    def _get_kasa_loss(self) -> Any:
        """What KaSA's penalties add to the loss; 0 without it."""
        state: State = self.state  # type: ignore[attr-defined]
        penalties = [
            part.penalty()
            for name in state.active
            for adapter in state.adapters(name).values()
            for part in adapter.parts
            if hasattr(part, "penalty")
        ]
        return sum(penalties) if penalties else 0.0

    def subtract_mutated_init(self, output_state_dict: Any, adapter_name: str, kwargs: Any = None) -> Any:
        return output_state_dict


class BasePromptEncoder(nn.Module):
    """PEFT's base of prompts; here each is a `Prompt`."""


MORE: dict[str, type] = {
    **dict.fromkeys(("LORA", "ADALORA", "IA3", "HIRA"), WithWeightedSums),
    "XLORA": WithGate,
    "SHADOW": WithShadow,
}
"""What the tuners of some methods have besides."""


def _tuner_class(kind: str, row: table.Row) -> type:
    module = f"peft.tuners.{row.package}.model"
    if issubclass(CONFIGS[PeftType(kind)], PromptConfig):
        return type(row.model, (BasePromptEncoder,), {"__module__": module, "prefix": row.prefix})
    layers = LAYERS[kind]
    names = {
        "__module__": module,
        "prefix": row.prefix,
        "uses_shared_state": row.shares,
        "tuner_layer_cls": next(iter(layers.values()), BaseTunerLayer),
        "peft_type": PeftType(kind),
    }
    bases = (*((MORE[kind],) if kind in MORE else ()), BaseTuner)
    return type(row.model, bases, names)


TUNERS: dict[Any, Any] = {PeftType(kind): _tuner_class(kind, row) for kind, row in table.METHODS.items()}


class MixedModel(BaseTuner):
    """The tuner of adapters of several methods on one model."""

    prefix = ""
