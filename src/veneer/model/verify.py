"""Verification of a saved adapter: load it onto a fresh base model and compare it with a record from training.

started = digests(model)               # before training
record(model, "out", batch, started)   # after saving: a few outputs, and digests of the initial tensors
verify("out", fresh_base).check()      # raises if a check fails
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..core.state import State
from ..errors import CheckpointError, NotMergeable, VeneerError, listing
from ..files.find import find_file
from ..files.read import WEIGHTS_NAME
from ..files.write import write_atomically
from ..targets.modules import evaluating
from ..targets.quantised import keep_gradients_, lost_to_rounding
from ..targets.walk import by_number
from .peft_model import PeftModel

PROBE_NAME = "probe.safetensors"
MOST_COLUMNS = 1024
FLOOR = 16 * torch.finfo(torch.float32).eps
"""Relative difference of outputs that a changed order of summation can cause."""
ROUNDINGS = 3.0
"""Allowed difference of merged from unmerged outputs, relative to the effect of moving all merged weights by 1 ulp."""


MOST_REQUANTISED = 8
"""Layers whose merge into quantised weights is tried: HQQ takes a second for each."""
PARTS = 3
"""The parts of a verification, for its progress: loading the adapter, comparing outputs, merging."""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool | None
    """None: there was nothing to compare with."""
    detail: str


@dataclass
class Verification:
    """The results of all checks of one adapter."""

    directory: str
    checks: list[Check] = field(default_factory=list)
    model: PeftModel | None = field(default=None, repr=False)
    """The reloaded adapter on its base, if it could be loaded."""

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def check(self) -> None:
        """Raise VeneerError if a check failed."""
        failed = [check for check in self.checks if check.passed is False]
        if failed:
            reasons = "; ".join(f"{check.name}: {check.detail}" for check in failed)
            raise VeneerError(f"the adapter in {self.directory!r} failed its verification; {reasons}")

    def as_dict(self) -> dict[str, Any]:
        return {"directory": self.directory, "passed": self.passed, "checks": [vars(check) for check in self.checks]}


# The record that training writes


def digests(model: PeftModel, adapter_name: str = "default") -> dict[str, str]:
    """A digest of each tensor that training may change, by its key in the file."""
    state = model._state
    trainable_addresses = set()
    for parameter in state.parameters(adapter_name):
        if parameter.requires_grad and parameter.numel():
            trainable_addresses.add(parameter.data_ptr())
    tensors = {}
    trained = {}
    for key, t in checkpoint.slots(state, adapter_name).items():
        if t.is_floating_point():
            tensors[key] = t
            if t.data_ptr() in trainable_addresses:
                trained[key] = t
    return {key: _digest(t) for key, t in (trained or tensors).items()}


def record(
    model: PeftModel,
    directory: str | Path,
    batch: Mapping[str, Tensor],
    started: Mapping[str, str],
    adapter_name: str = "default",
    is_main_process: bool = True,
) -> None:
    """Write some of the model's outputs into the adapter's directory, for comparison after a reload.

    Args:
        model: the trained model.
        directory: the adapter's directory.
        batch: arguments of a model call; one or two rows of a few tokens are enough.
        started: `digests` from before training.
        adapter_name: which adapter.
        is_main_process: false on the processes of a distributed run that must not write.
    """
    from safetensors.torch import save

    with evaluating(model):
        output = _output(model, batch)
    if not is_main_process:
        return
    tensors = {}
    for name, t in batch.items():
        tensors[f"input.{name}"] = t.detach().cpu().contiguous()
    tensors["output"] = output
    metadata = {"started": json.dumps(dict(started)), "adapter": adapter_name}
    write_atomically(Path(directory) / PROBE_NAME, save(tensors, metadata))


def unmoved(directory: str | Path, started: Mapping[str, str]) -> list[str]:
    """Keys of the tensors in an adapter's file that training did not change."""
    from safetensors import safe_open

    with safe_open(find_file(directory, WEIGHTS_NAME), framework="pt") as file:
        unchanged = []
        for key in sorted(file.keys(), key=by_number):
            if key in started and _digest(file.get_tensor(key)) == started[key]:
                unchanged.append(key)
        return unchanged


# Verifying


