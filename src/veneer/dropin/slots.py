"""How a layer shows its adapters to torch as PEFT's code expects them: `q_proj.lora_A.default.weight`.

In veneer an adapter is one module per name. In PEFT a layer has one container per attribute, with the adapter names
inside. A slot is such a container: a view of the adapters. It stores nothing, so it is always up to date.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..targets.modules import Modules
from ..targets.target import Matrix

if TYPE_CHECKING:
    from .layers import PeftLayer


class Live(MutableMapping[str, Any]):
    """One of the dicts of a slot that torch reads (`_modules`, `_parameters`, `_buffers`), by adapter name."""

    def __init__(self, layer: Any, attribute: str, kind: str, key: str = "") -> None:
        self.layer = layer
        self.attribute = attribute
        self.kind = kind
        self.key = key
        self.taken: dict[str, nn.Module] = {}
        """Modules whose parameter FSDP has replaced by a plain tensor, by adapter name."""

    def _owner(self, name: str) -> dict[str, Any]:
        """The dict of torch's that has an adapter's entry."""
        return self.holder(name).__dict__[self.kind]  # type: ignore[no-any-return]

    def holder(self, name: str) -> nn.Module:
        """The module that has an adapter's entry."""
        for module in self._holders(name):
            if module.__dict__[self.kind].get(self.attribute) is not None:
                return module
        raise KeyError(name)

    def _holders(self, name: str) -> Iterator[nn.Module]:
        """The modules that may have an adapter's entry."""
        adapter = self.layer.adapters.get(name)
        if adapter is None:
            return
        for part in adapter.parts:
            if part.key == self.key:
                yield part

    def __getitem__(self, name: str) -> Any:
        return self._owner(name)[self.attribute]

    def __setitem__(self, name: str, value: Any) -> None:
        module = self.taken.pop(name, None) or self.holder(name)
        module.__dict__.pop(self.attribute, None)
        module.__dict__[self.kind][self.attribute] = value

    def __delitem__(self, name: str) -> None:
        self._owner(name)[self.attribute] = None

    def __contains__(self, name: object) -> bool:
        try:
            self._owner(str(name))
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return (name for name in list(self.layer.adapters.keys()) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Any]:
        return dict(self)


class ModuleSlot(Modules):
    """One module per adapter name: `layer.lora_A["default"]`."""

    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__()
        self.__dict__["_modules"] = Live(layer, attribute, "_modules", key)

    def _get_name(self) -> str:
        return "ModuleDict"


class TensorSlot(nn.ParameterDict):
    """One parameter or buffer per adapter name: `layer.vera_lambda_b["default"]`."""

    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__()
        buffers = Live(layer, attribute, "_buffers", key)
        self.__dict__["_parameters"] = Live(layer, attribute, "_parameters", key)
        self.__dict__["_buffers"] = buffers
        self.__dict__["_non_persistent_buffers_set"] = Passing(buffers)

    def _tensors(self) -> dict[str, Any]:
        return {**self._buffers, **self._parameters}

    def _view_of(self, key: str) -> Any:
        """The view through which an adapter's tensor is written."""
        return self._parameters if key in self._parameters else self._buffers

    def __delattr__(self, name: str) -> None:
        live: Any = self._parameters
        module = live.taken.get(name) or live.holder(name)
        delattr(module, live.attribute)
        live.taken[name] = module

    def __setattr__(self, name: str, value: Any) -> None:
        live = self.__dict__.get("_parameters")
        if not isinstance(live, Live) or name not in live.taken:
            super().__setattr__(name, value)
        elif isinstance(value, nn.Parameter):
            live[name] = value
        else:
            setattr(live.taken[name], live.attribute, value)

    def __getattr__(self, name: str) -> Any:
        live = self.__dict__.get("_parameters")
        if isinstance(live, Live) and name in live.taken:
            return getattr(live.taken[name], live.attribute)
        return super().__getattr__(name)

    def __getitem__(self, key: str) -> Any:
        return self._tensors()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._view_of(key)[key] = value

    def __delitem__(self, key: str) -> None:
        del self._view_of(key)[key]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())

    def keys(self) -> Any:
        return self._tensors().keys()

    def items(self) -> Any:
        return self._tensors().items()

    def values(self) -> Any:
        return self._tensors().values()

    def get(self, key: str, default: Any = None) -> Any:
        return self._tensors().get(key, default)

    def _get_name(self) -> str:
        return "ParameterDict"


class SharedLive(Live):
    """A view of the modules that layers share, by adapter name."""

    def _holders(self, name: str) -> Iterator[nn.Module]:
        shared = self.layer.shared.get(name)
        if shared is not None:
            yield shared

    def __iter__(self) -> Iterator[str]:
        return (name for name in list(self.layer.shared.keys()) if name in self)


