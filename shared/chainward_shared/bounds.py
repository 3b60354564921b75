"""Numbers and texts with the ranges within which they make sense: of the configuration, and of what reaches a site.

Every number that a message carries has a type of this module or bounds of its own: a number that no honest coordinator
sends can't be held by a model at all. What a hospital allows of it is the hospital's own decision, below these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

SMALLEST_WEIGHT = 1e-6
"""A weight of a term of the loss is 0 or at least this: smaller ones do nothing but underflow."""

SMALLEST_LEARNING_RATE = 1e-9
MOST_EPOCHS = 10_000

FEWEST_SITES = 3
"""Of a secure sum: of one over two, each of them could subtract itself."""


@dataclass(frozen=True)
class ZeroOrAtLeast:
    """Marks a number that is 0 or at least `least`."""

    least: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: float) -> float:
        if value != 0 and value < self.least:
            raise PydanticCustomError(
                "zero_or_at_least", "Input should be 0, or at least {least}", {"least": f"{self.least:g}"}
            )
        return value


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Epochs = Annotated[int, Field(ge=1, le=MOST_EPOCHS)]
Rounds = Annotated[int, Field(ge=0, le=10_000)]
Laps = Annotated[int, Field(ge=1, le=100)]
BatchSize = Annotated[int, Field(ge=1, le=4_096)]
UnitsPerStep = Annotated[int, Field(ge=0, le=65_536)]
Threads = Annotated[int, Field(ge=1, le=256)]
ImageSize = Annotated[int, Field(ge=1, le=4_096)]

LearningRate = Annotated[float, Field(ge=SMALLEST_LEARNING_RATE, le=10)]
Fraction = Annotated[float, ZeroOrAtLeast(SMALLEST_WEIGHT), Field(le=1)]
PositiveFraction = Annotated[float, Field(ge=1e-6, le=1)]
Weight = Annotated[float, ZeroOrAtLeast(SMALLEST_WEIGHT), Field(le=100)]
Temperature = Annotated[float, Field(ge=1, le=100)]
Decay = Annotated[float, ZeroOrAtLeast(SMALLEST_WEIGHT), Field(le=0.999999)]

Epsilon = Annotated[float, Field(ge=1e-4, le=1_000)]
Delta = Annotated[float, Field(ge=1e-15, le=0.5)]
Clip = Annotated[float, Field(ge=1e-4, le=1_000)]
NoiseMultiplier = Annotated[float, Field(ge=1e-3, le=1e6)]

SiteCount = Annotated[int, Field(ge=0, le=512)]
SiteIndex = Annotated[int, Field(ge=0, lt=512)]
LabelSkew = Annotated[float, Field(ge=0, le=1_000)]

Location = Annotated[str, Field(max_length=4_096)]
"""A path, or the name of something built in."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]


def _part(text: str) -> str:
    if not re.fullmatch(r"all|head|norms-and-biases|last-[1-9]\d{0,2}", text):
        raise PydanticCustomError("part", "Input should be all, last-N (N from 1), norms-and-biases or head")
    return text


Part = Annotated[str, Field(max_length=64), AfterValidator(_part)]
"""Which part of a model is trained; see `chainward_shared.models.parts`."""
