"""Throughput of the training loop beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from chainward_client.data.site_data import SiteData
from chainward_client.precision import best_device, resolve_precision, training_environment
from chainward_client.training.link import train_link
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture, build_model
from chainward_shared.models.of_run import chain_architecture
from chainward_shared.recipes import LinkRecipe
from chainward_shared.settings import Augmentation
from chainward_shared.weights import StateDict
from chainward_simulations.benchmark.figures import Aim, Backbone, Measured, Options, Report, Table, in_turn
from chainward_simulations.benchmark.plain import train_plain_link
from chainward_simulations.runner import open_sites

Variant = Literal["plain fp32", "chainward fp32", "chainward auto"]
VARIANTS: tuple[Variant, ...] = ("plain fp32", "chainward fp32", "chainward auto")

BACKBONES = (Backbone("convnext_atto"), Backbone("vit_tiny_patch16_224", 8))
AUGMENTATIONS: tuple[Augmentation, ...] = ("upright", "none")
AIMS: Mapping[Variant, Aim] = {"chainward fp32": Aim("at least", 0.95), "chainward auto": Aim("at least", 1.5)}


@dataclass(frozen=True)
class Throughput:
    """Training images per second of one backbone with one augmentation, a teacher beside it; `images` of one training."""

    backbone: Backbone
    augmentation: Augmentation
    images: int
    images_per_second: dict[Variant, Measured]

    def speed_up(self, variant: Variant) -> Measured:
        """Return the ratio of the variant's throughput to that of plain PyTorch, repeat by repeat."""
        return self.images_per_second[variant].ratio_to(self.images_per_second["plain fp32"])

    def rows(self, auto: str) -> list[tuple[str, ...]]:
        """Return a row for each variant; `auto`: the arithmetic that "auto" is here."""
        found: list[tuple[str, ...]] = []
        for variant, speed in self.images_per_second.items():
            ratio = self.speed_up(variant)
            aim = None if (variant, auto) == ("chainward auto", "fp32") else AIMS.get(variant)
            found.append(
                (
                    str(self.backbone),
                    self.augmentation,
                    f"{variant} ({auto})" if variant == "chainward auto" else variant,
                    speed.text(1),
                    "-" if variant == "plain fp32" else ratio.text(2),
                    aim.text(ratio.median) if aim else "-",
                )
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return every measurement, and the median ratios to plain PyTorch."""
        return {**asdict(self), "ratio_to_plain": {variant: self.speed_up(variant).median for variant in VARIANTS}}


def auto_precision() -> str:
    """Return the arithmetic that precision "auto" takes on this machine."""
    return resolve_precision("auto", best_device())


def train_variant(
    variant: Variant, data: SiteData, architecture: Architecture, recipe: LinkRecipe, predecessor: StateDict | None
) -> tuple[StateDict, float]:
    """Train a link in one of the ways that are compared; return its weights and the seconds of the loop."""
    if variant == "plain fp32":
        with training_environment(recipe.threads, recipe.seed):
            return train_plain_link(data, architecture, recipe, predecessor)
    recipe = recipe.model_copy(update={"precision": "fp32" if variant == "chainward fp32" else "auto"})
    state, log = train_link(data, architecture, recipe, predecessor, strand=0, lap=0)
    return state, log.seconds


def config_of(backbone: Backbone, epochs: int) -> RunConfig:
    """Return the configuration of a run with this backbone, the defaults but for that and the epochs."""
    return RunConfig.from_flat(
        {"chain.backbone": backbone.name, "chain.patch-size": backbone.patch_size, "chain.epochs": epochs}
    )


def a_site(name: str) -> SiteData:
    """Return the phantoms of a site."""
    (data,) = open_sites(RunConfig.from_flat({"federation.sites": name})).values()
    return data


def measure(options: Options) -> Report:
    """Return the throughput of every variant, for each backbone, without and with augmentation.

    In each repeat all variants train once, one after the other from the same weights with the same data.
    """
    epochs, repeats = options.epochs or (1 if options.quick else 2), options.repeats or (2 if options.quick else 5)
    backbones = options.backbones or ((Backbone("test_convnext"),) if options.quick else BACKBONES)
    data = a_site("site-5" if options.quick else "site-1")
    found = [
        throughput(backbone, augmentation, data, epochs, repeats, options)
        for backbone in backbones
        for augmentation in AUGMENTATIONS
    ]
    auto = auto_precision()
    table = Table(
        "Training loop, images per second",
        ("backbone", "augmentation", "loop", "images/s", "ratio to plain PyTorch", "aim"),
        [row for one in found for row in one.rows(auto)],
        [
            f"Median (smallest to largest) of {repeats} trainings of {epochs} epochs each, all loops in one "
            f"process in turn, {options.threads} threads; link with a predecessor. Ratios are taken within a repeat."
        ],
    )
    if auto == "fp32":
        table.notes.append("This hardware doesn't compute bf16: auto is fp32 here.")
    return [table], [one.to_json() for one in found]


def throughput(
    backbone: Backbone, augmentation: Augmentation, data: SiteData, epochs: int, repeats: int, options: Options
) -> Throughput:
    """Return the throughput of every variant with one backbone and augmentation."""
    config = config_of(backbone, epochs)
    recipe = config.link_recipe().model_copy(update={"augmentation": augmentation, "threads": options.threads})
    architecture = architecture_for(config, data)
    predecessor = dict(build_model(architecture, seed=1).state_dict())
    images = epochs * len(data.splits["train"])
    speeds = in_turn(
        VARIANTS,
        repeats,
        lambda variant: images / train_variant(variant, data, architecture, recipe, predecessor)[1],
        lambda line: options.say(f"throughput of {backbone}, augmentation {augmentation}: {line}"),
    )
    return Throughput(backbone, augmentation, images, speeds)


def architecture_for(config: RunConfig, data: SiteData) -> Architecture:
    """Return the architecture of a configuration's backbone for the images of a site."""
    images = data.splits["train"].images
    return chain_architecture(
        config.chain, classes=len(data.classes), channels=images.shape[1], image_size=images.shape[-1]
    )
