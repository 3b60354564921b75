"""From stored pixels to what a model sees. The constants are fixed, not fitted to anybody's images: a statistic of
private images would leave with the model. A model that starts from pretrained weights sees pixels as those did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from chainward_shared.pixels import PIXEL_MEAN, PIXEL_SCALE, Pixels

RESIZED_AT_ONCE = 256


def to_float(images: Tensor, pixels: Pixels | None = None) -> Tensor:
    """Return uint8 images (n, c, h, w) as float32, ``(x / 255 - mean) / std``; without `pixels`, ``(x / 255 - 0.5) / 0.25``."""
    if pixels is None:
        return (images.float() / 255.0 - PIXEL_MEAN) / PIXEL_SCALE
    mean, std = (_by_channel(values, images.device) for values in (pixels.mean, pixels.std))
    return (images.float() / 255.0 - mean) / std


def pixels_of(model: nn.Module) -> Pixels | None:
    """Return how the pixels of a model that `chainward_shared.models.build_model` built are scaled; None: the usual way."""
    found = getattr(model, "chainward_pixels", None)
    return found if isinstance(found, Pixels) else None


def scaled_for(model: nn.Module, images: Tensor) -> Tensor:
    """Return uint8 images (n, c, h, w) as `model` sees them, float32."""
    return to_float(images, pixels_of(model))


def brightness_scale(pixels: Pixels | None, device: torch.device) -> Tensor | float:
    """Return by what a change of brightness, pixels within 0 and 1, is divided to be one of scaled images (n, c, h, w)."""
    return PIXEL_SCALE if pixels is None else _by_channel(pixels.std, device)


def _by_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def resized(images: Tensor, size: int) -> Tensor:
    """Return images (n, c, h, w), uint8 or float, as (n, c, size, size) of the same dtype: bilinear, antialiased.

    Images of that size already are returned as they are. uint8 values are rounded, halves to even.
    """
    if images.shape[-2:] == (size, size):
        return images
    # in parts: as float32 a whole data set takes four times its memory
    parts = [
        functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        for part in images.split(RESIZED_AT_ONCE)
    ]
    if images.is_floating_point():
        return torch.cat(parts).to(images.dtype)
    return torch.cat([part.round().clamp(0, 255).to(images.dtype) for part in parts])
