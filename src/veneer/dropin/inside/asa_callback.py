"""`peft.tuners.adamss.asa_callback`: subspace allocation of AdaMSS as a callback of transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class AdamssAsaCallback(TrainerCallback):
    """Runs the allocation at each optimizer step. Without it, veneer runs it after each step of the optimizer."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model")
        tuner = getattr(model, "base_model", model)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)
        return control
