"""Merging adapters into a model on disk, from the base's files to the merged model's, one module at a time.

The base model is never in memory as a whole. It is built on the meta device with the adapters on it. For each adapted
module the weights are read, the adapters are folded in (summed in fp32, rounded once to the file's dtype), and the
result is written to its place in the new files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from ..core import embeddings
from ..core.adapter import Tensors
from ..core.config import TASK_HEADS, Config
from ..core.provenance import MERGED, prepare
from ..errors import CheckpointError, ConfigError, NotMergeable
from ..files.find import find_weights
from ..files.pull import name_anywhere
from ..files.read import tensor_shapes
from ..files.write import appearing, claimed
from ..model.loading import quantised_in_training
from ..model.peft_model import PeftModel
from ..model.stages import START, digest, merged_below
from .base import copy_settings, find_base, model_class
from .mapped import MappedModel
from .merger import Merger, Rounded, share_lost, share_unmoved
from .shards import Shards

SETTINGS = ("num_labels", "tie_word_embeddings", "vocab_size")
"""Settings of the text model's config that a merge may change."""


@dataclass
class MergeReport:
    """What was merged, and how much of the change was lost to rounding."""

    out: str
    base: str
    adapters: list[str]
    tensors: list[Rounded] = field(default_factory=list)
    quantised: str | None = None
    """What the base was quantised to for the training of an adapter; the merged weights are not."""
    earlier: str | None = None
    """The adapter of an earlier stage that was merged into the base before these."""
    untied: bool = False
    """The base's tied weights have separate values now."""
    files: list[str] = field(default_factory=list)

    @property
    def lost(self) -> float:
        """The rounding error of all tensors relative to the change."""
        return share_lost(self.tensors)

    @property
    def unmoved(self) -> float:
        """The share of the changed entries that rounding brings back to their old value."""
        return share_unmoved(self.tensors)

    def as_dict(self) -> dict[str, Any]:
        tensors = [asdict(t) | {"lost": t.lost} for t in self.tensors]
        return {**vars(self), "lost": self.lost, "unmoved": self.unmoved, "tensors": tensors}


