"""How a model's pixels are scaled, and how its file says so."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field, model_validator

from chainward_shared.outside import Record

PIXEL_MEAN, PIXEL_SCALE = 0.5, 0.25
"""Where nothing else is said: fixed, not fitted to anybody's images (`chainward_shared.preprocessing`)."""


class Pixels(Record):
    """How a model's pixels are scaled: within 0 and 1, less `mean`, over `std`, both by channel."""

    mean: tuple[Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)], ...] = Field(min_length=1, max_length=64)
    std: tuple[Annotated[float, Field(ge=1e-4, le=10, allow_inf_nan=False)], ...] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _possible(self) -> Pixels:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations; expected one each per channel"
            )
        return self


def scaling(pixels: Pixels | None) -> tuple[float | list[float], float | list[float]]:
    """Return mean and standard deviation as they are written down: a number each, or a list by channel."""
    return (PIXEL_MEAN, PIXEL_SCALE) if pixels is None else (list(pixels.mean), list(pixels.std))


def preprocessing_metadata(pixels: Pixels | None = None) -> dict[str, str]:
    """Return the metadata with which a model's file tells how its pixels are scaled."""
    mean, std = scaling(pixels)
    return {"chainward.pixels": json.dumps({"divide_by": 255, "mean": mean, "std": std})}
