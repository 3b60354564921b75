"""What a study is asked to do, out of the words that were typed."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from chainward_shared.config import ConfigScalar, options
from chainward_shared.errors import ConfigError, StudyError, nearest

Goal = Literal["balanced-accuracy", "macro-auc"]
"""What a search for settings maximises."""

PHANTOM = "phantom"
NOT_A_SETTING = (
    "seed",
    "output.",
    "federation.deadline",
    "federation.hop-deadline",
    "federation.patience",
    "federation.check-every",
    "chain.retries",
    "chain.on-failure",
    "chain.max-drift",
    "student.quorum",
)
"""Keys, or their beginnings, that decide nothing about a study: seeds are its own, and it sends no messages."""


def parse_assignments(words: Iterable[str], source: str) -> dict[str, str]:
    """Return ``{"chain.epochs": "8", ...}`` of ``["chain.epochs=8 data.label-skew=0.5"]``, quotes removed.

    Raises
    ------
    ConfigError
        A word is no assignment, or a key is given twice; `source` is the option that the words were typed for.
    """
    found: dict[str, str] = {}
    for text in words:
        try:
            parts = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"{source} {text!r}: {str(error).lower()}; expected key=value key=value") from error
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise ConfigError(f"{source} {text!r}: found {part!r}; expected key=value, as in 'chain.epochs=8'")
            if key in found:
                raise ConfigError(f"{source}: {key} is given twice, as {found[key]!r} and {value!r}; give it once")
            found[key] = value
    return found


def typed(assignments: Mapping[str, str], source: str) -> dict[str, ConfigScalar]:
    """Return the values of config keys in the type that the key has.

    Raises
    ------
    ConfigError
        There is no such key, or the value isn't of its type.
    """
    known = {option.key: option for option in options()}
    values: dict[str, ConfigScalar] = {}
    for key, text in assignments.items():
        if key not in known:
            raise ConfigError(f"{source} {key}={text}: there is no such key{nearest(key, known)}")
        values[key] = _value(key, text, known[key].kind, source)
    return values


def _value(key: str, text: str, kind: str, source: str) -> ConfigScalar:
    if kind in ("text", "choice"):
        return text
    if kind == "true or false":
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    else:
        try:
            return int(text) if kind == "integer" else float(text)
        except ValueError:
            pass
    raise ConfigError(f"{source} {key}={text}: expected {'an integer' if kind == 'integer' else kind}")


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of ``"0,1,2"``.

    Raises
    ------
    StudyError
        One is no number from 0 on, or is given twice; or there are none.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise StudyError("--seeds: none given; expected numbers, as in 0,1,2")
    for word in words:
        if not word.isdecimal() or int(word) >= 2**63:
            raise StudyError(f"--seeds: found {word!r}; expected whole numbers from 0 on, as in 0,1,2")
    seeds = [int(word) for word in words]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise StudyError(f"--seeds: {twice[0]} is given twice; a seed counts once")
    return seeds


def base_settings(
    data: str, sites: int, label_fraction: float | None, assignments: Mapping[str, ConfigScalar]
) -> dict[str, ConfigScalar]:
    """Return the run configuration that the arms start from, as far as it was given.

    Raises
    ------
    StudyError
        The same thing is said twice, or a key isn't a study's to set.
    """
    base: dict[str, ConfigScalar] = {"federation.threads": 1}
    for key, option in (
        ("data.source", "--data"),
        ("federation.num-sites", "--sites"),
        ("seed", "--seeds"),
        ("chain.label-fraction", "--label-fraction"),
    ):
        if key in assignments and (key != "chain.label-fraction" or label_fraction is not None):
            raise StudyError(f"--set {key}={assignments[key]}: {option} says this in a study; drop one of the two")
    base |= assignments
    base["data.source"] = data if data == PHANTOM else str(Path(data).expanduser().absolute())
    if sites:
        base["federation.num-sites"] = sites
    if label_fraction is not None:
        base["chain.label-fraction"] = label_fraction
    return base
