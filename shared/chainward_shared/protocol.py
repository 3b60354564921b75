"""The messages between coordinator and sites: typed records, to and from Flower's `RecordDict`.

Every message is one pydantic model, carried as JSON, and at most the arrays that its kind may carry. What isn't listed
in `ARRAYS` for a kind can't be packed, and is refused on arrival: no tensor of a privileged teacher has a name here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chainward_shared import __version__
from chainward_shared.bounds import LabelSkew, Location, PositiveFraction, Seed, Sha256, SiteCount, SiteIndex, Threads
from chainward_shared.errors import ProtocolError
from chainward_shared.evaluation.localisation import LocalisationSums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.hops import scores_key, student_key
from chainward_shared.models import Architecture
from chainward_shared.outside import (
    MAX_SITES,
    Base64,
    Count,
    Digest,
    Fraction,
    HopKey,
    Line,
    Lines,
    Loss,
    Name,
    PerClass,
    PerEpoch,
    RunId,
    Seconds,
    SiteId,
    Word,
)
from chainward_shared.privacy.entries import Head
from chainward_shared.privacy.plan import PrivatePlan
from chainward_shared.privacy.policy import MetricsRelease, PrivacyPolicy, Terms
from chainward_shared.privacy.statements import Statement
from chainward_shared.recipes import MAX_ENSEMBLE, LinkRecipe, StudentRecipe
from chainward_shared.task import Task
from chainward_shared.words import first_problem

PROTOCOL_VERSION = 4


MAX_BODY = 2**23
"""Characters of a message's body: a thousand times what a usual one has. Arrays are not among them."""


Split = Literal["train", "val", "test"]


class Body(BaseModel):
    """Base of the messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    KIND: ClassVar[str]
    ARRAYS: ClassVar[frozenset[str]] = frozenset()
    """Names of the array records that may travel with this kind of message."""


class SimulatedSite(Body):
    """Which simulated hospital a node shall play, and where it finds everything. Only simulations send it."""

    KIND: ClassVar[str] = "simulated-site"

    index: SiteIndex
    source: Location
    num_sites: SiteCount
    label_skew: LabelSkew
    seed: Seed
    state_dir: Location
    policy: PrivacyPolicy | None = None


class HelloRequest(Body):
    """Who is there? A simulated node also says which sites the data source has. `nonce`: 32 random bytes, which a deployed
    site signs with its own key."""

    KIND: ClassVar[str] = "hello-request"

    source: Location
    num_sites: SiteCount
    label_skew: LabelSkew
    nonce: Digest | Literal[""] = ""


class Hello(Body):
    """A node's answer. `site`: its id where it knows it from its own site.yaml; None for a simulated node, which says
    instead which sites the data source has, or what is wrong with it (`problem`). `key`, `signature`: by which a deployed site is
    known again; see `identity`."""

    KIND: ClassVar[str] = "hello"

    site: SiteId | None
    simulated_sites: list[SiteId] = Field(default_factory=list, max_length=MAX_SITES)
    problem: Line | None = None
    partition: Count | None = None
    version: Name = __version__
    key: Digest | None = None
    signature: Base64 | None = None


class CardRequest(Body):
    """Describe your data."""

    KIND: ClassVar[str] = "card-request"

    simulated: SimulatedSite | None = None


class AtWorkRequest(Body):
    """Is anyone at the site at work on this? `task`: the `fingerprint` of a request that was sent and not answered."""

    KIND: ClassVar[str] = "at-work-request"

    run_id: RunId
    task: Sha256


class AtWork(Body):
    """The site's answer: whether one of its processes is at work on the task."""

    KIND: ClassVar[str] = "at-work"

    site: SiteId
    at_work: bool


