"""The trainings of a study in several worker processes."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

from chainward_client.data.site_data import SiteData
from chainward_shared.config import DataConfig, FederationConfig, RunConfig
from chainward_shared.errors import ChainwardError, StudyError
from chainward_simulations import runner
from chainward_simulations.study.configured_arms import ConfiguredArm
from chainward_simulations.study.kept_features import ImageFeatures
from chainward_simulations.study.records import ArmRecord
from chainward_simulations.study.store import FEATURES, Chain, chain_file, load_chain, save_chain
from chainward_simulations.study.training import Bench, chain_work, expected_work, measure_arm, train_arm, train_chain


@dataclass(frozen=True)
class Unit:
    """Arms of one seed that one worker trains one after the other: those that share a training."""

    seed: int
    arms: tuple[ConfiguredArm, ...]

    def images(self, sites: int) -> float:
        """Return roughly how much work it is, in units of one site's training images."""
        different = {arm.digest(): arm for arm in self.arms}.values()
        work = sum(expected_work(arm, sites).images for arm in different)
        if all(arm.arm.trainer == "student" for arm in self.arms):
            work += chain_work(self.arms[0], sites).images
        return work

    def run(self, folder: Path, report: Report) -> None:
        """Train and measure the arms, in this process.

        Raises
        ------
        ChainwardError
            The data can't be used, or the study folder can't be written.
        """
        sites, features = open_sites(self.arms[0].config), ImageFeatures(folder / FEATURES)
        chains: dict[str, Chain] = {}
        done: dict[str, ArmRecord] = {}
        with tempfile.TemporaryDirectory(prefix="chainward-study-") as state_dir:
            for configured in self.arms:
                digest = configured.digest()
                if digest in done:
                    report(renamed(done[digest], configured))
                    continue
                on_step = _reporting(report, configured, expected_work(configured, len(sites)).per_training)
                chain_of = partial(_chain_of, chains, folder, report)
                bench = Bench(sites, chain_of, on_step, Path(state_dir), features)
                event = _trained(configured, bench, folder)
                if isinstance(event, ArmRecord):
                    done[digest] = event
                report(event)


@dataclass(frozen=True)
class Step:
    """A training is finished: `images` of what `Unit.images` counts."""

    arm: str
    seed: int
    what: str
    images: float


@dataclass(frozen=True)
class Failed:
    """An arm can't be trained: one line why, and where, if it is a defect of ours."""

    arm: str
    seed: int
    reason: str
    details: str = ""


@dataclass(frozen=True)
class Tried:
    """A trial of the search for settings is finished, with this value of the objective; None: it could not be trained."""

    number: int
    value: float | None
    reason: str = ""


Event = Step | ArmRecord | Failed | Tried
"""A record: an arm is finished."""
Report = Callable[[Event], None]


class Runnable(Protocol):
    """What a worker can do: pure data, so that it can travel there."""

    def run(self, folder: Path, report: Report) -> None:
        """Do it; `folder` is the study's, `report` takes what happens."""


def make_units(todo: Sequence[ConfiguredArm]) -> list[Unit]:
    """Return the units of all arms to train, each with its seed: by seed, and within one the largest first.

    Arms that train the same, and arms whose students share a chain, are one unit.
    """
    groups: dict[tuple[int, str], list[ConfiguredArm]] = {}
    for configured in todo:
        shared = configured.chain_digest() if configured.arm.trainer == "student" else configured.digest()
        groups.setdefault((configured.config.seed, shared), []).append(configured)
    units = [
        Unit(seed, tuple(sorted(arms, key=lambda one: one.arm.trainer == "student")))
        for (seed, _), arms in groups.items()
    ]
    seeds = list(dict.fromkeys(configured.config.seed for configured in todo))
    return sorted(units, key=lambda unit: (seeds.index(unit.seed), -unit.images(6)))


def _reporting(report: Report, configured: ConfiguredArm, images: float) -> Callable[[str], None]:
    """Return what reports a training of an arm as so many images."""
    return lambda what: report(Step(configured.name, configured.config.seed, what, images))


