"""Further formats of data files: one file each.

A new format is a new file in this folder: a description of its keys, and a function under `@data_format(...)` that reads what it
describes; nothing else needs to change.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from chainward_client.data.description import CsvDescription
from chainward_client.data.manifest import Manifest

Read = Callable[[Any], Manifest]


@dataclass(frozen=True)
class Format:
    """A format: the model of its keys, and the function that makes a checked manifest of what they describe."""

    description: type[CsvDescription]
    read: Read


_REGISTERED: dict[str, Format] = {}


def data_format(name: str, description: type[CsvDescription]) -> Callable[[Read], Read]:
    """Add a function to the readers, for data files with ``format: name``."""

    def register(read: Read) -> Read:
        _REGISTERED[name] = Format(description, read)
        return read

    return register


@cache
def further_formats() -> Mapping[str, Format]:
    """Return the formats by name, with every file of this folder imported."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _REGISTERED
