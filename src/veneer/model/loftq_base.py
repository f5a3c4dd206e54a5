"""LoftQ and the base model: store the simulated quantised weights, or initialise a LoRA on a quantised base."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.state import state_of
from ..errors import CheckpointError, VeneerError
from ..files.pull import resolve
from ..methods.families.loftq import LoftQ
from ..methods.inits.loftq import best_fit
from ..methods.lora import LoRA

if TYPE_CHECKING:
    from .peft_model import PeftModel


@torch.no_grad()
def quantise_base_(model: PeftModel, adapter_name: str = "default") -> None:
    """Replace the base's weights by the quantised weights of a LoftQ adapter, which becomes a plain LoRA.

    Use it to save the base, or to quantise it in another library. Other adapters then run on the new base too.

    Raises:
        VeneerError: the adapter was not made by LoftQ, or an adapter is merged.
    """
    state = model._state
    loras: list[LoftQ] = []
    for adapter in state.adapters(adapter_name).values():
        loras += [part for part in adapter.parts if isinstance(part, LoftQ)]
    if not any(lora.error is not None for lora in loras) or model._merged():
        raise VeneerError(
            f'{adapter_name!r} must be a LoRA created with init_lora_weights="loftq", and no adapter may be merged'
        )
    for lora in loras:
        W = lora.target.weight()
        quantised = (W + lora.error).to(W.dtype)
        lora.target.replace(lora.target.tensors(quantised, None))
        lora.error = None  # type: ignore[assignment]
    config: Any = copy.copy(state.configs[adapter_name])
    config.init_lora_weights = True
    config.loftq_config = None
    state.configs[adapter_name] = config


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Initialise a LoRA on a quantised base with the best low-rank fit of the quantisation error.

    Args:
        peft_model: the quantised base with its adapter.
        model_path: directory of the original safetensors; None: where the base was loaded from.
        adapter_name: which adapter.
        callback: called after each layer with the model and the layer's path; if it returns false, the layer gets its
            previous values back.

    Raises:
        VeneerError: the base is not quantised: no layer differs from the file.
    """
    state = state_of(peft_model.get_base_model())
    is_quantised = False
    with ExitStack() as files:
        read = Pretrained(peft_model, model_path, files)
        for path, adapter in state.adapters(adapter_name).items():
            for lora in adapter.parts:
                if not isinstance(lora, LoRA):
                    continue
                W = lora.target.as_matrix(read(f"{path}.weight")).to(lora.target.device)
                residual = W.float() - lora.target.weight().float()
                if not residual.any():
                    continue
                is_quantised = True
                previous = [matrix.clone() for matrix in lora.matrices()]
                _copy_into(lora, best_fit(residual, lora.r, lora.scaling))
                if callback is not None and not callback(peft_model, path):
                    _copy_into(lora, previous)
    if not is_quantised:
        raise VeneerError("no adapted layer differs from the pretrained file: the base is not quantised")


def _copy_into(lora: LoRA, values: Iterable[Tensor]) -> None:
    for matrix, value in zip(lora.matrices(), values, strict=True):
        matrix.copy_(value)


class Pretrained:
    """Reads single tensors of a pretrained model from its safetensors, one file or shards."""

    def __init__(self, model: Any, directory: str | None, files: ExitStack) -> None:
        base = model.get_base_model()
        self.directory = Path(directory or resolve(base.config.name_or_path))
        if self.directory.suffix == ".safetensors":
            self.directory = self.directory.parent
        self.prefix = getattr(base, "base_model_prefix", "") + "."
        self.files = files
        self.open: dict[Path, Any] = {}
        self.shards = self._index()

    def _index(self) -> dict[str, Path]:
        """The file of each tensor, by key."""
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            return {key: self.directory / file for key, file in weight_map.items()}
        if single.is_file():
            return dict.fromkeys(self._file(single).keys(), single)
        raise CheckpointError(f"{str(self.directory)!r} holds no model.safetensors; give model_path")

    def _file(self, path: Path) -> Any:
        """An open safetensors file; stays open until `files` is closed."""
        from safetensors import safe_open

        if path not in self.open:
            self.open[path] = self.files.enter_context(safe_open(path, framework="pt"))
        return self.open[path]

    def __call__(self, name: str) -> Tensor:
        # A checkpoint of the headless model lacks the prefix, and one of the model with a head has it.
        for key in (name, name.removeprefix(self.prefix), self.prefix + name):
            if key in self.shards:
                return self._file(self.shards[key]).get_tensor(key)
        raise CheckpointError(f"{str(self.directory)!r} has no tensor {name!r}; is it the base model's directory?")