def _trained(configured: ConfiguredArm, bench: Bench, folder: Path) -> ArmRecord | Failed:
    try:
        return measure_arm(configured, train_arm(configured, bench), bench, folder)
    except OSError as error:
        raise StudyError(
            f"{folder}: can't be written ({error.strerror or error}); finished arms are kept, "
            "the same command goes on from there"
        ) from error
    except ChainwardError as error:
        return Failed(configured.name, configured.config.seed, str(error))
    except Exception as error:  # a defect in one arm must not cost the others a night
        reason, details = f"{type(error).__name__}: {error}", traceback.format_exc()
        return Failed(configured.name, configured.config.seed, reason, details)


def _chain_of(chains: dict[str, Chain], folder: Path, report: Report, configured: ConfiguredArm, bench: Bench) -> Chain:
    """Return the chain of an arm: the one of this unit, the one in the study folder, or one trained now."""
    key, work = configured.chain_digest(), chain_work(configured, len(bench.sites))
    if key in chains:
        return chains[key]
    file = chain_file(folder, key, configured.config.seed)
    if (stored := load_chain(file)) is not None:
        _reporting(report, configured, work.images)("chain trained before")
        chains[key] = stored
    else:
        on_step = _reporting(report, configured, work.per_training)
        chains[key] = train_chain(configured, replace(bench, on_step=on_step))
        save_chain(chains[key], file)
    return chains[key]


def renamed(record: ArmRecord, configured: ConfiguredArm) -> ArmRecord:
    """Return the record of another arm that is the same training."""
    own = {"arm": configured.name, "about": configured.arm.about, "overrides": dict(configured.arm.overrides)}
    return record.model_copy(update=own)


def open_sites(config: RunConfig) -> dict[str, SiteData]:
    """Return the data of all sites; that of the last call is kept, for arms differ in anything but the data."""
    return _opened(config.seed, config.data, config.federation)


@lru_cache(maxsize=1)
def _opened(seed: int, data: DataConfig, federation: FederationConfig) -> dict[str, SiteData]:
    return runner.open_sites(RunConfig(seed=seed, data=data, federation=federation))


class Workers:
    """Processes that train side by side; one job is done in this process. A context manager.

    Parameters
    ----------
    folder : the study's
    report : called here with all that happens
    """

    def __init__(self, jobs: int, folder: Path, report: Report) -> None:
        self.jobs, self.folder, self.report = jobs, folder, report
        self._pending: set[Future[None]] = set()
        self._pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            # Threads that spin while they wait slow down the trainings beside them; workers read this when they start.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            context = get_context("spawn")
            self._events: Any = context.SimpleQueue()  # an event is in its pipe before the unit's future is done
            self._pool = ProcessPoolExecutor(jobs, context, _start_worker, (self._events,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=not self._pending, cancel_futures=True)
            if self._pending:  # interrupted, or one of them failed
                for child in active_children():
                    child.terminate()

    def run(self, units: Sequence[Runnable]) -> None:
        """Run all units, in their order as far as there are free workers.

        Raises
        ------
        ChainwardError
            The data can't be used, the study folder can't be written, or a worker died.
        """
        if self._pool is None:
            for unit in units:
                unit.run(self.folder, self.report)
            return
        try:
            self._pending = {self._pool.submit(_run_in_worker, unit, self.folder) for unit in units}
            while self._pending:
                finished, _ = wait(self._pending, timeout=0.2, return_when="FIRST_COMPLETED")
                while not self._events.empty():
                    self.report(self._events.get())
                for future in finished:
                    future.result()
                self._pending -= finished
        except BrokenProcessPool as error:
            raise StudyError(
                "a worker process died (out of memory?); finished arms are kept; try again with a smaller --jobs"
            ) from error


_events: Any = None
"""Of a worker: where its events go."""


def _start_worker(events: Any) -> None:
    global _events
    _events = events
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone: nobody would read what it trains."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run_in_worker(unit: Runnable, folder: Path) -> None:
    unit.run(folder, _events.put)
