"""The memory of a simulation's coordinator, watched while it runs, by the hops that it has finished."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from chainward_server.run_state import Phase, RunState
from chainward_simulations.benchmark.memory import Sampler
from chainward_simulations.flower import processes_of

COORDINATOR = "flwr-simulation"
"""The process of a simulation in which the ServerApp runs, as a thread beside Flower's message store and Ray's driver."""


SAMPLE_SECONDS = 1.0


MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """The memory of the coordinator's process at one moment.

    Attributes
    ----------
    seconds : since the start of the watch
    phase : of the run
    hops : links that `run.json` lists as finished
    uss : bytes that only this process has
    rss : bytes in RAM, also those shared with other processes: libraries, and Ray's object store as far as it was touched
    pss : `uss` and a share of what is shared; None where the system doesn't tell
    """

    seconds: float
    phase: Phase
    hops: int
    uss: int
    rss: int
    pss: int | None


class CoordinatorWatch(Sampler):
    """Samples the memory of a run's coordinator, and how far the run is, while its `with` block lasts.

    Parameters
    ----------
    flwr_home : FLWR_HOME of the run
    output : the run's ``output.dir``, without any other run
    """

    def __init__(self, flwr_home: Path, output: Path) -> None:
        self.flwr_home, self.output = flwr_home, output
        self.samples: list[Sample] = []
        self._process: psutil.Process | None = None
        self._started = time.monotonic()
        super().__init__()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            state = _state_under(self.output)
            if state is None:
                continue
            try:
                self._process = self._process or _coordinator(self.flwr_home)
                if self._process is None:
                    continue
                memory = self._process.memory_full_info()
            except psutil.Error:
                self._process = None  # it has ended
                continue
            hops = sum(key.startswith("strand-") for key in state.finished)
            seconds = time.monotonic() - self._started
            pss = getattr(memory, "pss", None)
            self.samples.append(Sample(seconds, state.phase, hops, memory.uss, memory.rss, pss))


def _state_under(output: Path) -> RunState | None:
    for file in output.glob("*/run.json"):
        try:
            return RunState.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            return None
    return None


def _coordinator(flwr_home: Path) -> psutil.Process | None:
    found = [process for process in processes_of(flwr_home) if _runs(process, COORDINATOR)]
    return max(found, key=lambda process: int(process.memory_info().rss), default=None)


def _runs(process: psutil.Process, program: str) -> bool:
    try:
        return any(Path(part).name == program for part in process.cmdline()[:2])
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Growth:
    """Memory over some hops, in MiB; all None where fewer than two of them were sampled.

    Attributes
    ----------
    first, half, last : while the hop after the first, the middle and the last of these hops was under way
    per_hop : slope of the straight line of least squares through the memory after each hop
    """

    first: float | None = None
    half: float | None = None
    last: float | None = None
    per_hop: float | None = None


def memory_after_hops(samples: Sequence[Sample]) -> dict[int, float]:
    """Return MiB (USS) by the number of finished hops, 1 or more: the median of the samples during the chain.

    The median, because the peaks within a hop (the models on their way to all sites) are alike in all hops.
    """
    found: dict[int, list[int]] = {}
    for sample in samples:
        if sample.phase == "chain" and sample.hops:
            found.setdefault(sample.hops, []).append(sample.uss)
    return {hops: statistics.median(sizes) / MIB for hops, sizes in sorted(found.items())}


def growth(memory: dict[int, float], first: int, last: int) -> Growth:
    """Return how memory grew from the `first` to the `last` hop, both included; see `memory_after_hops`."""
    hops = [hop for hop in memory if first <= hop <= last]
    if len(hops) < 2:
        return Growth()
    middle = min(hops, key=lambda hop: abs(hop - (hops[0] + hops[-1]) / 2))
    slope = statistics.linear_regression(hops, [memory[hop] for hop in hops]).slope
    return Growth(memory[hops[0]], memory[middle], memory[hops[-1]], slope)
