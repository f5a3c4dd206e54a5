"""The drop-in: veneer under the name `peft`, for programs that import Hugging Face PEFT.

    import veneer
    veneer.install_as_peft()      # or, without touching the program: python -m veneer.as_peft program.py ...
    from peft import LoraConfig, get_peft_model

PEFT's names, defaults and wording are data, in `tables/`; the rest are thin views of veneer's own classes. Start with
`register.py`, which puts the modules in place, and `models.py`.
"""

from __future__ import annotations


def install_as_peft(strict: bool = False) -> None:
    """Make `import peft` import veneer for the rest of the process, whether PEFT is installed or not.

    Args:
        strict: raise an error, not a warning, where PEFT accepts what veneer refuses.

    Raises:
        VeneerError: the real PEFT is already imported.
    """
    from .register import install

    install(strict)
