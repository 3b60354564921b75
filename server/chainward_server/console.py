"""What the coordinator's process prints."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from chainward_shared.errors import ChainwardError


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
    """Print the progress of a run, one line each with the time of day."""
    logger = logging.getLogger("chainward")
    if not logger.handlers:
        handler = _CurrentStdout()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    # Flower's own account of each aggregation repeats what the progress says.
    logging.getLogger("flwr").addFilter(_without_aggregation)


def _without_aggregation(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("aggregate_train:")


def one_line_for(error: ChainwardError) -> None:
    """Let Flower report `error`, which makes the run fail, in one line instead of with a traceback."""

    def shorten(record: logging.LogRecord) -> bool:
        raised = record.exc_info[1] if record.exc_info else None
        while raised is not None and raised is not error:
            raised = raised.__cause__ or raised.__context__
        if raised is error:
            record.exc_info = None
            record.msg, record.args = "The run failed: %s", (str(error),)
        return "Traceback (most recent call last)" not in record.getMessage()

    logging.getLogger("flwr").addFilter(shorten)
