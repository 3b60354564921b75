"""Where a run is written down while it goes on: what the method needs of it, and one that lasts as long as the process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from chainward_server.results import Results
from chainward_shared.models import Architecture
from chainward_shared.weights import StateDict


class Checkpoints(Protocol):
    """What has happened in a run: finished pieces of work by name, and the models that they left."""

    @property
    def run_id(self) -> str:
        """Id of the run, as the sites are told it."""

    @property
    def age(self) -> float:
        """Seconds since the run was first started."""

    def is_finished(self, key: str) -> bool:
        """Return whether the piece of work called `key` is done."""

    def has_model(self, name: str) -> bool:
        """Return whether the model called `name` is kept."""

    def load_model(self, name: str, template: StateDict) -> StateDict:
        """Return the model called `name`, checked against `template`."""

    def save_model(self, name: str, state: StateDict, architecture: Architecture, metadata: Mapping[str, str]) -> None:
        """Keep a model; it counts once `commit` has been called. `metadata`: what is kept beside its weights."""

    def metadata_of(self, name: str) -> Mapping[str, str]:
        """Return what is kept beside the weights of the model called `name`."""

    def drop_model(self, name: str) -> None:
        """Forget a model that is not needed any more."""

    def commit(self, results: Results, *finished: str) -> None:
        """Note the pieces of work `finished`, and what was measured in them."""

    def write_results(self, results: Results) -> None:
        """Note what was measured."""


class InMemory:
    """Checkpoints of a run that nobody resumes. `models`: those that were kept, by name."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.models: dict[str, StateDict] = {}
        self._metadata: dict[str, Mapping[str, str]] = {}
        self._finished: set[str] = set()
        self._started = time.monotonic()

    @property
    def age(self) -> float:
        return time.monotonic() - self._started

    def is_finished(self, key: str) -> bool:
        return key in self._finished

    def has_model(self, name: str) -> bool:
        return name in self.models

    def load_model(self, name: str, template: StateDict) -> StateDict:
        return self.models[name]

    def save_model(self, name: str, state: StateDict, architecture: Architecture, metadata: Mapping[str, str]) -> None:
        self.models[name], self._metadata[name] = state, metadata

    def metadata_of(self, name: str) -> Mapping[str, str]:
        return self._metadata[name]

    def drop_model(self, name: str) -> None:
        self.models.pop(name, None)

    def commit(self, results: Results, *finished: str) -> None:
        self._finished.update(finished)

    def write_results(self, results: Results) -> None:
        """Nothing is written."""
