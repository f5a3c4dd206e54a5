"""The drop-in: veneer under the name `peft`, for programs that import Hugging Face PEFT.

    import veneer
    veneer.install_as_peft()      # or, without touching the program: python -m veneer.as_peft program.py ...
    from peft import LoraConfig, get_peft_model

PEFT's names, defaults and messages are data, in `tables/`; all other modules are thin views of veneer's own classes.
`inside/` has one file for each of PEFT's inner modules of which programs use a part. Start with `register.py`, which
makes every module that `tables/names.json` lists, and `models.py`.
"""

from __future__ import annotations


def install_as_peft(strict: bool = False) -> None:
    """Make `import peft` import veneer for the rest of the process, whether PEFT is installed or not.

    Args:
        strict: if PEFT accepts something that veneer refuses, raise an error instead of a warning.

    Raises:
        VeneerError: the real PEFT is already imported.
    """
    from .register import install

    install(strict)
