"""Libraries that speak up on their own are told to be quiet: a command has a display of its own."""

from __future__ import annotations

import warnings


def quiet() -> None:
    """No progress bars and no advice from transformers; no warnings of the libraries below us."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|transformers\.|accelerate\.")
