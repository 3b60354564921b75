"""How busy the machine is on which somebody watches: of a simulation the one that trains, else the coordinator's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from chainward_server.report.formats import bytes_size


@dataclass(frozen=True)
class Load:
    """A machine at one moment.

    Attributes
    ----------
    processor : percent of all cores since the last look
    memory : percent of the memory that is taken
    free : bytes free on the disk of the run folder
    words : the same for a person, a line each
    warns : whether memory or disk are about to run out
    """

    processor: float
    memory: float
    free: int
    words: tuple[str, ...]
    warns: bool


def load_of(run: Path) -> Load:
    """Return how busy this machine is; `run`: the folder whose disk counts."""
    processor, memory, disk = psutil.cpu_percent(), psutil.virtual_memory(), psutil.disk_usage(str(run))
    cores = psutil.cpu_count() or 1
    words = (
        f"of {cores} {'core' if cores == 1 else 'cores'} busy",
        f"memory: {bytes_size(memory.available)} free of {bytes_size(memory.total)}",
        f"disk: {bytes_size(disk.free)} free",
    )
    return Load(processor, memory.percent, disk.free, words, memory.percent > 95 or disk.free < 10**9)
