"""Checks that stop training which cannot work, at the first step that shows it, in `Trainer` or in any other loop.

A model's guard observes the model's calls, through hooks, and the steps of torch's optimizers. In each call it checks
the labels and the loss, or the gradients if the loss is computed outside of the model; all other checks stop after the
first steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..core.adapter import Bias, Replace
from ..core.state import State
from ..errors import TargetError, TrainingError, listing
from ..targets.walk import walk

PATIENCE = 10
"""Optimizer steps after which an adapter must have changed."""
MASKED = -100
"""The label of tokens that transformers ignores in the loss."""

_guards: weakref.WeakSet[Guard] = weakref.WeakSet()
_hooks: list[Any] = []


class Guard:
    """Watches the training of one model's adapters."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.calls = self.looked = 0
        self.called: set[str] = set()
        self.reached: set[str] = set()
        self.start: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.changed: set[str] = set()
        self.blind = False
        """Whether the loss of a call since the last step is unknown."""
        self.seen_for: Any = None
        self.seen: Seen | None = None
        self.model: Any = None
        _watch(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """Start a new guard for a deep copy or an unpickled model."""
        self.__init__(attributes["state"])  # type: ignore[misc]

    def learning(self) -> list[str]:
        """The adapters that a call at this moment would train."""
        return [name for name in self.state.live() if name in self.state.trainable]

    # Calls

    def before(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self.model = weakref.ref(model)
        self._start_looking(model, kwargs)
        if model.training and torch.is_grad_enabled() and self.learning():
            self.calls += 1
            _check_labels(kwargs)

    def after(self, model: nn.Module, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.seen is not None:
            seen, self.seen = self.seen, None
            seen.finish()
        learning = self.learning()
        if not (model.training and torch.is_grad_enabled() and learning):
            return
        mixed = self.state.facts.get("adapter_names", ())
        self.called.update(name for name in learning if not mixed or name in mixed)
        loss = getattr(output, "loss", None)
        _check_loss(loss, self.calls)
        self.blind |= not isinstance(loss, Tensor)
        self._check_graph(loss, output)

    def _check_graph(self, loss: Any, output: Any) -> None:
        """Raise TrainingError if neither the loss nor the logits depend on a trained parameter."""
        tensors = [value for value in (loss, getattr(output, "logits", None)) if isinstance(value, Tensor)]
        if self.called and tensors and not any(tensor.requires_grad for tensor in tensors):
            raise TrainingError(_unreached(sorted(self.called), "the loss does not depend on any of its parameters"))

    def _start_looking(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Watch which layers the model runs, in the first complete call with a set of adapters."""
        if self.seen is not None:
            self.seen.stop()
            self.seen = None
        adapters = (self.state.live(), tuple(self.state.configs), len(self.state.layers))
        is_partial = kwargs.get("encoder_outputs") is not None or kwargs.get("inputs_embeds") is not None
        is_known = adapters == self.seen_for or not self.state.live()
        if is_partial or is_known or "adapter_names" in kwargs or _is_compiled(model):
            return
        self.seen_for = adapters
        self.seen = Seen(model, self.state)

    # Steps

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check the gradients, until all adapters have been seen to change."""
        waiting = [name for name in self.called if name not in self.changed]
        if not waiting and not self.blind:
            return
        stepped = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                stepped[id(parameter)] = parameter
        has_scaler = getattr(optimizer, "found_inf", None) is not None  # a GradScaler has already checked the gradients
        if self.blind and not has_scaler:
            self._check_gradients(stepped)
        for name in waiting:
            if name not in self.start:
                self.start[name] = _sum(self.state.parameters(name))
            if name not in self.reached:
                self._check_reached(name, stepped)
        if waiting:
            self._check_holds(stepped)

    def _check_reached(self, name: str, stepped: dict[int, Any]) -> None:
        parameters = [parameter for parameter in self._own(name) if id(parameter) in stepped and parameter.numel()]
        if not parameters:
            return
        if all(parameter.grad is None for parameter in parameters):
            raise TrainingError(_unreached([name], "after the backward pass none of its parameters has a gradient"))
        self.reached.add(name)

    def _own(self, name: str) -> list[nn.Parameter]:
        """The method's own trained parameters, without copies of heads and biases, which always get gradients.

        If there are only such copies, all trained parameters.
        """
        learned = [parameter for parameter in self.state.parameters(name) if parameter.requires_grad]
        copies: set[int] = set()
        for adapter in self.state.adapters(name).values():
            for part in adapter.parts:
                if isinstance(part, (Bias, Replace)):
                    copies.update(id(parameter) for parameter in part.learned())
        return [parameter for parameter in learned if id(parameter) not in copies] or learned

    def _check_gradients(self, stepped: dict[int, Any]) -> None:
        for name in self.called:
            gradients = []
            for parameter in self.state.parameters(name):
                if id(parameter) in stepped and stepped[id(parameter)].grad is not None:
                    gradients.append(stepped[id(parameter)].grad)
            if not _are_finite(gradients):
                raise TrainingError(
                    f"the gradient of adapter {name!r} is not finite after training call {self.calls}: lower the "
                    "learning rate, or look for values in the loss, the data or the base model that are not finite"
                )

    def _check_holds(self, stepped: dict[int, Any]) -> None:
        """Raise TrainingError if an optimizer holds parameters of this model, but none that is trained."""
        model = self.model() if self.model is not None else None
        if model is None:
            return
        parameters = [parameter for parameter in model.parameters() if id(parameter) in stepped]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            names = ", ".join(map(repr, sorted(self.called)))
            raise TrainingError(
                f"the optimizer holds {len(parameters)} parameters of the model, all of them frozen, and none of "
                f"adapter {names}: create the optimizer after the adapter is attached and active"
            )

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check whether the adapters have changed, after their first step and after `PATIENCE` steps."""
        if self.calls == self.looked:  # no call of this model led to the step
            return
        self.looked = self.calls
        self.blind = False
        rates = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates[id(parameter)] = group["lr"]
        for name in list(self.start):
            if name not in self.changed:
                self._count_step(name, rates)

    def _count_step(self, name: str, rates: dict[int, Any]) -> None:
        parameters = list(self.state.parameters(name))
        own_rates = []
        has_gradients = False
        for parameter in parameters:
            has_gradients |= parameter.grad is not None
            if id(parameter) in rates:
                own_rates.append(float(rates[id(parameter)]))
        may_change = any(own_rates) if own_rates else has_gradients
        if not may_change:
            return
        self.steps[name] = self.steps.get(name, 0) + 1
        if self.steps[name] in (1, PATIENCE) and _sum(parameters) != self.start[name]:
            self.changed.add(name)
        elif self.steps[name] == PATIENCE:
            raise TrainingError(_unchanged(name, len(own_rates)))


class Seen:
    """Records which layers of the active adapters a call runs, and which it bypasses by reading their weight."""

    only_looks = True
    """Its hooks only observe; they do not change the call."""

    def __init__(self, model: nn.Module, state: State) -> None:
        self.model, self.state = model, state
        self.names = state.live()
        self.run: set[str] = set()
        self.read: set[str] = set()
        self.layers: dict[str, Any] = {}
        self.handles = []
        for path, layer in state.layers.items():
            if layer.stack(self.names):
                self.layers[path] = layer
                self.handles.append(layer.register_forward_pre_hook(self._run))
        state.watch = self.read

    def _run(self, layer: Any, args: Any) -> None:
        self.run.add(layer.path)

    def stop(self) -> None:
        self.state.watch = None
        for handle in self.handles:
            handle.remove()

    def finish(self) -> None:
        """Raise TargetError if an adapter has no effect because the model reads the weight of its module directly."""
        self.stop()
        if self.run >= self.layers.keys():
            return
        tied = _tied(self.model, self.layers)
        lines = []
        for path in self.layers:
            if path in self.run:
                continue
            if path in tied:
                lines.append(f"{path} (tied to {_listed(tied[path])}, which run instead)")
            elif path in self.read:
                lines.append(path)
        if lines:
            raise TargetError(
                f"adapter {_listed(self.names)} has no effect on modules whose weight the model reads without running "
                f"them:{listing(lines)}\nLeave them out, with exclude_modules or by naming others in target_modules"
            )


def _tied(model: nn.Module, layers: dict[str, Any]) -> dict[str, list[str]]:
    """For each layer, the other modules with the same weight, unless one of them is adapted too."""
    paths_by_weight: dict[int, list[str]] = {}
    for path, module in walk(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            paths_by_weight.setdefault(id(weight), []).append(path)
    tied = {}
    for path, layer in layers.items():
        weight = getattr(layer.base_layer, "_parameters", {}).get("weight")
        others = [other for other in paths_by_weight.get(id(weight), []) if other != path]
        if others and not any(other in layers for other in others):
            tied[path] = others
    return tied


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _is_compiled(model: nn.Module) -> bool:
    """Whether a part of the model is compiled; hooks would cause a recompilation."""
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in model.modules()
    )


def _check_labels(kwargs: dict[str, Any]) -> None:
    labels, counted = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_meta or not labels.numel():
        return
    if counted is not None and int(counted) > 0:  # other micro-batches of the step have labels
        return
    if bool((labels == MASKED).all()):
        raise TrainingError(
            f"all {labels.numel()} labels of the batch are {MASKED}, which excludes tokens from the loss: nothing is "
            "left to learn. Check the template or the collator that masks the prompt, and the truncation"
        )


def _check_loss(loss: Any, calls: int) -> None:
    if isinstance(loss, Tensor) and not loss.is_meta and not bool(torch.isfinite(loss).all()):
        raise TrainingError(
            f"the loss of training call {calls} is {float(loss.detach().flatten()[0])}: lower the learning rate, or "
            "look for values in the data or the base model that are not finite"
        )


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are finite, with a single synchronisation with the device."""
    finite: list[Tensor] = []
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.numel() and not local.is_sparse and not local.is_meta:
            is_finite = torch.isfinite(local.detach().abs().max())
            finite.append(is_finite.to(finite[0].device) if finite else is_finite)
    return not finite or bool(torch.stack(finite).all())


def _unreached(names: list[str], found: str) -> str:
    return (
        f"no gradient reaches adapter {_listed(names)}: {found}. If gradient checkpointing is on, call "
        "model.enable_input_require_grads() or set use_reentrant to False; otherwise check that the adapted modules run"
    )


def _unchanged(name: str, held: int) -> str:
    steps = f"adapter {name!r} has not changed in {PATIENCE} optimizer steps"
    if not held:
        return f"{steps}: no optimizer that made a step holds its parameters. Create the optimizer from this model"
    return f"{steps}: the updates are lost to rounding. Raise the learning rate, or keep the adapter in fp32"


def _sum(parameters: Iterable[Tensor]) -> float:
    """A checksum that almost certainly changes if any value changes."""
    total = 0.0
    for i, p in enumerate(parameters):
        local = p.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        if local.numel() and not local.is_meta:
            flat = local.double().flatten()
            total += float(flat.sum() * (i + 1) + flat.square().sum())
    return total


def _watch(guard: Guard) -> None:
    _guards.add(guard)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for guard in list(_guards):
        guard.before_step(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for guard in list(_guards):
        guard.after_step(optimizer)
