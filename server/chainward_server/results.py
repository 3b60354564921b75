"""`metrics.json`: everything a run measured, as typed records. Its `schema` is a contract; the number counts its versions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from chainward_shared.evaluation.localisation import LocalisationScores
from chainward_shared.evaluation.operating import THRESHOLDS, Calibration, OperatingPoint, ReliabilityBin, Tally
from chainward_shared.evaluation.scores import Scores
from chainward_shared.hops import alone_key, link_key, student_key
from chainward_shared.outside import (
    MAX_RECORDS,
    MAX_SITES,
    BySite,
    Bytes,
    Count,
    Digest,
    Figure,
    Fraction,
    HopKey,
    Line,
    Lines,
    Name,
    PerClass,
    RunId,
    Seconds,
    Seed,
    SiteId,
    Word,
)
from chainward_shared.preparation import Preparation
from chainward_shared.task import Split, Task
from chainward_shared.training_log import TrainingLog

LinkStatus = Literal["done", "retried", "skipped", "refused", "failed"]

T = TypeVar("T")
ByModel = Annotated[dict[Word, T], Field(max_length=8)]


class Record(BaseModel):
    """Base: unknown fields are refused, so that a damaged or foreign file is noticed."""

    model_config = ConfigDict(extra="forbid")


class Progressing(Record):
    """Base of what is filled in while the work is under way: what is set later is checked like what is given at first."""

    model_config = ConfigDict(validate_assignment=True)


class SiteScores(Record):
    """One model on every site's own images, and on all of them together. `together`: sites that are in `pooled` and whose own
    scores nobody has seen."""

    sites: BySite[Scores]
    pooled: Scores
    together: list[SiteId] = Field(default_factory=list, max_length=MAX_SITES)


class ClassScores(Record):
    """One class on some test images. `decided`: as the model decides, by its largest probability or, multi-label, at 0.5;
    `at_point`: from its operating point on, None where it has none or the site's scores carry noise."""

    decided: Tally
    at_point: Tally | None = None


class ByClass(Record):
    """One final model, class by class.

    `calibration`, `points`: chosen on the validation images of all sites whose counts could be seen; the rest is of test
    images. `sites`, `pooled`: in the order of the classes. `as_given`, `as_calibrated`: how often decisions of like probability
    are right, before and after the temperature. `net_benefit`: of each class, at the probabilities `operating.THRESHOLDS`,
    calibrated where there is a temperature.
    """

    calibration: Calibration
    points: PerClass[OperatingPoint]
    sites: BySite[PerClass[ClassScores]] = Field(default_factory=dict)
    pooled: PerClass[ClassScores] = Field(default_factory=list)
    as_given: list[ReliabilityBin] = Field(default_factory=list, max_length=100)
    as_calibrated: list[ReliabilityBin] = Field(default_factory=list, max_length=100)
    net_benefit: PerClass[Annotated[list[Figure], Field(min_length=len(THRESHOLDS), max_length=len(THRESHOLDS))]] = (
        Field(default_factory=list)
    )


class SiteLocalisation(Record):
    """How well one model's attention finds the regions of interest: at every site that has some, and over all of them."""

    sites: BySite[LocalisationScores]
    pooled: LocalisationScores


class SiteSummary(Record):
    """What a site said of its data when it joined. `class_counts`: per split, in the order of the classes; multi-label: the
    images with each finding. A site with a privacy policy that withholds them: `train` is what it declares, the others
    None, and there are no counts. `preparation`: how its images become what a model sees; None in runs of earlier builds.
    `encoder`: digest of the language encoder that reads its reports."""

    site: SiteId
    train: Count
    val: Count | None
    test: Count | None
    class_counts: dict[Split, PerClass[Count]] = Field(default_factory=dict, max_length=3)
    notes: Lines = Field(default_factory=list)
    preparation: Preparation | None = None
    encoder: Digest | None = None


class DataSummary(Record):
    """What the run was trained and scored on. `notes`: what makes scores on it too good, over all sites."""

    source: Line
    synthetic: bool
    task: Task = "single"
    classes: PerClass[Name]
    image_size: Count
    channels: Count
    sites: list[SiteSummary] = Field(max_length=MAX_SITES)
    notes: Lines = Field(default_factory=list)


def named(source: str) -> str:
    """Return the name of a simulation's data for people: its data file with the folder, since most are called data.yaml."""
    if source == "phantom":
        return "phantoms"
    path = Path(source)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


class LinkMetrics(Record):
    """The model that left a link: on every site's test images, and on the validation images, pooled and at every site."""

    test: SiteScores
    validation: Scores
    validation_sites: BySite[Scores] = Field(default_factory=dict)


class LinkRecord(Progressing):
    """One hop of the chain. `predecessor`: site whose model it started from; None for the first. `reason`: what went
    wrong, for every status but "done". `unreached`: the site, or the process that simulates it, could not be reached."""

    strand: Count
    lap: Count
    step: Count
    site: SiteId
    predecessor: SiteId | None
    status: LinkStatus
    attempts: Count
    seconds: Seconds
    bytes_down: Bytes
    bytes_up: Bytes
    reason: Line | None = None
    unreached: bool = False
    training: TrainingLog | None = None
    metrics: LinkMetrics | None = None

    @property
    def key(self) -> str:
        """Name of this piece of work in `run.json`, and of its model file."""
        return link_key(self.strand, self.lap, self.step)

    @property
    def succeeded(self) -> bool:
        """Whether a model came out of it, with which the chain went on."""
        return self.status in ("done", "retried")


