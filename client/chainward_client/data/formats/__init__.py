"""The formats of data files: one file each.

A format is a description of its keys, and a function under `@data_format(...)` that reads what it describes. A new one is a new
file in this folder; nothing else needs to change.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # both are built on this module
    from chainward_client.data.description import DataDescription
    from chainward_client.data.table import Table

Read = Callable[[Any], "Table"]


@dataclass(frozen=True)
class Format:
    """A format of data files.

    Attributes
    ----------
    description : the model of its keys
    read : makes a checked table of what they describe; opens no image
    keeps_decoded : whether a deployed site may keep decoded images: nothing decides them but what the description names
    """

    description: type[DataDescription]
    read: Read
    keeps_decoded: bool


_REGISTERED: dict[str, Format] = {}


def data_format(
    name: str, description: type[DataDescription], *, keeps_decoded: bool = False
) -> Callable[[Read], Read]:
    """Add a function to the readers, for data files with ``format: name``; the rest as in `Format`."""

    def register(read: Read) -> Read:
        _REGISTERED[name] = Format(description, read, keeps_decoded)
        return read

    return register


@cache
def data_formats() -> Mapping[str, Format]:
    """Return the formats by name, with every file of this folder imported."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


def format_of(description: DataDescription) -> Format:
    """Return the format of a parsed data file."""
    return data_formats()[description.format]
