"""Augmentation of whole batches on tensors: one affine resampling and one change of brightness per view."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from chainward_shared.preprocessing import PIXEL_SCALE, to_float
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


def augmented(images: Tensor, kind: Augmentation, generator: torch.Generator) -> Tensor:
    """Return one random view of each image, float32 (n, c, h, w), scaled as by `to_float`.

    Parameters
    ----------
    images : uint8 (n, c, h, w)
    generator : CPU generator; the same one yields the same views on every device
    """
    values = to_float(images)
    if kind == "none":
        return values
    strength = STRENGTHS[kind]
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2.0 - 1.0) * limit

    angle = uniform(math.radians(strength.rotation))
    zoom = 1.0 + uniform(strength.zoom)
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    mirror = torch.ones(n)
    if strength.flips:
        mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    shift_x, shift_y = uniform(2 * strength.shift), uniform(2 * strength.shift)
    affine = torch.stack(
        [torch.stack([cosine * mirror, -sine, shift_x], dim=1), torch.stack([sine * mirror, cosine, shift_y], dim=1)],
        dim=1,
    ).to(images.device)
    grid = functional.affine_grid(affine, list(values.shape), align_corners=False)
    values = functional.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
    contrast = (1.0 + uniform(strength.contrast)).to(images.device)[:, None, None, None]
    brightness = (uniform(strength.brightness) / PIXEL_SCALE).to(images.device)[:, None, None, None]
    return values * contrast + brightness
