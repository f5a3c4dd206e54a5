"""PEFT's tuners: the layer between a `PeftModel` and the model. A tuner also adds adapters without a `PeftModel`."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.config import PromptConfig
from ..core.state import State, state_of
from ..errors import NotMergeable, VeneerError
from ..model.adapted import Adapted
from ..model.peft_model import PeftModel
from .adamss import WithAllocation
from .attach import activate, enable, put_on, set_requires_grad, take_off
from .configs import CONFIGS, PeftType
from .layers import LAYERS, BaseTunerLayer, agree, bare_targets, is_flat, names_of
from .matching import check_target_module_exists, tied_modules
from .shadow import WithShadow
from .slots import SharedSlot
from .tables import methods as table
from .tables import names
from .utils import DefaultTargets
from .vblora import WithSizes
from .wording import pefts_words
from .xlora import WithGate


class BaseTuner(Adapted):
    """`PeftModel.base_model`: the adapted model as `.model`, and methods to add, switch, merge and delete adapters."""

    prefix: str = ""
    tuner_layer_cls: Any = BaseTunerLayer
    uses_shared_state = False
    peft_type: Any = None

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
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
        state = put_on(
            model,
            config,
            adapter_name,
            on_meta=low_cpu_mem_usage,
            lift=autocast_adapter_dtype,
            state_dict=state_dict,
        )
        self.__dict__["_state_kept"] = state
        self.note_targets()
        activate(state, adapter_name, config.inference_mode)
        self.__dict__["_set"] = [adapter_name]

    def _init_tinylora_v(self, config: Any, adapter_name: str) -> None:
        self._draw(adapter_name, config.init_v_bound)

    def _init_vblora_vector_bank(self, config: Any, adapter_name: str) -> None:
        self._draw(adapter_name, config.init_vector_bank_bound)

    def _draw(self, adapter_name: str, bound: float) -> None:
        """Reinitialise the parameters that the layers share, uniformly between -bound and bound."""
        for parameter in self.state.shared[adapter_name].parameters():
            nn.init.uniform_(parameter, -bound, bound)

    # Access

    @property
    def state(self) -> State:
        """The model's adapter state; if all adapters were deleted, the last state that it had."""
        state = state_of(self.model)
        if state is not None:
            self.__dict__["_state_kept"] = state
        return self.__dict__["_state_kept"]

    @property
    def peft_config(self) -> dict[str, Any]:
        return self.state.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self.state.active)

    @active_adapters.setter
    def active_adapters(self, names: Any) -> None:
        self.state.activate(names_of(names))

    @property
    def _active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        last_set = self.__dict__["_set"]
        return last_set if names == list(names_of(last_set)) else names

    def note_targets(self) -> None:
        """Register the tensors that layers share, and record the paths of the adapted modules and parameters."""
        for shared in self.state.shared.values():
            if is_flat(shared):
                for attribute in (*shared._parameters, *shared._buffers):
                    self._modules.setdefault(attribute, SharedSlot(self.state, attribute))
        parameter_names = []
        for path, layer in self.state.layers.items():
            for name in bare_targets(layer):  # type: ignore[arg-type]
                parameter_names.append(f"{path}.{name}")
        self.__dict__["targeted_module_names"] = list(_adapted_layers(self.state))
        self.__dict__["targeted_parameter_names"] = parameter_names

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's config as a dict."""
        config: Any = getattr(model, "config", None) or table.CONSTANTS["DUMMY_MODEL_CONFIG"]
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
        """Add the adapter that `peft_config[adapter_name]` describes; the active adapters stay active."""
        state = self.state
        active = state.active
        if any(layer.merged_adapters for layer in state.layers.values()):
            activate(state, active)
        if config is None:
            config = self.peft_config[adapter_name]
        flags = []
        for name in state.configs:
            flags += [(parameter, parameter.requires_grad) for parameter in state.parameters(name)]
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
        """The model with the adapters merged into its weights and removed."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.peft_config]
        return finish(self, names, progressbar, safe_merge)

    def unload(self) -> nn.Module:
        """The model without its adapters. As in PEFT, merged weights and trained copies of whole modules remain."""
        for layer in self.state.layers.values():
            if getattr(layer, "is_copy", False):
                layer.merge([name for name in self.state.active if name in layer.adapters])
            layer.kept = {}
            layer.kept_module = None
            layer.merged_adapters = ()
        model = PeftModel.unload(self)  # type: ignore[arg-type]
        model.__dict__.pop("peft_config", None)
        return model

    _state = property(lambda self: self.state)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return tied_modules(self.model)

    def get_base_model(self) -> nn.Module:
        return self.model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        layers = _adapted_layers(self.state).values()
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)


def _adapted_layers(state: State) -> dict[str, Any]:
    """The layers by path, without those that hold trained copies of whole modules."""
    return {path: layer for path, layer in state.layers.items() if not getattr(layer, "is_copy", False)}


@pefts_words()
def merge(state: State, names: Sequence[str] | None, safe: bool, progressbar: bool = False) -> None:
    """Merge adapters into all layers, or into none if one of them refuses.

    Raises:
        TypeError: `names` is a string instead of a list.
    """
    from tqdm import tqdm

    from .layers import to_merge

    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
    layers = list(_adapted_layers(state).values())
    snapshots = [layer.snapshot() for layer in layers]
    try:
        for layer in tqdm(layers, desc="merging", disable=not progressbar):
            unmerged = to_merge(layer, names)
            unmerged = [name for name in unmerged if name in layer.adapters]
            layer.check_merge(unmerged)
            layer.merge(unmerged, safe)
    except BaseException as error:
        for layer, snapshot in zip(layers, snapshots, strict=True):
            layer.revert(snapshot)
        if isinstance(error, NotMergeable):
            raise CannotMerge(str(error)) from error
        raise


class CannotMerge(NotMergeable, NotImplementedError):
    """An adapter cannot be merged. PEFT's methods raise ValueError, RuntimeError or NotImplementedError for it."""


