"""Training that cannot work says so at the first step that shows it, under any loop: `Trainer`'s or one by hand.

A model's guard looks at its calls (the root hooks tell it) and at the steps of torch's optimizers. It costs one look at
the labels and one at the loss a call, or at the gradients where the loss is computed outside of the model; the rest
ends with the first steps, once they have shown what they should.
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
"""The label of a token that is not learned, in transformers."""

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
        """The loss of a call since the last step is not known."""
        self.seen_for: Any = None
        self.seen: Seen | None = None
        self.model: Any = None
        _watch(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """A deep copy or an unpickled model is watched anew."""
        self.__init__(attributes["state"])  # type: ignore[misc]

    def learning(self) -> list[str]:
        """The adapters that a call now would train."""
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
        tensors = [t for t in (loss, getattr(output, "logits", None)) if isinstance(t, Tensor)]
        if self.called and tensors and not any(t.requires_grad for t in tensors):
            raise TrainingError(_unreached(sorted(self.called), "the loss depends on none of its parameters"))

    def _start_looking(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        """The first call with a set of adapters shows which of their layers the model runs."""
        whole = not any(kwargs.get(name) is not None for name in ("encoder_outputs", "inputs_embeds"))
        stack = (self.state.live(), tuple(self.state.configs), len(self.state.layers))
        if self.seen is not None:
            self.seen.stop()
            self.seen = None
        if whole and stack != self.seen_for and stack[0] and "adapter_names" not in kwargs and not _is_compiled(model):
            self.seen_for, self.seen = stack, Seen(model, self.state)

    # Steps

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        waiting = [name for name in self.called if name not in self.changed]
        if not waiting and not self.blind:
            return
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        if self.blind and getattr(optimizer, "found_inf", None) is None:  # else a gradient scaler has looked
            self._check_gradients(held)
        for name in waiting:
            if name not in self.start:
                self.start[name] = _sum(self.state.parameters(name))
            own = [held[id(p)] for p in self._own(name) if id(p) in held and p.numel()]
            if own and name not in self.reached:
                if all(p.grad is None for p in own):
                    raise TrainingError(_unreached([name], "after a backward pass none of its parameters has one"))
                self.reached.add(name)
        if waiting:
            self._check_holds(held)

    def _own(self, name: str) -> list[nn.Parameter]:
        """What the method itself learns: a copy of a head or of a bias has a gradient where that has none.

        All that is learned where these are all there is.
        """
        learned = [p for p in self.state.parameters(name) if p.requires_grad]
        parts = (part for adapter in self.state.adapters(name).values() for part in adapter.parts)
        copies = {id(p) for part in parts if isinstance(part, (Bias, Replace)) for p in part.learned()}
        return [p for p in learned if id(p) not in copies] or learned

    def _check_gradients(self, held: dict[int, Any]) -> None:
        for name in self.called:
            own = [held[id(p)].grad for p in self.state.parameters(name) if id(p) in held]
            if not _are_finite([grad for grad in own if grad is not None]):
                raise TrainingError(
                    f"the gradient of adapter {name!r} is not finite after training call {self.calls}: lower the "
                    "learning rate, or look for values in the loss, the data or the base model that are not finite"
                )

    def _check_holds(self, held: dict[int, Any]) -> None:
        """An optimizer of this model's parameters must hold some that learn."""
        model = self.model() if self.model is not None else None
        ours = [p for p in model.parameters() if id(p) in held] if model is not None else []
        if ours and not any(p.requires_grad for p in ours):
            names = ", ".join(map(repr, sorted(self.called)))
            raise TrainingError(
                f"the optimizer holds {len(ours)} parameters of the model, all of them frozen, and none of adapter "
                f"{names}: make the optimizer after the adapter is on the model and active"
            )

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.calls == self.looked:  # a step of somebody else's
            return
        self.looked, self.blind = self.calls, False
        held = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name in list(self.start):
            own = list(self.state.parameters(name))
            rates = [held[id(p)] for p in own if id(p) in held]
            counts = any(float(rate) for rate in rates) if rates else any(p.grad is not None for p in own)
            if name in self.changed or not counts:
                continue
            self.steps[name] = self.steps.get(name, 0) + 1
            if self.steps[name] in (1, PATIENCE) and _sum(self.state.parameters(name)) != self.start[name]:
                self.changed.add(name)
            elif self.steps[name] == PATIENCE:
                raise TrainingError(_unchanged(name, len(rates)))


