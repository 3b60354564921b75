"""The errors that a person is meant to read: one line that says what, found what, expected what, do what."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ChainwardError(Exception):
    """Base of all errors with a message for the user; shown as one line, never as a traceback."""


class ConfigError(ChainwardError):
    """A key of the run configuration is unknown, out of range, or contradicts another key."""


class DataError(ChainwardError):
    """A data file, manifest or image can't be used as it is."""


class ModelError(ChainwardError):
    """A backbone is unknown, or its family is not supported for what was asked."""


class WeightsError(ChainwardError):
    """Weights that arrived or were stored are not those that were expected."""


class ProtocolError(ChainwardError):
    """A message lacks something, carries something it must not, or speaks another version."""


class RunFolderError(ChainwardError):
    """A run folder can't be written, or is damaged."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'X'?)"`` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
