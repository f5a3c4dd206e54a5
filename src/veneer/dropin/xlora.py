"""Additional methods of X-LoRA's tuner: the settings of its gate, and a log of the scalings that the gate computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class WithGate:
    """Methods of X-LoRA's tuner only."""

    @property
    def lora_model(self) -> Any:
        """This tuner. In PEFT it is a separate LoRA model that holds the experts."""
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
        """Recorded only: the first pass always runs without adapters, as in PEFT with a value of 0."""
        self.internal_xlora_classifier.set_override_scaling_pass_value(value)

    def get_latest_scalings(self) -> Tensor | None:
        """The scalings of the last call, (batch, length, layers, experts)."""
        return self.internal_xlora_classifier.latest

    def enable_scalings_logging(self) -> None:
        self.internal_xlora_classifier.logs = True

    def disable_scalings_logging(self) -> None:
        """Stop logging; the entries so far remain."""
        self.internal_xlora_classifier.logs = False

    def get_scalings_log(self) -> list[Tensor]:
        return list(self.internal_xlora_classifier.log)

    def clear_scalings_log(self) -> None:
        self.internal_xlora_classifier.log.clear()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)  # type: ignore[attr-defined]

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by sequence length: the positions of its entries, and the entries."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for position, scalings in enumerate(self.internal_xlora_classifier.log):
            length = scalings.shape[1]
            positions, entries = buckets.setdefault(length, ([], []))
            positions.append(position)
            entries.append(scalings)
        return buckets


class Gate:
    """The gate in the form of PEFT's classifier: records the scalings that the gate computes."""

    def __init__(self, gate: Any) -> None:
        self.gate = gate
        self.logs = False
        self.log: list[Tensor] = []
        self.latest: Tensor | None = None
        self.override_scaling_pass_value = gate.config.scaling_pass_value
        gate.register_forward_hook(self.record)

    @property
    def config(self) -> Any:
        return self.gate.config

    def record(self, module: Any, inputs: Any, scalings: Tensor) -> None:
        self.latest = scalings.detach()
        if self.logs:
            self.log.append(self.latest)

    def set_override_scaling_pass_value(self, value: float | None) -> None:
        """Set the value of the first pass; None means one divided by the number of experts."""
        if value is None:
            value = 1 / len(self.config.adapters)
        self.config.scaling_pass_value = value
        self.override_scaling_pass_value = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "gate":
            raise AttributeError(name)
        return getattr(self.gate.internal_xlora_classifier, name)
