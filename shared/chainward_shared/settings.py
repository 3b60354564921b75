"""Settings of trainings, each declared once: the configuration's tables and the recipes inherit the same groups.

A field that decides how a site trains is added to the group that it belongs to, with its range, its default and its
description. The key of the run configuration, the row of ``docs/configuration.md``, the field of the recipe that travels
to the site and the site's check of it follow.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from chainward_shared.bounds import (
    SMALLEST_WEIGHT,
    BatchSize,
    Clip,
    Decay,
    Delta,
    Epochs,
    Fraction,
    LearningRate,
    PositiveFraction,
    Rounds,
    Temperature,
    Threads,
    UnitsPerStep,
    Weight,
    ZeroOrAtLeast,
)
from chainward_shared.outside import MAX_SITES

Augmentation = Literal["none", "upright", "all-orientations"]
ClassBalance = Literal["site-prior", "weighted", "none"]
LinkStart = Literal["warm", "fresh"]
Precision = Literal["auto", "fp32", "bf16"]
AuxiliaryTeacher = Literal["ema", "frozen"]
EmaSchedule = Literal["cosine", "constant"]
ChannelSelection = Literal["strided", "consecutive", "random", "random-inconsistent"]
HeadSelection = Literal["whole", "mixed"]
LayerSelection = Literal["first", "spread"]
TeacherTrust = Literal["label", "none"]
PrivacyUnit = Literal["patient", "image"]
Transfer = Literal["half", "full"]


USUAL_THREADS = 2
"""Of a training, where nothing is said, but for the smallest models."""


class Settings(BaseModel):
    """Base of the groups: immutable, without unknown fields, without NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def values_of(table: Settings, group: type[Settings]) -> dict[str, Any]:
    """Return what `table`, which inherits `group`, holds of the group's fields, by name."""
    return {name: getattr(table, name) for name in group.model_fields}


class ArithmeticSettings(Settings):
    """How numbers are computed, and how they travel."""

    precision: Precision = Field(
        "auto",
        description="Arithmetic of training: auto takes bf16 where the hardware has instructions for it, fp32 elsewhere",
    )
    threads: Threads = Field(
        2, description="CPU threads of a training. Results are repeatable only for the same number"
    )
    transfer: Transfer = Field(
        "half",
        description="How models travel. half: every tensor that float16 holds to 11 significant bits is rounded to it before "
        "the model is stored, scored and sent; full: as they are, in twice the bytes",
    )


class SecureSumsSettings(Settings):
    """Sums over the sites that nobody sees in part, see `chainward_shared.secure_sums`."""

    secure_sums: Literal["off", "on", "required-by-site"] = Field(
        "off",
        description="Whether statistics, students and counts of scores are added up so that nobody sees those of a single site: "
        "`off`, `on`, or `required-by-site`: where a site gives them in no other way. Takes three sites",
    )
    secure_threshold: float = Field(
        0.5,
        ge=0.5,
        lt=1,
        description="Share of the sites more than which must be there to unmask a secure sum; a site can ask for more",
    )
    secure_noise_from: int = Field(
        1,
        ge=1,
        le=MAX_SITES,
        description="Private statistics in secure sums: the noise of so many sites together is as much as privacy needs, and "
        "each adds a share. 1: each adds all of it. A site allows no more than its site.yaml says",
    )


class RunArithmetic(ArithmeticSettings):
    """The same of a whole run, which may leave the number of threads open."""

    threads: Annotated[int, Field(ge=0, le=256)] = Field(
        0,
        description="CPU threads of a training. 0: by the size of the model, and kept in run.json. Results are repeatable only "
        "for the same number",
    )

    @property
    def cpu_threads(self) -> int:
        """The threads of a training; the usual number where the run has not settled it."""
        return self.threads or USUAL_THREADS


class AugmentationSettings(Settings):
    """How images vary in training."""

    augmentation: Augmentation = Field(
        "upright",
        description="none; upright: small shifts, turns and changes of brightness; "
        "all-orientations: also flips and any turn (skin, cells)",
    )


class LabelSettings(Settings):
    """Which labels are used, and how unequal classes count. The same for links and students."""

    label_fraction: PositiveFraction = Field(
        1.0, description="Fraction of each site's training cases whose labels are used, by class, at least one each"
    )
    class_balance: ClassBalance = Field(
        "site-prior",
        description="site-prior: cross-entropy adjusted by the logarithm of the site's class frequencies; "
        "weighted: inverse class frequencies as weights; none",
    )
    prior_strength: Fraction = Field(
        1.0,
        description="Strength of the site-prior adjustment. 1: predictions as if all classes were equally frequent; "
        "less: part of the sites' own class mix stays in them",
    )


class OptimiserSettings(Settings):
    """Budget and optimiser of a training."""

    epochs: Epochs = Field(12, description="Epochs of one link")
    batch_size: BatchSize = Field(32, description="Images per step; a site with fewer takes all it has")
    learning_rate: LearningRate = Field(1e-3, description="Peak of the one-cycle learning rate (AdamW)")
    weight_decay: Fraction = Field(0.05, description="Decoupled weight decay; not on norms and biases")


