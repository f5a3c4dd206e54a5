"""How a layer shows its adapters to torch as PEFT's code expects them: `q_proj.lora_A.default.weight`.

An adapter here is one module for each name; PEFT has one container for each attribute, with the names inside. A slot
is such a container over the adapters themselves: it holds nothing, so that there is nothing to keep in step.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ...core.adapter import Matrix, Modules

if TYPE_CHECKING:
    from .layers import PeftLayer


class Live(MutableMapping[str, Any]):
    """One of torch's dicts (`_modules`, `_parameters`, `_buffers`) of a slot: an entry for each adapter's name."""

    def __init__(self, layer: PeftLayer, attribute: str, kind: str) -> None:
        self.layer, self.attribute, self.kind = layer, attribute, kind

    def _owner(self, name: str) -> dict[str, Any]:
        adapter = self.layer.adapters.get(name)
        for part in adapter.parts if adapter is not None else ():
            held = part.__dict__[self.kind]
            if held.get(self.attribute) is not None:
                return held
        raise KeyError(name)

    def __getitem__(self, name: str) -> Any:
        return self._owner(name)[self.attribute]

    def __setitem__(self, name: str, value: Any) -> None:
        self._owner(name)[self.attribute] = value

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

    def __init__(self, layer: PeftLayer, attribute: str) -> None:
        super().__init__()
        self.__dict__["_modules"] = Live(layer, attribute, "_modules")


class TensorSlot(nn.ParameterDict):
    """A parameter or a buffer for each adapter's name: `layer.vera_lambda_b["default"]`."""

    def __init__(self, layer: PeftLayer, attribute: str) -> None:
        super().__init__()
        self.__dict__["_parameters"] = Live(layer, attribute, "_parameters")
        self.__dict__["_buffers"] = Live(layer, attribute, "_buffers")
        self.__dict__["_non_persistent_buffers_set"] = Passing(layer, attribute)

    def _tensors(self) -> dict[str, Any]:
        return {**self._buffers, **self._parameters}

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

    def extra_repr(self) -> str:
        return "\n".join(f"({name}): {type(t).__name__} {tuple(t.shape)}" for name, t in self.items())


class Passing:
    """The adapters' names for which a buffer does not go into a state dict."""

    def __init__(self, layer: PeftLayer, attribute: str) -> None:
        self.layer, self.attribute = layer, attribute

    def __contains__(self, name: object) -> bool:
        adapter = self.layer.adapters.get(str(name))
        parts = adapter.parts if adapter is not None else ()
        return any(self.attribute in part._non_persistent_buffers_set for part in parts)


class Factor(nn.Linear):
    """A factor that is also a linear layer, as PEFT's are: `layer.lora_A["default"](x)`."""

    matrix, extra_repr = Matrix.matrix, nn.Linear.extra_repr


class Factor1d(nn.Conv1d):
    matrix = Matrix.matrix


class Factor2d(nn.Conv2d):
    matrix = Matrix.matrix


class Factor3d(nn.Conv3d):
    matrix = Matrix.matrix


CONVOLUTIONS: dict[int, type[Any]] = {3: Factor1d, 4: Factor2d, 5: Factor3d}


def as_factor(matrix: Matrix, base: Any) -> None:
    """Make a layer of torch's of a factor in place: its weight stays the same Parameter."""
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
    matrix._parameters = {"weight": weight, "bias": bias}
