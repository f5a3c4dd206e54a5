"""A model with an adapter merged in as a GGUF file: folded, rounded once and written one tensor after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.config import Config
from ..core.layer import AdapterLayer
from ..errors import CheckpointError, ConfigError, NotMergeable, VeneerError, first_line, listing
from ..files.gguf import metadata as headers
from ..files.gguf.architectures import check_computed
from ..files.gguf.file import Metadata, Planned, Progress, type_of, write
from ..files.gguf.modelfile import MODELFILE, Turns, modelfile
from ..files.gguf.tensors import Naming, rope_factors
from ..files.gguf.vocabulary import load_tokenizer, vocabulary
from ..files.read import read_json
from ..files.skeleton import skeleton
from ..files.write import write_atomically
from ..model.catalogue import page_of
from .base import find_base
from .exported import Export
from .gguf_adapter import ALORA
from .mapped import MappedModel, widened
from .merge import on_files, saved_embeddings
from .merger import Folded, Merger
from .shards import Shards

if TYPE_CHECKING:
    import numpy as np

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Endings of the names of classes of language models."""


class Model:
    """A model on disk, with or without an adapter, as a source of tensors.

    Args:
        source: an adapter, or a model's directory.
        is_model: whether it is the latter.
        model: the base of an adapter.

    Attributes:
        owners: the layers whose adapters change a parameter, by its name.
        folded: parameters that are folded and not yet written.
        squared_changes, squared_errors, squared_weights: squared norms of update, rounding error and weight, by the
            names in GGUF of the parameters that the adapter changes.
    """

    def __init__(self, source: str, is_model: bool, model: str | None, check_base: bool) -> None:
        self.source = source
        self.merger: Merger | None = None
        if is_model:
            self.base = source
            self.directory = find_base(source)
            self.mapped = MappedModel(self._skeleton(), Shards(self.directory))
            self._check_values()
        else:
            self._check_method()
            opened = on_files([source], model, check_base)
            self.base = opened.base
            self.directory = opened.directory
            self.mapped = opened.mapped
            self._check_class()
            self.merger = Merger(opened.mapped, opened.model, saved_embeddings([source]))
        self.config = self.mapped.model.config
        self.owners = self._owners()
        self.folded: dict[str, Folded] = {}
        self.squared_changes: dict[str, float] = {}
        self.squared_errors: dict[str, float] = {}
        self.squared_weights: dict[str, float] = {}
        self.naming = Naming(self.config)
        check_computed(self.config)

    def _skeleton(self) -> Any:
        model = skeleton(self.base)
        if getattr(model.config, "quantization_config", None):
            raise NotMergeable(f"the weights of {self.base!r} are quantised; give the original model")
        return model

    def _check_values(self) -> None:
        """Raise CheckpointError unless the files have a value for each parameter."""
        missing = []
        for name in self.mapped.ties:
            if name not in self.mapped.groups and not self.mapped.fits(name):
                missing.append(name)
        if missing:
            raise CheckpointError(f"the files of {self.base!r} have no values for:{listing(missing)}")

    def _check_method(self) -> None:
        config = Config.from_pretrained(self.source)
        if not page_of(config).mergeable or getattr(config, ALORA, None):
            raise NotMergeable(f"{config.peft_type} has no form as weights, so it cannot be merged; nothing is written")

    def _check_class(self) -> None:
        """Raise ConfigError unless the model is a causal language model."""
        name = type(self.mapped.model).__name__
        if not name.endswith(CAUSAL):
            raise ConfigError(f"the adapter was trained on a {name}; only causal language models are exported to GGUF")

    def write(self, out: Path, dtype: str, ollama: bool, progress: Progress) -> Export:
        tokenizer = load_tokenizer(self._tokenizer_directory())
        embedding = self.mapped.model.get_input_embeddings().weight
        words = vocabulary(tokenizer, embedding.shape[0], self._stops())
        base = None if self.merger is None else self.base
        metadata: Metadata = headers.of_model(self.config, words.named(Path(self.source).name), base) | words.metadata()
        architecture = self.naming.architecture.name
        metadata[f"{architecture}.vocab_size"] = embedding.shape[0]
        tensors = list(self._planned(dtype))
        turns = Turns.of(tokenizer, words.add_bos) if ollama else None
        size = write(out, architecture, dtype, metadata, tensors, progress, self._measure)
        result = Export(str(out), "model", self.base, architecture, dtype, len(tensors), size)
        if self.merger is not None:
            result.rounding = _ratio(self.squared_errors, self.squared_weights)
            result.rounding_of_change = _ratio(self.squared_errors, self.squared_changes)
        result.notes.extend(words.notes)
        result.notes.extend(self._notes())
        if ollama:
            self._write_modelfile(out, result, tokenizer, turns)
        return result

    def _write_modelfile(self, out: Path, result: Export, tokenizer: Any, turns: Turns | None) -> None:
        path = out.parent / MODELFILE
        content = modelfile(out.name, turns, tokenizer, self._stops())
        try:
            write_atomically(path, content.encode())
        except OSError as error:
            raise VeneerError(f"{str(out)!r} is written, but {str(path)!r} could not be: {first_line(error)}") from None
        result.modelfile = str(path)
        if turns is None:
            result.notes.append(
                "the chat template is not a sequence of turns that Ollama's language describes; the Modelfile has no "
                "TEMPLATE, and Ollama looks for one that resembles the model's"
            )
        elif "system" not in turns.before:
            result.notes.append("the chat template has no place for a system message; Ollama will leave it out")

    def _tokenizer_directory(self) -> Path:
        """The directory of the adapter, if it has a tokenizer, else that of the base."""
        directory = Path(self.source)
        has_tokenizer = (directory / "tokenizer_config.json").is_file()
        return directory if has_tokenizer else self.directory

    def _stops(self) -> list[int]:
        """Ids of the tokens that end a generation, by the base's settings."""
        path = self.directory / "generation_config.json"
        stops = read_json(path).get("eos_token_id") if path.is_file() else self.config.eos_token_id
        if stops is None:
            return []
        return stops if isinstance(stops, list) else [stops]

    def _notes(self) -> Iterator[str]:
        window = getattr(self.config, "sliding_window", None)
        if self.config.model_type in ("mistral", "phi3") and window and window < self.config.max_position_embeddings:
            yield f"llama.cpp ignores the model's sliding window: the same up to {window} tokens, not beyond"

    # Tensors

    def _owners(self) -> dict[str, AdapterLayer]:
        owners = {}
        if self.merger is not None:
            for layer in self.merger.layers:
                owners.update(dict.fromkeys(self.merger.changed_by(layer), layer))
        return owners

    def _planned(self, dtype: str) -> Iterator[Planned]:
        """The tensors of the file, in the order of the model."""
        by_key = {self.naming.of(name): name for name in self._parameters()}
        output = "output.weight" if "output.weight" in by_key else "token_embd.weight"
        for key, tensor in rope_factors(self.config).items():
            yield Planned(key, tuple(tensor.shape), type_of(key, tensor.shape, dtype, output), partial(_same, tensor))
        for key, name in by_key.items():
            placeholder = self.mapped.ties[name].parameter.detach().to("meta")
            shape = tuple(self.naming.arranged(name, placeholder).shape)
            yield Planned(key, shape, type_of(key, shape, dtype, output), partial(self._value, key, name))

    def _parameters(self) -> list[str]:
        """Names of the parameters, tied ones once."""
        apart: set[str] = set() if self.merger is None else self.merger.apart
        names = []
        written: set[str] = set()
        for name, tie in self.mapped.ties.items():
            if name in written:
                continue
            names.append(name)
            written.update({name} if name in apart else tie.names)
        return names

    def _value(self, key: str, name: str) -> Tensor:
        """A parameter with the adapter folded in, as llama.cpp stores it."""
        exact = self._fold(key, name) if name in self.owners else self._base_value(name)
        return self.naming.arranged(name, widened(exact).detach())

    def _fold(self, key: str, name: str) -> Tensor:
        assert self.merger is not None
        if name not in self.folded:
            self.folded |= self.merger.fold(self.owners[name])
        before, exact = self.folded.pop(name)
        if before is not None:
            self.squared_changes[key] = _squared(exact - before)
        return exact

    def _base_value(self, name: str) -> Tensor:
        """The base's value of a parameter, or the one that was saved with the adapter."""
        if self.merger is not None and name in self.merger.apart:
            saved = self.merger.embeddings.get(name)
            return self.mapped.shards.tensor(str(self.mapped.home(name))) if saved is None else saved
        group = self.mapped.groups.get(name)
        names = [name] if group is None else group.names
        self.mapped.bind(names)
        value = self.mapped.value(name)
        self.mapped.release(names)
        return value

    def _measure(self, planned: Planned, value: Tensor, stored: np.ndarray) -> None:
        """Measure the rounding of a tensor that the adapter changes."""
        if planned.name not in self.squared_changes:
            return
        from gguf import dequantize

        read = torch.from_numpy(dequantize(stored, planned.type))
        self.squared_errors[planned.name] = _squared(read - value)
        self.squared_weights[planned.name] = _squared(value)


def _squared(t: Tensor) -> float:
    """The squared Frobenius norm."""
    return float(t.double().square().sum())


def _ratio(squared_parts: dict[str, float], squared_wholes: dict[str, float]) -> float:
    """The ratio of two norms over several tensors."""
    whole = sum(squared_wholes.values())
    return math.sqrt(sum(squared_parts.values()) / whole) if whole else 0.0


def _same(tensor: Tensor) -> Tensor:
    return tensor
