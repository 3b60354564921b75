"""`metrics.json`: everything a run measured, as typed records. Its `schema` is a contract; the number counts its versions."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from chainward_shared.evaluation.localisation import LocalisationScores
from chainward_shared.evaluation.scores import Scores
from chainward_shared.protocol import TrainingLog
from chainward_shared.task import Task

LinkStatus = Literal["done", "retried", "skipped", "refused", "failed"]


class Record(BaseModel):
    """Base: unknown fields are refused, so that a damaged or foreign file is noticed."""

    model_config = ConfigDict(extra="forbid")


class SiteScores(Record):
    """One model on every site's own images, and on all of them together."""

    sites: dict[str, Scores]
    pooled: Scores


class SiteLocalisation(Record):
    """How well one model's attention finds the regions of interest: at every site that has some, and over all of them."""

    sites: dict[str, LocalisationScores]
    pooled: LocalisationScores


class SiteSummary(Record):
    """What a site said of its data when it joined. `class_counts`: per split, in the order of the classes; multi-label: the
    images with each finding. A site with a privacy policy that withholds them: `train` is what it declares, the others
    None, and there are no counts."""

    site: str
    train: int
    val: int | None
    test: int | None
    class_counts: dict[str, list[int]] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class DataSummary(Record):
    """What the run was trained and scored on."""

    source: str
    synthetic: bool
    task: Task = "single"
    classes: list[str]
    image_size: int
    channels: int
    sites: list[SiteSummary]


class LinkMetrics(Record):
    """The model that left a link: on every site's test images, and on the validation images, pooled and at every site."""

    test: SiteScores
    validation: Scores
    validation_sites: dict[str, Scores] = Field(default_factory=dict)


class LinkRecord(Record):
    """One hop of the chain. `predecessor`: site whose model it started from; None for the first. `reason`: what went
    wrong, for every status but "done"."""

    strand: int
    lap: int
    step: int
    site: str
    predecessor: str | None
    status: LinkStatus
    attempts: int
    seconds: float
    bytes_down: int
    bytes_up: int
    reason: str | None = None
    training: TrainingLog | None = None
    metrics: LinkMetrics | None = None

    @property
    def key(self) -> str:
        """Name of this piece of work in `run.json`, and of its model file."""
        return f"strand-{self.strand}-lap-{self.lap}-step-{self.step}"


class AloneRecord(Record):
    """A hospital that trained without the others, with the budget of a link: what the chain is compared with."""

    site: str
    status: LinkStatus
    seconds: float
    reason: str | None = None
    metrics: LinkMetrics | None = None

    @property
    def key(self) -> str:
        """Name of this piece of work in `run.json`."""
        return f"alone-{self.site}"


class StudentRound(Record):
    """One round of the compact students. `failed`: site -> why it is missing from the average. `auxiliary_kept`: fraction
    of its own selection that the auxiliary teacher still holds after this round, mean over the sites; None in fine-tuning."""

    round: int
    stage: Literal["distil", "finetune"]
    sites: list[str]
    failed: dict[str, str] = Field(default_factory=dict)
    seconds: float
    bytes_down: int
    bytes_up: int
    validation: Scores | None = None
    auxiliary_kept: float | None = None

    @property
    def key(self) -> str:
        """Name of this piece of work in `run.json`, and of its model file."""
        return f"student-round-{self.round}"


class ModelSummary(Record):
    """Size and speed of a model. `latency_ms`: median of one image on this machine's CPU, one thread."""

    architecture: str
    parameters: int
    file_bytes: int
    latency_ms: float


class Results(Record):
    """The whole of `metrics.json`.

    `final` maps "chain" and "student" to their scores; `timings` maps a phase to seconds.
    `localization`: the same names, on the regions of interest of the test images; empty where no site has any.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    run_id: str
    seed: int
    data: DataSummary
    links: list[LinkRecord] = Field(default_factory=list)
    alone: list[AloneRecord] = Field(default_factory=list)
    student_rounds: list[StudentRound] = Field(default_factory=list)
    models: dict[str, ModelSummary] = Field(default_factory=dict)
    final: dict[str, SiteScores] = Field(default_factory=dict)
    localization: dict[str, SiteLocalisation] = Field(default_factory=dict)
    timings: dict[str, float] = Field(default_factory=dict)

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