def merge(
    adapters: Sequence[str | Path],
    out: str | Path,
    model: str | None = None,
    *,
    check_base: bool = True,
    allow_absent: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> MergeReport:
    """Write a plain transformers model with adapters merged in.

    Args:
        adapters: directories or hub ids, in the order in which they apply (innermost first).
        out: a directory that does not exist yet, or is empty.
        model: the base; None: the one that the adapters name.
        check_base: refuse a base other than the one an adapter was trained on.
        allow_absent: pass over tensors for modules that the base lacks, with a warning.
        progress: called with the number of modules done and the number of all modules.

    Raises:
        NotMergeable: a method cannot be merged into weights, or tied weights cannot be separated.
        CheckpointError: the base's files or an adapter's are damaged, or do not fit each other.
        VeneerError: something would be overwritten, or the disk is too small. Errors leave nothing in `out`.
    """
    with claimed(Path(out)), _with_earlier(adapters, model, out, check_base) as (base, merged):
        opened = on_files(adapters, base, check_base, allow_absent, merged)
        merger = Merger(opened.mapped, opened.model, saved_embeddings(adapters))
        name = opened.base if base == model else base_of([Config.from_pretrained(adapters[0])], model)
        report = MergeReport(str(out), name, [str(adapter) for adapter in adapters], untied=bool(merger.apart))
        report.quantised = _quantised_in_training(adapters)
        report.earlier = str(Path(adapters[0]) / START) if merged else None
        with appearing(Path(out), merger.size) as folder:
            report.tensors = merger.write(folder, progress)
            _write_config(opened.mapped.model, opened.directory, folder)
            copy_settings(opened.directory, [Path(adapter) for adapter in adapters], folder)
            report.files = sorted(p.name for p in folder.iterdir())
    return report


@contextmanager
def _with_earlier(
    adapters: Sequence[str | Path], model: str | None, out: str | Path, check_base: bool
) -> Iterator[tuple[str | None, list[str]]]:
    """Yield the base model of adapters, and the digests of the earlier adapters that are merged into it.

    An adapter of a second stage is merged into a temporary model, which has the earlier adapter merged in.

    Raises:
        ConfigError: the adapters were trained on different base models in this sense.
    """
    merged = [merged_below(adapter) for adapter in adapters]
    if any(digests != merged[0] for digests in merged):
        raise ConfigError(
            "the adapters were trained on different base models, because earlier adapters were merged into those of "
            "some; merge them one at a time"
        )
    if not merged[0]:
        yield model, []
        return
    start = Path(adapters[0]) / START
    with TemporaryDirectory(prefix=".earlier-", dir=Path(out).absolute().parent) as folder:
        base = Path(folder) / "base"
        merge([start], base, model, check_base=check_base)
        if [*merged_below(start), digest(start)] != merged[0]:
            raise CheckpointError(
                f"{str(start)!r} is another adapter than the one that was merged into the base model for the training "
                "of the later one; restore it"
            )
        yield str(base), merged[0]


def _quantised_in_training(adapters: Sequence[str | Path]) -> str | None:
    """The schemes to which the base model was quantised for the training of adapters; None if it never was."""
    schemes: dict[str, None] = {}
    for adapter in adapters:
        how = quantised_in_training(adapter)
        if how is not None:
            schemes[how.scheme] = None
    return ", ".join(schemes) or None


class Opened(NamedTuple):
    """A base model whose weights stay in its files, with adapters."""

    base: str
    """The name of the base model."""
    directory: Path
    mapped: MappedModel
    model: PeftModel


def on_files(
    adapters: Sequence[str | Path],
    model: str | None,
    check_base: bool = True,
    allow_absent: bool = False,
    merged: Sequence[str] = (),
) -> Opened:
    """Load adapters on the files of their base, all active and named "1", "2" and so on.

    Args:
        merged: digests of the earlier adapters that are merged into these files.
    """
    configs = [Config.from_pretrained(adapter) for adapter in adapters]
    base = base_of(configs, model)
    revision = configs[0].revision if model is None else None
    directory = find_base(base, revision)
    skeleton = _skeleton(directory, configs, adapters)
    mapped = MappedModel(skeleton, Shards(directory))
    if merged:
        prepare(mapped.model, **{MERGED: list(merged)})
    return Opened(base, directory, mapped, _adapted(mapped, configs, adapters, check_base, allow_absent))


def base_of(configs: Sequence[Config], model: str | None) -> str:
    """The base model's name: the one given, else the one that all adapters name."""
    if model:
        return model
    named = [config.base_model_name_or_path for config in configs if config.base_model_name_or_path]
    named = list(dict.fromkeys(map(name_anywhere, named)))
    if not named:
        raise ConfigError("the adapters do not name their base model; give the right one with --model")
    if len(named) > 1:
        raise ConfigError(
            f"the adapters name {len(named)} base models ({', '.join(named)}); give the right one with --model"
        )
    return str(named[0])


def _skeleton(home: Path, configs: Sequence[Config], adapters: Sequence[str | Path]) -> Any:
    """The model on the meta device, with the class, number of labels and vocabulary that the adapters need."""
    import transformers

    files = [tensor_shapes(find_weights(adapter)) for adapter in adapters]
    config = transformers.AutoConfig.from_pretrained(home)
    if getattr(config, "quantization_config", None):
        raise NotMergeable(f"the weights of {str(home)!r} are quantised; give the original model with --model")
    labels: set[int] = set()
    keys: list[str] = []
    for adapter_config, shapes in zip(configs, files, strict=True):
        labels |= _labels(adapter_config, shapes)
        keys += shapes
    if len(labels) > 1:
        raise ConfigError(f"the adapters differ in the number of labels ({labels}); merge only one")
    for count in labels - {config.num_labels}:
        config.num_labels = count
    with torch.device("meta"):
        model = model_class(config, configs, keys).from_config(config)
    words: set[int] = set()
    for shapes in files:
        words |= _words(model, shapes)
    if len(words) > 1:
        raise ConfigError(f"the adapters differ in the vocabulary size ({words}); merge only one")
    for count in words - {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(count, mean_resizing=False)
    return model


def _words(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """The vocabulary sizes of the model's embedding and head in an adapter's file; empty without them."""
    own = embeddings.of_model(model)
    paths = {path for path, module in model.named_modules() if any(part is module for part in own)}
    return {shape[0] for key, shape in shapes.items() if embeddings.is_one(key) and embeddings.path_of(key) in paths}


def _labels(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """The number of labels of the head in an adapter's file; empty without a head."""
    heads = TASK_HEADS.get(config.task_type, ())  # type: ignore[call-overload]
    for key, shape in shapes.items():
        path, _, leaf = key.rpartition(".")
        is_head = path.rpartition(".")[2] in heads
        if is_head and leaf == "weight" and len(shape) == 2:
            return {shape[0]}
    return set()


def _adapted(
    mapped: MappedModel,
    configs: Sequence[Config],
    adapters: Sequence[str | Path],
    check_base: bool,
    allow_absent: bool,
) -> PeftModel:
    """The mapped model with all adapters, all active."""
    mapped.bind_all()
    mapped.bind_new()
    names = [str(i) for i in range(1, len(adapters) + 1)]
    how: dict[str, Any] = {"check_base": check_base, "allow_absent": allow_absent}
    model = PeftModel.from_pretrained(mapped.model, adapters[0], names[0], config=configs[0], **how)
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, name, **how)
    model.set_adapter(names)
    if any(getattr(config, "layer_replication", None) for config in configs):
        raise NotMergeable(
            "layer_replication changes the model's layers, so the base's files do not fit; use merge_and_unload()"
        )
    return model


def saved_embeddings(adapters: Sequence[str | Path]) -> Tensors:
    """Base embeddings that were saved with the adapters, by the parameters' names."""
    from safetensors import safe_open

    tensors = {}
    for adapter in adapters:
        with safe_open(find_weights(adapter), framework="pt") as file:
            for key in filter(embeddings.is_one, file.keys()):
                tensors[f"{embeddings.path_of(key)}.weight"] = file.get_tensor(key)
    return tensors


def _write_config(model: Any, home: Path, folder: Path) -> None:
    """Copy the base's config, or write a new one if the merge changed labels, vocabulary, ties or the class."""
    config = model.config
    base_config = type(config).from_pretrained(home)
    class_name = type(model).__name__
    if class_name in (base_config.architectures or ()) and _are_equal(config, base_config):
        shutil.copyfile(home / "config.json", folder / "config.json")
        return
    config.architectures = [class_name]
    config.save_pretrained(folder)


def _are_equal(config: Any, base_config: Any) -> bool:
    """Whether two configs have the same number of labels and the same `SETTINGS`."""
    if getattr(config, "num_labels", None) != getattr(base_config, "num_labels", None):
        return False
    text = config.get_text_config()
    base_text = base_config.get_text_config()
    return all(getattr(text, name, None) == getattr(base_text, name, None) for name in SETTINGS)
