"""What a process of ours prints while it works: one line each, with the time of day."""

from __future__ import annotations

import logging
import sys
from typing import TextIO


class _CurrentStdout(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stdout` is now: Flower replaces it to stream a run's output to the user."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignored: the stream is always the current one."""


def show_progress() -> None:
    """Print what the "chainward" loggers say from INFO on; calling it again changes nothing."""
    logger = logging.getLogger("chainward")
    if not any(isinstance(handler, _CurrentStdout) for handler in logger.handlers):
        handler = _CurrentStdout()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        # Opacus calls logging.basicConfig where it is imported, and every line would come twice; with a handler it does nothing
        logging.getLogger().addHandler(logging.NullHandler())
