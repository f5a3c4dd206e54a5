"""`peft.tuners.lora.variants`: the classes of LoRA's variants, and the block-diagonal factor of BD-LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...methods.alora import ALoRA
from ...methods.arrow import Arrow
from ...methods.bdlora import BDLoRA
from ...methods.dora import DoRA
from ...methods.kasa import KaSA
from ...methods.mica import MiCA
from ...methods.monteclora import MonteCLoRA
from ...methods.qalora import QALoRA
from ...methods.velora import VeLoRA


class VariantMarker(type):
    """An adapter is an instance of PEFT's class of a variant if it is of veneer's class, on a module of its kind."""

    method: type
    kind: str

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, cls.method):
            return False
        target: Any = instance.target  # type: ignore[attr-defined]
        dimensions = f"{target.spatial}d" if target.kind == "conv" else ""
        return cls.kind == target.kind + dimensions


def _variant(name: str, method: type, kind: str) -> Any:
    namespace = {"__module__": "peft.tuners.lora.variants", "method": method, "kind": kind}
    return VariantMarker(name, (), namespace)


ALoraLinearVariant = _variant("ALoraLinearVariant", ALoRA, "linear")
ArrowLinearVariant = _variant("ArrowLinearVariant", Arrow, "linear")
BdLoraLinearVariant = _variant("BdLoraLinearVariant", BDLoRA, "linear")
DoraLinearVariant = _variant("DoraLinearVariant", DoRA, "linear")
DoraEmbeddingVariant = _variant("DoraEmbeddingVariant", DoRA, "embedding")
DoraConv1dVariant = _variant("DoraConv1dVariant", DoRA, "conv1d")
DoraConv2dVariant = _variant("DoraConv2dVariant", DoRA, "conv2d")
DoraConv3dVariant = _variant("DoraConv3dVariant", DoRA, "conv3d")
KasaLinearVariant = _variant("KasaLinearVariant", KaSA, "linear")
MiCALinearVariant = _variant("MiCALinearVariant", MiCA, "linear")
MiCAEmbeddingVariant = _variant("MiCAEmbeddingVariant", MiCA, "embedding")
MontecloraLinearVariant = _variant("MontecloraLinearVariant", MonteCLoRA, "linear")
QALoraLinearVariant = _variant("QALoraLinearVariant", QALoRA, "linear")
VeloraLinearVariant = _variant("VeloraLinearVariant", VeLoRA, "linear")


class BlockDiagonalLinear(nn.Module):
    """A linear layer with a block-diagonal weight, held as its blocks on top of each other, (out, in / n).

    Raises:
        ValueError: the number of blocks does not divide the sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(f"{nblocks} blocks do not divide {in_features} inputs and {out_features} outputs")
        self.in_features = in_features
        self.out_features = out_features
        self.nblocks = nblocks
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // nblocks, dtype=dtype, device=device))
        if not init_zero:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (self.nblocks, -1))  # (..., blocks, in / n)
        blocks = self.weight.unflatten(0, (self.nblocks, -1))  # (blocks, out / n, in / n)
        return torch.einsum("...bi,boi->...bo", groups, blocks).flatten(-2)

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        return torch.block_diag(*self.weight.chunk(self.nblocks))
