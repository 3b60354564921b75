"""What several tests share: a consortium on small images, and a Flower grid that calls the client in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads that spin while they wait make small trainings many times slower on a machine that is busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import numpy as np
import pytest
import yaml
from loopback_grid import LoopbackGrid
from PIL import Image

from chainward_server.app import coordinate
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig


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
    """Run configuration of a whole run on the small consortium that takes a few seconds."""
    return {
        "data.source": str(small_consortium),
        "output.dir": str(tmp_path / "runs"),
        "chain.backbone": "test_convnext",
        "chain.epochs": 2,
        "chain.batch-size": 16,
        "student.rounds": 2,
        "student.epochs": 1,
        "student.batch-size": 16,
        "federation.deadline": 5.0,
        "federation.hop-deadline": 30.0,
        "federation.precision": "fp32",
    }


@pytest.fixture
def coordinated() -> Callable[..., tuple[RunFolder, Results]]:
    """Run a configuration over a loopback grid; return the run folder and the results."""

    def run(flat: dict[str, Any], grid: LoopbackGrid | None = None, nodes: int = 2) -> tuple[RunFolder, Results]:
        config = RunConfig.from_flat(flat)
        folder = RunFolder.resume(config) if config.output.resume else RunFolder.create(config)
        return folder, coordinate(grid or LoopbackGrid(nodes), folder)

    return run


@pytest.fixture
def loopback() -> type[LoopbackGrid]:
    """The grid without Flower."""
    return LoopbackGrid
