"""LoRA on a quantised base: simulated from the whole one ("loftq"), or fitted to one that is quantised already."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
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
    """Give the base the quantised weights that a LoftQ adapter stands on; the adapter becomes plain LoRA on that base.

    For bases that are to be saved, or quantised for real, as they are. Other adapters stand on the new base too.

    Raises:
        VeneerError: the adapter is not LoftQ's, or something is merged.
    """
    state = model._state
    adapters = [part for a in state.adapters(adapter_name).values() for part in a.parts if isinstance(part, LoftQ)]
    if not any(part.error is not None for part in adapters) or model._merged():
        raise VeneerError(f'{adapter_name!r} must be a LoRA made with init_lora_weights="loftq", and nothing merged')
    for part in adapters:
        W = part.target.weight()
        part.target.replace(part.target.tensors((W + part.error).to(W.dtype), None))
        part.error = None  # type: ignore[assignment]
    config: Any = copy.copy(state.configs[adapter_name])
    config.init_lora_weights, config.loftq_config = True, None
    state.configs[adapter_name] = config


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Start a LoRA on a quantised base at what the quantisation lost.

    Args:
        peft_model: the quantised base with its adapter.
        model_path: directory of the base's own safetensors; None: where the base came from.
        callback: called after each layer with the model and the layer's path; false takes that layer's start back.

    Raises:
        VeneerError: the base is not quantised: no layer differs from the file.
    """
    state = state_of(peft_model.get_base_model())
    found = False
    with ExitStack() as files:
        read = Pretrained(peft_model, model_path, files)
        for path, adapter in state.adapters(adapter_name).items():
            for lora in (part for part in adapter.parts if isinstance(part, LoRA)):
                W = lora.target.as_matrix(read(f"{path}.weight")).to(lora.target.device)
                residual = W.float() - lora.target.weight().float()
                if not residual.any():
                    continue
                found = True
                before = [t.clone() for t in lora.matrices()]
                for mine, start in zip(lora.matrices(), best_fit(residual, lora.r, lora.scaling), strict=True):
                    mine.copy_(start)
                if callback is not None and not callback(peft_model, path):
                    for mine, old in zip(lora.matrices(), before, strict=True):
                        mine.copy_(old)
    if not found:
        raise VeneerError("no adapted layer differs from the pretrained file: the base is not quantised")


class Pretrained:
    """Tensors of a pretrained model's safetensors, whole or in shards, read one at a time."""

    def __init__(self, model: Any, directory: str | None, files: ExitStack) -> None:
        base = model.get_base_model()
        self.directory = Path(directory or resolve(base.config.name_or_path))
        self.directory = self.directory.parent if self.directory.suffix == ".safetensors" else self.directory
        self.prefix = getattr(base, "base_model_prefix", "") + "."
        self.files, self.open = files, {}  # type: ignore[var-annotated]
        self.shards = dict(self._index())

    def _index(self) -> Iterator[tuple[str, Path]]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            for name, file in json.loads(index.read_text())["weight_map"].items():
                yield name, self.directory / file
        elif (whole := self.directory / "model.safetensors").is_file():
            yield from ((name, whole) for name in self._file(whole).keys())  # noqa: SIM118 (not a dict)
        else:
            raise CheckpointError(f"{str(self.directory)!r} holds no model.safetensors; give model_path")

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self.open:
            self.open[path] = self.files.enter_context(safe_open(path, framework="pt"))
        return self.open[path]

    def __call__(self, name: str) -> Tensor:
        for key in (name, name.removeprefix(self.prefix), self.prefix + name):
            if key in self.shards:
                return self._file(self.shards[key]).get_tensor(key)
        raise CheckpointError(f"{str(self.directory)!r} holds no {name!r}; is it the base model's directory?")