class Seen:
    """Which layers of the live adapters a call of the model runs, and whose weights it reads past them."""

    only_looks = True
    """Its hooks change nothing of a call."""

    def __init__(self, model: nn.Module, state: State) -> None:
        self.model, self.state = model, state
        self.names = state.live()
        self.layers = {path: layer for path, layer in state.layers.items() if layer.stack(self.names)}
        self.run: set[str] = set()
        self.read: set[str] = set()
        self.handles = [layer.register_forward_pre_hook(self._run) for layer in self.layers.values()]
        state.watch = self.read

    def _run(self, layer: Any, args: Any) -> None:
        self.run.add(layer.path)

    def stop(self) -> None:
        self.state.watch = None
        for handle in self.handles:
            handle.remove()

    def finish(self) -> None:
        """Raise TargetError where an adapter has no effect although the model uses the weight it is on."""
        self.stop()
        idle = [path for path in self.layers if path not in self.run]
        twins = _twins(self.model, self.layers, self.names) if idle else {}
        silent = {path: twins.get(path, []) for path in idle if path in self.read or path in twins}
        if not silent:
            return
        lines = [f"{p}{f' (it is {_listed(others)} that run)' if others else ''}" for p, others in silent.items()]
        raise TargetError(
            f"adapter {_listed(self.names)} has no effect on modules whose weight the model reads without running "
            f"them:{listing(lines)}\nTake them out of target_modules, or name those that run"
        )


def _twins(model: nn.Module, layers: dict[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Of each layer, the other modules with the same weight, unless one of them has the same adapter."""
    places: dict[int, list[str]] = {}
    for path, module in walk(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            places.setdefault(id(weight), []).append(path)
    found = {}
    for path, layer in layers.items():
        same = places.get(id(getattr(layer.base_layer, "_parameters", {}).get("weight")), [])
        others = [other for other in same if other != path]
        if others and not any(other in layers for other in others):
            found[path] = others
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _is_compiled(model: nn.Module) -> bool:
    """Some part of it is compiled, where a look from outside would mean compiling it again."""
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in model.modules()
    )


def _check_labels(kwargs: dict[str, Any]) -> None:
    labels, counted = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_meta or not labels.numel():
        return
    if counted is not None and int(counted) > 0:  # other parts of the batch have labels
        return
    if bool((labels == MASKED).all()):
        raise TrainingError(
            f"all {labels.numel()} labels of the batch are {MASKED}, which means not to learn the token: nothing is "
            "left to learn. Look at the template or the collator that masks the prompt, and at truncation"
        )


def _check_loss(loss: Any, calls: int) -> None:
    if isinstance(loss, Tensor) and not loss.is_meta and not bool(torch.isfinite(loss).all()):
        raise TrainingError(
            f"the loss of training call {calls} is {float(loss.detach().flatten()[0])}: lower the learning rate, or "
            "look for values in the data or the base model that are not finite"
        )


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Asks the device once."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    finite = [torch.isfinite(t.detach().abs().max()) for t in local if t.numel() and not t.is_sparse and not t.is_meta]
    return not finite or bool(torch.stack([found.to(finite[0].device) for found in finite]).all())


def _unreached(names: list[str], found: str) -> str:
    return (
        f"no gradient reaches adapter {_listed(names)}: {found}. If gradient checkpointing is on, call "
        "model.enable_input_require_grads() or set use_reentrant to False; else look whether the model runs its modules"
    )


def _unchanged(name: str, held: int) -> str:
    steps = f"adapter {name!r} is what it was before {PATIENCE} optimizer steps"
    if not held:
        return (
            f"{steps}: none of the optimizers that stepped holds its parameters. Make the optimizer from this model's"
        )
    return f"{steps}: the updates are lost to rounding. Raise the learning rate, or hold the adapter in fp32"


def _sum(parameters: Iterable[Tensor]) -> float:
    """A number that changes with any of the values, as good as always."""
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