def verify(
    directory: str | Path,
    base: nn.Module,
    *,
    follow_paths: bool = False,
    allow_absent: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Verification:
    """Load the adapter in `directory` onto `base`, a fresh model, and run all checks.

    Without a record (see `record`), the checks of outputs and of changes have nothing to compare with. The adapter
    stays on `base`, so use a model that is not needed elsewhere. `progress` is called with the number of finished parts
    and the number of all parts.
    """
    verification = Verification(str(directory))
    checks = verification.checks
    try:
        probe = _read_probe(Path(directory))
        tensors, _ = checkpoint.read(directory)
        model = PeftModel.from_pretrained(base, directory, follow_paths=follow_paths, allow_absent=allow_absent).eval()
    except VeneerError as error:
        message = " ".join(str(error).split())
        checks.append(Check("loads", False, message))
        return verification
    keep_gradients_(model.get_base_model())  # which computes as in training; evaluation has products of its own
    verification.model = model
    progress(1, PARTS)
    checks.append(Check("loads", True, f"{len(tensors)} tensors, all finite"))
    started = probe.started if probe is not None else {}
    checks.append(_not_zero(tensors, started))
    checks.append(_changed(tensors, started))
    batch = probe.batch if probe is not None else _random_batch(base)
    recorded = probe.output if probe is not None else None
    with torch.no_grad():
        checks.append(_same_outputs(model, batch, recorded))
        progress(2, PARTS)
        checks.append(_merges(model, batch))
        progress(3, PARTS)
    return verification


class _Probe(NamedTuple):
    """The record that training wrote."""

    batch: dict[str, Tensor]
    output: Tensor
    started: dict[str, str]


def _read_probe(directory: Path) -> _Probe | None:
    """The record in an adapter's directory; None if training wrote none."""
    from safetensors import SafetensorError, safe_open

    if not (directory / PROBE_NAME).is_file():
        return None
    path = find_file(directory, PROBE_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
        started = json.loads(metadata.get("started", "{}"))
        batch = {}
        for key, t in tensors.items():
            if key.startswith("input."):
                batch[key.removeprefix("input.")] = t
        return _Probe(batch, tensors["output"], dict(started))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{str(path)!r} is not a record of outputs: {error}") from None


def _random_batch(model: Any) -> dict[str, Tensor]:
    """Two rows of random tokens, the same in every run."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (2, 16), generator=generator)
    batch = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


def _not_zero(tensors: Mapping[str, Tensor], started: Mapping[str, str]) -> Check:
    trained = [key for key in tensors if key in started or not started]
    zero = []
    for key in trained:
        t = tensors[key]
        if t.numel() and t.is_floating_point() and not t.any():
            zero.append(key)
    if zero:
        return Check("not all zero", False, f"{len(zero)} tensors are all zero:{_inline(zero)}")
    return Check("not all zero", True, f"none of {len(trained)} tensors is all zero")


def _changed(tensors: Mapping[str, Tensor], started: Mapping[str, str]) -> Check:
    if not started:
        return Check("changed", None, "skipped: there is no record of the initial tensors")
    missing = [key for key in started if key not in tensors]
    if missing:
        detail = f"{len(missing)} trained tensors are not in the file:{_inline(missing)}"
        return Check("changed", False, detail)
    unchanged = []
    for key, digest in started.items():
        if _digest(tensors[key]) == digest:
            unchanged.append(key)
    if unchanged:
        return Check("changed", False, f"{len(unchanged)} tensors have their initial values:{_inline(unchanged)}")
    return Check("changed", True, f"all {len(started)} trained tensors changed")


def _same_outputs(model: PeftModel, batch: dict[str, Tensor], recorded: Tensor | None) -> Check:
    """Check that the reloaded model's outputs match the recorded ones, far better than the base model's do."""
    if recorded is None:
        return Check("same outputs", None, "skipped: there is no record of outputs")
    active = _output(model, batch)
    if active.shape != recorded.shape:
        return Check("same outputs", False, f"shape {tuple(active.shape)}, but {tuple(recorded.shape)} is recorded")
    with model.disable_adapter():
        base_output = _output(model, batch)
    without_prompt = active[:, -base_output.shape[1] :]
    effect = _distance(without_prompt, base_output)
    size = float(recorded.double().norm())
    difference = _distance(active, recorded)
    limit = min(_eps(model) ** 0.5 * size, 0.1 * effect)
    is_near = difference <= FLOOR * size or difference <= limit
    relative = difference / max(size, 1e-30)
    return Check("same outputs", is_near, f"relative difference from the recorded outputs {relative:.2g}")


def _merges(model: PeftModel, batch: dict[str, Tensor]) -> Check:
    """Check that merged outputs equal unmerged ones to rounding; the effect of rounding is measured on the model."""
    active = _output(model, batch)
    try:
        lost = _lost_if_quantised(model)
        if lost is not None:
            detail = f"skipped: quantising merged weights again would cause an error of {lost:.0%} of the update"
            return Check("merges", None, f"{detail}; merge into the unquantised model")
        model.merge_adapter()
    except NotMergeable as error:
        reason = " ".join(str(error).split())
        return Check("merges", None, f"skipped, it cannot be merged: {reason}")
    merged = _output(model, batch)
    _jitter(model._state)
    rounding = _distance(merged, _output(model, batch))
    model.unmerge_adapter()
    difference = _distance(merged, active)
    size = max(float(active.double().norm()), 1e-30)
    limit = ROUNDINGS * rounding + FLOOR * size
    detail = f"merged differs by {difference / size:.2g} from unmerged; allowed for rounding {limit / size:.2g}"
    return Check("merges", difference <= limit, detail)


def _lost_if_quantised(model: PeftModel) -> float | None:
    """The rounding error of merging into quantised weights as a share of the update, from some layers.

    None if no layer is quantised.
    """
    names = tuple(model.active_adapters)
    layers = [layer for layer in model._state.layers.values() if layer.target.is_quantised and layer.stack(names)]
    sampled = layers[:: max(1, len(layers) // MOST_REQUANTISED)][:MOST_REQUANTISED]
    snapshots = [layer.snapshot() for layer in sampled]
    try:
        for layer in sampled:
            layer.check_merge(names)
            layer.merge(names, False)
        return lost_to_rounding(sampled)
    finally:
        for layer, snapshot in zip(sampled, snapshots, strict=True):
            layer.revert(snapshot)


def _jitter(state: State) -> None:
    """Change every merged weight by up to one unit in the last place."""
    generator = torch.Generator().manual_seed(0)
    for layer in state.layers.values():
        for name in layer.kept:
            merged = layer.base_layer._parameters[name]
            uniform = torch.rand(merged.shape, generator=generator).to(merged.device)
            step = uniform * 2 - 1
            wide = merged.to(torch.promote_types(merged.dtype, torch.float32))
            eps = torch.finfo(merged.dtype).eps
            merged.copy_(wide * (1 + step.to(wide) * eps))


# Helpers


@torch.no_grad()
def _output(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits or first output in fp32 on the CPU; evenly spaced columns if there are many."""
    device = next(model.parameters()).device
    arguments = {name: t.to(device) for name, t in batch.items()}
    out = model(**arguments)
    logits = getattr(out, "logits", None)
    if logits is None:
        logits = out[0]
    stride = math.ceil(logits.shape[-1] / MOST_COLUMNS)
    return logits[..., ::stride].float().cpu().contiguous()


def _distance(a: Tensor, b: Tensor) -> float:
    """The Euclidean distance; infinite instead of NaN, so that no limit accepts it."""
    distance = float((a.double() - b.double()).norm())
    return math.inf if math.isnan(distance) else distance


def _eps(model: PeftModel) -> float:
    """The machine epsilon of the model's least precise dtype; of bfloat16 if it is quantised.

    The libraries' products with quantised weights round their scales to half precision in some calls and not in others.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if any(layer.target.is_quantised for layer in model._state.layers.values()):
        dtypes.add(torch.bfloat16)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _digest(t: Tensor) -> str:
    """The dtype, the shape and a hash of the values."""
    values = t.detach().cpu().contiguous().flatten()
    data = values.view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(data).hexdigest()
    return f"{t.dtype} {tuple(t.shape)} {digest}"


def _inline(keys: list[str]) -> str:
    """The first keys on one line."""
    lines = listing(keys, 3).split("\n")
    return ",".join(lines).removeprefix(",")
