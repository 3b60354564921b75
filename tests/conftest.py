"""What several tests share: a consortium on small images, and a Flower grid that calls the client in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

# Threads that spin while they wait make small trainings many times slower on a machine that is busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import numpy as np
import pytest
import yaml
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

import chainward_client.app
from chainward_server.app import coordinate
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig

Interference = Callable[[Message, Callable[[], Message]], Message | None]
"""Sees a message and may answer it as the site would, otherwise, wrongly, or (None) not at all."""


class LoopbackGrid(Grid):
    """Flower's grid without Flower: a message is answered at once, by the real client app, in this process.

    Every message is serialised and read again on its way, as it would be on a wire.
    """

    def __init__(self, nodes: int, interference: Interference | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower's process would know
        self.nodes = list(range(101, 101 + nodes))
        self.interference = interference
        self.sent: list[Message] = []
        self.replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Nothing to set."""

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.sent.append(message)
            context = Context(
                run_id=1,
                node_id=message.metadata.dst_node_id,
                node_config={"partition-id": self.nodes.index(message.metadata.dst_node_id), "num-partitions": 1},
                state=RecordDict(),
                run_config={},
            )

            def answer(message: Message = message, context: Context = context) -> Message:
                try:
                    return chainward_client.app.app(message, context)
                except Exception as error:  # as Flower reports it
                    return Message(Error(code=2, reason=repr(error)), reply_to=message)

            reply = self.interference(message, answer) if self.interference else answer()
            if reply is not None:
                self.replies[message.metadata.message_id] = reply
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


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
