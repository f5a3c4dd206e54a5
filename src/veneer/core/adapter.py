"""What a method is: an `nn.Module` for one (target, adapter name), whose attribute names are the checkpoint's.

An adapter says what it does to activations (`pre`, `post`), to the weight (`fold`), or both; the laws hold
the two together.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import NotMergeable
from ..ops.low_rank_linear import Update

if TYPE_CHECKING:
    from ..targets.target import Target
    from .config import Config

Tensors = dict[str, Tensor]


class Adapter(nn.Module):
    """One method on one target.

    Subclasses define any of:

    - `pre(x) -> x`: on the input of the base module.
    - `post(x, y) -> y`: on its output; x is what `pre` received.
    - `fold(W, b) -> (W, b)`: the method as a new weight, W (out, in); left undefined it is not mergeable.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    """The kinds of target it adapts: linear, conv, embedding, norm, block."""
    reads_weight: bool = False
    """`post` reads the weight below it (its norm, say), so adapters below it must be folded into that weight first."""
    follows_ties: ClassVar[bool] = False
    """It also adapts modules with a tied weight; there it is built with `twin=` the first adapter."""
    is_product: ClassVar[bool] = False
    """Whether it adds x A^T B^T to the output, and nothing but `finish` after that (see `LowRank`)."""
    has_finish: ClassVar[bool] = False
    key: str = ""
    """Prefix of the names of its tensors in the file."""
    has_pre: bool = False
    has_post: bool = False
    has_fold: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.has_pre = cls.pre is not Adapter.pre
        cls.has_post = cls.post is not Adapter.post
        cls.has_fold = cls.fold is not Adapter.fold

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # torch says Tensor | Module, which fits no attribute

    def __init__(self, config: Config | None, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.config: Any = config
        self.target = target
        self._shared = (shared,)  # a tuple, so that torch does not register it as a child of every layer

    @property
    def shared(self) -> Any:
        """The module that all layers of this adapter name share, from `Config.build_shared`."""
        return self._shared[0]

    @property
    def parts(self) -> tuple[Adapter, ...]:
        """The single adapters it consists of, innermost first."""
        return (self,)

    @property
    def commutes(self) -> bool:
        """Whether its place among other adapters makes no difference, so that it may be merged out of order."""
        return False

    @property
    def is_dense(self) -> bool:
        """Whether `post` makes the update as a whole matrix, which `fold` gives from its parameters alone."""
        return False

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype its mathematics runs in: that of its first floating tensor, or the shared module's."""
        if "_dtype" not in self.__dict__:
            self._dtype = _dtype_of(self) or _dtype_of(self.shared)
        return self._dtype

    def forget_dtype(self) -> None:
        """Look `dtype` up again: its tensors were cast."""
        self.__dict__.pop("_dtype", None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget_dtype()
        return super()._apply(fn, recurse)

    def pre(self, x: Tensor) -> Tensor:
        return x

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotMergeable(
            f"{type(self).__name__} on {self.target.path!r} has no form as a weight; keep the adapter unmerged"
        )

    def export(self) -> Tensors:
        """What goes to the file, by attribute name."""
        return self.state_dict()

    def absorb(self, tensors: Tensors) -> None:
        """Take tensors from a file.

        In place where it has memory, since an optimizer may hold its Parameters; placeholder tensors are replaced.
        """
        present = self.state_dict(keep_vars=True)
        if not any(tensor.is_meta for tensor in present.values()):
            self.load_state_dict(tensors, strict=False)
            return
        for key in tensors.keys() & present.keys():
            path, _, name = key.rpartition(".")
            owner = self.get_submodule(path)
            placeholder = present[key]
            if isinstance(placeholder, nn.Parameter):
                owner._parameters[name] = nn.Parameter(tensors[key], requires_grad=placeholder.requires_grad)
            else:
                owner._buffers[name] = tensors[key]

    def repeats(self) -> dict[str, str]:
        """Keys whose tensors repeat those of another target's adapter, perhaps transposed, each with that one's key."""
        return {}

    def learned(self) -> list[nn.Parameter]:
        """The parameters that training may change."""
        parameters = []
        for module in modules_of(self):
            parameters += [parameter for parameter in module._parameters.values() if parameter is not None]
        return parameters

    def describe(self) -> str:
        """Its settings in a few words, for `print(model)`."""
        return ""

    def expected_parameters(self) -> int:
        """The number of trained parameters by the paper's formula; the actual number where a method states none."""
        return sum(p.numel() for p in self.parameters())


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all below it: `module.modules()` in a quarter of the time, with repetitions."""
    modules = [module]
    for parent in modules:  # which grows meanwhile
        modules.extend(child for child in parent._modules.values() if child is not None)
    return modules


def _dtype_of(module: nn.Module | None) -> torch.dtype | None:
    """The dtype of the first floating-point parameter, else buffer."""
    if module is None:
        return None
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return None


class Parts(Adapter):
    """Several adapters under one name on one target, innermost first (an update and a trained bias)."""

    def __init__(self, *parts: Adapter) -> None:
        super().__init__(parts[0].config, parts[0].target, parts[0].shared)
        self.members = nn.ModuleList(parts)

    @property
    def parts(self) -> tuple[Adapter, ...]:
        parts: tuple[Adapter, ...] = ()
        for member in self.members:
            parts += member.parts
        return parts

    def forget_dtype(self) -> None:
        for part in self.members:
            part.forget_dtype()

    def export(self) -> Tensors:
        tensors: Tensors = {}
        for part in self.parts:
            tensors |= part.export()
        return tensors

    def absorb(self, tensors: Tensors) -> None:
        for part in self.parts:
            part.absorb({key: tensors[key] for key in part.export() if key in tensors})

    def learned(self) -> list[nn.Parameter]:
        parameters = []
        for part in self.parts:
            parameters += part.learned()
        return parameters

    def describe(self) -> str:
        return ", ".join(filter(None, (part.describe() for part in self.parts)))

    def expected_parameters(self) -> int:
        return sum(part.expected_parameters() for part in self.parts)


class Additive(Adapter):
    """W' = W + delta(), with delta of shape (out, in)."""

    @property
    def commutes(self) -> bool:
        return not self.reads_weight

    @property
    def is_dense(self) -> bool:
        return type(self).post is Additive.post and self.shared is None

    def delta(self) -> Tensor:
        raise NotImplementedError  # a subclass that forgets it fails in every law

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta().to(W.dtype), b

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.target.op(x, self.delta())


class LowRank(Additive):
    """delta = B A from `factors()`: A (r, in), B (out, r), the scaling folded in."""

    def __init__(self, config: Config | None, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.dropout: nn.Module | None = None  # a default on the class would hide the module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_product = cls.post is LowRank.post and cls.update is LowRank.update and not cls.has_pre
        cls.has_finish = cls.finish is not LowRank.finish

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError  # a subclass that forgets it fails in every law

    def as_update(self) -> Update:
        """The factors, and the dropout that is in effect."""
        A, B = self.factors()
        dropout = self.dropout
        in_effect = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return Update(A, B, in_effect)

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.target.product(A, B)

    @property
    def is_plain_sum(self) -> bool:
        """Whether `fold` is W + B A, for W (out, in) as it is stored."""
        kind = type(self)
        return self.target.kind == "linear" and kind.fold is LowRank.fold and kind.delta is LowRank.delta

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.is_plain_sum:
            return super().fold(W, b)
        A, B = self.factors()
        return torch.addmm(W, B.to(W.dtype), A.to(W.dtype)), b

    def update(self, x: Tensor) -> Tensor:
        """What it adds to the output for an input."""
        A, B = self.factors()
        if self.dropout is not None:
            x = self.dropout(x)
        return self.target.low_rank(x, A, B)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.finish(y + self.update(x))

    def finish(self, z: Tensor) -> Tensor:
        """A last change of the output, after the update was added."""
        return z

    def set_dropout(self, p: float) -> None:
        self.dropout = nn.Dropout(p) if p > 0 else None


class Bias(Adapter):
    """A trained copy of the target's bias: y' = y - b + b'. The base keeps its own."""

    kinds = frozenset({"linear", "conv", "norm"})

    def __init__(self, target: Target, beside: bool) -> None:
        super().__init__(None, target)
        self.bias = nn.Parameter(target.bias().detach().clone())
        self._key = "base_layer.bias" if beside else "bias"

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.target.channels(self.bias - self.target.original_bias().to(self.bias.dtype), y)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert b is not None
        return W, b + (self.bias - self.target.original_bias()).to(b.dtype)

    def export(self) -> Tensors:
        return {self._key: self.bias.detach()}

    def absorb(self, tensors: Tensors) -> None:
        super().absorb({"bias": tensors[self._key]} if self._key in tensors else {})


class Replace(Adapter):
    """A trained copy of a whole module, which runs instead of it (`modules_to_save`: a classifier, a head)."""

    kinds = frozenset({"linear", "conv", "embedding", "norm", "block"})

    def __init__(self, target: Target) -> None:
        super().__init__(None, target)
        self.module = target.copy()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.target.matrix_of(self.module)
        return weight.to(W.dtype), None if bias is None else bias.to(W.dtype)

    def export(self) -> Tensors:
        return self.module.state_dict()

    def absorb(self, tensors: Tensors) -> None:
        super().absorb({f"module.{key}": tensor for key, tensor in tensors.items()})


class TiedReplace(Replace):
    """A module tied to one of which a copy is trained: it runs with the copy's weight."""

    def __init__(self, target: Target, first: Replace) -> None:
        Adapter.__init__(self, None, target, first)

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        twin = copy.copy(self.target.base)
        twin._parameters = {**twin._parameters, "weight": self.shared.module.weight}
        return twin

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.target.base, {"weight": self.shared.module.weight}, args, kwargs)

    def export(self) -> Tensors:
        return {"weight": self.shared.module.weight.detach()}

    def absorb(self, tensors: Tensors) -> None:
        pass  # the first one has taken it

    def repeats(self) -> dict[str, str]:
        return {"weight": f"{self.shared.target.path}.weight"}
