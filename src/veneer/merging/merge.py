"""Adapters merged into a model on disk: from the base's files to the merged model's, a module at a time.

The base model is never whole in memory. Its skeleton stands on the meta device with the adapters on it; for each
adapted module the weights are read, the adapters folded in (summed in fp32, rounded once to the file's dtype), and the
result goes to its place in the new files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core import embeddings
from ..core.adapter import Tensors
from ..core.config import TASK_HEADS, Config
from ..errors import ConfigError, NotMergeable
from ..files.find import find_weights
from ..files.read import tensor_shapes
from ..files.write import appearing, check_free
from ..model.peft_model import PeftModel
from . import merger as rounding
from .base import copy_beside, find_base, model_class
from .mapped import MappedModel
from .merger import Merger
from .shards import Shards

SETTINGS = ("num_labels", "tie_word_embeddings", "vocab_size")
"""What of a config a merge may change, besides the class."""


@dataclass
class MergeReport:
    """What was merged, and what rounding took."""

    out: str
    base: str
    adapters: list[str]
    tensors: list[rounding.Rounded] = field(default_factory=list)
    untied: bool = False
    """The base's tied weights have values of their own now."""
    files: list[str] = field(default_factory=list)

    @property
    def lost(self) -> float:
        return rounding.lost(self.tensors)

    @property
    def unmoved(self) -> float:
        return rounding.unmoved(self.tensors)

    def as_dict(self) -> dict[str, Any]:
        tensors = [asdict(t) | {"lost": t.lost} for t in self.tensors]
        return {**vars(self), "lost": self.lost, "unmoved": self.unmoved, "tensors": tensors}


def merge(
    adapters: Sequence[str | Path],
    out: str | Path,
    model: str | None = None,
    *,
    check_base: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> MergeReport:
    """Write a plain transformers model with adapters merged in.

    Args:
        adapters: directories or hub ids, innermost first.
        out: a directory that does not exist yet, or is empty.
        model: the base; None: the one that the adapters name.
        check_base: refuse a base other than the one an adapter was trained on.
        progress: called with the number of modules done, and of all.

    Raises:
        NotMergeable: a method has no form as a weight, or tied weights could not be set apart.
        CheckpointError: the base's files or an adapter's are damaged, or do not fit each other.
        VeneerError: something would be overwritten, or the disk is too small. Nothing is left of `out` in any case.
    """
    check_free(Path(out))
    base, home, mapped, adapted = on_files(adapters, model, check_base)
    merger = Merger(mapped, adapted, _embeddings(adapters))
    report = MergeReport(str(out), base, [str(adapter) for adapter in adapters], untied=bool(merger.apart))
    with appearing(Path(out), merger.size) as folder:
        report.tensors = merger.write(folder, progress)
        _write_config(mapped.model, home, folder)
        copy_beside(home, [Path(adapter) for adapter in adapters], folder)
        report.files = sorted(p.name for p in folder.iterdir())
    return report


def on_files(
    adapters: Sequence[str | Path], model: str | None, check_base: bool = True
) -> tuple[str, Path, MappedModel, PeftModel]:
    """Adapters on the files of their base, all active, called "1", "2" and so on.

    Returns:
        (the base's name, its directory, the model whose weights lie in files, that model adapted)
    """
    configs = [Config.from_pretrained(adapter) for adapter in adapters]
    base = base_of(configs, model)
    home = find_base(base, configs[0].revision if model is None else None)
    mapped = MappedModel(_skeleton(home, configs, adapters), Shards(home))
    return base, home, mapped, _adapted(mapped, configs, adapters, check_base)


def base_of(configs: Sequence[Config], model: str | None) -> str:
    """The base model's name: the one given, else the one that all adapters name."""
    named = list(dict.fromkeys(c.base_model_name_or_path for c in configs if c.base_model_name_or_path))
    if model is None and len(named) != 1:
        what = f"name {len(named)} base models ({', '.join(named)})" if named else "do not name their base model"
        raise ConfigError(f"the adapters {what}; give the right one with --model")
    return model or str(named[0])


def _skeleton(home: Path, configs: Sequence[Config], adapters: Sequence[str | Path]) -> Any:
    """The model on meta, of the adapters' task, with as many labels and words as the adapters' files have."""
    import transformers

    shapes = [tensor_shapes(find_weights(adapter)) for adapter in adapters]
    config = transformers.AutoConfig.from_pretrained(home)
    if getattr(config, "quantization_config", None):
        raise NotMergeable(f"the weights of {str(home)!r} are quantised; give the model they were made from (--model)")
    labels = {n for c, s in zip(configs, shapes, strict=True) if (n := _labels(c, s)) is not None}
    words = {s[key][0] for s in shapes for key in s if embeddings.is_one(key)}
    if len(labels) > 1 or len(words) > 1:
        raise ConfigError(f"the adapters differ in their number of labels ({labels}) or words ({words}); merge one")
    for n in labels - {config.num_labels}:
        config.num_labels = n
    with torch.device("meta"):
        model = model_class(config, configs).from_config(config)
    for n in words - {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(n, mean_resizing=False)
    return model


def _labels(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many labels the head in an adapter's file has."""
    heads = TASK_HEADS.get(config.task_type, ())  # type: ignore[call-overload]
    for key, shape in shapes.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "weight" and path.rpartition(".")[2] in heads and len(shape) == 2:
            return shape[0]
    return None


def _adapted(
    mapped: MappedModel, configs: Sequence[Config], adapters: Sequence[str | Path], check_base: bool
) -> PeftModel:
    """All adapters on the mapped model, and active."""
    mapped.bind_all()
    mapped.bind_new()
    names = [str(i) for i in range(1, len(adapters) + 1)]
    model = PeftModel.from_pretrained(mapped.model, adapters[0], names[0], config=configs[0], check_base=check_base)
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, name, check_base=check_base)
    model.set_adapter(names)
    if any(getattr(config, "layer_replication", None) for config in configs):
        raise NotMergeable("layer_replication gives the model other layers than its files; use merge_and_unload()")
    return model


def _embeddings(adapters: Sequence[str | Path]) -> Tensors:
    """Base embeddings that came in the adapters' files, by the parameters' names."""
    from safetensors import safe_open

    found = {}
    for path in map(find_weights, adapters):
        with safe_open(path, framework="pt") as file:
            for key in filter(embeddings.is_one, file.keys()):
                name = key.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer")
                found[f"{name}.weight"] = file.get_tensor(key)
    return found


def _write_config(model: Any, home: Path, folder: Path) -> None:
    """The base's config as it is; where labels, words, ties or the class have changed, anew."""
    config, old = model.config, type(model.config).from_pretrained(home)
    same = [getattr(c, "num_labels", None) for c in (config, old)]
    pairs = [(c.get_text_config(), o.get_text_config()) for c, o in ((config, old),)]
    unchanged = all(getattr(c, name, None) == getattr(o, name, None) for c, o in pairs for name in SETTINGS)
    if unchanged and same[0] == same[1] and type(model).__name__ in (old.architectures or ()):
        shutil.copyfile(home / "config.json", folder / "config.json")
        return
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
