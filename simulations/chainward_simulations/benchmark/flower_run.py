"""A whole `flwr run`: seconds by phase and hop, bytes by hop, peak memory, and the same work without Flower."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chainward_server.results import HeadRecord, LinkRecord, Results, StudentRound
from chainward_server.run_folder import RunFolder
from chainward_shared.config import ConfigScalar
from chainward_shared.weights import digest, load_file
from chainward_simulations.benchmark.figures import Aim, BenchmarkError, Measured, Options, Report, Table
from chainward_simulations.benchmark.memory import MemoryPeak, MemorySampler
from chainward_simulations.benchmark.reference import Reference
from chainward_simulations.flower import own_flower, run_command

RATIO_AIM, MEMORY_AIM = Aim("at most", 1.25), Aim("at most", 6.0, " GiB")
GIB, MB = 2**30, 1e6

QUICK_CONFIG: dict[str, ConfigScalar] = {
    "federation.sites": "site-5,site-6",
    "chain.backbone": "test_convnext",
    "chain.epochs": 1,
    "student.rounds": 1,
    "student.epochs": 1,
    "student.finetune-rounds": 0,
}
"""A run of a few seconds of training."""


@dataclass(frozen=True)
class FlowerRun:
    """One measured run. `reference` is None where only Flower was measured; `same_models` then too."""

    wall_seconds: float
    results: Results
    memory: MemoryPeak
    reference: Reference | None
    same_models: bool | None

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of the coordinator's phases between rendezvous and report."""
        timings = self.results.timings
        return {phase: seconds for phase, seconds in timings.items() if phase not in ("rendezvous", "report", "total")}

    @property
    def hops(self) -> list[LinkRecord | StudentRound | HeadRecord]:
        """What travelled to sites and back."""
        return [*self.results.heads, *self.results.links, *self.results.student_rounds]

    @property
    def ratio(self) -> float | None:
        """Seconds of these phases relative to the same work in one process without Flower."""
        return sum(self.phases.values()) / sum(self.reference.phases.values()) if self.reference else None

    def to_json(self) -> dict[str, Any]:
        """Return every measurement."""
        sizes = {"seconds", "bytes_down", "bytes_up"}
        return {
            "wall_seconds": self.wall_seconds,
            "timings": self.results.timings,
            "ratio": self.ratio,
            "reference": self.reference.model_dump() if self.reference else None,
            "same_models": self.same_models,
            "memory": asdict(self.memory),
            "hops": [{"hop": record.key} | record.model_dump(include=sizes) for record in self.hops],
        }


def measure(options: Options, *, with_reference: bool) -> Report:
    """Run a Flower app as often as is asked for; `with_reference`: each time also the same work without Flower.

    Raises
    ------
    BenchmarkError
        A run failed or took longer than the timeout.
    """
    done: list[FlowerRun] = []
    for number in range(1, options.runs + 1):
        options.say(f"flwr run {options.app.name}: {number} of {options.runs}")
        done.append(_measured(options, with_reference=with_reference))
    tables = [phases_table(done)] if with_reference else []
    return [*tables, hops_table(done[0]), memory_table(done)], [run.to_json() for run in done]


def _measured(options: Options, *, with_reference: bool) -> FlowerRun:
    """Run a Flower app with a SuperLink of its own, then the same configuration in process, and measure both."""
    with tempfile.TemporaryDirectory(prefix="chainward-benchmark-", ignore_cleanup_errors=True) as temporary:
        home, output = Path(temporary) / "flwr", Path(temporary) / "runs"
        with own_flower(home) as environment, MemorySampler(home) as sampler:
            command = run_command(options.app, {**options.settings, "output.dir": str(output)})
            wall_seconds = timed_run(command, environment, options.timeout)
            folder = finished_folder(output)
        results = folder.load_results()
        assert results is not None
        reference = _reference(folder, options.timeout) if with_reference else None
        same = None if reference is None else reference.digests == _digests(folder)
        return FlowerRun(wall_seconds, results, sampler.peak, reference, same)


def timed_run(command: list[str], environment: dict[str, str], timeout: float, *, what: str = "flwr run") -> float:
    """Run a command to its end, its output to stderr, and return the seconds it took; `what` it is called in messages."""
    started = time.monotonic()
    try:
        _done(what, command, timeout, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    except OSError as error:
        raise BenchmarkError(f"flwr can't be started ({error.strerror}); is Flower installed here?") from error
    return time.monotonic() - started


def _done(what: str, command: list[str], timeout: float, **how: Any) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, timeout=timeout, check=True, **how)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{what} took longer than {timeout:.0f} s; raise --timeout") from error
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{what} failed with exit code {error.returncode}; its messages are above") from error


