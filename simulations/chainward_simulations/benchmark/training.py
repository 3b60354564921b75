"""Throughput of the training loop beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from chainward_simulations.benchmark.figures import Aim, Measured, Table
from chainward_simulations.benchmark.plain import train_plain_link
from chainward_simulations.runner import open_sites

Variant = Literal["plain fp32", "chainward fp32", "chainward auto"]
VARIANTS: tuple[Variant, ...] = ("plain fp32", "chainward fp32", "chainward auto")

FP32_AIM, AUTO_AIM = Aim("at least", 0.95), Aim("at least", 1.5)


@dataclass(frozen=True)
class Backbone:
    """A timm model, and its patch size in pixels where it is a ViT; 0: the backbone's own."""

    name: str
    patch_size: int = 0

    @classmethod
    def parse(cls, text: str) -> Backbone:
        """Return the backbone that ``NAME`` or ``NAME:PATCH`` names.

        Raises
        ------
        ValueError
            The patch size isn't a number.
        """
        name, _, patch_size = text.partition(":")
        return cls(name, int(patch_size or 0))

    def __str__(self) -> str:
        return f"{self.name}, patch {self.patch_size}" if self.patch_size else self.name


@dataclass(frozen=True)
class TrainingWorkload:
    """What to train.

    Parameters
    ----------
    sites : ids of phantom sites, comma-separated; empty: all six. Throughput is measured at the first
    epochs : epochs of one measured training
    repeats : measured trainings of each variant; one more comes first and isn't counted
    """

    backbones: tuple[Backbone, ...] = (Backbone("convnext_atto"), Backbone("vit_tiny_patch16_224", 8))
    augmentations: tuple[Augmentation, ...] = ("upright", "none")
    sites: str = ""
    epochs: int = 2
    repeats: int = 5
    threads: int = 2

    @classmethod
    def quick(cls) -> TrainingWorkload:
        """Return a workload of a few seconds that exercises everything; its figures say nothing."""
        return cls((Backbone("test_convnext"),), sites="site-5,site-6", epochs=1, repeats=2)

    def with_changes(self, changes: Mapping[str, Any]) -> TrainingWorkload:
        """Return the workload with other values for the fields that `changes` names."""
        return replace(self, **changes)

    def config(self, backbone: Backbone, augmentation: Augmentation, *, seed: int, epochs: int) -> RunConfig:
        """Return the run configuration: the defaults but for what the workload names."""
        return RunConfig.from_flat(
            {
                "seed": seed,
                "federation.sites": self.sites,
                "federation.threads": self.threads,
                "data.augmentation": augmentation,
                "chain.backbone": backbone.name,
                "chain.patch-size": backbone.patch_size,
                "chain.epochs": epochs,
            }
        )


@dataclass(frozen=True)
class Throughput:
    """Training images per second of one backbone with one augmentation, a teacher beside it."""

    backbone: Backbone
    augmentation: Augmentation
    images: int
    images_per_second: dict[Variant, Measured]

    def speed_up(self, variant: Variant) -> Measured:
        """Return the ratio of the variant's throughput to that of plain PyTorch, repeat by repeat."""
        return self.images_per_second[variant].ratio_to(self.images_per_second["plain fp32"])

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


def measure_throughput(
    workload: TrainingWorkload, on_step: Callable[[str], None] = lambda step: None
) -> list[Throughput]:
    """Return the throughput of every variant, for each backbone and augmentation of the workload.

    In each repeat all variants train once, one after the other from the same weights with the same data; the order
    rotates from repeat to repeat, so that a machine that slows down or warms up does so for all of them.
    """
    measured = []
    first = open_sites(workload.config(workload.backbones[0], "none", seed=0, epochs=1))
    data = next(iter(first.values()))
    for backbone in workload.backbones:
        for augmentation in workload.augmentations:
            config = workload.config(backbone, augmentation, seed=0, epochs=workload.epochs)
            architecture = architecture_for(config, data)
            predecessor = dict(build_model(architecture, seed=1).state_dict())
            images = workload.epochs * len(data.splits["train"])
            seen: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
            for repeat in range(-1, workload.repeats):
                turn = repeat % len(VARIANTS)
                for variant in VARIANTS[turn:] + VARIANTS[:turn]:
                    _, seconds = train_variant(variant, data, architecture, config.link_recipe(), predecessor)
                    if repeat >= 0:
                        seen[variant].append(images / seconds)
                on_step(f"throughput of {backbone}, augmentation {augmentation}: {repeat + 1} of {workload.repeats}")
            figures = {variant: Measured(tuple(values)) for variant, values in seen.items()}
            measured.append(Throughput(backbone, augmentation, images, figures))
    return measured


def architecture_for(config: RunConfig, data: SiteData) -> Architecture:
    """Return the architecture of a configuration's backbone for the images of a site."""
    images = data.splits["train"].images
    return chain_architecture(
        config.chain, classes=len(data.classes), channels=images.shape[1], image_size=images.shape[-1]
    )


def throughput_table(measured: Sequence[Throughput], workload: TrainingWorkload) -> Table:
    """Return the table of throughputs."""
    auto = auto_precision()
    table = Table(
        "Training loop, images per second",
        ("backbone", "augmentation", "loop", "images/s", "ratio to plain PyTorch", "aim"),
        notes=[
            f"Median (smallest to largest) of {workload.repeats} trainings of {workload.epochs} epochs each, all loops in one "
            f"process in turn, {workload.threads} threads; link with a predecessor. Ratios are taken within a repeat."
        ],
    )
    for figure in measured:
        for variant, speed in figure.images_per_second.items():
            ratio = figure.speed_up(variant)
            aim = {"chainward fp32": FP32_AIM, "chainward auto": AUTO_AIM}.get(variant)
            if variant == "chainward auto" and auto == "fp32":
                aim = None
            table.rows.append(
                (
                    str(figure.backbone),
                    figure.augmentation,
                    _label(variant, auto),
                    speed.text(1),
                    "-" if variant == "plain fp32" else ratio.text(2),
                    aim.text(ratio.median) if aim else "-",
                )
            )
    if auto == "fp32":
        table.notes.append("This hardware doesn't compute bf16: auto is fp32 here.")
    return table


def _label(variant: Variant, auto: str) -> str:
    return f"{variant} ({auto})" if variant == "chainward auto" else variant
