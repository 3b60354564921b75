"""Recipes: everything that decides how a link or a student is trained. They travel with the task to the site."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Augmentation = Literal["none", "upright", "all-orientations"]
ClassBalance = Literal["site-prior", "weighted", "none"]
Precision = Literal["auto", "fp32", "bf16"]
StudentStart = Literal["dual", "single", "random"]
TeacherTrust = Literal["label", "none"]


class TrainingRecipe(BaseModel):
    """What every training has: budget, optimiser, data and arithmetic. The site checks the ranges again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(ge=0)
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    augmentation: Augmentation
    precision: Precision
    threads: int = Field(ge=1)
    class_balance: ClassBalance
    label_fraction: float = Field(gt=0, le=1)


class LinkRecipe(TrainingRecipe):
    """How a link is trained (methods: the chain)."""

    start: Literal["warm", "fresh"]
    distillation_weight: float = Field(ge=0, le=1)
    temperature: float = Field(ge=1)
    temperature_decay: float = Field(gt=0, le=1)
    teacher_trust: TeacherTrust


class StudentRecipe(TrainingRecipe):
    """How a compact student is trained in one round at a site. `rounds`: rounds of stage "distil" in the whole run,
    over which the decay of the auxiliary teacher's moving average rises from `ema_decay` to 1."""

    stage: Literal["distil", "finetune"]
    distillation_weight: float = Field(ge=0)
    temperature: float = Field(ge=1)
    ema_decay: float = Field(ge=0, lt=1)
    frozen_epochs: int = Field(ge=0)
    rounds: int = Field(ge=0)
