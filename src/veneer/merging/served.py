"""An adapter as a plain LoRA that vLLM or SGLang loads: of one scaling, within their ranks, experts one by one.

Both read PEFT's files, but not all of PEFT: `report/servers.py` has what they read, and the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import checkpoint, embeddings
from ..core.config import Config
from ..core.layer import AdapterLayer
from ..errors import ConfigError, NotMergeable
from ..files.find import find_weights
from ..files.gguf.file import Progress
from ..files.read import PREFIX, WEIGHTS_NAME, tensor_shapes
from ..files.skeleton import skeleton
from ..files.write import appearing, claimed
from ..formats import peft
from ..formats.lora import Pair
from ..methods.lora import LoRA, LoraConfig
from ..model.catalogue import page_of
from ..model.to_lora import Update, adapter_state, update_of
from ..report.servers import PACKED, VLLM_RANKS
from ..upstream import weights
from .as_lora import Nearest
from .exported import Export
from .gguf_adapter import from_file
from .merge import base_of, on_files

PROGRAMS = ("vllm", "sglang")
"""What `export --to` calls the servers."""


def export_served(
    source: str,
    out: Path,
    program: str,
    model: str | None,
    rank: int | None,
    check_base: bool,
    progress: Progress,
) -> Export:
    """Write an adapter as a LoRA that a server loads; see `export`."""
    config = Config.from_pretrained(source)
    if rank is not None and rank > VLLM_RANKS[-1]:
        raise ConfigError(f"--rank {rank}: servers take ranks up to {VLLM_RANKS[-1]}")
    base = base_of([config], model)
    bare = skeleton(base)
    lora = _Served(bare)
    if rank is None and peft.is_plain(config):
        pairs = from_file(source, base, check_base)
        lora.nearest.pairs = pairs
        if max(pair.r for pair in pairs.values()) > VLLM_RANKS[-1]:
            lora.nearest = _lowered(pairs)
    else:
        if not page_of(config).mergeable:
            raise NotMergeable(f"{config.peft_type} has no form as an update of weights, so servers cannot run it")
        lora.read(source, base, rank, check_base, progress)
    if program == "sglang":
        lora.complete()
    with claimed(out), appearing(out) as folder:
        written = lora.write(folder, config, base, _origin(source), is_uniform=program == "sglang")
        size = (folder / WEIGHTS_NAME).stat().st_size
        highest = Config.from_pretrained(folder).r  # type: ignore[attr-defined]
    result = Export(str(out), "adapter", base, program, lora.dtypes(), written, size, highest, lora.nearest.lost)
    result.notes.extend(lora.notes)
    return result


def _origin(source: str) -> dict[str, Any]:
    """What an adapter's file records about its base model."""
    _, notes = checkpoint.read(source)
    return {name: notes[name] for name in ("base", "rounded", "file") if name in notes}


def _lowered(pairs: Mapping[str, Pair]) -> Nearest:
    """Pairs of no more than the highest rank of a server."""
    nearest = Nearest()
    for path, pair in pairs.items():
        nearest.add(path, Update((pair.A.float(), pair.B.float() * pair.scale), None), None, VLLM_RANKS[-1])
    return nearest


