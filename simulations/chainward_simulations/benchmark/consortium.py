"""A simulated consortium of many sites: seconds of a hop and what they consist of, and the coordinator's memory by hop."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from chainward_server.results import LinkRecord
from chainward_server.run_folder import RunFolder
from chainward_shared.config import ConfigScalar
from chainward_shared.seeds import numpy_generator
from chainward_simulations.benchmark.coordinator_memory import (
    CoordinatorWatch,
    Growth,
    Sample,
    growth,
    memory_after_hops,
)
from chainward_simulations.benchmark.flower_run import BenchmarkError, finished_folder, timed_run
from chainward_simulations.benchmark.training import Backbone
from chainward_simulations.flower import own_flower, run_command

IMAGE_SIZE = 32
CASES = {"train": 16, "val": 4, "test": 8}
CLASSES = ("dark", "bright")
RENDEZVOUS_SECONDS = 1_800.0
SMALLEST = Backbone("test_convnext")


@dataclass(frozen=True)
class ConsortiumWorkload:
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
    def quick(cls) -> ConsortiumWorkload:
        """Return a workload of six sites and one lap."""
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
    workload: ConsortiumWorkload, sites: int | None, laps: int | None, backbones: Sequence[Backbone], threads: int
) -> ConsortiumWorkload:
    """Return `workload` with what was chosen; None, and no backbone, leave what it has."""
    return ConsortiumWorkload(
        sites=sites or workload.sites,
        laps=laps or workload.laps,
        backbone=backbones[0] if backbones else workload.backbone,
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

    workload: ConsortiumWorkload
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
            "workload": asdict(self.workload),
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
            "growth": {name: asdict(of_lap) for name, of_lap in growths(self.workload, memory).items()},
            "samples": [asdict(sample) for sample in self.samples],
        }


def measure_consortium(app: Path, workload: ConsortiumWorkload, *, timeout: float) -> ConsortiumRun:
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
        data_file = write_consortium(Path(temporary) / "data", workload.sites)
        with own_flower(home) as environment, CoordinatorWatch(home, output) as watch:
            settings = {**workload.settings(data_file), "output.dir": str(output)}
            wall_seconds = timed_run(run_command(app, settings, workload.sites), environment, timeout)
            folder = finished_folder(output)
        return _measured(workload, wall_seconds, folder, watch.samples)


def _measured(
    workload: ConsortiumWorkload, wall_seconds: float, folder: RunFolder, samples: list[Sample]
) -> ConsortiumRun:
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
        workload,
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


def growths(workload: ConsortiumWorkload, memory: dict[int, float]) -> dict[str, Growth]:
    """Return how memory grew in each lap, and over all of several; see `memory_after_hops`."""
    laps = range(workload.laps)
    found = {f"lap {lap + 1}": growth(memory, lap * workload.sites + 1, (lap + 1) * workload.sites) for lap in laps}
    return {**found, "whole chain": growth(memory, 1, workload.laps * workload.sites)} if workload.laps > 1 else found
