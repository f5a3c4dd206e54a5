"""Constants of PEFT's inner modules, which are few and mean the same in every module."""

from __future__ import annotations

from typing import Any, Literal, Union

from ...maths.wavelet import NAMES, filters
from ..configs import CONFIGS, PeftType
from ..layers import LAYERS
from ..tables import methods as table

MIXED = ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA")
"""The methods that PEFT lists for its mixed models."""

COMPATIBLE_TUNER_TYPES = tuple(PeftType(kind) for kind in MIXED)
PREFIXES = [table.METHODS[kind].prefix for kind in ("LORA", "LOKR", "LOHA", "OFT", "SHIRA")]
Configs: Any = Union[tuple(CONFIGS[kind] for kind in COMPATIBLE_TUNER_TYPES)]  # noqa: UP007 - they are computed
Layers = tuple(LAYERS[kind][table.METHODS[kind].layers[0]] for kind in MIXED)
VARIANT_KWARG_KEYS = ["alora_offsets"]
UNSUPPORTED_LORA_MODULES = tuple(
    LAYERS["LORA"][name] for name in ("Embedding", "MultiheadAttention", "Conv1d", "Conv2d", "Conv3d")
)
CONFIG_KEYS_TO_CHECK = {PeftType("LORA"): ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}
ENABLE_DORA_CACHING = False
EPS = 1e-12
WAVELET_REDUCTIONS = {name: (len(filters(name)[0]) - 2,) * 2 for name in NAMES}
RoadVariant = Literal["road_1", "road_2", "road_4"]
mlu_available = False
is_transformers_le_4_53 = False
is_transformers_dtensor_tp = False
"""Whether layers are adapted on tensor-parallel modules, which veneer leaves to FSDP2."""
warn_msg_weight_tying = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but no implementation exists to tie "
    "the adapters. This can lead to complications, for example when merging the adapter or converting your model to "
    "formats other than safetensors. Check the discussion here: https://github.com/huggingface/peft/issues/2777"
)
