"""Ctrl-C, SIGTERM and a time limit as one question: should the run stop after this step?"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from chela.training import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, the two signals only set a flag; a second Ctrl-C stops at once, as Python does by default."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline  # on time.monotonic's clock
        self._reason = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._reason and number == signal.SIGINT and distributed.size() == 1:  # torchrun repeats the terminal's
            raise KeyboardInterrupt
        self._reason = signal.Signals(number).name

    @property
    def reason(self) -> str:
        """Why to stop: a signal's name, "time limit", or "" to go on."""
        if not self._reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "time limit"
        return self._reason