class SitePrivacy(BaseModel):
    """What a site says of its privacy policy: its terms, whether it refuses runs without privacy, and how far its ledger
    goes; None where the ledger can't be read, which the site's own log explains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    terms: Terms
    required: bool
    head: Head | None


class SiteCard(Body):
    """What a site says of its data when it joins. `class_counts`: per split, in the order of `classes`; multi-label: the
    images with each finding. A site with a privacy policy (`privacy`) whose metrics are not "exact" declares the units of
    its training data in `train`, and nothing of the rest: None, no counts, no notes."""

    KIND: ClassVar[str] = "site-card"

    site: SiteId
    task: Task = "single"
    classes: PerClass[Name]
    image_size: Count
    channels: Count
    train: Count
    val: Count | None
    test: Count | None
    class_counts: dict[Split, PerClass[Count]] = Field(max_length=3)
    synthetic: bool
    notes: Lines
    privacy: SitePrivacy | None = None


class BaseTask(Body):
    """Have you got the weights that models of this architecture start from? If not, here is a piece of their file.

    `bytes`, `sha256`: of the whole file; `offset`: where the piece that comes along begins; None: none does.
    """

    KIND: ClassVar[str] = "base-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"piece"})

    run_id: RunId
    architecture: Architecture
    bytes: int = Field(ge=1, le=2**40)
    sha256: Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")]
    offset: int | None = Field(None, ge=0, le=2**40)
    simulated: SimulatedSite | None = None

    @model_validator(mode="after")
    def _there_is_a_start(self) -> BaseTask:
        if self.architecture.start is None:
            raise ValueError("the architecture starts from nothing that could be sent")
        return self


class BaseState(Body):
    """How much of a base a site has. `received`: bytes of its file that are there."""

    KIND: ClassVar[str] = "base-state"

    site: SiteId
    complete: bool
    received: int = Field(ge=0, le=2**40)


class LinkTask(Body):
    """Train one link. `hop` names it; `trained_alone`: no predecessor, the comparison of a hospital on its own.

    `seen_head` (also of other tasks): how far the coordinator has seen this site's ledger go, so that the site notices when
    an older copy was put back.
    """

    KIND: ClassVar[str] = "link-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"predecessor"})

    run_id: RunId
    hop: HopKey
    strand: Annotated[int, Field(ge=0, lt=512)]
    lap: Annotated[int, Field(ge=0, lt=100)]
    trained_alone: bool = False
    architecture: Architecture
    recipe: LinkRecipe
    predecessor_digest: Sha256 | None = None
    seen_head: Head | None = None
    simulated: SimulatedSite | None = None


class TrainingLog(BaseModel):
    """How one training went; lists hold one value per epoch, `seconds` is the whole of it.

    `images` counts labelled images times epochs; `unlabelled`: images without labels that were used beside them.
    `attention`, `unlabelled_loss`, `privileged`: the mean of that term of the loss, unweighted; empty where it is not used.
    `privacy`: the plan of a private training, of which nothing else but `seconds` tells anything: the lists are empty and
    `images` is what was planned. `notes`: what the site switched off, a line each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Count
    steps: Count
    images: Count
    unlabelled: Count = 0
    loss: PerEpoch[Loss]
    temperature: PerEpoch[Loss] = Field(default_factory=list)
    teacher_trust: PerEpoch[Loss] = Field(default_factory=list)
    attention: PerEpoch[Loss] = Field(default_factory=list)
    unlabelled_loss: PerEpoch[Loss] = Field(default_factory=list)
    privileged: PerEpoch[Loss] = Field(default_factory=list)
    seconds: Seconds
    precision: Word
    privacy: PrivatePlan | None = None
    notes: Lines = Field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Images that went through training per second; 0 where no time was measured."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


class LinkResult(Body):
    """The refined model of a link. `statement`: what the site has spent, signed; None where it trained without privacy."""

    KIND: ClassVar[str] = "link-result"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"model"})

    hop: HopKey
    site: SiteId
    digest: Digest
    training: TrainingLog
    statement: Statement | None = None


