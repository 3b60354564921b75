"""What common backbones of timm can do here, found by doing it: with random weights, on a few generated images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from chainward_client.training.link import train_link
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError
from chainward_shared.evaluation.attention_maps import attention_maps
from chainward_shared.models import (
    Architecture,
    build_model,
    compact_architecture,
    count_parameters,
    resolve_architecture,
    select_weights,
)
from chainward_shared.models.private_ready import check_private_ready
from chainward_shared.models.trunk import trunk_of
from chainward_shared.preprocessing import scaled_for
from chainward_shared.words import first_line
from chainward_simulations.benchmark.figures import Options, Report, Table
from chainward_simulations.benchmark.generated import base_of, generated_images, generated_site, started

COMMON = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "deit_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "convnext_tiny",
    "convnextv2_nano",
    "resnet18",
    "resnet50",
    "resnetv2_50",
    "densenet121",
    "regnety_004",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
)
"""What people ask for most; a person's choice, not a ranking."""
_SIDE = 112
"""Pixels: whole patches of 14 and of 16."""
_IMAGES, _CLASSES = 4, 3


@dataclass(frozen=True)
class Backbone:
    """What one backbone can do: by question, an empty string for yes, else why not."""

    name: str
    parameters: int
    answers: Mapping[str, str]


def measure(options: Options) -> Report:
    """Return what common backbones can do, or those that are named."""
    found = []
    for name in tuple(one.name for one in options.backbones) or COMMON:
        found.append(examined(name))
        options.say(f"{name}: " + ", ".join(f"{what} {why or 'yes'}" for what, why in found[-1].answers.items()))
    measured = [{"name": one.name, "parameters": one.parameters, **one.answers} for one in found]
    return [backbones_table(found)], measured


def backbones_table(found: list[Backbone]) -> Table:
    """Return the answers as a table, with the reasons below it."""
    reasons: dict[str, list[str]] = {}
    for one in found:
        for what, why in one.answers.items():
            if why:
                reasons.setdefault(f"{what}: {_short(why)}", []).append(one.name)
    return Table(
        f"{len(found)} backbones with random weights, images of {_SIDE} px",
        ("backbone", "parameters, millions", *_QUESTIONS),
        [
            (one.name, f"{one.parameters / 1e6:.1f}", *("no" if one.answers[what] else "yes" for what in _QUESTIONS))
            for one in found
        ],
        ["\n".join(f"* {reason} ({', '.join(names)})" for reason, names in reasons.items())],
    )


def _short(why: str) -> str:
    """Return what is wrong, without whose fault it is and what else there is."""
    first = why.partition("; ")[0]
    which, _, what = first.partition(": ")
    return which if not what or what.startswith("supported") else what


def examined(name: str) -> Backbone:
    """Return what a timm model can do."""
    try:
        parameters = count_parameters(build_model(_fresh(name), seed=0))
    except ChainwardError as error:
        return Backbone(name, 0, dict.fromkeys(_QUESTIONS, first_line(error)))
    return Backbone(name, parameters, {what: _problem(ask, name) for what, ask in _QUESTIONS.items()})


def _problem(ask: Callable[[str], None], name: str) -> str:
    try:
        ask(name)
    except Exception as error:  # whatever timm or PyTorch raise: this backbone can't do it
        return first_line(error) or type(error).__name__
    return ""


def _fresh(name: str) -> Architecture:
    return resolve_architecture(name, num_classes=_CLASSES, in_chans=3, image_size=_SIDE)


def _started(name: str, part: str = "all") -> Architecture:
    return started(name, part, _SIDE, _CLASSES)


def _trains(architecture: Architecture) -> None:
    """Train a link after a predecessor for one epoch."""
    recipe = RunConfig.from_flat({"chain.epochs": 1, "data.augmentation": "none"}).link_recipe()
    state = dict(build_model(architecture, seed=1).state_dict())
    base = None if architecture.start is None else base_of(architecture, seed=1)
    train_link(generated_site(_IMAGES, _SIDE, _CLASSES), architecture, recipe, state, strand=0, lap=0, base=base)


def _last_kept(name: str) -> None:
    if trunk_of(build_model(_started(name, "last-1"), seed=0).eval()) is None:
        raise ChainwardError("images go through the whole model: it can't be divided before its last blocks")


def _student(name: str) -> None:
    large = _fresh(name)
    small = compact_architecture(large, width=0.5, depth=0.67)
    model = build_model(small, seed=0)
    model.load_state_dict(select_weights(build_model(large, seed=1).state_dict(), large, small))
    with torch.no_grad():
        if not model.eval()(scaled_for(model, generated_images(_IMAGES, _SIDE))).isfinite().all():
            raise ChainwardError("the selected student's answers are not finite")


def _attention_map(name: str) -> None:
    model = build_model(_fresh(name), seed=0).eval()
    attention_maps(model, scaled_for(model, generated_images(_IMAGES, _SIDE)))


_QUESTIONS: Mapping[str, Callable[[str], None]] = {
    "chain": lambda name: _trains(_fresh(name)),
    "chain from a start": lambda name: _trains(_started(name)),
    "private": lambda name: check_private_ready(_fresh(name)),
    "private from a start": lambda name: check_private_ready(_started(name)),
    "last blocks on kept features": _last_kept,
    "student": _student,
    "attention map": _attention_map,
}
