"""A private hospital on disk, all that a coordinator can ask of its data, and models as a hostile one would send them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from chainward_client.app import app
from chainward_client.site_ledger import create_site_ledger
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture, build_model
from chainward_shared.private_sums import Frame, SumsForm
from chainward_shared.protocol import EvaluateTask, LinkTask, StatisticsTask, StudentTask, pack
from chainward_shared.recipes import PrivacyRecipe
from chainward_shared.weights import StateDict, digest, to_arrays

CLASSES = ["a", "b", "c"]
SIZE = 16
PATIENTS = 36
POLICY = {"epsilon": 1e6, "delta": 1e-4, "units": 20, "metrics": "noised", "metrics_epsilon": 50.0}
"""Little noise on scores: a matrix that noise has emptied has no accuracy, which would be another kind of answer."""
PRIVACY = PrivacyRecipe(delta=1e-4, noise_multiplier=50.0, clip=1.0, batch_size=4_000)
"""Sample rate 1: every patient is in every step."""

NAME = "vit_tiny_patch16_224"
OPTIONS = {"img_size": SIZE, "patch_size": SIZE, "depth": 1, "embed_dim": 24, "num_heads": 3}


def architecture(**changes: Any) -> Architecture:
    fields = {"name": NAME, "num_classes": 3, "in_chans": 1, "image_size": SIZE, "options": OPTIONS}
    return Architecture(**fields | changes)


ARCHITECTURES = {
    "fitting": architecture(),
    "one output": architecture(num_classes=1),
    "two outputs": architecture(num_classes=2),
    "more outputs": architecture(num_classes=9),
    "colour": architecture(in_chans=3),
    "larger images": architecture(image_size=24, options=OPTIONS | {"img_size": 24, "patch_size": 8}),
    "patches that do not fit": architecture(options=OPTIONS | {"patch_size": 5}),
    "heads that do not divide": architecture(options=OPTIONS | {"num_heads": 5}),
    "another family": architecture(name="test_convnext", options={}),
    "batch norm": architecture(name="test_resnet", options={}),
}


def scaled(magnitude: float) -> Callable[[torch.Tensor, torch.Generator], torch.Tensor]:
    return lambda tensor, generator: tensor.normal_(generator=generator).mul_(magnitude)


def of_all_magnitudes(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    exponents = torch.rand(tensor.shape, generator=generator) * 80 - 42
    return tensor.normal_(generator=generator).sign_() * 10 ** exponents.clamp(max=38)


def overflowing(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every sum of two of these is infinite, and every difference of two sums not a number."""
    return tensor.normal_(generator=generator).sign_() * 3.3e38


WEIGHTS = {
    "as they come": None,
    "zero": lambda tensor, generator: tensor.zero_(),
    "denormal": scaled(1e-42),
    "large": scaled(1e8),
    "huge": scaled(1e18),
    "of all magnitudes": of_all_magnitudes,
    "overflowing": overflowing,
    "overflowing for a white image alone": "white",
    "not numbers": lambda tensor, generator: tensor.fill_(torch.nan),
    "infinite": lambda tensor, generator: tensor.fill_(torch.inf),
}


