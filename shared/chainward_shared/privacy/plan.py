"""How private a training is asked to be, and the plan a site makes of it: all that is fixed before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chainward_shared.errors import PrivacyError
from chainward_shared.privacy.accounting import Mechanism, solve_noise_multiplier

Unit = Literal["patient", "image"]


class PrivacyRecipe(BaseModel):
    """What a private training is asked to be; travels with the recipe. The site's policy is above it.

    `unit`: who is protected. `epsilon`: at most so much for this training, of which the site computes the noise; or
    `noise_multiplier`: the noise itself. `clip`: each example's gradient is shortened to this length.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Unit = "patient"
    delta: float = Field(gt=0, lt=1)
    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    noise_multiplier: float | None = Field(None, gt=0, allow_inf_nan=False)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_of_both(self) -> PrivacyRecipe:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise PrivacyError("a private training needs either epsilon or noise_multiplier; give exactly one of them")
        return self


class PrivatePlan(BaseModel):
    """What a site does in one private training. Nothing in it depends on data, and nothing in it changes on the way.

    `sample_rate`: probability with which a unit is in a step. `expected_batch`: by which the sum of a step's gradients
    is divided, whatever came out of the draw. `noise_multiplier`: standard deviation of the noise over `clip`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Unit
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)
    sample_rate: float = Field(gt=0, le=1)
    expected_batch: float = Field(gt=0, allow_inf_nan=False)
    steps: int = Field(ge=1)
    clip: float = Field(gt=0, allow_inf_nan=False)

    @property
    def mechanism(self) -> Mechanism:
        """What the plan costs when it is carried out to the end: to be reserved before the first step."""
        return Mechanism("dp-sgd", self.noise_multiplier, self.sample_rate, self.steps)


def plan(
    recipe: PrivacyRecipe, *, units: int, epochs: int, batch_size: int, before: Sequence[Mechanism] = ()
) -> PrivatePlan:
    """Return how a site with `units` patients (or images) trains for `epochs` at an expected batch of `batch_size`.

    With an epsilon the noise is the least with which this training alone stays within it; with `before`, within it
    after what was spent before.

    Parameters
    ----------
    units : taken as public. Use a declared or a rounded number, see `rounded_units`; the guarantee does not rest on its
        being right

    Raises
    ------
    PrivacyError
        There are no units, delta is not below 1 / units, or no noise is enough.
    """
    if units < 1:
        raise PrivacyError(f"a private training of {units} {recipe.unit}s is none; expected at least 1")
    if recipe.delta >= 1 / units:
        raise PrivacyError(
            f"delta {recipe.delta:g} is not below 1 / {units}, one over the {recipe.unit}s of this site: at that delta a "
            "mechanism may publish one of them; choose a smaller one"
        )
    sample_rate = min(1.0, batch_size / units)
    steps = max(1, round(epochs / sample_rate))
    noise = recipe.noise_multiplier
    if noise is None:
        assert recipe.epsilon is not None
        noise = solve_noise_multiplier(recipe.epsilon, recipe.delta, sample_rate, steps, before)
    return PrivatePlan(
        unit=recipe.unit,
        delta=recipe.delta,
        noise_multiplier=noise,
        sample_rate=sample_rate,
        expected_batch=sample_rate * units,
        steps=steps,
        clip=recipe.clip,
    )


def rounded_units(count: int) -> int:
    """Return `count` rounded down to one digit and a half (1, 1.5, 2, .. 9.5 times a power of ten), at least 1.

    The exact number of patients is private. A coarse one hides one patient in nearly every case, not in all: declare
    the number where that matters.
    """
    if count < 10:
        return max(1, count)
    half = 10 ** int(math.log10(count)) // 2
    return count // half * half
