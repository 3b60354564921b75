"""Recipes: everything that decides how a link or a student is trained. They travel with the task to the site."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chainward_shared.errors import PrivacyError

Augmentation = Literal["none", "upright", "all-orientations"]
ClassBalance = Literal["site-prior", "weighted", "none"]
LearningRateCycle = Literal["link", "laps"]
Precision = Literal["auto", "fp32", "bf16"]
SiteOrder = Literal["given", "reversed", "shuffled", "largest-first", "smallest-first", "weakest-next"]
StrandMerge = Literal["best", "average", "ensemble"]
StudentStart = Literal["dual", "single", "random"]
AuxiliaryTeacher = Literal["ema", "frozen"]
EmaSchedule = Literal["cosine", "constant"]
ChannelSelection = Literal["strided", "consecutive", "random", "random-inconsistent"]
HeadSelection = Literal["whole", "mixed"]
LayerSelection = Literal["first", "spread"]
TeacherTrust = Literal["label", "none"]
PrivilegedUse = Literal["text", "table", "all"]
PrivateSites = Literal["all", "by-policy"]
PrivacyUnit = Literal["patient", "image"]
Transfer = Literal["half", "full"]

MAX_ENSEMBLE = 8
"""At most so many large models teach a student at once."""


class PrivilegedRecipe(BaseModel):
    """How a site's privileged teachers are trained and used (methods, section 2). They stay at the site.

    `use`: which of its privileged data a site's teachers read. `text_features`: length of a report's hashed vector.
    `hidden`: units of a teacher's hidden layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: PrivilegedUse
    logit_weight: float = Field(ge=0)
    embedding_weight: float = Field(ge=0)
    temperature: float = Field(ge=1)
    epochs: int = Field(ge=1)
    text_features: int = Field(1024, ge=16, le=65_536)
    hidden: int = Field(64, ge=4, le=1_024)
    blank_label_words: bool = False


PRIVILEGED_BATCH = 64
"""Examples in a step of a privileged teacher's training."""


class PlannedTraining(BaseModel):
    """A training that a run will ask of a site `times` times: its epochs, and the units expected in a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    times: int = Field(1, ge=1)


class PrivacyRecipe(BaseModel):
    """What a private training is asked to be; travels with the recipe. The site's policy is above it.

    `sites`: whether every site has to train privately, or those with a privacy policy of their own. `unit`: who is
    protected. `epsilon`: at most so much for all that `run` lists together, of which the site computes the noise; without
    a list, for this training. Or `noise_multiplier`: the noise itself. `clip`: each example's gradient is shortened to
    this length. `batch_size`: units expected in a step of private training; 0: as the training's recipe says. `share`:
    of the site's units that the trainings use, with or without their labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: PrivateSites = "all"
    unit: PrivacyUnit = "patient"
    delta: float = Field(gt=0, lt=1)
    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    noise_multiplier: float | None = Field(None, gt=0, allow_inf_nan=False)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    batch_size: int = Field(0, ge=0)
    share: float = Field(1.0, gt=0, le=1)
    run: tuple[PlannedTraining, ...] = ()

    @model_validator(mode="after")
    def _one_of_both(self) -> PrivacyRecipe:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise PrivacyError("a private training needs either epsilon or noise_multiplier; give exactly one of them")
        return self


class TrainingRecipe(BaseModel):
    """What every training has: budget, optimiser, data and arithmetic. The site checks the ranges again.

    `transfer`: how the trained model is rounded before it is stored and sent (`chainward_shared.weights.rounded`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(ge=0)
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    augmentation: Augmentation
    precision: Precision
    threads: int = Field(ge=1)
    transfer: Transfer = "half"
    class_balance: ClassBalance
    prior_strength: float = Field(1.0, ge=0, le=1)
    label_fraction: float = Field(gt=0, le=1)
    privileged: PrivilegedRecipe | None = None
    privacy: PrivacyRecipe | None = None


class LinkRecipe(TrainingRecipe):
    """How a link is trained (methods, section 1). `laps`: of the whole chain, among which "laps" shares a learning-rate cycle."""

    start: Literal["warm", "fresh"]
    laps: int = Field(1, ge=1)
    cycle: LearningRateCycle = "link"
    distillation_weight: float = Field(ge=0, le=1)
    attention_weight: float = Field(0.0, ge=0)
    unlabelled_weight: float = Field(0.0, ge=0)
    temperature: float = Field(ge=1)
    temperature_decay: float = Field(gt=0, le=1)
    teacher_trust: TeacherTrust


class StudentRecipe(TrainingRecipe):
    """How a compact student is trained in one round at a site (methods, section 3).

    `auxiliary`: whether the auxiliary teacher follows the student (after `frozen_epochs`) or stays as it was selected.
    `rounds`: rounds of stage "distil" in the whole run, over which the decay of its moving average rises from `ema_decay`
    to 1 where `ema_schedule` is "cosine". `large_weight`: weight of the distillation from the large models, which then
    come with the task.
    """

    stage: Literal["distil", "finetune"]
    distillation_weight: float = Field(ge=0)
    temperature: float = Field(ge=1)
    large_weight: float = Field(0.0, ge=0)
    auxiliary: AuxiliaryTeacher = "ema"
    ema_schedule: EmaSchedule = "cosine"
    ema_decay: float = Field(ge=0, lt=1)
    frozen_epochs: int = Field(ge=0)
    rounds: int = Field(ge=0)
