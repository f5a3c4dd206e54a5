"""What an adapter sees of the module it adapts: sizes, the weight as a matrix, and how the module applies one.

Methods never ask whether a weight is stored transposed, is a convolution or an embedding: W is (out, in) everywhere.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import NotMergeable, TargetError
from ..upstream import offload
from ..upstream.models import is_conv1d, is_from

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


class Layer(Protocol):
    """What a target reads of the layer that it belongs to (`core.layer.AdapterLayer`)."""

    base_layer: Any
    path: str
    state: Any
    rows: Tensor | None
    """The rows of a mixed batch that are being computed."""
    call: dict[str, Any]
    """The keyword arguments of a block's call under way."""
    kept: dict[str, Tensor]
    """The pretrained tensors by name, while adapters are merged."""
    kept_module: Any
    """The pretrained module, where merging took another one."""


class Target:
    """A module of any kind, seen as a block: its first tensor in, its first tensor out.

    Holds the layer, not the module: `base` is read anew each time, so it is never stale after a swap.
    """

    kind: ClassVar[str] = "block"
    inside: ClassVar[Mapping[str, str]] = {}
    """Parameters that a module reads without calling what holds them, each with what stands before its keys in a file.
    """
    is_quantised: ClassVar[bool] = False
    """Its weight is kept in other numbers than those it stands for."""
    is_readable: ClassVar[bool] = True
    """What its weight stands for can be told."""

    def __init__(self, layer: Layer) -> None:
        self._layer = weakref.ref(layer)  # the layer holds the target: a base model must not wait for a cycle's end

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": self.layer}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes | {"_layer": weakref.ref(attributes["_layer"])})

    @property
    def layer(self) -> Any:
        layer = self._layer()
        assert layer is not None, "the target outlived its layer"
        return layer

    @property
    def base(self) -> Any:
        return self.layer.base_layer

    @property
    def path(self) -> str:
        """Where the module stands in the unadapted model: `model.layers.0.self_attn.q_proj`."""
        return self.layer.path

    @property
    def in_features(self) -> int:
        return _block_width(self.base)

    @property
    def out_features(self) -> int:
        return self.in_features

    @property
    def in_channels(self) -> int:
        """The size of the input's channel dimension; for a convolution not `in_features`, which counts the kernel."""
        return self.in_features

    @property
    def spatial(self) -> int:
        """How many dimensions a convolution slides over; 0 for anything else."""
        return 0

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's kernel; () for anything else."""
        return getattr(self.base, "kernel_size", ()) if self.spatial else ()

    @property
    def groups(self) -> int:
        """Independent groups of channels; 1 but for grouped convolutions."""
        return getattr(self.base, "groups", 1)

    @property
    def copies(self) -> int:
        """Matrices of this shape in the weight; 1 but for a stack of experts."""
        return 1

    @property
    def scale(self) -> Tensor | float:
        """What an embedding multiplies its rows by (Gemma)."""
        return getattr(self.base, "embed_scale", 1.0)

    @property
    def device(self) -> torch.device:
        """Where the module computes (under accelerate's offload its weights may lie elsewhere)."""
        execution = offload.execution_device(self.base)
        if execution is not None:
            return execution
        first = next((t for t in (*self.base.parameters(), *self.base.buffers())), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the base module's floating tensors."""
        return next((p.dtype for p in self.base.parameters() if p.is_floating_point()), None)

    def fact(self, key: Any) -> Any:
        """A fact of the model call under way, for the rows that are being computed; None without it."""
        value, rows = self.layer.state.facts.get(key), self.layer.rows
        return value if rows is None or value is None else value[rows]

    def once(self, owner: Any, compute: Callable[[], Any]) -> Any:
        """What `owner` computes from its parameters alone: once where many calls follow without a change of them."""
        memo = None if torch.is_grad_enabled() else self.layer.state.memo
        if memo is None:
            return compute()
        if id(owner) not in memo:
            memo[id(owner)] = compute()
        return memo[id(owner)]

    def argument(self, name: str) -> Any:
        """A keyword argument of a block's call under way, such as the attention's `position_embeddings`; None without.

        Of tensors that have a row for each of a mixed batch, the rows that are being computed.
        """
        value, rows = self.layer.call.get(name), self.layer.rows
        if isinstance(value, tuple):
            return tuple(_of_rows(t, rows) for t in value)
        return _of_rows(value, rows)

    def child(self, name: str) -> Any:
        """A module inside a block, as the rows being computed see it: in a mixed batch they have no other adapter."""
        module = getattr(self.base, name)
        return module if self.layer.rows is None else getattr(module, "base_layer", module)

    def present(self) -> AbstractContextManager[nn.Module]:
        """The module with its weights in memory, also where accelerate has offloaded them."""
        return offload.present(self.base)

    def weight(self) -> Tensor:
        """The weight below the unmerged adapters, (out, in)."""
        with self.present() as module:
            return self.matrix_of(module)[0]

    def bias(self) -> Tensor | None:
        with self.present() as module:
            return self.matrix_of(module)[1]

    def original_weight(self) -> Tensor:
        """The pretrained weight, (out, in), whatever is merged at the moment."""
        kept = self.layer.kept.get("weight")
        if kept is not None:
            return self.as_matrix(kept)
        return self.weight() if self.layer.kept_module is None else self.matrix_of(self.layer.kept_module)[0]

    def original_bias(self) -> Tensor | None:
        kept = self.layer.kept.get("bias")
        if kept is not None:
            return kept
        return self.bias() if self.layer.kept_module is None else self.matrix_of(self.layer.kept_module)[1]

    def matrix_of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """(weight as (out, in), bias) of a module of this kind."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            raise NotMergeable(f"{self.path!r} ({type(module).__name__}) is a block without a weight of its own")
        return self.as_matrix(weight), getattr(module, "bias", None)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def as_stored(self, W: Tensor) -> Tensor:
        """The inverse of `as_matrix`: the layout the module keeps."""
        return W

    def copy(self) -> nn.Module:
        """A trainable copy of the module, with Parameters of its own."""
        with self.present() as module:
            return copy.deepcopy(module).requires_grad_(True)

    def direct(self) -> tuple[Tensor, Tensor | None] | None:
        """W (out, in) and b where calling the module is x W^T + b and nothing more, so that it may be left out."""
        return None

    def op(self, x: Tensor, M: Tensor, b: Tensor | None = None) -> Tensor:
        """The module's operation with M (out, in) for its weight and b for its bias."""
        return functional_call(self.base, self.tensors(M, b), (x,))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """`op(x, product(A, B))` without forming the product."""
        return self.op(x, self.product(A, B))

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """The (out, in) matrix of a factor pair: B A."""
        return B @ A

    def factors(self, r: int) -> tuple[Matrix, Matrix]:
        """Empty A and B of rank r in the layout of the file: (r, in) and (out, r)."""
        return Matrix(r, self.in_features), Matrix(self.out_features, r)

    def channels(self, v: Tensor, y: Tensor) -> Tensor:
        """A vector over channels, shaped to multiply or add to an activation."""
        return v

    def columns(self, v: Tensor) -> Tensor:
        """A vector over input channels, shaped to multiply W."""
        return v[None, :]

    def tensors(self, W: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """Weight and bias under the names and in the layout of the module's parameters."""
        return {"weight": self.as_stored(W)} | ({} if b is None else {"bias": b})

    def replace(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bind new Parameters and return the old ones. Never `.data`: a tied weight is shared with another module."""
        old = {name: self.base._parameters[name] for name in new}
        for name, tensor in new.items():
            dtype = old[name].dtype
            self.base._parameters[name] = nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False)
        return old

    def restore(self, old: dict[str, Tensor]) -> None:
        self.base._parameters.update(old)

    def parameters(self) -> dict[str, Any]:
        """The module's own Parameters, for `restore`."""
        return dict(self.base._parameters)

    def call_with(self, module: nn.Module, tensors: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        """A call of the module with other Parameters."""
        return functional_call(module, tensors, args, kwargs)


class LinearTarget(Target):
    kind = "linear"

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def direct(self) -> tuple[Tensor, Tensor | None] | None:
        base = self.base
        if not is_bare(base, self.forward_of(base)):
            return None
        return self.as_matrix(base._parameters["weight"]), base._parameters.get("bias")

    @staticmethod
    def forward_of(base: nn.Module) -> Any:
        """The forward that is x W^T + b."""
        return nn.Linear.forward

    def op(self, x: Tensor, M: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, M, b)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)


class Conv1DTarget(LinearTarget):
    """GPT-2's Conv1D: a linear layer that stores its weight as (in, out)."""

    @property
    def in_features(self) -> int:
        return self.base.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.base.weight.shape[1]

    @staticmethod
    def forward_of(base: nn.Module) -> Any:
        return type(base).forward if is_from(base, "pytorch_utils") else None

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_stored(self, W: Tensor) -> Tensor:
        return W.T


class ConvTarget(Target):
    """Conv1d, 2d, 3d: W is (out, in / groups * kernel), one row for each output channel."""

    kind = "conv"

    @property
    def in_features(self) -> int:
        return self.base.weight[0].numel()

    @property
    def out_features(self) -> int:
        return self.base.out_channels

    @property
    def in_channels(self) -> int:
        return self.base.in_channels

    @property
    def spatial(self) -> int:
        return len(self.base.kernel_size)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_stored(self, W: Tensor) -> Tensor:
        return W.unflatten(1, self.base.weight.shape[1:])

    def op(self, x: Tensor, M: Tensor, b: Tensor | None = None) -> Tensor:
        return self.base._conv_forward(x, self.as_stored(M), b)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        kernel = B.unflatten(1, (B.shape[1], *(1,) * self.spatial))
        return self._convolve(self._read(x, A), kernel, groups=self.groups)

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        if self.groups > 1:
            raise NotMergeable(
                f"an update of {self.path!r} mixes its {self.groups} groups of channels, which its weight cannot; "
                "keep the adapter unmerged"
            )
        return B @ A

    def factors(self, r: int) -> tuple[Matrix, Matrix]:
        if r % self.groups:
            raise TargetError(f"rank {r} on {self.path!r} must be a multiple of its {self.groups} groups")
        if self.groups > 1 and self.base.padding_mode != "zeros":
            raise TargetError(f"{self.path!r} pads a grouped convolution by {self.base.padding_mode}; only zeros work")
        kernel, ones = self.base.weight.shape[2:], (1,) * self.spatial
        return Matrix(r, self.in_channels, *kernel), Matrix(self.out_features, r // self.groups, *ones)

    def _read(self, x: Tensor, A: Tensor) -> Tensor:
        """A's convolution: it reads all channels, also where the module has groups."""
        if self.groups == 1:
            return self.op(x, A)
        base, kernel = self.base, A.unflatten(1, (self.in_channels, *self.base.weight.shape[2:]))
        return self._convolve(x, kernel, stride=base.stride, padding=base.padding, dilation=base.dilation)

    def _convolve(self, x: Tensor, kernel: Tensor, **settings: Any) -> Tensor:
        return (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1](x, kernel, **settings)

    def channels(self, v: Tensor, y: Tensor) -> Tensor:
        return v.view(-1, *(1,) * self.spatial)

    def columns(self, v: Tensor) -> Tensor:
        groups, kernel = self.groups, self.base.weight[0, 0].numel()
        return v.view(groups, -1).repeat_interleave(self.out_features // groups, 0).repeat_interleave(kernel, 1)


class EmbeddingTarget(Target):
    """An embedding is a linear layer over one-hot inputs: W is (width, vocabulary), the stored weight transposed."""

    kind = "embedding"

    @property
    def in_features(self) -> int:
        return self.base.num_embeddings

    @property
    def out_features(self) -> int:
        return self.base.embedding_dim

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_stored(self, W: Tensor) -> Tensor:
        return W.T

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(self.op(x, A), B)


class NormTarget(Target):
    """LayerNorm, RMSNorm and their kin: W is their vector of scales."""

    kind = "norm"

    @property
    def in_features(self) -> int:
        return self.base.weight.shape[0]


class ParamTarget(Target):
    """A bare parameter of a module: a matrix W (out, in), or a stack of them, (experts, out, in).

    The module is lent the folded parameter for each call, so an adapter here needs no activations.
    """

    kind = "param"

    def __init__(self, layer: Layer, name: str) -> None:
        super().__init__(layer)
        self.name = name

    @property
    def path(self) -> str:
        return f"{self.layer.path}.{self.name}"

    @property
    def shape(self) -> torch.Size:
        return self.as_matrix(_parameter(self.base, self.name)).shape

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def copies(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def matrix_of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        return self.as_matrix(_parameter(module, self.name)), None

    def original_weight(self) -> Tensor:
        kept = self.layer.kept.get(self.name)
        return self.weight() if kept is None else self.as_matrix(kept)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if weight.dim() == 3 and getattr(self.base, "is_transposed", False) else weight

    def as_stored(self, W: Tensor) -> Tensor:
        return self.as_matrix(W)

    def tensors(self, W: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        return {self.name: self.as_stored(W)}

    def factors(self, r: int) -> tuple[Matrix, Matrix]:
        """A (experts * r, in) and B (out, r * experts): the file counts A's rows by expert first, B's columns last."""
        return Matrix(self.copies * r, self.in_features), Matrix(self.out_features, r * self.copies)

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        if len(self.shape) == 2:
            return B @ A
        return B.unflatten(1, (-1, self.copies)).permute(2, 0, 1) @ A.unflatten(0, (self.copies, -1))


class AttentionTarget(Target):
    """`nn.MultiheadAttention`: a block whose own weights are adapted as bare parameters."""

    inside = {"in_proj_weight": "", "out_proj.weight": "base_layer.out_proj."}

    def parameters(self) -> dict[str, Any]:
        return {name: _parameter(self.base, name) for name in self.inside}

    def replace(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {name: self.parameters()[name] for name in new}
        lent: dict[str, Tensor] = {
            n: nn.Parameter(t.to(old[n].dtype).contiguous(), requires_grad=False) for n, t in new.items()
        }
        self.restore(lent)
        return old

    def restore(self, old: dict[str, Tensor]) -> None:
        for path, parameter in old.items():
            owner, _, name = path.rpartition(".")
            self.base.get_submodule(owner)._parameters[name] = parameter


def _parameter(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def adapts(kinds: Collection[str], module: nn.Module) -> bool:
    """Whether a method for these kinds of targets can adapt a module, or the parameters inside it."""
    target = kind_of(module)
    return target.kind in kinds or ("param" in kinds and bool(target.inside))


def _of_rows(value: Any, rows: Tensor | None) -> Any:
    """Entries for some rows of a batch; a tensor whose first dimension is 1 stands for all of them."""
    return value if rows is None or not isinstance(value, Tensor) or len(value) == 1 else value[rows]


def kind_of(module: nn.Module) -> type[Target]:
    """The view that fits a module: the one place that looks at module classes."""
    from .quantised import quantised

    if is_conv1d(module):
        return Conv1DTarget
    if (backend := quantised(module)) is not None:
        return backend
    if isinstance(module, nn.Linear):
        return LinearTarget
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return ConvTarget
    if isinstance(module, nn.Embedding):
        return EmbeddingTarget
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return AttentionTarget
    weight = module._parameters.get("weight")
    if "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1:
        return NormTarget
    return Target


def _block_width(module: Any) -> int:
    """The width of a block's stream: what its first linear layer reads."""
    for child in module.modules():
        if kind_of(child).kind == "linear":
            return child.weight.shape[0] if is_conv1d(child) else child.in_features
    raise TargetError(f"cannot tell the width of {type(module).__name__}: it holds no linear layer")


def is_bare(module: Any, forward: Any) -> bool:
    """Calling the module is `forward` and nothing more: no hooks, no other class's or wrapper's forward, plain tensors.

    Its weight and bias are frozen. Quantised and sharded weights are tensors of other classes.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(module).forward is forward
        and "forward" not in module.__dict__
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        and not (torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)
    )


class Matrix(nn.Module):
    """A weight and nothing else: `lora_A.weight` without the cost of an `nn.Linear` that is initialised twice."""

    weight: nn.Parameter

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self._parameters["weight"] = nn.Parameter(torch.empty(shape))  # as the attribute would, in a fifth of the time

    def matrix(self) -> Tensor:
        """The weight with all but its first dimension flattened: (rows, columns)."""
        return self.weight.flatten(1)

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))