class AloneRecord(Record):
    """A hospital that trained without the others, with the budget of a link: what the chain is compared with."""

    site: SiteId
    status: LinkStatus
    seconds: Seconds
    reason: Line | None = None
    unreached: bool = False
    metrics: LinkMetrics | None = None

    @property
    def key(self) -> str:
        """Name of this piece of work in `run.json`."""
        return alone_key(self.site)


class Influence(Record):
    """What one site's model was in an average. `share`: of the weight; `moved`: length of its update as it came, in
    lengths of the model that it started from; `factor`: by which that was shortened, 1: it was not."""

    share: Fraction
    moved: Figure
    factor: Fraction = 1.0

    @property
    def moved_the_average(self) -> float:
        """How far the site alone moved the average, in lengths of the model; a bound where a robust mean was taken."""
        return self.share * self.moved * self.factor


class StudentRound(Progressing):
    """One round of the compact students. `failed`: site -> why it is missing from the average. `unreached`: those of them that
    could not be reached. `auxiliary_kept`: fraction of its own selection that the auxiliary teacher still holds after this
    round, mean over the sites; None in fine-tuning. `secure`: nobody has seen the student of a single site. `influence`: what
    part each site had in the average; empty where that is so, and in runs of earlier builds."""

    round: Count
    stage: Literal["distil", "finetune"]
    sites: list[SiteId] = Field(max_length=MAX_SITES)
    failed: BySite[Line] = Field(default_factory=dict)
    unreached: list[SiteId] = Field(default_factory=list, max_length=MAX_SITES)
    seconds: Seconds
    bytes_down: Bytes
    bytes_up: Bytes
    validation: Scores | None = None
    auxiliary_kept: Fraction | None = None
    secure: bool = False
    influence: BySite[Influence] = Field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of this piece of work in `run.json`, and of its model file."""
        return student_key(self.round)


class LargestInfluence(NamedTuple):
    """The site that moved an average of students furthest, the round's number, and what part it had in it."""

    site: str
    round: int
    part: Influence


def largest_influence(rounds: Sequence[StudentRound]) -> LargestInfluence | None:
    """Return the largest influence that any site had on the students; None where nothing is known of it."""
    found = [LargestInfluence(site, one.round, part) for one in rounds for site, part in one.influence.items()]
    return max(found, key=lambda one: one.part.moved_the_average, default=None)


class HeadRecord(Progressing):
    """One statistics round: the model's head, out of the sums of all sites. `failed`: site -> why it is missing from them;
    `secure`: nobody has seen those of a single site; `images`, `validation`: over how many they go; `shrinkage`: of the
    covariance; `temperature`: of the logits; `metrics`: of the model with that head."""

    key: HopKey
    sites: list[SiteId] = Field(max_length=MAX_SITES)
    failed: BySite[Line] = Field(default_factory=dict)
    unreached: list[SiteId] = Field(default_factory=list, max_length=MAX_SITES)
    secure: bool = False
    images: Count
    validation: Count
    shrinkage: Fraction = 0.0
    temperature: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    seconds: Seconds
    bytes_down: Bytes
    bytes_up: Bytes
    metrics: LinkMetrics | None = None


class ModelSummary(Record):
    """Size and speed of a model. `latency_ms`: median of one image on this machine's CPU, one thread."""

    architecture: Name
    parameters: Bytes
    file_bytes: Bytes
    latency_ms: Seconds


class StartSummary(Record):
    """The pretrained weights that a run started from.

    `part`: which part of the model was trained; `trained`: that part, as a fraction of the parameters; `bytes_sent`: to each
    site that had not got the weights, 0 to the others, in the last part of the run.
    """

    name: Name
    sha256: Digest
    licence: Name
    source: Line
    part: Word
    trained: Fraction
    bytes_sent: BySite[Bytes]


class Results(Record):
    """The whole of `metrics.json`.

    `start`: None where the chain began at random. `final` maps "chain" and "student" to their scores, `by_class` to these class
    by class, with calibration and operating points; `timings` maps a phase to seconds. `localization`: the same names, on the
    regions of interest of the test images; empty where no site has any. `make_up`: hops whose site was not reached, for each
    of which a resumed run has a further one at the end of the chain. `released`: the piece of work whose model is the chain's;
    None where the last hop's is, the only choice by default.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    run_id: RunId
    seed: Seed
    data: DataSummary
    start: StartSummary | None = None
    links: list[LinkRecord] = Field(default_factory=list, max_length=MAX_RECORDS)
    make_up: list[HopKey] = Field(default_factory=list, max_length=MAX_RECORDS)
    heads: list[HeadRecord] = Field(default_factory=list, max_length=MAX_RECORDS)
    alone: list[AloneRecord] = Field(default_factory=list, max_length=MAX_SITES)
    student_rounds: list[StudentRound] = Field(default_factory=list, max_length=MAX_RECORDS)
    released: HopKey | None = None
    models: ByModel[ModelSummary] = Field(default_factory=dict)
    final: ByModel[SiteScores] = Field(default_factory=dict)
    by_class: ByModel[ByClass] = Field(default_factory=dict)
    localization: ByModel[SiteLocalisation] = Field(default_factory=dict)
    timings: dict[Word, Seconds] = Field(default_factory=dict, max_length=32)

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
