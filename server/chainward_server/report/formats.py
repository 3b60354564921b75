"""Numbers as a reader sees them. A missing value is an en dash everywhere."""

from __future__ import annotations

import re
from datetime import datetime

from markupsafe import Markup, escape

MISSING = "–"
MINUS = "−"

_WORDS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")


def score(value: float | None) -> str:
    """A metric between 0 and 1, three decimals."""
    return MISSING if value is None else f"{value:.3f}"


def factor(value: float | None) -> str:
    """How many times chance: two decimals."""
    return MISSING if value is None else f"{value:.2f}×"


def interval(low: float | None, high: float | None) -> str:
    """The ends of a confidence interval, two decimals; a dash where there is none."""
    return MISSING if low is None or high is None else f"{low:.2f} to {high:.2f}"


def threshold(value: float | None) -> str:
    """A probability from which on something is done: with as many decimals as tell it from 0 and from 1."""
    if value is None:
        return MISSING
    distance = min(value, 1 - value)
    if distance < 1e-6:
        return "below 0.000001" if value < 0.5 else "above 0.999999"
    tells = 1 - int(f"{distance:.1e}".partition("e")[2])  # decimals up to the second digit that is none of 0 or 9
    return f"{value:.{tells}f}" if distance < 0.0005 else f"{value:.3f}"


def change(value: float | None) -> str:
    """A difference of two metrics, always with its sign."""
    if value is None:
        return MISSING
    text = f"{value:+.3f}"
    return "±0.000" if float(text) == 0 else text.replace("-", MINUS)


def count(value: int | None) -> str:
    """A whole number with a thin space between thousands."""
    return MISSING if value is None else f"{value:,}".replace(",", "\u202f")


def percent(fraction: float | None) -> str:
    """A fraction in percent: whole, but with one decimal below ten."""
    if fraction is None:
        return MISSING
    return f"{100 * fraction:.1f}\u00a0%" if fraction < 0.0995 else f"{100 * fraction:.0f}\u00a0%"


def times(ratio: float | None) -> str:
    """How many times larger, smaller or faster: ``4.2×``."""
    if ratio is None:
        return MISSING
    return f"{ratio:.1f}×" if ratio < 99.5 else f"{ratio:.0f}×"


def bytes_size(value: int | None) -> str:
    """Bytes in the decimal unit that fits."""
    if value is None:
        return MISSING
    size = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f}\u00a0{unit}" if unit == "B" or size >= 99.5 else f"{size:.1f}\u00a0{unit}"
        size /= 1000
    return f"{size:.1f}\u00a0TB"


def duration(seconds: float | None) -> str:
    """Seconds in the units of a clock."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(text: str | None) -> str:
    """An ISO 8601 time to the minute; any other text as it is."""
    if not text:
        return MISSING
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".strip()


def elapsed(started: str, finished: str | None) -> float | None:
    """Seconds between two ISO 8601 times; None where either is missing or says something else."""
    try:
        seconds = (datetime.fromisoformat(finished or "") - datetime.fromisoformat(started)).total_seconds()
    except (ValueError, TypeError):  # TypeError: only one of the two names its time zone
        return None
    return seconds if seconds >= 0 else None


def number_word(number: int) -> str:
    """A number that starts a sentence: a word up to twelve, digits beyond."""
    return _WORDS[number] if number < len(_WORDS) else str(number)


def breakable(name: str) -> Markup:
    """A name that may go on in the next line after an underscore or a hyphen; escaped."""
    return Markup(re.sub(r"([_-])", r"\1<wbr>", str(escape(name))))


def setting(value: object) -> str:
    """A configuration value as TOML writes it, without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value) or MISSING
    return MISSING if value is None or value == "" else str(value)


FILTERS = (
    score,
    factor,
    interval,
    threshold,
    change,
    count,
    percent,
    times,
    bytes_size,
    duration,
    moment,
    breakable,
    setting,
)
"""What templates know by these names."""