class SharedSlot(TensorSlot):
    """One tensor that layers share per adapter name: `model.base_model.vera_A["default"]`."""

    def __init__(self, state: Any, attribute: str) -> None:
        nn.Module.__init__(self)
        self._keys: dict[str, Any] = {}
        buffers = SharedLive(state, attribute, "_buffers")
        parameters = SharedLive(state, attribute, "_parameters")
        parameters.taken = state.__dict__.setdefault("shared_taken", {}).setdefault(attribute, {})
        self.__dict__["_parameters"] = parameters
        self.__dict__["_buffers"] = buffers
        self.__dict__["_non_persistent_buffers_set"] = Passing(buffers)


class Passing:
    """The names of the adapters whose buffer is left out of state dicts."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def __contains__(self, name: object) -> bool:
        for module in self.live._holders(str(name)):
            if self.live.attribute in module._non_persistent_buffers_set:
                return True
        return False


class Dropouts(Live):
    """The dropout of each adapter; an `Identity` for adapters without dropout, as in PEFT."""

    def _owner(self, name: str) -> dict[str, Any]:
        for part in self._holders(name):
            if hasattr(part, self.attribute):
                dropout = getattr(part, self.attribute)
                return {self.attribute: dropout or nn.Identity()}
        raise KeyError(name)


class DropoutSlot(ModuleSlot):
    """One dropout per adapter name: `layer.lora_dropout["default"]`."""

    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__(layer, attribute)
        self.__dict__["_modules"] = Dropouts(layer, attribute, "_modules", key)


class Weight(MutableMapping[str, Any]):
    """The parameters of a `Held`: a single `weight`, which is an attribute of another module."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        self.owner = owner
        self.attribute = attribute

    def __getitem__(self, name: str) -> Any:
        if name != "weight":
            raise KeyError(name)
        return self.owner._parameters[self.attribute]

    def __contains__(self, name: object) -> bool:
        return name == "weight" and self.attribute in self.owner._parameters

    def __setitem__(self, name: str, value: Any) -> None:
        self.owner._parameters[self.attribute] = value

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(("weight",))

    def __len__(self) -> int:
        return 1

    def copy(self) -> dict[str, Any]:
        return dict(self)


class Held(nn.Module):
    """A parameter that PEFT keeps in a separate module: `lora_magnitude_vector.default.weight`."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        super().__init__()
        self.__dict__["_parameters"] = Weight(owner, attribute)
        self.__dict__["place"] = owner, attribute

    def __delattr__(self, name: str) -> None:
        owner, attribute = self.place
        delattr(owner, attribute)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            owner, attribute = self.place
            setattr(owner, attribute, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            owner, attribute = self.place
            return getattr(owner, attribute)
        return super().__getattr__(name)


class Holding(Live):
    """The modules of a slot in which each module contains one parameter."""

    def __getitem__(self, name: str) -> Any:
        for module in self._holders(name):
            if module._parameters.get(self.attribute) is not None:
                return Held(module, self.attribute)
        raise KeyError(name)

    def _owner(self, name: str) -> dict[str, Any]:
        return {self.attribute: self[name]}


class HeldSlot(Modules):
    """One module with one parameter per adapter name: `layer.lora_magnitude_vector["default"].weight`."""

    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__()
        self.__dict__["_modules"] = Holding(layer, attribute, "_parameters", key)


class Twins(Live):
    """The copies that tied modules run with: each has the weight of the trained copy on the first module."""

    def _owner(self, name: str) -> dict[str, Any]:
        for part in self._holders(name):
            return {self.attribute: part.module}
        raise KeyError(name)


class TiedSlot(ModuleSlot):
    """One copy of a tied module per adapter name."""

    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__(layer, attribute)
        self.__dict__["_modules"] = Twins(layer, attribute, "_modules", key)


class ShownTokens(nn.Module):
    """`embed_tokens.token_adapter`: the trained tokens of a layer, its own or those of the layer it is tied to."""

    def __init__(self, layer: PeftLayer) -> None:
        super().__init__()
        self.__dict__["layer"] = layer

    def parts(self) -> dict[str, Any]:
        """The trained tokens by adapter name."""
        tokens = {}
        for name, adapter in self.layer.adapters.items():
            for part in adapter.parts:
                if part.key == "token_adapter.":
                    tokens[name] = part
                    break
        return tokens

    @property
    def token_indices(self) -> dict[str, list[int]]:
        return {name: part.index.tolist() for name, part in self.parts().items()}

    @property
    def trainable_tokens_original(self) -> dict[str, Any]:
        """The pretrained rows of the tokens, (tokens, width)."""
        return {name: part.originals for name, part in self.parts().items()}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_modules"]:
            return self._modules[name]
        layer = self.__dict__["layer"]
        if name == "trainable_tokens_delta":
            path = next(part.shared.target.path for part in self.parts().values())
            return layer.state.layers[path].token_adapter.trainable_tokens_delta
        return getattr(layer, name)


class ShownPrompt(nn.Module):
    """A prompt in the form of PEFT's encoder, with the learned values as the weight of `embedding`."""

    def __init__(self, prompt: nn.Module) -> None:
        super().__init__()
        self.__dict__["prompt"] = prompt
        self.__dict__["_modules"] = dict(prompt._modules)
        parameters = dict(prompt._parameters)
        embeddings = parameters.pop("prompt_embeddings", None)
        self.__dict__["_parameters"] = parameters
        if embeddings is not None:
            self._modules["embedding"] = Held(prompt, "prompt_embeddings")

    @property
    def frozen_embedding(self) -> Any:
        """The fixed first positions of a cartridge; None if all are trained."""
        frozen = self.prompt.frozen_embedding
        return frozen if len(frozen) else None

    @property
    def weight(self) -> Any:
        """All positions of a cartridge, the fixed ones first."""
        return self.prompt.export()["prompt_embeddings"]

    def forward(self, *ignored: Any) -> Any:
        """The learned positions, (1, n, width)."""
        return self.prompt.export()["prompt_embeddings"][None]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["prompt"], name)


