"""All numbers of `metrics.json`, each under the name that it has there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from chainward_server.results import Results

_BY_SITE = ("alone",)
"""Lists whose records are told apart by their site; those of the others follow each other in time."""
_LEFT_OUT = ("schema", "seed", "data")
"""What is no measurement."""


class Figure(NamedTuple):
    """One number. `name`: its path in metrics.json; `step`: place in the list that the path goes through, from 1; 0 outside of
    lists."""

    name: str
    step: int
    value: float


def figures(results: Results) -> Iterator[Figure]:
    """Yield every number that was measured so far; lists of numbers, such as a loss for each epoch, are left out."""
    content = results.model_dump(mode="json", by_alias=True)
    for name, value in content.items():
        if name not in _LEFT_OUT:
            yield from _walk(value, name, 0)


def _walk(value: Any, name: str, step: int) -> Iterator[Figure]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield Figure(name, step, float(value))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(part, f"{name}/{key}", step)
    elif isinstance(value, list):
        records = [(place, part) for place, part in enumerate(value, 1) if isinstance(part, Mapping)]
        for place, part in records:
            if name in _BY_SITE:
                yield from _walk(part, f"{name}/{part['site']}", 0)
            elif step == 0:  # of lists within lists the outer one counts the steps
                yield from _walk(part, name, place)
