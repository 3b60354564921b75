"""What all processes of a Flower run take, looked at again and again."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import psutil

from chainward_simulations.flower import processes_of

SAMPLE_SECONDS = 0.5


class Sampler:
    """Calls `look` every `seconds`, in a thread, while its `with` block lasts."""

    def __init__(self, look: Callable[[], None], seconds: float) -> None:
        self.look, self.seconds = look, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self.seconds):
            self.look()


@dataclass(frozen=True)
class MemoryPeak:
    """The largest sum over all processes that a sample found.

    Attributes
    ----------
    measure : "PSS", memory shared between processes split among them; or "USS", without it, where PSS is unknown
    bytes : sum at the peak
    processes : number of processes at the peak
    by_name : bytes at the peak by the name of the process
    samples : samples taken, one every `SAMPLE_SECONDS`
    """

    measure: str = "PSS"
    bytes: int = 0
    processes: int = 0
    by_name: dict[str, int] = field(default_factory=dict)
    samples: int = 0


class MemorySampler(Sampler):
    """Samples the memory of a run's processes while its `with` block lasts; `peak` holds the largest sum."""

    def __init__(self, flwr_home: Path) -> None:
        self.flwr_home = flwr_home
        self.peak = MemoryPeak()
        super().__init__(self._look, SAMPLE_SECONDS)

    def _look(self) -> None:
        largest = max(_sample(processes_of(self.flwr_home)), self.peak, key=lambda peak: peak.bytes)
        self.peak = replace(largest, samples=self.peak.samples + 1)


def _sample(processes: list[psutil.Process]) -> MemoryPeak:
    measure = "PSS"
    by_name: Counter[str] = Counter()
    count = 0
    for process in processes:
        try:
            memory, name = process.memory_full_info(), process.name()
        except psutil.Error:
            continue  # ended meanwhile
        if not hasattr(memory, "pss"):
            measure = "USS"
        by_name[name] += getattr(memory, "pss", memory.uss)
        count += 1
    return MemoryPeak(measure, by_name.total(), count, dict(by_name.most_common()))
