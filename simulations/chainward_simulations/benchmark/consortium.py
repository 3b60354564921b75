"""A simulated consortium of many sites: seconds of a hop and what they consist of, and the coordinator's memory by hop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image
from pydantic import ValidationError

from chainward_server.results import LinkRecord
from chainward_server.run_folder import Phase, RunFolder, RunState
from chainward_shared.config import ConfigScalar
from chainward_shared.seeds import numpy_generator
from chainward_simulations.benchmark.figures import Measured, Table
from chainward_simulations.benchmark.flower_run import MB, BenchmarkError, finished_folder, timed_run
from chainward_simulations.benchmark.memory import Sampler
from chainward_simulations.benchmark.training import Backbone
from chainward_simulations.flower import own_flower, processes_of, run_command

COORDINATOR = "flwr-simulation"
"""The process of a simulation in which the ServerApp runs, as a thread beside Flower's message store and Ray's driver."""

SAMPLE_SECONDS = 1.0
MIB = 2**20
IMAGE_SIZE = 32
CASES = {"train": 16, "val": 4, "test": 8}
CLASSES = ("dark", "bright")
RENDEZVOUS_SECONDS = 1_800.0
SMALLEST = Backbone("test_convnext")


@dataclass(frozen=True)
class ConsortiumPlan:
    """Which consortium is measured: as little training as there can be, so that the rest shows.

    Attributes
    ----------
    sites : number of sites, each with a virtual SuperNode of its own
    laps : passes of the chain over all sites
    backbone : what travels along the chain
    threads : CPU threads of a training
    """

    sites: int = 50
    laps: int = 2
    backbone: Backbone = SMALLEST
    threads: int = 2

    @classmethod
    def quick(cls) -> ConsortiumPlan:
        """Return a plan of six sites and one lap."""
        return cls(sites=6, laps=1)

    def settings(self, data_file: Path) -> dict[str, ConfigScalar]:
        """Return the run configuration where it differs from the app's."""
        return {
            "federation.deadline": RENDEZVOUS_SECONDS,
            "federation.threads": self.threads,
            "data.source": str(data_file),
            "data.augmentation": "none",
            "chain.backbone": self.backbone.name,
            "chain.patch-size": self.backbone.patch_size,
            "chain.laps": self.laps,
            "chain.epochs": 1,
            "chain.compare-alone": False,
            "student.rounds": 0,
        }


def with_choices(
    plan: ConsortiumPlan, sites: int | None, laps: int | None, backbones: Sequence[Backbone], threads: int
) -> ConsortiumPlan:
    """Return `plan` with what was chosen; None, and no backbone, leave what it has."""
    return ConsortiumPlan(
        sites=sites or plan.sites,
        laps=laps or plan.laps,
        backbone=backbones[0] if backbones else plan.backbone,
        threads=threads,
    )


