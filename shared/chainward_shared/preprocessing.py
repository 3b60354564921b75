"""From stored pixels to what a model sees. The constants are fixed, not fitted to anybody's images: a statistic of
private images would leave with the model. A model that starts from pretrained weights sees pixels as those did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

PIXEL_MEAN, PIXEL_SCALE = 0.5, 0.25
RESIZED_AT_ONCE = 256


class Pixels(BaseModel):
    """How a model's pixels are scaled: within 0 and 1, less `mean`, over `std`, both by channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)], ...] = Field(min_length=1, max_length=64)
    std: tuple[Annotated[float, Field(ge=1e-4, le=10, allow_inf_nan=False)], ...] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _possible(self) -> Pixels:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations; expected one each per channel"
            )
        return self


def to_float(images: Tensor, pixels: Pixels | None = None) -> Tensor:
    """Return uint8 images (n, c, h, w) as float32, ``(x / 255 - mean) / std``; without `pixels`, ``(x / 255 - 0.5) / 0.25``."""
    if pixels is None:
        return (images.float() / 255.0 - PIXEL_MEAN) / PIXEL_SCALE
    mean, std = (_by_channel(values, images.device) for values in (pixels.mean, pixels.std))
    return (images.float() / 255.0 - mean) / std


def pixels_of(model: nn.Module) -> Pixels | None:
    """Return how the pixels of a model that `chainward_shared.models.build_model` built are scaled; None: the usual way."""
    found = getattr(getattr(model, "_module", model), "chainward_pixels", None)  # Opacus wraps
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


def scaling(pixels: Pixels | None) -> tuple[float | list[float], float | list[float]]:
    """Return mean and standard deviation as they are written down: a number each, or a list by channel."""
    return (PIXEL_MEAN, PIXEL_SCALE) if pixels is None else (list(pixels.mean), list(pixels.std))


def preprocessing_metadata(pixels: Pixels | None = None) -> dict[str, str]:
    """Return the metadata with which a model's file tells how its pixels are scaled."""
    mean, std = scaling(pixels)
    return {"chainward.pixels": json.dumps({"divide_by": 255, "mean": mean, "std": std})}
