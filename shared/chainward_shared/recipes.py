"""Recipes: everything that decides how a link or a student is trained. They travel with the task to the site."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from chainward_shared.bounds import Epochs, Epsilon, NoiseMultiplier, PositiveFraction, Seed
from chainward_shared.settings import (
    ArithmeticSettings,
    AugmentationSettings,
    LabelSettings,
    LinkSettings,
    OptimiserSettings,
    PrivacySettings,
    PrivilegedSettings,
    Settings,
    StudentSettings,
)

PrivilegedUse = Literal["text", "table", "all"]
PrivateSites = Literal["all", "by-policy"]

MOST_STATISTICS = 100_000
"""Statistics rounds of a run, at most."""

MAX_ENSEMBLE = 8
"""At most so many large models teach a student at once."""

PRIVILEGED_BATCH = 64
"""Examples in a step of a privileged teacher's training."""


class PrivilegedRecipe(PrivilegedSettings):
    """How a site's privileged teachers are trained and used. They stay at the site.

    `use`: which of its privileged data a site's teachers read.
    """

    use: PrivilegedUse


class PlannedTraining(Settings):
    """A training that a run will ask of a site `times` times: its epochs, and the units expected in a step."""

    epochs: Epochs
    batch_size: Annotated[int, Field(ge=1, le=65_536)]
    times: Annotated[int, Field(ge=1, le=100_000)] = 1


class PrivacyRecipe(PrivacySettings):
    """What a private training is asked to be; travels with the recipe. The site's policy is above it.

    `sites`: whether every site has to train privately, or those with a privacy policy of their own. `epsilon`: at most so
    much for all that `run` lists together, of which the site computes the noise; without a list, for this training. Or
    `noise_multiplier`: the noise itself. `share`: of the site's units that the trainings use, with or without their labels.
    `statistics`: how many statistics rounds the run asks for; `statistics_share`: of what noised scores leave of epsilon, at most
    how much they may cost, all of it where nothing is trained.
    """

    sites: PrivateSites = "all"
    epsilon: Epsilon | None = None
    noise_multiplier: NoiseMultiplier | None = None
    share: PositiveFraction = 1.0
    run: Annotated[tuple[PlannedTraining, ...], Field(max_length=16)] = ()
    statistics: Annotated[int, Field(ge=0, le=MOST_STATISTICS)] = 0
    statistics_share: PositiveFraction = 1.0

    @model_validator(mode="after")
    def _one_of_both(self) -> PrivacyRecipe:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("a private training needs either epsilon or noise_multiplier; give exactly one of them")
        return self


class TrainingRecipe(OptimiserSettings, LabelSettings, AugmentationSettings, ArithmeticSettings):
    """What every training has: budget, optimiser, data and arithmetic. The site checks the ranges again.

    `transfer`: how the trained model is rounded before it is stored and sent (`chainward_shared.weights.rounded`).
    """

    seed: Seed
    privileged: PrivilegedRecipe | None = None
    privacy: PrivacyRecipe | None = None


class LinkRecipe(LinkSettings, TrainingRecipe):
    """How a link is trained."""


class StudentRecipe(StudentSettings, TrainingRecipe):
    """How a compact student is trained in one round at a site.

    `auxiliary`: whether the auxiliary teacher follows the student (after `frozen_epochs`) or stays as it was selected.
    `rounds`: rounds of stage "distil" in the whole run, over which the decay of its moving average rises from `ema_decay`
    to 1 where `ema_schedule` is "cosine". `large_weight`: weight of the distillation from the large models, which then
    come with the task.
    """

    stage: Literal["distil", "finetune"]