class StudentTask(Body):
    """Train the compact student for one round. `auxiliary` is sent until the site has finished a round of its own.

    `large_digests`: of the large models that teach the student, which come as the arrays `large_0`, `large_1`, ...; all of
    `large_architecture`. None where the recipe gives them no weight.
    """

    KIND: ClassVar[str] = "student-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"student", "auxiliary", *map("large_{}".format, range(MAX_ENSEMBLE))})

    run_id: RunId
    round: Annotated[int, Field(ge=1, le=20_000)]
    architecture: Architecture
    recipe: StudentRecipe
    student_digest: Sha256
    auxiliary_digest: Sha256 | None = None
    large_architecture: Architecture | None = None
    large_digests: list[Sha256] = Field(default_factory=list, max_length=MAX_ENSEMBLE)
    seen_head: Head | None = None
    simulated: SimulatedSite | None = None

    @property
    def hop(self) -> str:
        """Name of this piece of work."""
        return student_key(self.round)

    @model_validator(mode="after")
    def _large_models_are_complete(self) -> StudentTask:
        wanted, sent = self.recipe.large_weight > 0, bool(self.large_digests)
        if (wanted, wanted) != (sent, self.large_architecture is not None):
            raise ValueError(
                f"large models with weight {self.recipe.large_weight:g}, {len(self.large_digests)} digests and "
                f"{'an' if self.large_architecture else 'no'} architecture: all of them belong together"
            )
        return self


class StudentResult(Body):
    """A site's student of one round. The auxiliary teacher stays at the site; `auxiliary_kept` tells what fraction of
    its weights at the round's start the moving average has left in it (None in fine-tuning). `statement`: as of a link. Its
    weight in the average is not in it: that is what the site's card has declared."""

    KIND: ClassVar[str] = "student-result"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"student"})

    round: Count
    site: SiteId
    digest: Digest
    training: TrainingLog
    auxiliary_kept: Fraction | None
    statement: Statement | None = None


class EvaluateTask(Body):
    """Score a model on the site's own images of `splits`; `localisation`: also its attention on the test images' regions."""

    KIND: ClassVar[str] = "evaluate-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"model"})

    run_id: RunId
    architecture: Architecture
    splits: Annotated[list[Literal["val", "test"]], Field(max_length=2)]
    localisation: bool = False
    threads: Threads
    digest: Sha256
    seen_head: Head | None = None
    simulated: SimulatedSite | None = None

    @property
    def hop(self) -> str:
        """Name of this piece of work: the model, and what of it is asked."""
        return scores_key(self.splits, self.digest)


class EvaluateResult(Body):
    """Scores of each split, and the counts from which scores over several sites follow (`counts_<split>` arrays).

    `release`: as they are, with noise (then only what follows from the confusion matrix), or withheld: without any. With
    noise that was charged to the site's budget comes its `statement`.

    `localisation`: how well the model's attention finds the regions of interest, summed over the test images; None where it
    was not asked for or the site has no regions. No map, mask or image's own value is sent."""

    KIND: ClassVar[str] = "evaluate-result"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"counts_val", "counts_test"})

    site: SiteId
    scores: dict[Split, Scores] = Field(max_length=3)
    localisation: LocalisationSums | None = None
    release: MetricsRelease = "exact"
    statement: Statement | None = None


class StatisticsTask(Body):
    """Send the sums over a model's embeddings of the site's labelled training images, and of its validation images.

    `label_fraction`, `seed`: which training images have a label, as in a link.
    """

    KIND: ClassVar[str] = "statistics-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"model"})

    run_id: RunId
    hop: HopKey
    architecture: Architecture
    label_fraction: PositiveFraction
    seed: Seed
    threads: Threads
    digest: Sha256
    simulated: SimulatedSite | None = None