def finished_folder(output: Path) -> RunFolder:
    """Return the run folder that a finished run left under `output`; Flower may exit 0 though the run failed."""
    folders = [RunFolder.open(file.parent) for file in output.glob("*/run.json")]
    if len(folders) != 1:
        raise BenchmarkError(f"flwr run left {len(folders)} run folders, expected 1; its messages are above")
    state = folders[0].state
    if state.status != "finished":
        raise BenchmarkError(f"the run is '{state.status}' in phase '{state.phase}': {state.reason}")
    return folders[0]


def _reference(folder: RunFolder, timeout: float) -> Reference:
    command = [sys.executable, "-m", "chainward_simulations.benchmark.reference", str(folder.path)]
    return Reference.model_validate_json(
        _done("the in-process runner", command, timeout, stdout=subprocess.PIPE).stdout
    )


def _digests(folder: RunFolder) -> dict[str, str]:
    """Return the digests of the run's final models, by name."""
    names = [name for name in ("chain", "student") if name in folder.state.models]
    return {name: digest(load_file(folder.model_path(name), folder.state.models[name])[0]) for name in names}


def phases_table(runs: Sequence[FlowerRun]) -> Table:
    """Return where the time of a run goes, beside the same work without Flower."""
    table = Table("Seconds by phase", ("phase", "flwr run, s", "in process, s", "ratio"))
    references = [run.reference for run in runs if run.reference]

    def add(phase: str, flower: Sequence[float], process: Sequence[float] = ()) -> None:
        here, inside = Measured(tuple(flower)), Measured(tuple(process))
        compared = (inside.text(1), here.ratio_to(inside).text(2)) if process else ("-", "-")
        table.rows.append((phase, here.text(1), *compared))

    add("start of Flower, report, end", [run.wall_seconds - run.results.timings["total"] for run in runs])
    add("rendezvous (start of Ray, data)", [run.results.timings["rendezvous"] for run in runs])
    for phase in runs[0].phases:
        add(phase, [run.phases[phase] for run in runs], [reference.phases[phase] for reference in references])
    worked = [sum(run.phases.values()) for run in runs]
    add("phases after rendezvous", worked, [sum(reference.phases.values()) for reference in references])
    add("wall time", [run.wall_seconds for run in runs])
    table.notes.append(
        f"Median (smallest to largest) of {len(runs)} run(s). The phases are the coordinator's own timings; the start "
        "of Flower is the wall time of `flwr run --stream` less their total."
    )
    if references:
        ratio = statistics.median(run.ratio for run in runs if run.ratio is not None)
        same = "the same, bit for bit" if all(run.same_models for run in runs) else "NOT the same"
        data = statistics.median(reference.data_seconds for reference in references)
        table.notes += [
            f"Ratio of the phases after rendezvous: {ratio:.2f} ({RATIO_AIM.text(ratio)}). Its numerator is the "
            "coordinator's total less the rendezvous, in which Ray starts and the sites open their data; its "
            "denominator is the plain runner on the same configuration, in a process of its own right after, with the "
            f"same trainings and scorings, without making the data ({data:.1f} s). The models of both are {same}.",
        ]
    return table


def hops_table(run: FlowerRun) -> Table:
    """Return seconds and bytes of every hop, of every round of the students, and of the statistics rounds."""
    table = Table("Seconds and bytes by hop", ("hop", "site", "s", "images/s", "MB down", "MB up"))
    for record in run.hops:
        where = record.site if isinstance(record, LinkRecord) else f"{len(record.sites)} sites"
        training = record.training if isinstance(record, LinkRecord) else None
        speed = f"{training.images_per_second:.0f}" if training else "-"
        megabytes = (f"{size / MB:.4g}" for size in (record.bytes_down, record.bytes_up))
        table.rows.append((record.key, where, f"{record.seconds:.1f}", speed, *megabytes))
    table.notes.append("Of the first run. Bytes are those of the arrays, without Flower's envelope; 1 MB = 10^6 bytes.")
    if (start := run.results.start) is not None:
        table.notes.append(
            f"Trained, and sent at every hop, is {start.part}: {100 * start.trained:.3g} % of the model."
        )
    return table


def memory_table(runs: Sequence[FlowerRun]) -> Table:
    """Return the peak memory of a run, and what it consists of."""
    peaks = [run.memory for run in runs]
    largest = max(peaks, key=lambda peak: peak.bytes)
    gib = largest.bytes / GIB
    table = Table(f"Peak memory ({largest.measure})", ("processes", "GiB", "aim"))
    table.rows.append((f"all {largest.processes}", f"{gib:.2f}", MEMORY_AIM.text(gib)))
    table.rows += [(name, f"{size / GIB:.2f}", "-") for name, size in list(largest.by_name.items())[:6]]
    samples = sum(peak.samples for peak in peaks)
    table.notes.append(
        "Largest sum over the SuperLink, the simulation, Ray and the flwr command at one moment, of "
        f"{len(runs)} run(s) and {samples} samples; below it the largest parts by process name."
    )
    return table
