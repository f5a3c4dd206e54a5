"""The base classes of methods: an adapter is an `nn.Module` on one target, with the checkpoint's attribute names.

An adapter defines what it does to activations (`pre`, `post`), to the weight (`fold`), or both; `tests/test_laws.py`
checks that both give the same output.
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

    - `pre(x) -> x`: changes the input of the base module.
    - `post(x, y) -> y`: changes its output; x is the input before `pre`.
    - `fold(W, b) -> (W, b)`: changes the weight, W (out, in). Without it, the adapter cannot be merged.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    """The kinds of targets it adapts: linear, conv, embedding, norm, block, param."""
    reads_weight: bool = False
    """Whether `post` reads the weight (its norm, say), so that adapters below must be folded into the weight first."""
    follows_ties: ClassVar[bool] = False
    """Whether modules with a tied weight are adapted too; their adapters are built with `twin=` the first adapter."""
    is_product: ClassVar[bool] = False
    """Whether it adds x A^T B^T to the output and then only applies `finish` (see `LowRank`)."""
    has_finish: ClassVar[bool] = False
    only_adds: ClassVar[bool] = False
    """Whether the output is that of the module below plus a term (see `Adding`)."""
    key: str = ""
    """The prefix of its tensors' names in the file."""
    has_pre: bool = False
    has_post: bool = False
    has_fold: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.has_pre = cls.pre is not Adapter.pre
        cls.has_post = cls.post is not Adapter.post
        cls.has_fold = cls.fold is not Adapter.fold

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # torch's `Tensor | Module` fits no attribute of ours

    def __init__(self, config: Config | None, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.config: Any = config
        self.target = target
        self._shared = (shared,)  # a tuple, so that torch does not register it as a child of every layer

    @property
    def shared(self) -> Any:
        """The module from `Config.build_shared`, which all layers of this adapter share."""
        return self._shared[0]

    @property
    def parts(self) -> tuple[Adapter, ...]:
        """The adapters that it consists of, innermost first."""
        return (self,)

    @property
    def commutes(self) -> bool:
        """Whether its position among other adapters makes no difference, so that it may be merged out of order."""
        return False

    @property
    def is_dense(self) -> bool:
        """Whether `post` forms the full update matrix, and `fold` needs nothing but the parameters."""
        return False

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that it computes in: that of its first floating-point tensor, else the shared module's."""
        if "_dtype" not in self.__dict__:
            self._dtype = _dtype_of(self) or _dtype_of(self.shared)
        return self._dtype

    def forget_dtype(self) -> None:
        """Clear the cached `dtype` after the tensors were cast."""
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
        """The tensors to save, by attribute name."""
        return self.state_dict()

    def absorb(self, tensors: Tensors) -> None:
        """Load tensors from a file.

        Parameters are set in place, because an optimizer may hold them; placeholder tensors are replaced.
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
        """Maps keys whose tensors duplicate another adapter's (perhaps transposed) to that adapter's keys."""
        return {}

    def learned(self) -> list[nn.Parameter]:
        """The parameters that can be trained."""
        parameters = []
        for module in modules_of(self):
            parameters += [parameter for parameter in module._parameters.values() if parameter is not None]
        return parameters

    def describe(self) -> str:
        """A short description of its settings, for `print(model)`."""
        return ""

    def expected_parameters(self) -> int:
        """The number of trained parameters by the paper's formula; by default the actual number."""
        return sum(p.numel() for p in self.parameters())


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all modules inside it, with repetitions, in a quarter of the time of `module.modules()`."""
    modules = [module]
    for parent in modules:  # the list grows during the loop
        modules.extend(child for child in parent._modules.values() if child is not None)
    return modules


def _dtype_of(module: nn.Module | None) -> torch.dtype | None:
    """The dtype of the first floating-point parameter or, without one, buffer."""
    if module is None:
        return None
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return None


class Parts(Adapter):
    """Several adapters under one name on one target, such as an update and a trained bias; innermost first."""

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


class Adding(Adapter):
    """y' = y + term(x), which need not be what one update of the weight adds."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.only_adds = cls.post is Adding.post and not cls.has_pre

    def term(self, x: Tensor) -> Tensor:
        """What it adds to the output for an input x."""
        raise NotImplementedError  # a subclass without it fails `tests/test_laws.py`

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.term(x)


class Additive(Adding):
    """W' = W + delta(), with delta of shape (out, in)."""

    @property
    def commutes(self) -> bool:
        return not self.reads_weight

    @property
    def is_dense(self) -> bool:
        kind = type(self)
        return kind.post is Adding.post and kind.term is Additive.term and self.shared is None

    def delta(self) -> Tensor:
        raise NotImplementedError  # a subclass without it fails `tests/test_laws.py`

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta().to(W.dtype), b

    def term(self, x: Tensor) -> Tensor:
        return self.target.op(x, self.delta())


class LowRank(Additive):
    """delta = B A from `factors()`: A (r, in) and B (out, r), which include the scaling."""

    def __init__(self, config: Config | None, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.dropout: nn.Module | None = None  # a default on the class would hide the module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_product = cls.post is LowRank.post and cls.term is LowRank.term and not cls.has_pre
        cls.has_finish = cls.finish is not LowRank.finish
        cls.only_adds = cls.post is LowRank.post and not (cls.has_pre or cls.has_finish)

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError  # a subclass without it fails `tests/test_laws.py`

    def as_update(self) -> Update:
        """The factors, and the dropout probability that applies in the current mode."""
        A, B = self.factors()
        dropout = self.dropout
        in_effect = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return Update(A, B, in_effect)

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.target.product(A, B)

    @property
    def is_plain_sum(self) -> bool:
        """Whether `fold` computes W + B A, with W (out, in) as it is stored."""
        kind = type(self)
        return self.target.kind == "linear" and kind.fold is LowRank.fold and kind.delta is LowRank.delta

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.is_plain_sum:
            return super().fold(W, b)
        A, B = self.factors()
        return torch.addmm(W, B.to(W.dtype), A.to(W.dtype)), b

    def term(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        if self.dropout is not None:
            x = self.dropout(x)
        return self.target.low_rank(x, A, B)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.finish(y + self.term(x))

    def finish(self, z: Tensor) -> Tensor:
        """Change the output after the update was added; does nothing by default."""
        return z

    def set_dropout(self, p: float) -> None:
        self.dropout = nn.Dropout(p) if p > 0 else None


class Bias(Adapter):
    """A trained copy b' of the target's bias b: y' = y - b + b'. The base module keeps its own bias."""

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
    """A trained copy of a whole module that runs in its place (`modules_to_save`: a classifier, a head)."""

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
    """A module that shares its weight with a module that has a trained copy: it runs with the copy's weight."""

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
        pass  # the adapter of the first module loads it

    def repeats(self) -> dict[str, str]:
        return {"weight": f"{self.shared.target.path}.weight"}
