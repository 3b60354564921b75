"""Augmentation of whole batches on tensors: one affine resampling and one change of brightness per view."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from chainward_shared.pixels import Pixels
from chainward_shared.preprocessing import brightness_scale, to_float
from chainward_shared.seeds import torch_generator
from chainward_shared.settings import Augmentation


@dataclass(frozen=True)
class Strength:
    """Ranges of one kind of augmentation: degrees, fraction of the image side, relative zoom, contrast, brightness."""

    rotation: float
    shift: float
    zoom: float
    contrast: float
    brightness: float
    flips: bool


STRENGTHS: dict[Augmentation, Strength] = {
    "upright": Strength(rotation=8.0, shift=0.05, zoom=0.08, contrast=0.15, brightness=0.08, flips=False),
    "all-orientations": Strength(rotation=180.0, shift=0.05, zoom=0.10, contrast=0.15, brightness=0.08, flips=True),
}


FIXED_VIEWS: dict[Augmentation, int] = {"none": 1, "upright": 4, "all-orientations": 8}
"""Views of each image where the output of a frozen trunk is kept; see `fixed_view`."""


@dataclass(frozen=True)
class Change:
    """What is done to each of n images, tensors (n,): turn in radians, factor on the size, 1 or -1 for a mirror, shift in halves
    of the side, factor on the contrast, brightness added to pixels within 0 and 1."""

    angle: Tensor
    zoom: Tensor
    mirror: Tensor
    shift_x: Tensor
    shift_y: Tensor
    contrast: Tensor
    brightness: Tensor


def augmented(images: Tensor, kind: Augmentation, generator: torch.Generator, pixels: Pixels | None = None) -> Tensor:
    """Return one random view of each image, float32 (n, c, h, w), scaled as by `to_float`.

    Parameters
    ----------
    images : uint8 (n, c, h, w)
    generator : CPU generator; the same one yields the same views on every device
    pixels : how the model's pixels are scaled; None: the usual way
    """
    values = to_float(images, pixels)
    if kind == "none":
        return values
    return _changed(values, _drawn(len(images), STRENGTHS[kind], generator), pixels)


def fixed_view(images: Tensor, kind: Augmentation, view: int, pixels: Pixels | None = None) -> Tensor:
    """Return view number `view` of each image, float32 (n, c, h, w), scaled as by `to_float`: the same change of all images.

    0 is the image as it is. "all-orientations": the eight flips and quarter turns, which move pixels and mix none;
    "upright": three more, drawn once and for all from the range of `augmented`.
    """
    values = to_float(images, pixels)
    if view == 0:
        return values
    if kind == "all-orientations":
        turned = torch.rot90(values, view % 4, dims=(2, 3))
        return turned.flip(3) if view >= 4 else turned
    one = _drawn(1, STRENGTHS[kind], torch_generator(0, "fixed view", view))
    return _changed(values, Change(*(getattr(one, field.name).expand(len(images)) for field in fields(one))), pixels)


def _drawn(n: int, strength: Strength, generator: torch.Generator) -> Change:
    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2.0 - 1.0) * limit

    # the order of the draws decides every model that was ever trained by a seed
    angle = uniform(math.radians(strength.rotation))
    zoom = 1.0 + uniform(strength.zoom)
    mirror = torch.ones(n)
    if strength.flips:
        mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    shift_x, shift_y = uniform(2 * strength.shift), uniform(2 * strength.shift)
    contrast = 1.0 + uniform(strength.contrast)
    return Change(angle, zoom, mirror, shift_x, shift_y, contrast, uniform(strength.brightness))


def _changed(values: Tensor, change: Change, pixels: Pixels | None) -> Tensor:
    cosine, sine = torch.cos(change.angle) * change.zoom, torch.sin(change.angle) * change.zoom
    affine = torch.stack(
        [
            torch.stack([cosine * change.mirror, -sine, change.shift_x], dim=1),
            torch.stack([sine * change.mirror, cosine, change.shift_y], dim=1),
        ],
        dim=1,
    ).to(values.device)
    grid = functional.affine_grid(affine, list(values.shape), align_corners=False)
    values = functional.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
    contrast, brightness = (t.to(values.device)[:, None, None, None] for t in (change.contrast, change.brightness))
    return values * contrast + brightness / brightness_scale(pixels, values.device)
