"""`peft.tuners.lora.variants`: the classes of LoRA's variants, and the block-diagonal factor of BD-LoRA."""

from __future__ import annotations

from typing import Any

from ...methods.alora import ALoRA
from ...methods.arrow import Arrow
from ...methods.bdlora import BDLoRA
from ...methods.dora import DoRA
from ...methods.kasa import KaSA
from ...methods.mica import MiCA
from ...methods.monteclora import MonteCLoRA
from ...methods.qalora import QALoRA
from ...methods.velora import VeLoRA
from ..block_diagonal import BlockDiagonalLinear

__all__ = ["BlockDiagonalLinear"]


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
