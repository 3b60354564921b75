"""What keeping the output of a frozen trunk saves: seconds of an epoch, time to the first model, and what it takes on disk."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from chainward_client.training.features import Features
from chainward_client.training.link import train_link
from chainward_shared.config import ConfigScalar, RunConfig
from chainward_simulations.benchmark.figures import Aim, Options, Report, Table
from chainward_simulations.benchmark.generated import base_of, generated_site, started

_CLASSES = 7
_AIMS = {"head": 10.0, "last-2": 4.0}


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

    def row(self) -> tuple[str, ...]:
        """Return its row of the table."""
        times = self.epoch[0] / self.epoch[1]
        return (
            self.part,
            f"{self.epoch[0]:.2f}",
            f"{self.epoch[1]:.3f}",
            f"{times:.1f}",
            *(f"{seconds:.1f}" for seconds in self.first),
            f"{self.stored / 1e6:.1f}",
            Aim("at least", _AIMS[self.part], " times").text(times),
        )


def measure(options: Options) -> Report:
    """Return what a link of each part takes with and without kept features, on generated images without augmentation."""
    backbone, side, images, epochs = (
        ("test_vit", 32, 24, 1) if options.quick else ("vit_small_patch14_dinov2", 112, 512, 3)
    )
    backbone = options.backbones[0].name if options.backbones else backbone
    images, epochs = options.images or images, options.epochs or epochs
    links = [link_of(part, backbone, side, images, epochs, options) for part in _AIMS]
    table = Table(
        f"Kept features: {backbone}, {images} images of {side} px, {epochs} epochs",
        ("trained", "epoch without, s", "epoch with, s", "times", "first model without, s", "with, s", "MB", "aim"),
        [link.row() for link in links],
        [f"Without augmentation, {options.threads} threads; the first model includes computing the features."],
    )
    return [table], [asdict(link) for link in links]


def link_of(part: str, backbone: str, side: int, images: int, epochs: int, options: Options) -> Link:
    """Return what a link of one part takes."""
    data, architecture = generated_site(images, side, _CLASSES), started(backbone, part, side, _CLASSES)
    base = base_of(architecture, seed=0)

    def link(epochs: int, features: Features | None) -> tuple[float, float]:
        """Return the seconds of a link in all, and of one of its epochs."""
        asked: dict[str, ConfigScalar] = {
            "chain.epochs": epochs,
            "data.augmentation": "none",
            "federation.threads": options.threads,
        }
        recipe, began = RunConfig.from_flat(asked).link_recipe(), time.perf_counter()
        _, log = train_link(data, architecture, recipe, None, strand=0, lap=0, base=base, features=features)
        return time.perf_counter() - began, log.seconds / epochs

    with TemporaryDirectory(prefix="chainward-features-") as made:
        folder = Path(made) / "features"
        without, plain = link(epochs, None)
        computed, _ = link(epochs, Features(folder))
        # kept ones train so fast that one epoch would measure the start of a training
        _, kept = link(4 * epochs, Features(folder))
        stored = sum(file.stat().st_size for file in folder.iterdir())
    options.say(f"{part}: an epoch {plain:.2f} s without, {kept:.3f} s with kept features")
    return Link(part, (plain, kept), (without, computed), stored)
