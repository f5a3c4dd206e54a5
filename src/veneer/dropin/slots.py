"""How a layer shows its adapters to torch as PEFT's code expects them: `q_proj.lora_A.default.weight`.

An adapter here is one module for each name; PEFT has one container for each attribute, with the names inside. A slot
is such a container over the adapters themselves: it holds nothing, so that there is nothing to keep in step.
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
    """One of torch's dicts (`_modules`, `_parameters`, `_buffers`) of a slot: an entry for each adapter's name."""

    def __init__(self, layer: Any, attribute: str, kind: str, key: str = "") -> None:
        self.layer, self.attribute, self.kind, self.key = layer, attribute, kind, key
        self.taken: dict[str, nn.Module] = {}
        """Modules whose parameter FSDP has taken out, by the adapter's name: it puts a plain tensor in its place."""

    def _owner(self, name: str) -> dict[str, Any]:
        return self.holder(name).__dict__[self.kind]  # type: ignore[no-any-return]

    def holder(self, name: str) -> nn.Module:
        """The module that holds an adapter's entry."""
        for module in self._holders(name):
            if module.__dict__[self.kind].get(self.attribute) is not None:
                return module
        raise KeyError(name)

    def _holders(self, name: str) -> Iterator[nn.Module]:
        adapter = self.layer.adapters.get(name)
        yield from (part for part in (() if adapter is None else adapter.parts) if part.key == self.key)

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
    """A module for each adapter's name: `layer.lora_A["default"]`."""

    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__()
        self.__dict__["_modules"] = Live(layer, attribute, "_modules", key)

    def _get_name(self) -> str:
        return "ModuleDict"


class TensorSlot(nn.ParameterDict):
    """A parameter or a buffer for each adapter's name: `layer.vera_lambda_b["default"]`."""

    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__()
        self.__dict__["_parameters"] = Live(layer, attribute, "_parameters", key)
        self.__dict__["_buffers"] = live = Live(layer, attribute, "_buffers", key)
        self.__dict__["_non_persistent_buffers_set"] = Passing(live)

    def _tensors(self) -> dict[str, Any]:
        return {**self._buffers, **self._parameters}

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
        (self._parameters if key in self._parameters else self._buffers)[key] = value

    def __delitem__(self, key: str) -> None:
        del (self._parameters if key in self._parameters else self._buffers)[key]

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
    """The same for the modules that layers share, by adapter name."""

    def _holders(self, name: str) -> Iterator[nn.Module]:
        shared = self.layer.shared.get(name)
        yield from () if shared is None else (shared,)

    def __iter__(self) -> Iterator[str]:
        return (name for name in list(self.layer.shared.keys()) if name in self)


class SharedSlot(TensorSlot):
    """`model.base_model.vera_A["default"]`."""

    def __init__(self, state: Any, attribute: str) -> None:
        nn.Module.__init__(self)
        self._keys: dict[str, Any] = {}
        self.__dict__["_parameters"] = SharedLive(state, attribute, "_parameters")
        self.__dict__["_buffers"] = live = SharedLive(state, attribute, "_buffers")
        self.__dict__["_non_persistent_buffers_set"] = Passing(live)


