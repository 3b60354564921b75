"""Hands on what a run measures, while it goes on, to the trackers that `output.track` names.

A tracker is a convenience: without its library the run doesn't start, and says so; once it goes on, no tracker ends it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.errors import ConfigError
from chainward_shared.words import first_line

logger = logging.getLogger("chainward")

FAILURES = 3
"""Times in a row that a tracker may fail; then it is left alone for the rest of the run."""
ARTEFACTS = ("report.html", "metrics.json", "privacy.json", "config.toml")
_BY_SITE = ("alone",)
"""Lists whose records are told apart by their site; those of the others follow each other in time."""
_LEFT_OUT = ("schema", "seed", "data")
"""What is no measurement."""
_NEEDS = {"mlflow": ("mlflow", "track-mlflow"), "tensorboard": ("tensorboard", "track-tensorboard")}


class Figure(NamedTuple):
    """One number. `name`: its path in metrics.json; `step`: place in the list that the path goes through, from 1; 0 outside of
    lists."""

    name: str
    step: int
    value: float


class Tracker(Protocol):
    """One tracking tool, with one run open in it."""

    known: bool
    """Whether the run was in it before: it is resumed, and what it measured before is there."""

    def parameters(self, values: Mapping[str, str]) -> None:
        """Note the settings of the run."""

    def log(self, found: list[Figure]) -> None:
        """Note numbers that are new."""

    def artefacts(self, files: list[Path], digests: Mapping[str, str]) -> None:
        """Keep files, and the SHA-256 of each model file by its name."""

    def end(self, status: str) -> None:
        """Note how the run ended: as in `run.json`."""


def figures(results: Results) -> Iterator[Figure]:
    """Yield every number of `metrics.json`; lists of numbers, such as a loss for each epoch, are left out."""
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


def local_folder(config: RunConfig) -> Path:
    """Return where trackers write on this machine."""
    where = config.output.track_to or f"{config.output.dir}/tracking"
    return Path(where).expanduser().absolute()


def check_trackers(config: RunConfig) -> None:
    """Look before a run whether the libraries of its trackers are there.

    Raises
    ------
    ConfigError
        One isn't.
    """
    for name in config.output.trackers:
        library, extra = _NEEDS[name]
        if importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"output.track = {config.output.track!r}: the library {library} is not installed; "
                f"pip install 'chainward[{extra}]', or leave {name} out"
            )


def _opened(name: str, folder: RunFolder) -> Tracker:
    if name == "mlflow":
        from chainward_server.tracking.mlflow import MLflow

        return MLflow(folder, local_folder(folder.config))
    from chainward_server.tracking.tensorboard import TensorBoard

    return TensorBoard(folder, local_folder(folder.config))


@dataclass
class _Followed:
    """A tracker, what it has been told already, and how often in a row it has failed."""

    name: str
    tracker: Tracker | None = None
    told: dict[tuple[str, int], float] = field(default_factory=dict)
    failed: int = 0

    def attempt(self, what: Callable[[Tracker], None]) -> bool:
        """Do something with the tracker, and say where that fails; return whether it didn't."""
        if self.tracker is None:
            return False
        try:
            what(self.tracker)
        except Exception as error:
            self.failed += 1
            gives_up = self.failed >= FAILURES
            logger.warning(
                "tracking with %s failed (%s: %s); the run goes on%s",
                self.name,
                type(error).__name__,
                first_line(error),
                ", and it is not tried again" if gives_up else "",
            )
            if gives_up:
                self.tracker = None
            return False
        self.failed = 0
        return True


class Tracking:
    """Follows a run from its folder; as a context manager, from beginning to end.

    Parameters
    ----------
    folder : of the run
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._followed = [_Followed(name) for name in folder.config.output.trackers]

    def __enter__(self) -> Tracking:
        for one in self._followed:
            try:
                one.tracker = _opened(one.name, self.folder)
            except Exception as error:
                words = f"{type(error).__name__}: {first_line(error)}"
                logger.warning("tracking with %s can't begin (%s); the run goes on without it", one.name, words)
                continue
            results = self.folder.load_results()
            if one.tracker.known and results is not None:
                one.told = {(figure.name, figure.step): figure.value for figure in figures(results)}
            settings = {name: str(value) for name, value in self.folder.config.to_flat().items()}
            one.attempt(lambda tracker, settings=settings: tracker.parameters(settings))  # type: ignore[misc]
        if self._followed:
            self.folder.followed = self.follow
        return self

    def follow(self, results: Results) -> None:
        """Hand on the numbers that are new or have changed."""
        found = list(figures(results))
        for one in self._followed:
            new = [figure for figure in found if one.told.get((figure.name, figure.step)) != figure.value]
            if new and one.attempt(lambda tracker, new=new: tracker.log(new)):  # type: ignore[misc]
                one.told |= {(figure.name, figure.step): figure.value for figure in new}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._followed:
            return
        state = self.folder.state
        status = state.status if kind is None else "failed"  # which is not written down yet
        files = [path for name in ARTEFACTS if (path := self.folder.path / name).is_file()]
        if self.folder.config.output.track_models:
            final = [self.folder.model_path(name) for name in ("chain", "student") if name in state.models]
            files += [path for path in final if path.is_file()]
        results = self.folder.load_results()
        for one in self._followed:
            if results is not None:
                self.follow(results)
            one.attempt(lambda tracker: tracker.artefacts(files, state.models))
            one.attempt(lambda tracker: tracker.end(status))
