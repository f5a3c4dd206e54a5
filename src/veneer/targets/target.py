"""A target is a base module as its adapters see it: its sizes, its weight as a matrix, its operation.

W is (out, in) for every kind of module, so methods need not know whether the stored weight is transposed, a convolution
or an embedding.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import AbstractContextManager
from itertools import chain
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
    """The attributes of its layer (`core.layer.AdapterLayer`) that a target reads."""

    base_layer: Any
    path: str
    state: Any
    rows: Tensor | None
    """In a mixed batch, the rows of the current adapter."""
    call: dict[str, Any]
    """The keyword arguments of the current call of a block."""
    kept: dict[str, Tensor]
    """The pretrained tensors by name while adapters are merged."""
    kept_module: Any
    """The pretrained module, if merging has replaced it."""


class Target:
    """The default target, a block: any module, adapted at its first input and its first output tensor.

    It keeps a reference to the layer and not to the module, so `base` is up to date after the module is replaced.
    """

    kind: ClassVar[str] = "block"
    inside: ClassVar[Mapping[str, str]] = {}
    """Parameters that the module reads without calling the submodules that hold them; the values are key prefixes."""
    is_quantised: ClassVar[bool] = False
    """Whether the weight is stored quantised."""
    is_readable: ClassVar[bool] = True
    """Whether the weight can be read, after dequantisation if necessary."""
    forwards: ClassVar[tuple[Any, ...]] = ()
    """The forward methods that `op` and `low_rank` repeat; () if the class of the module decides nothing."""

    def __init__(self, layer: Layer) -> None:
        self._layer = weakref.ref(layer)  # a cycle with the layer would delay the release of the base model's memory
        self.by_weight = bool(self.forwards) and self._differs(layer.base_layer)
        """The module computes something else than its class, so updates of its weight must be put into the weight."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer": self.layer}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self._layer = weakref.ref(attributes["_layer"])

    def _differs(self, module: nn.Module) -> bool:
        """Whether the module's forward is another than those that this kind repeats."""
        return _forward_of(module) not in self.forwards

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
        """The module's path in the unadapted model, such as `model.layers.0.self_attn.q_proj`."""
        return self.layer.path

    @property
    def in_features(self) -> int:
        return _block_width(self.base)

    @property
    def out_features(self) -> int:
        return self.in_features

    @property
    def in_channels(self) -> int:
        """Channels of the input. A convolution's `in_features` counts the kernel as well."""
        return self.in_features

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions of a convolution; 0 for other modules."""
        return 0

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution; () for other modules."""
        if not self.spatial:
            return ()
        return getattr(self.base, "kernel_size", ())

    @property
    def groups(self) -> int:
        """Number of channel groups; 1 except for grouped convolutions."""
        return getattr(self.base, "groups", 1)

    @property
    def copies(self) -> int:
        """Number of matrices in the weight; 1 except for a stack of experts."""
        return 1

    @property
    def scale(self) -> Tensor | float:
        """The factor by which an embedding scales its rows (Gemma); 1 for other modules."""
        return getattr(self.base, "embed_scale", 1.0)

    @property
    def device(self) -> torch.device:
        """The device of the computation; accelerate may keep offloaded weights on another."""
        execution_device = offload.execution_device(self.base)
        if execution_device is not None:
            return execution_device
        first = next(chain(self.base.parameters(), self.base.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the base module's first floating-point parameter."""
        for parameter in self.base.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return None

    def fact(self, key: Any) -> Any:
        """A fact of the current model call, reduced to the current rows of a mixed batch; None if it is not given."""
        value = self.layer.state.facts.get(key)
        rows = self.layer.rows
        if rows is None or value is None:
            return value
        return value[rows]

    def once(self, owner: Any, compute: Callable[[], Any]) -> Any:
        """A result that depends only on the parameters of `owner`, cached while they cannot change (in generation)."""
        memo = None if torch.is_grad_enabled() else self.layer.state.memo
        if memo is None:
            return compute()
        if id(owner) not in memo:
            memo[id(owner)] = compute()
        return memo[id(owner)]

    def argument(self, name: str) -> Any:
        """A keyword argument of the current call of a block, such as `position_embeddings`; None if it is not given.

        In a mixed batch, tensors with one row per row of the batch are reduced to the current rows.
        """
        value = self.layer.call.get(name)
        rows = self.layer.rows
        if isinstance(value, tuple):
            return tuple(_of_rows(t, rows) for t in value)
        return _of_rows(value, rows)

    def child(self, name: str) -> Any:
        """A submodule of a block; in a mixed batch, without adapters, because a row has one adapter only."""
        module = getattr(self.base, name)
        if self.layer.rows is None:
            return module
        return getattr(module, "base_layer", module)

    def present(self) -> AbstractContextManager[nn.Module]:
        """A context in which the module's weights are in memory, even if accelerate has offloaded them."""
        return offload.present(self.base)

    def weight(self) -> Tensor:
        """The current weight of the base module, (out, in), including merged adapters."""
        with self.present() as module:
            return self.matrix_of(module)[0]

    def bias(self) -> Tensor | None:
        with self.present() as module:
            return self.matrix_of(module)[1]

    def original_weight(self) -> Tensor:
        """The pretrained weight, (out, in), without merged adapters."""
        kept = self.layer.kept.get("weight")
        if kept is not None:
            return self.as_matrix(kept)
        if self.layer.kept_module is None:
            return self.weight()
        return self.matrix_of(self.layer.kept_module)[0]

    def original_bias(self) -> Tensor | None:
        kept = self.layer.kept.get("bias")
        if kept is not None:
            return kept
        if self.layer.kept_module is None:
            return self.bias()
        return self.matrix_of(self.layer.kept_module)[1]

    def matrix_of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """(weight as (out, in), bias) of a module of this kind."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            raise NotMergeable(
                f"{self.path!r} ({type(module).__name__}) is a block, which has no weight of its own; keep the adapter "
                "unmerged"
            )
        return self.as_matrix(weight), getattr(module, "bias", None)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def as_stored(self, W: Tensor) -> Tensor:
        """W in the layout in which the module stores it: the inverse of `as_matrix`."""
        return W

    def copy(self) -> nn.Module:
        """A trainable copy of the module with its own Parameters."""
        with self.present() as module:
            return copy.deepcopy(module).requires_grad_(True)

    def direct(self) -> tuple[Tensor, Tensor | None] | None:
        """(W, b) if a call of the module computes x W^T + b and nothing else, so it can be skipped; otherwise None."""
        return None

    def op(self, x: Tensor, M: Tensor, b: Tensor | None = None) -> Tensor:
        """The module's operation with M (out, in) as its weight and b as its bias."""
        return functional_call(self.base, self.tensors(M, b), (x,))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """`op(x, product(A, B))` without forming the product."""
        return self.op(x, self.product(A, B))

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """The (out, in) matrix of a factor pair: B A."""
        return B @ A

    def factors(self, r: int) -> tuple[Matrix, Matrix]:
        """Uninitialised A and B of rank r in the checkpoint's layout: (r, in) and (out, r)."""
        return Matrix(r, self.in_features), Matrix(self.out_features, r)

    def channels(self, v: Tensor, y: Tensor) -> Tensor:
        """A vector over channels, shaped to be multiplied with or added to an activation."""
        return v

    def columns(self, v: Tensor) -> Tensor:
        """A vector over input channels, shaped to be multiplied with W."""
        return v[None, :]

    def tensors(self, W: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """Weight and bias under the names and in the layout of the module's parameters."""
        tensors = {"weight": self.as_stored(W)}
        if b is not None:
            tensors["bias"] = b
        return tensors

    def replace(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bind new Parameters and return the old ones. Writing to `.data` would change tied weights elsewhere.

        Raises:
            NotMergeable: a tensor is not a Parameter but computed from others.
        """
        for name in new:
            if name not in self.base._parameters:
                raise NotMergeable(
                    f"the {name} of {self.path!r} ({type(self.base).__name__}) is not a Parameter but computed from "
                    f"others; torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) makes it a tensor, "
                    "which must then be an nn.Parameter"
                )
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
        """Call the module with other Parameters."""
        return functional_call(module, tensors, args, kwargs)


class LinearTarget(Target):
    """`nn.Linear`."""

    kind = "linear"
    forwards: ClassVar[tuple[Any, ...]] = (nn.Linear.forward,)

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
        """The forward method that computes x W^T + b; None if the module has another."""
        return nn.Linear.forward

    def op(self, x: Tensor, M: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, M, b)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)


class Conv1DTarget(LinearTarget):
    """GPT-2's Conv1D: a linear layer that stores its weight as (in, out)."""

    forwards = ()

    @property
    def in_features(self) -> int:
        return self.base.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.base.weight.shape[1]

    @staticmethod
    def forward_of(base: nn.Module) -> Any:
        if not is_from(base, "pytorch_utils"):
            return None
        return type(base).forward

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_stored(self, W: Tensor) -> Tensor:
        return W.T


class ConvTarget(Target):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: W is (out, in / groups * kernel), one row per output channel."""

    kind = "conv"
    forwards: ClassVar[tuple[Any, ...]] = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def _differs(self, module: nn.Module) -> bool:
        convolution: Any = type(module)
        plain = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)
        return super()._differs(module) or convolution._conv_forward not in plain

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
                f"an update of {self.path!r} mixes its {self.groups} groups of channels, which its weight cannot "
                "express; keep the adapter unmerged"
            )
        return B @ A

    def factors(self, r: int) -> tuple[Matrix, Matrix]:
        if r % self.groups:
            kind = type(self.base).__name__
            raise TargetError(
                f"rank {r} on {self.path!r} must be a multiple of the {self.groups} groups of this {kind}"
            )
        if self.groups > 1 and self.base.padding_mode != "zeros":
            raise TargetError(
                f"{self.path!r} is a grouped convolution with padding_mode={self.base.padding_mode!r}; only 'zeros' is "
                "supported"
            )
        kernel = self.base.weight.shape[2:]
        ones = (1,) * self.spatial
        A = Matrix(r, self.in_channels, *kernel)
        B = Matrix(self.out_features, r // self.groups, *ones)
        return A, B

    def _read(self, x: Tensor, A: Tensor) -> Tensor:
        """Convolve x with A, which reads all channels even if the module has groups."""
        if self.groups == 1:
            return self.op(x, A)
        base = self.base
        kernel = A.unflatten(1, (self.in_channels, *base.weight.shape[2:]))
        return self._convolve(x, kernel, stride=base.stride, padding=base.padding, dilation=base.dilation)

    def _convolve(self, x: Tensor, kernel: Tensor, **settings: Any) -> Tensor:
        convolutions = (F.conv1d, F.conv2d, F.conv3d)
        convolution = convolutions[self.spatial - 1]
        return convolution(x, kernel, **settings)

    def channels(self, v: Tensor, y: Tensor) -> Tensor:
        return v.view(-1, *(1,) * self.spatial)

    def columns(self, v: Tensor) -> Tensor:
        groups = self.groups
        kernel = self.base.weight[0, 0].numel()
        rows = v.view(groups, -1).repeat_interleave(self.out_features // groups, 0)  # (out, in / groups)
        return rows.repeat_interleave(kernel, 1)


class EmbeddingTarget(Target):
    """An embedding is a linear layer over one-hot inputs: W is (width, vocabulary), the stored weight transposed."""

    kind = "embedding"
    forwards: ClassVar[tuple[Any, ...]] = (nn.Embedding.forward,)

    def _differs(self, module: nn.Module) -> bool:
        """A lookup whose rows are scaled is computed as the class does it, which spares the sum of whole tables."""
        return super()._differs(module) and not _is_scaled_lookup(module)

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
    """LayerNorm, RMSNorm and similar: W is the vector of scales."""

    kind = "norm"

    @property
    def in_features(self) -> int:
        return self.base.weight.shape[0]


class ParamTarget(Target):
    """A bare parameter of a module: a matrix W (out, in), or a stack of them, (experts, out, in).

    The layer calls the module with the folded parameter, so adapters here do not use activations.
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
        if kept is None:
            return self.weight()
        return self.as_matrix(kept)

    def as_matrix(self, weight: Tensor) -> Tensor:
        is_transposed = getattr(self.base, "is_transposed", False)
        if is_transposed and weight.dim() == 3:
            return weight.mT
        return weight

    def as_stored(self, W: Tensor) -> Tensor:
        return self.as_matrix(W)

    def tensors(self, W: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        return {self.name: self.as_stored(W)}

    def factors(self, r: int) -> tuple[Matrix, Matrix]:
        """A (experts * r, in), its rows grouped by expert, and B (out, r * experts), its columns grouped by rank."""
        return Matrix(self.copies * r, self.in_features), Matrix(self.out_features, r * self.copies)

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        if len(self.shape) == 2:
            return B @ A
        B_stack = B.unflatten(1, (-1, self.copies)).permute(2, 0, 1)  # (experts, out, r)
        A_stack = A.unflatten(0, (self.copies, -1))  # (experts, r, in)
        return B_stack @ A_stack


class AttentionTarget(Target):
    """`nn.MultiheadAttention`: a block whose weights can also be adapted, as bare parameters."""

    inside = {"in_proj_weight": "", "out_proj.weight": "base_layer.out_proj."}

    def parameters(self) -> dict[str, Any]:
        return {name: _parameter(self.base, name) for name in self.inside}

    def replace(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = self.parameters()
        old: dict[str, Tensor] = {}
        bound: dict[str, Tensor] = {}
        for name, tensor in new.items():
            old[name] = parameters[name]
            dtype = old[name].dtype
            bound[name] = nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False)
        self.restore(bound)
        return old

    def restore(self, old: dict[str, Tensor]) -> None:
        for path, parameter in old.items():
            owner, _, name = path.rpartition(".")
            self.base.get_submodule(owner)._parameters[name] = parameter


def _parameter(module: nn.Module, path: str) -> Any:
    """The parameter of a module at a path such as `out_proj.weight`."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _forward_of(module: nn.Module) -> Any:
    """The function that a call of the module runs, without that of accelerate around it."""
    bound = module.__dict__.get("forward")
    if bound is None:
        return type(module).forward
    if hasattr(module, "_hf_hook"):
        bound = module._old_forward
    return getattr(bound, "__func__", bound)


@torch.no_grad()
def _is_scaled_lookup(module: Any) -> bool:
    """Try whether an embedding with a forward of its own gives the rows of its weight times a number.

    Then a lookup in a product of factors is the product of a lookup in the first factor.
    """
    if hasattr(module, "embed_scale"):
        return True
    width, r = module.embedding_dim, 3
    row = torch.linspace(0.5, 1.5, r, device=module.weight.device)
    B = torch.linspace(-1, 2, width * r, device=row.device).view(width, r)
    ids = torch.arange(1, device=row.device)[None]
    shape = (module.num_embeddings, -1)
    try:
        of_factor = functional_call(module, {"weight": row.expand(shape)}, (ids,))
        of_product = functional_call(module, {"weight": (B @ row).expand(shape)}, (ids,))
        return torch.allclose(F.linear(of_factor, B), of_product, rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it takes other arguments than ids
        return False


def adapts(kinds: Collection[str], module: nn.Module) -> bool:
    """Whether a method for these kinds of targets can adapt the module, or the parameters inside it."""
    target = kind_of(module)
    return target.kind in kinds or ("param" in kinds and bool(target.inside))


def _of_rows(value: Any, rows: Tensor | None) -> Any:
    """The given rows of a batched tensor; a tensor whose first dimension is 1 is broadcast and kept as it is."""
    if rows is None or not isinstance(value, Tensor) or len(value) == 1:
        return value
    return value[rows]


def kind_of(module: nn.Module) -> type[Target]:
    """The target class for a module. No other function looks at module classes."""
    from .quantised import quantised

    if is_conv1d(module):
        return Conv1DTarget
    backend = quantised(module)
    if backend is not None:
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
    """The width of a block's input: the input width of its first linear layer."""
    for child in module.modules():
        if kind_of(child).kind == "linear":
            if is_conv1d(child):
                return child.weight.shape[0]
            return child.in_features
    raise TargetError(f"the width of {type(module).__name__} is unknown, because it contains no linear layer")


def is_bare(module: Any, forward: Any) -> bool:
    """Whether a call of the module runs `forward` and nothing else, on frozen plain Parameters.

    It is not if the module has hooks or an overridden forward, or a quantised or sharded weight (a tensor subclass).
    """
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
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
    """A module with only a weight, such as `lora_A`. Unlike `nn.Linear`, it leaves the weight uninitialised."""

    weight: nn.Parameter

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self._parameters["weight"] = nn.Parameter(torch.empty(shape))  # five times faster than `self.weight =`

    def matrix(self) -> Tensor:
        """The weight as (rows, columns): all dimensions but the first are flattened."""
        return self.weight.flatten(1)

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))
