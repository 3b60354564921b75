"""Measuring the peers: wall time, CPU seconds and peak memory of all processes of each."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from chainward_simulations.benchmark.figures import Measured, Options, Report, Table
from chainward_simulations.benchmark.flower_run import timed_run
from chainward_simulations.benchmark.memory import MemorySampler, Sampler
from chainward_simulations.benchmark.peers.flower_app import PYPROJECT
from chainward_simulations.benchmark.peers.work import SITES, choose, settings
from chainward_simulations.flower import own_flower, processes_of, run_command

GIB = 2**30
SIX_SITES = Path(__file__).resolve().parents[3] / "six_sites"
CPU_SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class PeerCost:
    """What one run of a peer cost: seconds of wall time, of all processors, and bytes of memory at the peak (PSS)."""

    peer: str
    wall: float
    cpu: float
    memory: int


class CpuSampler(Sampler):
    """Sums the processor seconds of all processes with a FLWR_HOME, each at its last sample."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._seconds: dict[tuple[int, float], float] = {}
        super().__init__(self._look, CPU_SAMPLE_SECONDS)

    @property
    def total(self) -> float:
        """Processor seconds so far, of user and system."""
        return sum(self._seconds.values())

    def _look(self) -> None:
        for process in processes_of(self.home):
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._seconds[process.pid, process.create_time()] = times.user + times.system


def peers() -> dict[str, Callable[[Path], list[str]]]:
    """Return the command of each peer by its name, given a folder to work in."""
    return {
        "plain loop": lambda folder: [sys.executable, "-m", "chainward_simulations.benchmark.peers.work"],
        "Flower FedAvg": _flower,
        "NVFlare cyclic": lambda folder: [
            *(sys.executable, "-m", "chainward_simulations.benchmark.peers.nvflare_job", str(folder / "nvflare"))
        ],
        "Chainward": lambda folder: run_command(SIX_SITES, settings() | {"output.dir": str(folder / "runs")}),
    }


def missing(peer: str) -> str | None:
    """Return what has to be installed for a peer; None if all is there."""
    if peer.startswith("NVFlare") and find_spec("nvflare") is None:
        return "nvflare is not installed here: pip install nvflare"
    return None


def measure(options: Options) -> Report:
    """Run all peers, in turn, and return what each of them cost."""
    choose(options)
    costs, left_out = [], [f"{peer}: {why}" for peer in peers() if (why := missing(peer))]
    for line in left_out:
        options.say(line)
    repeats = options.repeats or (1 if options.quick else 2)
    for number in range(1, repeats + 1):
        for peer, command in peers().items():
            if not missing(peer):
                options.say(f"{peer}: {number} of {repeats}")
                costs.append(_measure(peer, command, options.timeout))
    return [peers_table(costs, left_out)], [asdict(cost) for cost in costs]


def peers_table(costs: list[PeerCost], left_out: list[str]) -> Table:
    """Return what the peers cost, and that relative to plain Flower."""
    table = Table(
        f"{SITES} trainings in other frameworks", ("peer", "CPU s", "wall s", "peak memory, GiB", "CPU, Flower = 1")
    )
    of = {peer: [cost for cost in costs if cost.peer == peer] for peer in dict.fromkeys(cost.peer for cost in costs)}
    flower = Measured(tuple(cost.cpu for cost in of.get("Flower FedAvg", [])))
    for peer, found in of.items():
        cpu = Measured(tuple(cost.cpu for cost in found))
        wall, memory = Measured(tuple(c.wall for c in found)), Measured(tuple(c.memory / GIB for c in found))
        table.rows.append(
            (peer, cpu.text(0), wall.text(0), memory.text(2), cpu.ratio_to(flower).text(2) if flower.values else "-")
        )
    table.notes.append(
        "Median (smallest to largest). All processes of a peer together, each peer with a start of its own; every training makes "
        "its phantoms anew. Chainward also scores each model at every site, checks and stores it, and writes a report."
    )
    table.notes += left_out
    return table


def _measure(peer: str, command: Callable[[Path], list[str]], timeout: float) -> PeerCost:
    with tempfile.TemporaryDirectory(prefix="chainward-peers-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        home = folder / "flwr"
        with own_flower(home) as environment, MemorySampler(home) as memory, CpuSampler(home) as cpu:
            environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
            wall = timed_run(command(folder), environment, timeout, what=peer)
        return PeerCost(peer, wall, cpu.total, memory.peak.bytes)


def _flower(folder: Path) -> list[str]:
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    return run_command(app, {}, nodes=SITES)
