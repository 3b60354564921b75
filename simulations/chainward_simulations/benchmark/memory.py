"""The processes of one Flower run, found by their FLWR_HOME, and their memory."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

SAMPLE_SECONDS = 0.5


def processes_of(flwr_home: Path) -> list[psutil.Process]:
    """Return the processes that have `flwr_home` as FLWR_HOME, and their descendants."""
    processes = list(psutil.process_iter(["ppid", "environ"]))
    found = {p.pid for p in processes if (p.info["environ"] or {}).get("FLWR_HOME") == str(flwr_home)}
    while more := {p.pid for p in processes if p.info["ppid"] in found} - found:
        found |= more
    return [p for p in processes if p.pid in found]


def stop_processes(flwr_home: Path, grace: float = 20.0) -> None:
    """Stop the SuperLink that `flwr run` left behind under `flwr_home`, then whatever of that run is still there."""
    superlinks = [p for p in processes_of(flwr_home) if _is_superlink(p)]
    _stop(superlinks, grace)
    _, remaining = psutil.wait_procs(processes_of(flwr_home), timeout=grace)
    _stop(remaining, grace)


def _is_superlink(process: psutil.Process) -> bool:
    try:
        return any(Path(part).name == "flower-superlink" for part in process.cmdline())
    except psutil.Error:
        return False


def _stop(processes: list[psutil.Process], grace: float) -> None:
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, stubborn = psutil.wait_procs(processes, timeout=grace)
    for process in stubborn:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


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


class MemorySampler:
    """Samples the memory of a run's processes while its `with` block lasts; `peak` holds the largest sum."""

    def __init__(self, flwr_home: Path) -> None:
        self.flwr_home = flwr_home
        self.peak = MemoryPeak()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="memory", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample_until_stopped(self) -> None:
        samples = 0
        while not self._stop.wait(SAMPLE_SECONDS):
            samples += 1
            sample = _sample(processes_of(self.flwr_home))
            largest = max(sample, self.peak, key=lambda peak: peak.bytes)
            self.peak = MemoryPeak(largest.measure, largest.bytes, largest.processes, largest.by_name, samples)


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