def state_of(architecture: Architecture, weights: str) -> StateDict:
    state = build_model(architecture, 1).state_dict()
    generator = torch.Generator().manual_seed(7)
    change = WEIGHTS[weights]
    if change is None:
        return state
    if change == "white":
        first = state["patch_embed.proj.weight"]
        first.copy_(1e37 * torch.linspace(-1, 1, len(first))[:, None, None, None].expand_as(first))
        return state
    return {
        name: change(tensor.clone(), generator) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def link(architecture: Architecture, state: StateDict) -> tuple[str, Any, dict[str, StateDict]]:
    config = RunConfig.from_flat({"chain.epochs": 3, "federation.threads": 1, "chain.temperature": 1.0})
    recipe = config.link_recipe().model_copy(update={"privacy": PRIVACY, "class_balance": "none"})
    task = LinkTask(
        run_id="r", hop="h", strand=0, lap=0, architecture=architecture, recipe=recipe, predecessor_digest=digest(state)
    )
    return "train.link", task, {"predecessor": state}


def student(architecture: Architecture, state: StateDict) -> tuple[str, Any, dict[str, StateDict]]:
    config = RunConfig.from_flat({"student.epochs": 3, "federation.threads": 1, "student.large-weight": 0.5})
    recipe = config.student_recipe("distil").model_copy(update={"privacy": PRIVACY, "class_balance": "none"})
    task = StudentTask(
        run_id="r",
        round=1,
        architecture=architecture,
        recipe=recipe,
        student_digest=digest(state),
        auxiliary_digest=digest(state),
        large_architecture=architecture,
        large_digests=[digest(state)],
    )
    return "train.student", task, {"student": state, "auxiliary": state, "large_0": state}


def scores(architecture: Architecture, state: StateDict) -> tuple[str, Any, dict[str, StateDict]]:
    task = EvaluateTask(
        run_id="r",
        architecture=architecture,
        splits=["val", "test"],
        threads=1,
        localisation=True,
        digest=digest(state),
    )
    return "evaluate", task, {"model": state}


def statistics(architecture: Architecture, state: StateDict) -> tuple[str, Any, dict[str, StateDict]]:
    size = int(architecture.options.get("embed_dim", 24))
    frame = Frame(torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)[:6])
    task = StatisticsTask(
        run_id="r",
        hop="head",
        architecture=architecture,
        label_fraction=1.0,
        seed=0,
        threads=1,
        digest=digest(state),
        privacy=PRIVACY.model_copy(update={"statistics": 1_000}),
        form=SumsForm(dimension=6, labels=True, moments=True),
        frame_digest=digest(frame.state()),
    )
    return "evaluate.statistics", task, {"model": state, "frame": frame.state()}


REQUESTS: dict[str, Callable[[Architecture, StateDict], tuple[str, Any, dict[str, StateDict]]]] = {
    "link": link,
    "student": student,
    "scores": scores,
    "statistics": statistics,
}
"""All that a coordinator can ask of a site's data, and how."""


LEAVING = {"link": 6, "student": 6, "scores": 4, "statistics": 6}
"""The patient that the second hospital lacks: one that trains, or one that is tested."""


def hospital(folder: Path, without: int | None = None) -> dict[str, str]:
    """Write a private hospital and return its node configuration; one patient may be missing."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    lines = ["file,label,patient,split"]
    for n in range(PATIENTS):
        split = ("train", "test", "train", "val", "test", "train")[n % 6]
        label = "c" if n in LEAVING.values() else CLASSES[int(rng.integers(2))]  # theirs is a class of its own
        picture = rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8)
        picture[:] = 255 if n in LEAVING.values() else picture
        if n != without:
            Image.fromarray(picture).save(folder / f"{n}.png")
            lines.append(f"{n}.png,{label},p{n},{split}")
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    columns = {"image": "file", "label": "label", "patient": "patient", "split": "split"}
    data = {"format": "csv", "manifest": "cases.csv", "classes": CLASSES, "columns": columns}
    (folder / "data.yaml").write_text(yaml.safe_dump(data | {"image": {"size": SIZE, "channels": 1}}))
    site = {"site": "ash", "data": "data.yaml", "state": "state", "privacy": POLICY}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    create_site_ledger(folder / "state", "ash")
    return {"site-config": str(folder / "site.yaml")}


def answer(node_config: dict[str, str], kind: str, task: Any, arrays: dict[str, StateDict]) -> RecordDict:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    content = pack(task, {name: to_arrays(state) for name, state in arrays.items()})
    message = Message(content, dst_node_id=7, message_type=kind)
    context = Context(run_id=1, node_id=7, node_config=dict(node_config), state=RecordDict(), run_config={})
    return app(message, context).content


def failing(after: int, error: Exception, honest: Callable[..., None]) -> Callable[..., None]:
    """Return a function that is `honest` so many times, and then fails."""
    calls = iter(range(after))

    def step(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise error
        honest(*arguments)

    return step