class Prompts(MutableMapping[str, Any]):
    """The modules of `prompt_encoder`: the prompts of a state, each as a `ShownPrompt`."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return ShownPrompt(self.state.prompts._modules[name])

    def __setitem__(self, name: str, value: Any) -> None:
        raise KeyError(f"{name!r}: to add a prompt, call add_adapter()")

    def __delitem__(self, name: str) -> None:
        del self.state.prompts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.state.prompts.keys()))

    def __len__(self) -> int:
        return len(self.state.prompts)

    def copy(self) -> dict[str, Any]:
        return dict(self)


class PromptEncoders(Modules):
    """One prompt encoder per adapter name: `model.prompt_encoder["default"].embedding.weight`."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.__dict__["_modules"] = Prompts(state)


class Factor(nn.Linear):
    """A factor that is also a linear layer, as in PEFT: `layer.lora_A["default"](x)`."""

    matrix = Matrix.matrix

    def _get_name(self) -> str:
        return "Linear"


class Factor1d(nn.Conv1d):
    matrix = Matrix.matrix


class Factor2d(nn.Conv2d):
    matrix = Matrix.matrix


class Factor3d(nn.Conv3d):
    matrix = Matrix.matrix


CONVOLUTIONS: dict[int, type[Any]] = {3: Factor1d, 4: Factor2d, 5: Factor3d}
"""The class of a convolution's factor by the number of dimensions of its weight."""

GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice")
"""Attributes that define how a convolution moves over its input."""


def as_factor(matrix: Matrix, base: Any) -> None:
    """Turn a factor into a torch layer in place; its weight stays the same Parameter."""
    parameters = matrix._parameters if "weight" in matrix._parameters else {}  # MiCA's second factor is fixed
    weight = matrix.weight
    bias = matrix._parameters.get("bias")
    factor_class = CONVOLUTIONS.get(weight.dim(), Factor)
    matrix.__class__ = factor_class
    if factor_class is Factor:
        matrix.in_features = weight.shape[1]  # type: ignore[assignment]
        matrix.out_features = weight.shape[0]  # type: ignore[assignment]
    else:
        torch_class = factor_class.__mro__[1]
        matrix.__dict__.update(_convolution_settings(torch_class, weight, base))
    matrix._parameters = {**parameters, "bias": bias}


def _convolution_settings(torch_class: Any, weight: Any, base: Any) -> dict[str, Any]:
    """The attributes of a convolution with this weight; where it reads the base's input, it moves as the base does."""
    out_channels, in_channels, *kernel = weight.shape
    convolution = torch_class(in_channels, out_channels, tuple(kernel), bias=False, device="meta")
    settings = {}
    for name, value in convolution.__dict__.items():
        if not name.startswith("_") and name != "training":
            settings[name] = value
    settings["_reversed_padding_repeated_twice"] = convolution._reversed_padding_repeated_twice
    has_base_kernel = weight[0, 0].numel() == base.weight[0, 0].numel()
    if has_base_kernel and in_channels == base.in_channels:
        for name in GEOMETRY:
            settings[name] = base.__dict__[name]
    return settings