def finish(tuner: BaseTuner, names: list[str], progressbar: bool, safe: bool) -> nn.Module:
    """Merge permanently: the modules keep the merged weights, and the wrappers are removed."""
    from ..upstream.models import note_untied

    state = tuner.state
    merge(state, names, safe, progressbar)
    state.reshaped.clear()
    model = tuner.unload()
    note_untied(model)
    return model


class WithWeightedSums:
    """Methods of the tuners of LoRA and related methods only."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Any = "total",
    ) -> None:
        from ..model.combine import add_weighted_adapter

        for name in adapters:
            if name not in self.peft_config:  # type: ignore[attr-defined]
                raise VeneerError(f"Adapter {name} does not exist")
        add_weighted_adapter(
            self,  # type: ignore[arg-type]
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            svd_clamp,
            svd_full_matrices,
            svd_driver,
            density,
            majority_sign_method,
        )

    def _get_kasa_loss(self) -> Any:
        """The sum of KaSA's penalties, to be added to the loss; 0 without KaSA."""
        state: State = self.state  # type: ignore[attr-defined]
        penalties = []
        for name in state.active:
            for adapter in state.adapters(name).values():
                penalties += [part.penalty() for part in adapter.parts if hasattr(part, "penalty")]
        return sum(penalties) if penalties else 0.0

    def subtract_mutated_init(self, output_state_dict: Any, adapter_name: str, kwargs: Any = None) -> Any:
        return output_state_dict


class WithConfigAlone:
    """Methods of the tuner of adaption prompts only."""

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        self.inject_adapter(self.model, adapter_name, config=config)  # type: ignore[attr-defined]


class WithGenerate:
    """Methods of the tuners that generate by themselves."""

    def generate(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if task_ids is not None:
            kwargs["task_ids"] = task_ids
        return self.model.generate(*args, **kwargs)  # type: ignore[attr-defined]


class BasePromptEncoder(nn.Module):
    """PEFT's base class of prompt encoders. Veneer's prompts are `Prompt`s, not instances of it."""


MIXINS: dict[str, type] = {
    "LORA": WithWeightedSums,
    "ADALORA": WithWeightedSums,
    "IA3": WithWeightedSums,
    "HIRA": WithWeightedSums,
    "ADAPTION_PROMPT": WithConfigAlone,
    "POLY": WithGenerate,
    "ADAMSS": WithAllocation,
    "VBLORA": WithSizes,
    "XLORA": WithGate,
    "SHADOW": WithShadow,
}
"""Further methods of the tuners of some adapter methods."""


def _tuner_class(kind: str, row: table.Row) -> type:
    """PEFT's tuner class for a method, or its encoder class for a prompt method."""
    namespace: dict[str, Any] = {"__module__": f"peft.tuners.{row.package}.model", "prefix": row.prefix}
    if issubclass(CONFIGS[PeftType(kind)], PromptConfig):
        return type(row.model, (BasePromptEncoder,), namespace)
    namespace["uses_shared_state"] = row.shares
    namespace["target_module_mapping"] = DefaultTargets(PeftType(kind))
    if kind in ("LOHA", "LOKR"):
        namespace["layers_mapping"] = {getattr(nn, name): LAYERS[kind][name] for name in ("Linear", "Conv1d", "Conv2d")}
    namespace["tuner_layer_cls"] = next(iter(LAYERS[kind].values()), BaseTunerLayer)
    namespace["peft_type"] = PeftType(kind)
    mixin = MIXINS.get(kind)
    bases = (BaseTuner,) if mixin is None else (mixin, BaseTuner)
    for name in ("config", "configs"):  # PEFT's names of the config
        theirs = names.constructor(namespace["__module__"], row.model)
        if theirs is not None and name in theirs.parameters:
            namespace["__init__"] = _with_config_as(name)
    return type(row.model, bases, namespace)


def _with_config_as(name: str) -> Any:
    """`BaseTuner.__init__` with another name for its config."""

    def __init__(self: BaseTuner, model: nn.Module, *args: Any, **settings: Any) -> None:
        if name in settings:
            settings["peft_config"] = settings.pop(name)
        BaseTuner.__init__(self, model, *args, **settings)

    parameters = list(inspect.signature(BaseTuner.__init__).parameters.values())
    renamed = [p.replace(name=name) if p.name == "peft_config" else p for p in parameters]
    __init__.__signature__ = inspect.Signature(renamed)  # type: ignore[attr-defined]
    return __init__


TUNERS: dict[Any, Any] = {PeftType(kind): _tuner_class(kind, row) for kind, row in table.METHODS.items()}


class MixedModel(WithGenerate, WithWeightedSums, BaseTuner):
    """The tuner of a model with adapters of several methods."""

    prefix = ""
    __init__ = _with_config_as("config")
