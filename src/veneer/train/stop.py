"""Ctrl-C in training: the running step is finished and its checkpoint written, so that the run can be resumed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

NOTICE = b"\nfinishing this step and writing a checkpoint; Ctrl-C again stops at once\n"


class Stop(TrainerCallback):
    """Ends training after the step in which Ctrl-C is pressed; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.wanted = False
        self.first_step = 0
        """The step that training starts from: until the next one ends, there is nothing to save."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block, Ctrl-C ends training after its step. The block then ends with KeyboardInterrupt.

        In a run of several processes each would stop at another step, so there Ctrl-C keeps its usual meaning. It also
        does in a thread, where Python sets no signal handlers, and where Ctrl-C was ignored from the start.
        """
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        is_main_thread = threading.current_thread() is threading.main_thread()
        if not is_alone or not is_main_thread or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.wanted:
            raise KeyboardInterrupt

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.wanted and state.global_step == self.first_step:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.wanted:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        os.write(2, NOTICE)  # not through a console or stream, which this signal may have interrupted