class _Served:
    """The LoRA of a server, module by module.

    Args:
        bare: the base model on the meta device.
    """

    def __init__(self, bare: Any) -> None:
        self.bare = bare
        self.nearest = Nearest()
        self.fused: dict[str, Tensor] = {}
        """Tensors of experts that stay fused, by their keys."""
        self.fused_ranks: dict[str, int] = {}
        """The ranks of these experts by the paths of their stacks."""
        self.notes: list[str] = []

    # Reading

    @torch.no_grad()
    def read(self, source: str, base: str, rank: int | None, check_base: bool, progress: Progress) -> None:
        """Find the pairs of an adapter on its base."""
        opened = on_files([source], base, check_base)
        name = next(iter(opened.model.peft_config))
        state = adapter_state(opened.model, name)
        if any(embeddings.is_one(key) for key in tensor_shapes(find_weights(source))):
            raise NotMergeable("the adapter was saved with new embeddings, which no server takes; merge it instead")
        layers = [layer for layer in state.layers.values() if name in layer.adapters]
        for done, layer in enumerate(layers, 1):
            if layer.target.kind == "linear":
                update = update_of(layer, name)
                if update is None:
                    raise NotMergeable(f"{layer.path!r} is a trained copy of a module, which a LoRA does not hold")
                self.nearest.add(layer.path, update, rank, VLLM_RANKS[-1])
            else:
                self._add_experts(layer, name)
            progress(done, len(layers))

    def _add_experts(self, layer: AdapterLayer, name: str) -> None:
        """Add the LoRA on the stacked weights of experts."""
        adapted = set()
        for part in layer.adapters[name].parts:
            target = part.target
            is_stack = target.kind == "param" and target.copies > 1
            if not (is_stack and type(part) is LoRA):
                raise NotMergeable(
                    f"{target.path!r} is trained otherwise than by an update of a linear layer or a LoRA on experts; "
                    "merge it instead"
                )
            A, B = (factor.float() for factor in part.factors())
            A_stack = A.unflatten(0, (target.copies, -1))  # (experts, r, in)
            B_stack = B.unflatten(1, (-1, target.copies)).permute(2, 0, 1)  # (experts, out, r)
            pairs = self._one_by_one(target.path, A_stack, B_stack)
            adapted.add(target.path)
            if pairs is None:
                self._keep_fused(layer.path, part, A, B)
            else:
                self.nearest.pairs |= pairs
        self._add_other_stacks(layer.path, adapted)

    def _add_other_stacks(self, path: str, adapted: set[str]) -> None:
        """Add updates of zero to the experts' other stacks of weights: servers take all projections or none."""
        for name, parameter in self.bare.get_submodule(path).named_parameters():
            stack = f"{path}.{name}"
            if parameter.dim() != 3 or stack in adapted:
                continue
            experts, out_features, in_features = parameter.shape
            A = torch.zeros(experts, 1, in_features)
            B = torch.zeros(experts, out_features, 1)
            pairs = self._one_by_one(stack, A, B)
            if pairs is None:
                raise NotMergeable(
                    f"{stack!r} is not adapted, and fused experts are served only with all their weights adapted; "
                    "merge the adapter instead"
                )
            self.nearest.pairs |= pairs

    def _one_by_one(self, path: str, A: Tensor, B: Tensor) -> dict[str, Pair] | None:
        """The pairs of single experts by the names in the base's files; None if these have stacks too.

        Args:
            path: the path of a stack of weights.
            A: (experts, r, in).
            B: (experts, out, r), for all projections in the stack.
        """
        conversions = weights.conversions(self.bare)
        weights.remember(self.bare, conversions.transforms)
        parts_of_B = _reverted(self.bare, path, B)
        if set(parts_of_B) == {path}:
            return None
        projections = len(parts_of_B) // len(B)
        parts_of_A = _reverted(self.bare, path, A.repeat(1, projections, 1))
        if parts_of_A.keys() != parts_of_B.keys() or len(parts_of_B) != projections * len(B):
            return None
        pairs = {}
        for key, B_of_one in parts_of_B.items():
            A_of_one = parts_of_A[key]
            if A_of_one.shape != A.shape[1:] or B_of_one.shape[-1] != B.shape[-1]:
                return None  # stored in another order, such as interleaved or transposed
            pairs[key.removesuffix(".weight")] = Pair(A_of_one.contiguous(), B_of_one.contiguous(), float(A.shape[1]))
        return pairs

    def _keep_fused(self, path: str, part: Any, A: Tensor, B: Tensor) -> None:
        key = f"{PREFIX}{path}.{part.key}"
        self.fused[f"{key}lora_A.weight"] = A
        self.fused[f"{key}lora_B.weight"] = B
        self.fused_ranks[part.target.path] = A.shape[0] // part.target.copies
        if not self.notes:
            self.notes.append(
                f"the experts of a {self.bare.config.model_type} stay fused, as in its files; vLLM reads them so where "
                "its model does"
            )

    # What a server asks for

    def complete(self) -> None:
        """Add updates of zero to the projections that SGLang stacks with adapted ones."""
        modules = dict(self.bare.named_modules())
        pairs = dict(self.nearest.pairs)
        for path, pair in pairs.items():
            parent, _, leaf = path.rpartition(".")
            for group in PACKED:
                for other in group if leaf in group else ():
                    self._add_zero(f"{parent}.{other}", modules, pair)

    def _add_zero(self, path: str, modules: Mapping[str, Any], like: Pair) -> None:
        module = modules.get(path)
        if path in self.nearest.pairs or module is None:
            return
        A = torch.zeros(1, module.in_features, dtype=like.A.dtype)
        B = torch.zeros(module.out_features, 1, dtype=like.B.dtype)
        self.nearest.pairs[path] = Pair(A, B, 1.0)

    # Writing

    def dtypes(self) -> str:
        """The dtypes of the tensors, for people."""
        tensors = [*self.fused.values(), *(pair.A for pair in self.nearest.pairs.values())]
        return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))

    def write(self, folder: Path, original: Config, base: str, origin: dict[str, Any], is_uniform: bool) -> int:
        """Write the adapter; returns the number of its tensors.

        Args:
            original: the config of the adapter that it is made from.
            origin: what its file records about the base model.
            is_uniform: give all modules one rank.
        """
        pairs = self.nearest.pairs
        scales = {pair.scale for pair in pairs.values()}
        ranks = {path: pair.r for path, pair in pairs.items()} | self.fused_ranks
        highest = max(ranks.values())
        is_one = len(scales) == 1 and set(ranks.values()) == {highest} and not self.fused
        alpha: float = highest
        if is_one:
            alpha = next(iter(pairs.values())).alpha
        else:
            pairs = {path: _scaled(pair, highest if is_uniform else pair.r) for path, pair in pairs.items()}
        tensors = dict(self.fused)
        for path, pair in pairs.items():
            tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.A.contiguous()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.B.contiguous()
        ranks = {path: pair.r for path, pair in pairs.items()} | self.fused_ranks
        lower = {path: rank for path, rank in ranks.items() if rank != highest}
        config = LoraConfig(
            r=highest,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
            rank_pattern=dict(lower),
            alpha_pattern=dict(lower),
            target_modules=sorted({path.rpartition(".")[2] for path in pairs}),
            target_parameters=list(self.fused_ranks) or None,
            task_type=original.task_type,
            base_model_name_or_path=base,
            revision=original.revision,
            inference_mode=True,
        )
        checkpoint.write(folder, tensors, origin, config)
        return len(tensors)


def _reverted(model: Any, path: str, stack: Tensor) -> dict[str, Tensor]:
    """A stack of weights as the tensors of the base's files; itself if they cannot be converted."""
    try:
        return weights.revert(model, {path: stack})
    except (ValueError, RuntimeError, KeyError, IndexError):  # sizes that the conversion does not expect
        return {path: stack}


def _scaled(pair: Pair, rank: int) -> Pair:
    """The pair with a scaling of 1, filled up with zeros to a rank."""
    B = pair.B if pair.scale == 1 else pair.B.float() * pair.scale
    missing = rank - pair.r
    A = torch.nn.functional.pad(pair.A, (0, 0, 0, missing))
    return Pair(A, torch.nn.functional.pad(B, (0, missing)), float(rank))