def write_consortium(folder: Path, sites: int) -> Path:
    """Write the images and the manifest of `sites` sites, `CASES` at each, and return the data file.

    Phantoms would do, too, but drawing those of 50 sites takes longer than all that is to be measured.
    """
    folder.mkdir(parents=True)
    lines = ["image,label,split,site"]
    digits = len(str(sites))
    for number in range(1, sites + 1):
        site = f"site-{number:0{digits}d}"
        random = numpy_generator(0, "benchmark-consortium", site)
        splits = [split for split, count in CASES.items() for _ in range(count)]
        for index, split in enumerate(splits):
            label = index % len(CLASSES)
            name = f"{site}-{index}.png"
            pixels = random.integers(64 * label, 64 * label + 192, (IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            lines.append(f"{name},{CLASSES[label]},{split},{site}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    description = {
        "format": "csv",
        "manifest": "manifest.csv",
        "images": ".",
        "classes": list(CLASSES),
        "columns": {"image": "image", "label": "label", "split": "split", "site": "site"},
        "image": {"size": IMAGE_SIZE, "channels": 1},
    }
    data_file = folder / "data.yaml"
    data_file.write_text(yaml.safe_dump(description), encoding="utf-8")
    return data_file


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


@dataclass(frozen=True)
class HopSeconds:
    """Where the seconds of one hop went.

    Attributes
    ----------
    hop : its key
    training : the training loop at the site
    exchange : the rest from sending the task to receiving the model: message, opening the site, packing
    scoring : from then on to the next hop: checks, checkpoint, and the model's way to all sites to be scored
    """

    hop: str
    training: float
    exchange: float
    scoring: float

    @property
    def whole(self) -> float:
        """Seconds of the hop."""
        return self.training + self.exchange + self.scoring

    @property
    def overhead(self) -> float:
        """Seconds of the hop that are not training."""
        return self.exchange + self.scoring


def hop_seconds(links: Sequence[LinkRecord], written: Sequence[float], end: float) -> list[HopSeconds]:
    """Return where the seconds of each hop of a chain with one strand went.

    Parameters
    ----------
    links : the hops in their order
    written : seconds on any clock at which the model of each was written, right after it had come
    end : seconds on that clock at which the chain was finished

    Raises
    ------
    BenchmarkError
        A hop has no model.
    """
    training = []
    for link in links:
        if link.training is None:
            raise BenchmarkError(f"{link.key} at {link.site} is {link.status!r}: {link.reason}; measure again")
        training.append(link.training.seconds)
    sent = [at - link.seconds for at, link in zip(written, links, strict=True)]
    return [
        HopSeconds(link.key, trained, link.seconds - trained, next_sent - at)
        for link, trained, at, next_sent in zip(links, training, written, [*sent[1:], end], strict=True)
    ]


@dataclass(frozen=True)
class ConsortiumRun:
    """One measured run of a consortium.

    Attributes
    ----------
    wall_seconds : of the whole `flwr run`
    timings : the coordinator's phases, seconds
    links : the hops, as the run's metrics.json has them
    hops : their seconds
    model_bytes : of one model, as it travels
    metrics_bytes, metrics_seconds : size of metrics.json at the end, and the time that writing it takes then
    folder_bytes : the run folder by its parts: "models", "simulated-sites" (what the sites keep) and "rest"
    samples : the coordinator's memory
    """

    plan: ConsortiumPlan
    wall_seconds: float
    timings: dict[str, float]
    links: list[LinkRecord]
    hops: list[HopSeconds]
    model_bytes: int
    metrics_bytes: int
    metrics_seconds: float
    folder_bytes: dict[str, int]
    samples: list[Sample]

    def to_json(self) -> dict[str, Any]:
        """Return every measurement."""
        memory = memory_after_hops(self.samples)
        return {
            "plan": asdict(self.plan),
            "wall_seconds": self.wall_seconds,
            "timings": self.timings,
            "hops": [
                {**asdict(hop), "bytes_down": link.bytes_down, "bytes_up": link.bytes_up}
                for hop, link in zip(self.hops, self.links, strict=True)
            ],
            "model_bytes": self.model_bytes,
            "metrics_bytes": self.metrics_bytes,
            "metrics_seconds": self.metrics_seconds,
            "folder_bytes": self.folder_bytes,
            "growth": {name: asdict(of_lap) for name, of_lap in _growths(self.plan, memory).items()},
            "samples": [asdict(sample) for sample in self.samples],
        }


def measure_consortium(app: Path, plan: ConsortiumPlan, *, timeout: float) -> ConsortiumRun:
    """Run a Flower app over a consortium written for it, with a SuperLink of its own, and watch the coordinator.

    Parameters
    ----------
    app : folder of the Flower app
    timeout : seconds that the run may take

    Raises
    ------
    BenchmarkError
        The run failed, lost a hop or took longer than `timeout`.
    """
    with tempfile.TemporaryDirectory(prefix="chainward-benchmark-", ignore_cleanup_errors=True) as temporary:
        home, output = Path(temporary) / "flwr", Path(temporary) / "runs"
        data_file = write_consortium(Path(temporary) / "data", plan.sites)
        with own_flower(home) as environment, CoordinatorWatch(home, output) as watch:
            settings = {**plan.settings(data_file), "output.dir": str(output)}
            wall_seconds = timed_run(run_command(app, settings, plan.sites), environment, timeout)
            folder = finished_folder(output)
        return _measured(plan, wall_seconds, folder, watch.samples)


def _measured(plan: ConsortiumPlan, wall_seconds: float, folder: RunFolder, samples: list[Sample]) -> ConsortiumRun:
    results = folder.load_results()
    assert results is not None
    chain_written = folder.model_path("chain").stat().st_mtime
    written = [folder.model_path(link.key).stat().st_mtime for link in results.links if link.training is not None]
    hops = hop_seconds(results.links, written, chain_written)
    started = time.monotonic()
    folder.write_results(results)
    metrics_seconds = time.monotonic() - started
    parts = {part: _size(folder.path / part) for part in ("models", "simulated-sites")}
    return ConsortiumRun(
        plan,
        wall_seconds,
        dict(results.timings),
        results.links,
        hops,
        results.links[-1].bytes_up,
        (folder.path / "metrics.json").stat().st_size,
        metrics_seconds,
        {**parts, "rest": _size(folder.path) - sum(parts.values())},
        samples,
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _growths(plan: ConsortiumPlan, memory: dict[int, float]) -> dict[str, Growth]:
    laps = range(plan.laps)
    found = {f"lap {lap + 1}": growth(memory, lap * plan.sites + 1, (lap + 1) * plan.sites) for lap in laps}
    return {**found, "whole chain": growth(memory, 1, plan.laps * plan.sites)} if plan.laps > 1 else found


def consortium_table(run: ConsortiumRun) -> Table:
    """Return the seconds and the bytes of a consortium."""
    plan = run.plan
    table = Table(f"Consortium of {plan.sites} sites", ("what", "measured"))
    seconds = {name: [getattr(hop, name) for hop in run.hops] for name in ("whole", "training", "exchange", "scoring")}
    overhead = Measured(tuple(hop.overhead for hop in run.hops))
    megabytes = [(link.bytes_down / MB, link.bytes_up / MB) for link in run.links]
    table.rows += [
        ("hops (laps)", f"{len(run.hops)} ({plan.laps})"),
        ("wall time of flwr run, s", f"{run.wall_seconds:.0f}"),
        ("rendezvous (start of Ray, data), s", f"{run.timings['rendezvous']:.1f}"),
        ("chain, s", f"{run.timings['chain']:.1f}"),
        ("a hop, s", Measured(tuple(seconds["whole"])).text(2)),
        ("of it training at the site, s", Measured(tuple(seconds["training"])).text(2)),
        ("of it message, opening the site, packing, s", Measured(tuple(seconds["exchange"])).text(2)),
        (f"of it checks, checkpoint, scoring at {plan.sites} sites, s", Measured(tuple(seconds["scoring"])).text(2)),
        ("overhead of a hop: all but training, s", overhead.text(2)),
        ("overhead of a hop for each site, s", f"{overhead.median / plan.sites:.3f}"),
        ("a hop: MB down, up", _pairs(megabytes)),
        ("a hop: MB down to be scored everywhere", f"{plan.sites * run.model_bytes / MB:.2f}"),
        ("metrics.json at the end, MB", f"{run.metrics_bytes / MB:.2f}"),
        ("writing it then, s", f"{run.metrics_seconds:.2f}"),
        ("run folder, MB", f"{sum(run.folder_bytes.values()) / MB:.1f}"),
        *((f"of it {part}, MB", f"{size / MB:.1f}") for part, size in run.folder_bytes.items()),
    ]
    table.notes.append(
        f"{plan.backbone}, {CASES['train']} training images of {IMAGE_SIZE} pixels at a site, one epoch, no students. "
        "Median (smallest to largest) over the hops. Bytes are those of the arrays, without Flower's envelope; what is sent "
        "to be scored is the size of the model times the sites. 1 MB = 10^6 bytes."
    )
    return table


def _pairs(megabytes: Sequence[tuple[float, float]]) -> str:
    down, up = (statistics.median(values) for values in zip(*megabytes, strict=True))
    return f"{down:.2f}, {up:.2f}"


def coordinator_table(run: ConsortiumRun) -> Table:
    """Return the memory of the coordinator's process, and by how much it grows from hop to hop."""
    columns = ("hops", "MiB at the first", "at half", "at the last", "grows by, MiB per hop")
    table = Table("Memory of the coordinator (USS)", ("of", *columns))
    memory = memory_after_hops(run.samples)
    counts = {f"lap {lap + 1}": run.plan.sites for lap in range(run.plan.laps)}
    for name, found in _growths(run.plan, memory).items():
        cells = (_shown(found.first, 1), _shown(found.half, 1), _shown(found.last, 1), _shown(found.per_hop, 3))
        table.rows.append((name, str(counts.get(name, len(run.hops))), *cells))
    model = run.model_bytes / MIB
    if before := [sample.uss / MIB for sample in run.samples if sample.phase == "chain" and not sample.hops]:
        table.notes.append(
            f"When the chain begins it holds {before[0]:.1f} MiB; the first hops load what all later ones use."
        )
    if run.samples:
        peak = max(run.samples, key=lambda sample: sample.uss)
        rss = max(sample.rss for sample in run.samples) / MIB
        pss = [sample.pss / MIB for sample in run.samples if sample.pss is not None]
        words = f", {max(pss):.0f} PSS" if pss else ""
        table.notes.append(
            f"Peak of the whole run, MiB: {peak.uss / MIB:.0f} USS (phase {peak.phase}, after {peak.hops} hops){words}, "
            f"{rss:.0f} RSS; {len(run.samples)} samples, one every {SAMPLE_SECONDS:g} s."
        )
    table.notes.append(
        f"The process is {COORDINATOR}: in a simulation the ServerApp is a thread of it, beside Flower's message store, the "
        "driver of Ray and what all of them import. USS is what only this process has. After each hop the median of the "
        f"samples until the next; the slope is that of least squares. One model kept per hop would be {model:.2f} MiB per hop."
    )
    return table


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
