"""Keeping Flower's own log readable: no traceback for bad input."""

from __future__ import annotations

import logging

from chainward_shared.errors import ChainwardError


def one_line_for(error: ChainwardError) -> None:
    """Let Flower report `error`, which makes the run fail, in one line instead of with a traceback."""

    def shorten(record: logging.LogRecord) -> bool:
        raised = record.exc_info[1] if record.exc_info else None
        while raised is not None and raised is not error:
            raised = raised.__cause__ or raised.__context__
        if raised is error:
            record.exc_info = record.exc_text = None
            record.msg, record.args = "The run failed: %s", (str(error),)
        return "Traceback (most recent call last)" not in record.getMessage()

    logging.getLogger("flwr").addFilter(shorten)
