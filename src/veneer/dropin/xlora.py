"""What PEFT's X-LoRA model has besides: its gate's settings, and a log of the scalings that the gate gave."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class WithGate:
    """Of the tuner of X-LoRA."""

    @property
    def lora_model(self) -> Any:
        """PEFT keeps the experts in a LoRA model of their own."""
        return self

    @property
    def internal_xlora_classifier(self) -> Gate:
        gate = next(iter(self.state.shared.values()))  # type: ignore[attr-defined]
        if "shown" not in gate.__dict__:
            gate.__dict__["shown"] = Gate(gate)
        return gate.__dict__["shown"]

    def set_topk_lora(self, value: int | None) -> None:
        self.internal_xlora_classifier.config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        self.internal_xlora_classifier.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        return self.internal_xlora_classifier.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Noted; the first pass runs without adapters, which is what PEFT's value of 0 means."""
        self.internal_xlora_classifier.set_override_scaling_pass_value(value)

    def get_latest_scalings(self) -> Tensor | None:
        """(batch, length, layers, experts) of the last call."""
        return self.internal_xlora_classifier.latest

    def enable_scalings_logging(self) -> None:
        self.internal_xlora_classifier.logs = True

    def disable_scalings_logging(self) -> None:
        """The log stays."""
        self.internal_xlora_classifier.logs = False

    def get_scalings_log(self) -> list[Tensor]:
        return list(self.internal_xlora_classifier.log)

    def clear_scalings_log(self) -> None:
        self.internal_xlora_classifier.log.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """By length of the sequence: places in the log, and the scalings there."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, scalings in enumerate(self.internal_xlora_classifier.log):
            places, kept = found.setdefault(scalings.shape[1], ([], []))
            places.append(i)
            kept.append(scalings)
        return found


class Gate:
    """PEFT's classifier over ours: it notes what the gate gives."""

    def __init__(self, gate: Any) -> None:
        self.gate, self.logs = gate, False
        self.log: list[Tensor] = []
        self.latest: Tensor | None = None
        self.override_scaling_pass_value = gate.config.scaling_pass_value
        gate.register_forward_hook(self.note)

    @property
    def config(self) -> Any:
        return self.gate.config

    def note(self, module: Any, inputs: Any, scalings: Tensor) -> None:
        self.latest = scalings.detach()
        if self.logs:
            self.log.append(self.latest)

    def set_override_scaling_pass_value(self, value: float | None) -> None:
        value = 1 / len(self.config.adapters) if value is None else value
        self.override_scaling_pass_value = self.config.scaling_pass_value = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "gate":
            raise AttributeError(name)
        return getattr(self.gate.internal_xlora_classifier, name)
