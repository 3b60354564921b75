"""From stored pixels to what a model sees. The constants are fixed, not fitted to anybody's images: a statistic of
private images would leave with the model."""

from __future__ import annotations

import json

import torch
from torch import Tensor
from torch.nn import functional

PIXEL_MEAN, PIXEL_SCALE = 0.5, 0.25
RESIZED_AT_ONCE = 256


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images (n, c, h, w) as float32, ``(x / 255 - 0.5) / 0.25``."""
    return (images.float() / 255.0 - PIXEL_MEAN) / PIXEL_SCALE


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


def preprocessing_metadata() -> dict[str, str]:
    """Return the metadata with which a model's file tells how its pixels are scaled."""
    return {"chainward.pixels": json.dumps({"divide_by": 255, "mean": PIXEL_MEAN, "std": PIXEL_SCALE})}
