"""What transformers asks of the PEFT that is installed, when it puts an adapter on a model by itself.

transformers 5.24 asks for PEFT 0.22, which is not out, and uses nothing that 0.21 lacks. Under the name peft veneer has
the interface of 0.21: transformers' lower bound is lowered to that, rather than a version claimed that is not there.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

from packaging.version import Version

from .imports import when_imported

MODULE = "transformers.integrations.peft"


def accept(version: str) -> None:
    """Make transformers take `version` of PEFT, now or when its integration is imported."""
    when_imported(MODULE, partial(_lower, version))


def _lower(version: str, module: ModuleType) -> None:
    asked = getattr(module, "MIN_PEFT_VERSION", None)
    if asked is not None and Version(asked) > Version(version):
        module.MIN_PEFT_VERSION = version  # type: ignore[attr-defined]
