"""Further baselines of a study: one file each.

A new baseline is a new file in this folder, with a function under `@baseline(...)`; nothing else needs to change.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from chainward_client.data.site_data import SiteData
from chainward_shared.protocol import TrainingLog
from chainward_shared.recipes import LinkRecipe
from chainward_shared.weights import StateDict
from chainward_simulations.study.start import Start

Train = Callable[
    [Mapping[str, SiteData], Start, LinkRecipe, Callable[[str], None]],
    tuple[StateDict, list[TrainingLog]],
]
"""From the sites' data, what the arms start from, the recipe and what takes a line of progress to the model and how each training
went."""


@dataclass(frozen=True)
class Baseline:
    """A baseline: one line for people, and the function that trains its one model on the data of all sites."""

    about: str
    train: Train


_REGISTERED: dict[str, Baseline] = {}


def baseline(name: str, about: str) -> Callable[[Train], Train]:
    """Add a function to the baselines, as the arm `name`."""

    def register(train: Train) -> Train:
        _REGISTERED[name] = Baseline(about, train)
        return train

    return register


@cache
def further_baselines() -> Mapping[str, Baseline]:
    """Return the baselines by name, with every file of this folder imported."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _REGISTERED
