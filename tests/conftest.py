"""What several tests share: a consortium on small images, and a Flower grid that calls the client in this process."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that spin while they wait make small trainings many times slower on a machine that is busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import numpy as np
import pictures
import pytest
import yaml
from loopback_grid import LoopbackGrid
from PIL import Image
from whole_run import CHAIN_ONLY, whole_run

from chainward_server.app import coordinate
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig

WITH_PROCESSES = ("flower", "deployment")


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist deal out files in the order below, not those of most tests first."""
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests with a whole run, or with Flower's processes, as slow, and begin with the slowest files.

    One that is begun last has a core to itself.
    """
    seconds: Counter[Path] = Counter()
    for item in items:
        if "coordinated" in getattr(item, "fixturenames", ()) or any(map(item.get_closest_marker, WITH_PROCESSES)):
            item.add_marker("slow")
        seconds[item.path] += 60 if item.get_closest_marker("flower") else 5 if item.get_closest_marker("slow") else 0
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """`fsync` guards against a loss of power, which no test brings about; a test of a disk that fails replaces it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Reports are made without their pictures; a test of these asks for `drawn`."""
    with pictures.undrawn():
        yield


@pytest.fixture
def drawn() -> Iterator[None]:
    """Reports are made with their pictures."""
    with pictures.drawn():
        yield


@pytest.fixture(scope="session")
def small_consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a data file: four hospitals, three classes of 32 px blobs, about 24 training images each."""
    folder = tmp_path_factory.mktemp("consortium")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    rows = ["image,label,patient,split,hospital"]
    for hospital, mix in (("ash", (5, 2, 1)), ("birch", (1, 5, 2)), ("cedar", (1, 2, 5)), ("dogwood", (3, 3, 3))):
        for split, times in (("train", 3), ("val", 2), ("test", 2)):
            for label, count in enumerate(mix):
                for i in range(count * times):
                    name = f"{hospital}-{split}-{label}-{i}"
                    pixels = generator.normal(90, 25, (32, 32))
                    row, column = generator.integers(4, 20, 2)
                    size = (10, 6, 10)[label]
                    pixels[row : row + size, column : column + size] += (60, 90, -60)[label]
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.png")
                    rows.append(f"{name},{'abc'[label]},{name},{split},{hospital}")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    description = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": "images",
        "classes": ["a", "b", "c"],
        "columns": {"image": "image", "label": "label", "patient": "patient", "split": "split", "site": "hospital"},
        "image": {"size": 32, "channels": 1},
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(description))
    return path


@pytest.fixture
def settings(small_consortium: Path, tmp_path: Path) -> dict[str, Any]:
    """The configuration of `whole_run`, for one test to change and to run."""
    return whole_run(small_consortium, tmp_path / "runs")


@pytest.fixture
def chain_only(settings: dict[str, Any]) -> dict[str, Any]:
    """The same for the chain alone, one epoch a hop."""
    return settings | CHAIN_ONLY


@pytest.fixture(scope="session")
def coordinated() -> Callable[..., tuple[RunFolder, Results]]:
    """Run a configuration over a loopback grid; return the run folder and the results."""

    def run(flat: dict[str, Any], grid: LoopbackGrid | None = None, nodes: int = 2) -> tuple[RunFolder, Results]:
        config = RunConfig.from_flat(flat)
        folder = RunFolder.resume(config) if config.output.resume else RunFolder.create(config)
        return folder, coordinate(grid or LoopbackGrid(nodes), folder)

    return run


@pytest.fixture(scope="session")
def loopback() -> type[LoopbackGrid]:
    """The grid without Flower."""
    return LoopbackGrid


@dataclass(frozen=True)
class Finished:
    """A run that has finished: its folder, what was measured, and the grid with all messages that were sent."""

    folder: RunFolder
    results: Results
    grid: LoopbackGrid


@pytest.fixture(scope="session")
def finished_run(
    small_consortium: Path, tmp_path_factory: pytest.TempPathFactory, coordinated: Callable[..., Any]
) -> Finished:
    """The undisturbed run of `settings`. All tests share it: none may change its folder."""
    grid = LoopbackGrid(2)
    return Finished(*coordinated(whole_run(small_consortium, tmp_path_factory.mktemp("finished")), grid), grid)


@pytest.fixture(scope="session")
def finished_chain(
    small_consortium: Path, tmp_path_factory: pytest.TempPathFactory, coordinated: Callable[..., Any]
) -> Finished:
    """The same with `CHAIN_ONLY`."""
    grid = LoopbackGrid(2)
    flat = whole_run(small_consortium, tmp_path_factory.mktemp("finished-chain"))
    return Finished(*coordinated(flat | CHAIN_ONLY, grid), grid)
