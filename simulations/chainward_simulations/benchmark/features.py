"""What keeping the output of a frozen trunk saves: seconds of an epoch, time to the first model, and what it takes on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.training.features import Features
from chainward_client.training.link import train_link
from chainward_shared.config import ConfigScalar, RunConfig
from chainward_shared.models import Architecture, Start, build_model, resolve_architecture
from chainward_shared.models.start import travelling_names
from chainward_shared.weights import StateDict
from chainward_simulations.benchmark.figures import Aim, Table

_CLASSES = 7
_AIMS = {"head": 10.0, "last-2": 4.0}


@dataclass(frozen=True)
class FeaturesWorkload:
    """What to train: links of one backbone on generated images, with random weights in the place of pretrained ones, which cost
    the same."""

    backbone: str = "vit_small_patch14_dinov2"
    image_size: int = 112
    images: int = 512
    epochs: int = 3
    threads: int = 2
    augmentation: str = "none"

    @classmethod
    def quick(cls) -> FeaturesWorkload:
        """Return a tiny workload, whose figures say nothing."""
        return cls(backbone="test_vit", image_size=32, images=24, epochs=1)


@dataclass(frozen=True)
class Link:
    """One link of `part` on the same images: without kept features, with features that have to be computed, and with kept ones.

    Attributes
    ----------
    epoch : seconds of one epoch without and with kept features
    first : seconds from the data to the first model, without and with the computation
    stored : bytes of the features
    """

    part: str
    epoch: tuple[float, float]
    first: tuple[float, float]
    stored: int

    @property
    def times(self) -> float:
        """How many times faster an epoch is with kept features."""
        return self.epoch[0] / self.epoch[1]

    def to_json(self) -> dict[str, object]:
        """Return the measurement."""
        return asdict(self)


def measure_features(workload: FeaturesWorkload, say: Callable[[str], None]) -> list[Link]:
    """Return what a link of each part takes with and without kept features."""
    data, done = _data(workload), []
    for part in _AIMS:
        architecture, base = _started(workload, part)
        with TemporaryDirectory(prefix="chainward-features-") as made:
            folder = Path(made) / "features"
            without, plain = _link(data, architecture, base, workload, None)
            computed, _ = _link(data, architecture, base, workload, Features(folder))
            # kept ones train so fast that one epoch would measure the start of a training
            _, kept = _link(data, architecture, base, replace(workload, epochs=4 * workload.epochs), Features(folder))
            stored = sum(file.stat().st_size for file in folder.iterdir())
        done.append(Link(part, (plain, kept), (without, computed), stored))
        say(f"{part}: an epoch {plain:.2f} s without, {kept:.3f} s with kept features")
    return done


def features_table(links: list[Link], workload: FeaturesWorkload) -> Table:
    """Return the measurements as a table."""
    return Table(
        f"Kept features: {workload.backbone}, {workload.images} images of {workload.image_size} px, {workload.epochs} epochs",
        ("trained", "epoch without, s", "epoch with, s", "times", "first model without, s", "with, s", "MB", "aim"),
        rows=[
            (
                link.part,
                f"{link.epoch[0]:.2f}",
                f"{link.epoch[1]:.3f}",
                f"{link.times:.1f}",
                f"{link.first[0]:.1f}",
                f"{link.first[1]:.1f}",
                f"{link.stored / 1e6:.1f}",
                Aim("at least", _AIMS[link.part], " times").text(link.times),
            )
            for link in links
        ],
        notes=[f"Without augmentation, {workload.threads} threads; the first model includes computing the features."],
    )


def _data(workload: FeaturesWorkload) -> SiteData:
    shape = (workload.images, 3, workload.image_size, workload.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patients = np.array([f"p{index}" for index in range(workload.images)])
    cases = Cases(images, torch.arange(workload.images) % _CLASSES, patients)
    return SiteData("north", tuple("abcdefg"), dict.fromkeys(("train", "val", "test"), cases))


def _started(workload: FeaturesWorkload, part: str) -> tuple[Architecture, StateDict]:
    plain = resolve_architecture(
        workload.backbone, num_classes=_CLASSES, in_chans=3, image_size=workload.image_size, pretrained=True
    )
    start = Start(name=workload.backbone, file="0" * 64, digest="0" * 64, part=part)
    architecture = plain.model_copy(update={"start": start})
    classifier = travelling_names(plain.model_copy(update={"start": start.model_copy(update={"part": "head"})}))
    state = build_model(architecture, seed=0).state_dict()
    return architecture, {name: tensor for name, tensor in state.items() if name not in classifier}


def _link(
    data: SiteData, architecture: Architecture, base: StateDict, workload: FeaturesWorkload, features: Features | None
) -> tuple[float, float]:
    """Return the seconds of a link in all, and of one of its epochs."""
    settings: dict[str, ConfigScalar] = {
        "chain.epochs": workload.epochs,
        "data.augmentation": workload.augmentation,
        "federation.threads": workload.threads,
    }
    recipe, started = RunConfig.from_flat(settings).link_recipe(), time.perf_counter()
    _, log = train_link(data, architecture, recipe, None, strand=0, lap=0, base=base, features=features)
    return time.perf_counter() - started, log.seconds / workload.epochs
