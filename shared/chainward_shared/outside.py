"""Text and numbers from outside: whoever wrote them, they are bounded, and text holds nothing that a reader can't see.

A field of a message, or of a file that somebody else wrote, has one of these types. Its value can then be printed, logged and
rendered anywhere: no control character, no escape sequence, no character that reorders or hides others is left in it. What a
format of its own needs (HTML, Markdown, YAML) is still that format's to escape.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

LONGEST = 4_000
"""Characters of a message of our own, which may quote several texts from outside."""
MAX_LINE = 1_000
"""Characters of one text from outside."""
MAX_PAGE = 20_000
"""Characters of a text in a file that somebody else wrote."""
MAX_LINES = 32
"""Lines of remarks from one site."""
MAX_CLASSES = 10_000
MAX_SITES = 10_000
MAX_EPOCHS = 100_000
MAX_RECORDS = 1_000_000
"""Pieces of work of one run."""
MAX_COUNT = 10**9
"""Images, units, steps, or whatever else is counted."""
MAX_BYTES = 2**50
MAX_SECONDS = 1e8
"""Three years."""
MAX_FIGURE = 1e12

MARKS_IN_A_ROW = 3
"""Combining marks on one letter; no script needs more, and a hundred of them paint over the lines around them."""
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Shown as nothing at all, though Unicode counts them among letters, marks and symbols."""
_SELECTORS = frozenset(map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


def visible(text: str, limit: int | None = None) -> str:
    r"""Return text with everything in it that can't be seen written as an escape, ``\x1b`` or ``\u202e``, on one line.

    That is: control characters and line breaks, characters that format, hide or reorder others, half characters (surrogates),
    characters without a meaning (private, unassigned), and combining marks beyond `MARKS_IN_A_ROW`. Spaces of other widths
    become spaces. What was written so already stays as it is.

    Parameters
    ----------
    limit : most characters of the result, which then ends in an ellipsis; default: as many as it takes
    """
    if text.isascii() and text.isprintable():
        shown = text if limit is None else text[: limit + 1]
    else:
        shown = _escaped(text if limit is None else text[: limit + 1])
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def _escaped(text: str) -> str:
    pieces, marks = [], 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category[0] == "M" else 0
        if category == "Zs":
            pieces.append(" ")
        elif (
            category[0] == "C"
            or category in ("Zl", "Zp")
            or character in _INVISIBLE
            or character in _SELECTORS
            or marks > MARKS_IN_A_ROW
        ):
            pieces.append(character.encode("unicode_escape").decode())
        else:
            pieces.append(character)
    return "".join(pieces)


def visible_lines(text: str) -> str:
    """Return text of several lines with each made `visible`; the lines after the first are indented.

    So none of them can pass for a line of its own, with a time of day in front.
    """
    first, *others = text.split("\n")
    return "\n".join([visible(first), *(f"  {visible(line.removesuffix(chr(13)))}" for line in others)])


def visible_values(value: Any, limit: int = MAX_PAGE) -> Any:
    """Return plain JSON values with every text in them, names included, made `visible`."""
    if isinstance(value, str):
        return visible(value, limit)
    if isinstance(value, Mapping):
        return {visible(str(name), limit): visible_values(part, limit) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [visible_values(part, limit) for part in value]
    return value


class Shown:
    """Base of dataclasses that end on a terminal or a page: their texts are made `visible` when one is made."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # of the dataclass that inherits from this
            value = getattr(self, field.name)
            if isinstance(value, str):
                object.__setattr__(self, field.name, visible(value, LONGEST))


class Record(BaseModel):
    """Base of what is written down or sent as it is: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def few(lines: Any, most: int = MAX_LINES) -> Any:
    """Return at most `most` of a list of lines, the last of them saying how many were left out; anything else as it is."""
    if not isinstance(lines, list | tuple) or len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"and {len(lines) - most + 1} more"]


def _saturated(value: object) -> object:
    """Return a number within what a figure may be; a loss that has run away is large, whatever its exact value."""
    if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return float(max(-MAX_FIGURE, min(MAX_FIGURE, value)))
    return value


def _snapped(value: object) -> object:
    """Return a fraction within 0 and 1 that rounding errors alone took out of it."""
    return min(1.0, max(0.0, value)) if isinstance(value, float) and -1e-9 < value < 1 + 1e-9 else value


def _shown(limit: int) -> BeforeValidator:
    return BeforeValidator(lambda value: visible(value, limit) if isinstance(value, str) else value)


def _is_visible(value: str) -> str:
    if visible(value) != value:
        raise ValueError("holds characters that can't be seen")
    return value


# Text
Line = Annotated[str, _shown(MAX_LINE), Field(max_length=MAX_LINE, json_schema_extra={"visible": True})]
"""Words for a person: made visible, and cut where they are too long."""
Name = Annotated[str, _shown(200), Field(max_length=200, json_schema_extra={"visible": True})]
"""What something is called at a site, such as a class."""
Lines = Annotated[list[Line], BeforeValidator(few), Field(max_length=MAX_LINES)]
"""Remarks, a line each; a site with more of them has its last ones left out."""

_IN_NAMES = r"^[\p{L}\p{N}][\p{L}\p{N} ._'&()+-]*$"
"""Letters and digits of any script, and what stands in names; no slash, no quotation mark, nothing that markup uses."""
SiteId = Annotated[str, StringConstraints(pattern=_IN_NAMES, min_length=1, max_length=64), AfterValidator(_is_visible)]
RunId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", min_length=1, max_length=128)]
HopKey = Annotated[str, StringConstraints(pattern=_IN_NAMES, min_length=1, max_length=128), AfterValidator(_is_visible)]
"""Name of a piece of work, and of what is kept of it: it may hold a site's id."""
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", min_length=1, max_length=64)]
"""A term of the program's own, such as a precision or a version."""
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$", max_length=128)]
Base64 = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/=]*$", max_length=256)]
Moment = Annotated[str, StringConstraints(pattern=r"^[0-9TZ:.+ -]+$", max_length=40)]
"""A time as ISO 8601 text."""

# Numbers
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_snapped)]
Figure = Annotated[float, Field(ge=-MAX_FIGURE, le=MAX_FIGURE, allow_inf_nan=False)]
Total = Annotated[float, Field(ge=0, le=MAX_FIGURE * MAX_COUNT, allow_inf_nan=False)]
"""A sum of figures over as many images as there may be."""
Loss = Annotated[float, Field(ge=-MAX_FIGURE, le=MAX_FIGURE, allow_inf_nan=False), BeforeValidator(_saturated)]
"""A figure that may run away in training: it stops at the largest one instead of being refused."""

# Several of them
T = TypeVar("T")
PerEpoch = Annotated[list[T], Field(max_length=MAX_EPOCHS)]
PerClass = Annotated[list[T], Field(max_length=MAX_CLASSES)]
BySite = Annotated[dict[SiteId, T], Field(max_length=MAX_SITES)]
