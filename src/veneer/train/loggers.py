"""Where a run logs to, besides its own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigError

KNOWN_ARGUMENTS = {field.name for field in fields(TrainingArguments)}
LOCAL: dict[str, Any] = {}
"""Arguments that keep logs on this machine, unless a logger's own settings send them elsewhere."""
if "trackio_static_space_id" in KNOWN_ARGUMENTS:  # from transformers 5.21 on; None would let trackio publish its logs
    LOCAL["trackio_static_space_id"] = False


def check(names: Sequence[str]) -> None:
    """Fail before anything is loaded if a logger is missing; Trainer would only fail once it starts.

    Raises:
        ConfigError: a logger is not installed.
    """
    from transformers.integrations import integration_utils

    for name in names:
        try:
            integration_utils.INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            reason = str(error).split("\n")[0]
            raise ConfigError(f"report_to: {name} cannot be used; pip install {name} ({reason})") from None