class StatisticsResult(Body):
    """The sums of one site, as the tensors of `discriminant.HeadSums` for "train" and "val". `digest`: of these tensors;
    `images`, `validation`: over how many images they go."""

    KIND: ClassVar[str] = "statistics-result"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"sums"})

    hop: HopKey
    site: SiteId
    digest: Digest
    images: Count
    validation: Count


class Refusal(Body):
    """A site's word that it can't or won't, in one line for a person. `final`: its policy says no; asking again is no use."""

    KIND: ClassVar[str] = "refusal"

    reason: Line
    final: bool = False


def fingerprint(task: Body) -> str:
    """Return the SHA-256 of all that decides the answer to a task: a request with the same one has the same answer."""
    # not what comes along to be sure: an auxiliary teacher is sent again although the site has its own
    deciding = task.model_dump_json(exclude={"simulated", "seen_head", "auxiliary_digest"})
    return hashlib.sha256(f"{task.KIND} {deciding}".encode()).hexdigest()


B = TypeVar("B", bound=Body)

_ENVELOPE = "chainward"


def pack(body: Body, arrays: Mapping[str, ArrayRecord] | None = None) -> RecordDict:
    """Return `body` and its arrays as the content of a Flower message.

    Raises
    ------
    ProtocolError
        An array record is not on the allow-list of this kind of message.
    """
    arrays = dict(arrays or {})
    if foreign := sorted(set(arrays) - body.ARRAYS):
        raise ProtocolError(f"a message '{body.KIND}' may not carry the arrays '{foreign[0]}'")
    envelope = ConfigRecord({"protocol": PROTOCOL_VERSION, "kind": body.KIND, "body": body.model_dump_json()})
    return RecordDict({_ENVELOPE: envelope, **arrays})


def kind_of(content: RecordDict) -> str:
    """Return the kind of a packed message.

    Raises
    ------
    ProtocolError
        Not one of ours, or of another protocol version.
    """
    envelope = content.config_records.get(_ENVELOPE)
    if envelope is None or "kind" not in envelope or "body" not in envelope:
        raise ProtocolError(
            "a message without Chainward's envelope arrived; is another app running on this federation?"
        )
    if envelope.get("protocol") != PROTOCOL_VERSION:
        raise ProtocolError(
            f"a message of protocol version {envelope.get('protocol')!r} arrived; this side (chainward {__version__}) "
            f"speaks {PROTOCOL_VERSION}; install the same version on both sides"
        )
    return str(envelope["kind"])


def unpack(content: RecordDict, expected: type[B]) -> tuple[B, dict[str, ArrayRecord]]:
    """Return the typed body of a message and its array records by name.

    Raises
    ------
    ProtocolError
        Another kind, a field that is missing or wrong, or arrays that this kind may not carry; a `Refusal` raises
        `SiteRefusal` with the site's own words.
    """
    kind = kind_of(content)
    text = str(content.config_records[_ENVELOPE]["body"])
    if kind == Refusal.KIND and expected is not Refusal:
        refusal = _parse(text, Refusal)
        raise SiteRefusal(refusal.reason, final=refusal.final)
    if kind != expected.KIND:
        raise ProtocolError(f"a message '{kind}' arrived where '{expected.KIND}' was expected")
    body = _parse(text, expected)
    arrays = dict(content.array_records)
    if foreign := sorted(set(arrays) - expected.ARRAYS):
        raise ProtocolError(f"a message '{kind}' carries the arrays '{foreign[0]}', which it may not")
    return body, arrays


def _parse(text: str, expected: type[B]) -> B:
    if len(text) > MAX_BODY:
        raise ProtocolError(f"a message '{expected.KIND}' of {len(text)} characters; at most {MAX_BODY} are read")
    try:
        return expected.model_validate_json(text)
    except ValidationError as error:
        raise ProtocolError(f"a message '{expected.KIND}' with a bad field: {first_problem(error)}") from error


class SiteRefusal(ProtocolError):
    """A site refused; the message is its own one line. `final`: asking again is no use."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final
