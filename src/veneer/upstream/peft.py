"""The PEFT version that transformers requires before it loads an adapter itself.

transformers 5.24 requires PEFT 0.22, which is not released, but uses nothing that 0.21 lacks. Under the name peft,
veneer has the interface of 0.21. It lowers the bound in transformers, because claiming to be 0.22 would be false.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

from packaging.version import Version

from .imports import when_imported

MODULE = "transformers.integrations.peft"


def accept(version: str) -> None:
    """Make transformers accept `version` of PEFT, now or as soon as its PEFT integration is imported."""
    when_imported(MODULE, partial(_lower, version))


def _lower(version: str, module: ModuleType) -> None:
    required = getattr(module, "MIN_PEFT_VERSION", None)
    if required is not None and Version(required) > Version(version):
        module.MIN_PEFT_VERSION = version  # type: ignore[attr-defined]
