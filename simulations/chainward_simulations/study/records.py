"""What a study writes down: typed records, so that a damaged or foreign file is noticed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from chainward_shared.config import ConfigScalar
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture

SCHEMA: Literal[1] = 1


class Record(BaseModel):
    """Base: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class BestSite(Record):
    """Of an arm with a model for each site: the one with the highest balanced accuracy on the pooled test images."""

    site: str
    pooled: Scores


class ArmRecord(Record):
    """One finished arm of one seed. Where the arm has several models, scores are means over them.

    Attributes
    ----------
    digest : of all that decided what was trained; arms with the same one are the same training
    pooled : on the test images of all sites together
    sites : on each site's own test images
    validation : on the validation images of all sites together
    models : how many models the scores are means of
    steps, images : of the optimiser, and labelled images times epochs, of all trainings that the arm needs; a student's
        include its chain's
    images_per_model : images that went into one model of the arm, mean
    seconds : of all these trainings, on one worker
    parameters, file_bytes : of one model
    architecture : of the models; None where they have no network
    predictions : name of the file with the probabilities, within the study folder
    classes : names of the classes, in the order of the labels
    data_notes : what a reader must know of the data: copies in two splits, no patients
    """

    arm: str
    seed: int
    digest: str
    about: str
    overrides: dict[str, ConfigScalar]
    pooled: Scores
    sites: dict[str, Scores]
    validation: Scores
    best: BestSite | None = None
    localisation: dict[str, float] | None = None
    models: int
    steps: int
    images: int
    data_notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    images_per_model: float
    seconds: float
    parameters: int
    file_bytes: int
    architecture: Architecture | None
    precision: str
    predictions: str
    finished: str

    @property
    def site_mean(self) -> Scores:
        """Mean of the sites' scores, each site counted once."""
        return mean_scores(list(self.sites.values()))


class StudyState(Record):
    """`study.json`.

    Attributes
    ----------
    settings : what the study was started with; it goes on only with the same
    latency_ms : by description of a model: median time of one image on one CPU thread
    """

    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    started: str
    updated: str
    settings: dict[str, ConfigScalar]
    records: list[ArmRecord] = Field(default_factory=list)
    latency_ms: dict[str, float] = Field(default_factory=dict)
    tuned: dict[str, ConfigScalar] | None = None


def mean_scores(scores: list[Scores]) -> Scores:
    """Return the mean of each figure over those that have it."""

    def mean(values: list[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return sum(found) / len(found) if found else None

    return Scores(
        n=round(sum(score.n for score in scores) / len(scores)),
        accuracy=mean([score.accuracy for score in scores]),
        balanced_accuracy=mean([score.balanced_accuracy for score in scores]),
        macro_auc=mean([score.macro_auc for score in scores]),
        ece=mean([score.ece for score in scores]),
    )
