"""From stored pixels to what a model sees. The constants are fixed, not fitted to anybody's images: a statistic of
private images would leave with the model."""

from __future__ import annotations

import json

from torch import Tensor

PIXEL_MEAN, PIXEL_SCALE = 0.5, 0.25


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images (n, c, h, w) as float32, ``(x / 255 - 0.5) / 0.25``."""
    return (images.float() / 255.0 - PIXEL_MEAN) / PIXEL_SCALE


def preprocessing_metadata() -> dict[str, str]:
    """Return the metadata with which a model's file tells how its pixels are scaled."""
    return {"chainward.pixels": json.dumps({"divide_by": 255, "mean": PIXEL_MEAN, "std": PIXEL_SCALE})}
