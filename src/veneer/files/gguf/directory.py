"""Turning a GGUF file of a model into a directory of transformers: config, weights in safetensors, and tokenizer.

The weights are read one at a time, dequantised and put into the order that transformers has; each keeps its dtype, and
one that is quantised becomes fp32, because its values have no exact form in half precision. Nothing of the file is
left out: what the model has no place for is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, listing
from .config import config_of
from .reader import Source
from .tensors import ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT, Naming
from .tokenizer import tokenizer_of

SHARD = 1 << 30
"""Bytes of a file of weights; a larger tensor has one for itself."""
IN_CONFIG = (ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT)
"""Tensors that become settings of the config."""


class Plan:
    """A directory of transformers that holds the model of a GGUF file.

    Raises:
        ConfigError: transformers has no such model, or no place for a tensor.
        CheckpointError: tensors are missing or have wrong shapes.
    """

    def __init__(self, path: Path) -> None:
        self.source = Source(path)
        self.config = config_of(self.source)
        self.tokenizer = tokenizer_of(self.source, self.config.max_position_embeddings)
        self.naming = Naming(self.config)
        self.shapes = _shapes(self.config)
        self._check_tensors()
        dtypes = [self.dtype(name) for name, shape in self.shapes.items() if len(shape) > 1]
        self.config.dtype = max(dtypes, key=lambda dtype: (dtype.itemsize, dtypes.count(dtype)))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter."""
        stored = self.naming.of(name)
        return self.source.dtype(stored) if stored in self.source.names else torch.float32

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(math.prod(shape) * self.dtype(name).itemsize for name, shape in self.shapes.items())

    def _check_tensors(self) -> None:
        """Compare the names and shapes of the file's tensors with the parameters of the model."""
        expected = {}
        for name, shape in self.shapes.items():
            placeholder = torch.empty(shape, device="meta")
            expected[self.naming.of(name)] = tuple(self.naming.arranged(name, placeholder).shape)
        present = set(self.source.names)
        missing = [key for key in expected if key not in present and not _is_bias(key)]
        if missing:
            raise CheckpointError(f"{self.source.shown} lacks tensors of its model:{listing(missing)}")
        extra = [key for key in self.source.names if key not in expected and key not in IN_CONFIG]
        if extra:
            title = self.naming.architecture.title
            raise ConfigError(
                f"{self.source.shown} holds tensors that a {title} of transformers has no place for, and would be "
                f"another model without them:{listing(extra)}"
            )
        wrong = []
        for key, shape in expected.items():
            if key in present and self.source.shape(key) != shape:
                wrong.append(f"{key} is {self.source.shape(key)}, not {shape}")
        if wrong:
            raise CheckpointError(f"{self.source.shown} holds tensors of wrong shapes:{listing(wrong)}")

    def value(self, name: str) -> Tensor:
        """A parameter in its dtype. A bias that the file lacks is zero."""
        key = self.naming.of(name)
        if key not in self.source.names:
            return torch.zeros(self.shapes[name])
        stored = self.source.value(key)
        return self.naming.restored(name, stored).contiguous()

    def write(self, folder: Path) -> None:
        """Write config, weights and tokenizer into an empty directory."""
        from transformers import GenerationConfig

        self._write_weights(folder)
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        generation = GenerationConfig(
            bos_token_id=self.config.bos_token_id,
            eos_token_id=self._stops(),
            pad_token_id=self.config.pad_token_id,
        )
        generation.save_pretrained(folder)

    def _stops(self) -> list[int] | int | None:
        """Ids of the tokens that end a generation: the last token of a text, and that of a turn."""
        stops = [self.config.eos_token_id, self.source.metadata.get("tokenizer.ggml.eot_token_id")]
        stops = list(dict.fromkeys(token for token in stops if token is not None))
        if len(stops) < 2:
            return stops[0] if stops else None
        return stops

    def _write_weights(self, folder: Path) -> None:
        from safetensors.torch import save_file

        shards = list(self._shards())
        places = {}
        for number, names in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file({name: self.value(name) for name in names}, folder / file, {"format": "pt"})
            places.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.size}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _shards(self) -> Iterator[list[str]]:
        """The names of the parameters in each file of weights."""
        names: list[str] = []
        size = 0
        for name, shape in self.shapes.items():
            grown = size + math.prod(shape) * self.dtype(name).itemsize
            if names and grown > SHARD:
                yield names
                names, size = [], 0
            names.append(name)
            size += math.prod(shape) * self.dtype(name).itemsize
        yield names


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by name, tied ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _is_bias(key: str) -> bool:
    return key.endswith(".bias")