class Passing:
    """The adapters' names for which a buffer does not go into a state dict."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def __contains__(self, name: object) -> bool:
        return any(self.live.attribute in h._non_persistent_buffers_set for h in self.live._holders(str(name)))


class Dropouts(Live):
    """The dropout of each adapter; PEFT has an `Identity` where there is none."""

    def _owner(self, name: str) -> dict[str, Any]:
        for part in self._holders(name):
            if hasattr(part, self.attribute):
                return {self.attribute: getattr(part, self.attribute) or nn.Identity()}
        raise KeyError(name)


class DropoutSlot(ModuleSlot):
    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__(layer, attribute)
        self.__dict__["_modules"] = Dropouts(layer, attribute, "_modules", key)


class Weight(MutableMapping[str, Any]):
    """The parameters of a module that has none of its own: a `weight`, which is another module's attribute."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        self.owner, self.attribute = owner, attribute

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
    """A parameter that PEFT keeps in a module of its own: `lora_magnitude_vector.default.weight`."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        super().__init__()
        self.__dict__["_parameters"] = Weight(owner, attribute)

        self.__dict__["place"] = owner, attribute

    def __delattr__(self, name: str) -> None:
        delattr(*self.place)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            owner, attribute = self.place
            setattr(owner, attribute, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(*self.place) if name == "weight" else super().__getattr__(name)


class Holding(Live):
    """The modules of a slot, each of which holds a parameter."""

    def __getitem__(self, name: str) -> Any:
        for module in self._holders(name):
            if module._parameters.get(self.attribute) is not None:
                return Held(module, self.attribute)
        raise KeyError(name)

    def _owner(self, name: str) -> dict[str, Any]:
        return {self.attribute: self[name]}


class HeldSlot(Modules):
    """`layer.lora_magnitude_vector["default"].weight`."""

    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__()
        self.__dict__["_modules"] = Holding(layer, attribute, "_parameters", key)


class Twins(Live):
    """The copies that a layer runs with which are another layer's: a module with that one's weight."""

    def _owner(self, name: str) -> dict[str, Any]:
        for part in self._holders(name):
            return {self.attribute: part.module}
        raise KeyError(name)


class TiedSlot(ModuleSlot):
    def __init__(self, layer: PeftLayer, attribute: str, key: str = "") -> None:
        super().__init__(layer, attribute)
        self.__dict__["_modules"] = Twins(layer, attribute, "_modules", key)


class ShownTokens(nn.Module):
    """`embed_tokens.token_adapter`: the trained tokens of a layer, also where the layer follows another one's."""

    def __init__(self, layer: PeftLayer) -> None:
        super().__init__()
        self.__dict__["layer"] = layer

    def parts(self) -> dict[str, Any]:
        """The trained tokens by adapter."""
        adapters = self.layer.adapters
        found = {n: [p for p in adapters[n].parts if p.key == "token_adapter."] for n in adapters}
        return {name: parts[0] for name, parts in found.items() if parts}

    @property
    def token_indices(self) -> dict[str, list[int]]:
        return {name: part.index.tolist() for name, part in self.parts().items()}

    @property
    def trainable_tokens_original(self) -> dict[str, Any]:
        """The rows that the tokens had, (tokens, width)."""
        return {name: part.originals for name, part in self.parts().items()}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_modules"]:
            return self._modules[name]
        layer = self.__dict__["layer"]
        if name == "trainable_tokens_delta":
            first = next(part.shared.target.path for part in self.parts().values())
            return layer.state.layers[first].token_adapter.trainable_tokens_delta
        return getattr(layer, name)


class ShownPrompt(nn.Module):
    """A prompt as PEFT's encoder: its values are the weight of `embedding`."""

    def __init__(self, prompt: nn.Module) -> None:
        super().__init__()
        self.__dict__["prompt"] = prompt
        self.__dict__["_modules"] = dict(prompt._modules)
        self.__dict__["_parameters"] = {n: p for n, p in prompt._parameters.items() if n != "prompt_embeddings"}
        if prompt._parameters.get("prompt_embeddings") is not None:
            self._modules["embedding"] = Held(prompt, "prompt_embeddings")

    def forward(self, *ignored: Any) -> Any:
        """The learned positions, (1, n, width)."""
        return self.prompt.export()["prompt_embeddings"][None]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["prompt"], name)


class Prompts(MutableMapping[str, Any]):
    """The modules of `prompt_encoder`: each prompt of the state, as PEFT shows it."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return ShownPrompt(self.state.prompts._modules[name])

    def __setitem__(self, name: str, value: Any) -> None:
        raise KeyError(f"{name!r}: a prompt is put on with add_adapter()")

    def __delitem__(self, name: str) -> None:
        del self.state.prompts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.state.prompts.keys()))

    def __len__(self) -> int:
        return len(self.state.prompts)

    def copy(self) -> dict[str, Any]:
        return dict(self)


class PromptEncoders(Modules):
    """`model.prompt_encoder["default"].embedding.weight`."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.__dict__["_modules"] = Prompts(state)


class Factor(nn.Linear):
    """A factor that is also a linear layer, as PEFT's are: `layer.lora_A["default"](x)`."""

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


def as_factor(matrix: Matrix, base: Any) -> None:
    """Make a layer of torch's of a factor in place: its weight stays the same Parameter."""
    parameters = matrix._parameters if "weight" in matrix._parameters else {}  # MiCA's second factor is fixed
    weight, kind = matrix.weight, CONVOLUTIONS.get(matrix.weight.dim(), Factor)
    bias = matrix._parameters.get("bias")
    matrix.__class__ = kind
    if kind is Factor:
        matrix.in_features, matrix.out_features = weight.shape[1], weight.shape[0]  # type: ignore[assignment]
    else:
        made = kind.__mro__[1](weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta")
        reads = weight[0, 0].numel() == base.weight[0, 0].numel() and weight.shape[1] == base.in_channels
        own = {n: v for n, v in made.__dict__.items() if not n.startswith("_") and n != "training"}
        read = ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice")
        own |= {"_reversed_padding_repeated_twice": made._reversed_padding_repeated_twice}
        matrix.__dict__.update(own | ({n: base.__dict__[n] for n in read} if reads else {}))
    matrix._parameters = {**parameters, "bias": bias}