class LinkSettings(OptimiserSettings, LabelSettings):
    """How one link is trained."""

    layer_decay: Annotated[float, Field(ge=0.01, le=1)] = Field(
        1.0,
        description="Factor on the learning rate from each layer to the one before it, the classifier having all of it: less "
        "moves what is near the images less. 1: the same for all",
    )
    start: LinkStart = Field(
        "warm", description="warm: a link starts from the predecessor's weights; fresh: from the run's initial weights"
    )
    unlabelled_weight: Weight = Field(
        0.0,
        description="Weight c of the distillation from the predecessor on the images that the label fraction leaves "
        "without a label. 0: they are not used",
    )
    distillation_weight: Fraction = Field(
        0.5, description="Weight a of the distillation; cross-entropy has 1-a. 0: no teacher"
    )
    temperature: Temperature = Field(4.0, description="Temperature of the distillation in the first epoch")
    temperature_decay: Annotated[float, Field(ge=1e-3, le=1)] = Field(
        1.0, description="Factor on the temperature from epoch to epoch, down to 1. 1: no annealing"
    )
    attention_weight: Annotated[float, ZeroOrAtLeast(SMALLEST_WEIGHT), Field(le=10_000)] = Field(
        0.0,
        description="Weight b of the attention transfer: a link attends to what its predecessor found. 0: none",
    )
    teacher_trust: TeacherTrust = Field(
        "label",
        description="label: the predecessor counts less where it contradicts the label; none: the same everywhere",
    )


class StudentSettings(OptimiserSettings):
    """How a compact student is trained in the rounds of self-distillation."""

    rounds: Rounds = Field(3, description="Rounds of self-distillation. 0: no students")
    epochs: Epochs = Field(4, description="Epochs at each site in a round")
    distillation_weight: Weight = Field(1.0, description="Weight of the distillation from the auxiliary teacher")
    large_weight: Weight = Field(
        0.0, description="Weight of the distillation from the chain's large model(s) into the student"
    )
    temperature: Temperature = Field(2.0, description="Temperature of these distillations")
    auxiliary: AuxiliaryTeacher = Field(
        "ema",
        description="ema: the auxiliary teacher follows the student as a moving average; frozen: stays as it was selected",
    )
    ema_schedule: EmaSchedule = Field(
        "cosine",
        description="Decay of the moving average. cosine: from student.ema-decay to 1; constant: student.ema-decay",
    )
    ema_decay: Decay = Field(
        0.996, description="Decay of the auxiliary teacher's moving average (at the start, if it rises)"
    )
    frozen_epochs: Annotated[int, Field(ge=0, le=10_000)] = Field(
        1, description="First epochs in which the auxiliary teacher stays as it was selected"
    )


class PrivilegedSettings(Settings):
    """How a site's privileged teachers are trained and used."""

    logit_weight: Weight = Field(0.5, description="Weight of the distillation from the privileged teacher's logits")
    embedding_weight: Weight = Field(
        0.5, description="Weight of the cosine distance to the privileged teacher's embedding"
    )
    temperature: Temperature = Field(2.0, description="Temperature of the distillation of logits")
    epochs: Epochs = Field(60, description="Epochs of a privileged teacher at the site")
    text_features: Annotated[int, Field(ge=16, le=65_536)] = Field(
        1_024, description="Length of the hashed vector of a report"
    )
    hidden: Annotated[int, Field(ge=4, le=1_024)] = Field(
        64, description="Units of a privileged teacher's hidden layer"
    )
    blank_label_words: bool = Field(
        False, description="Blank the class names, and the words that a site lists, in reports before they are read"
    )
    image: bool = Field(
        False,
        description="The teachers see the image too, through the pretrained weights as they are: they answer the same question "
        "as the model, better informed. Needs chain.start-from, and guides links only",
    )


class PrivacySettings(Settings):
    """What a private training is asked to be."""

    delta: Delta = Field(1e-5, description="Delta of the guarantee; below 1 over the patients of every private site")
    clip: Clip = Field(1.0, description="Length to which the gradient of each example is clipped")
    unit: PrivacyUnit = Field(
        "patient",
        description="Who is protected: a patient with all images, or one image. A site with another unit refuses",
    )
    batch_size: UnitsPerStep = Field(
        0,
        description="Patients (or images) expected in a step of a private training, instead of chain.batch-size and "
        "student.batch-size. 0: those",
    )
    views: Annotated[int, Field(ge=1, le=32)] = Field(
        1,
        description="Augmented views of each image in a private step, whose mean gradient is clipped (augmentation "
        "multiplicity). Costs no privacy, but so many times the work",
    )
    average_decay: Decay = Field(
        0.9999,
        description="Decay of the moving average of the weights over the private steps, which is what a private training yields; "
        "it begins at 2/11 and rises as (1 + step) / (10 + step). 0: the weights after the last step. Costs no privacy",
    )
