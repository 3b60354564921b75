"""Words for a person: lists, and what is wrong with content that a model refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

MOST_SHOWN = 60
"""Characters of a foreign value that a message quotes."""


def listed(words: Sequence[str], most: int = 0, *, last: str = "and") -> str:
    """Return ``"a, b and c"``; with more than `most` (0: any number) ``"a, b and 4 more"``. `last`: instead of "and"."""
    words = list(words)
    if most and len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
    return f" {last} ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def first_problem(error: Exception) -> str:
    """Return what is wrong first with content that a model refused, in one line: where, what, and what was found.

    For any other error its first line.
    """
    if not isinstance(error, ValidationError):
        return first_line(error)
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    said = " ".join(problem["msg"].removeprefix("Value error, ").split())
    found = f", found {shown(problem['input'])}" if isinstance(problem["input"], bool | int | float | str) else ""
    return f"{where}: {lower_first(said)}{found}" if where else f"{lower_first(said)}{found}"


def shown(value: Any) -> str:
    """Return a value as a message quotes it: escaped, on one line, and short however long it is."""
    if isinstance(value, int) and abs(value) >= 10**21:  # Python refuses to print integers of many digits
        return f"about {'-' if value < 0 else ''}10**{round(math.log10(abs(value)))}"
    text = repr(value[: MOST_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def lower_first(text: str) -> str:
    """Return the text with a small first letter."""
    return text[:1].lower() + text[1:]
