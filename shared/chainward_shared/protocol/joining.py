"""How sites and coordinator meet: who is there, what data a site has, and the weights that all start from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from chainward_shared import __version__
from chainward_shared.bounds import LabelSkew, Location, Seed, Sha256, SiteCount, SiteIndex
from chainward_shared.models import Architecture
from chainward_shared.outside import (
    MAX_SITES,
    Base64,
    Count,
    Digest,
    Line,
    Lines,
    Name,
    PerClass,
    Record,
    RunId,
    SiteId,
)
from chainward_shared.preparation import Preparation
from chainward_shared.privacy.entries import Head
from chainward_shared.privacy.policy import PrivacyPolicy, Terms
from chainward_shared.protocol.envelope import Body
from chainward_shared.task import Split, Task


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


class RunTask(Body):
    """Base of what a site is asked to do with its data in a run.

    `seen_head`: how far the coordinator has seen this site's ledger go, so that the site notices when an older copy was put back.
    """

    run_id: RunId
    seen_head: Head | None = None
    simulated: SimulatedSite | None = None


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


class SitePrivacy(Record):
    """What a site says of its privacy policy: its terms, whether it refuses runs without privacy, and how far its ledger
    goes; None where the ledger can't be read, which the site's own log explains."""

    terms: Terms
    required: bool
    head: Head | None


class SiteCard(Body):
    """What a site says of its data when it joins. `class_counts`: per split, in the order of `classes`; multi-label: the
    images with each finding. `preparation`: the settings of its data file by which images become what a model sees. A site with
    a privacy policy (`privacy`) whose metrics are not "exact" declares the units of its training data in `train`, and nothing
    of the rest: None, no counts, no notes. `secure_sums`: it gives sums in secure sums alone. `approval`: whether a person
    there approves every run. `encoder`: digest of the language encoder that reads its reports, where it has one; of files that
    somebody published, nothing of its data."""

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
    preparation: Preparation | None = None
    notes: Lines
    privacy: SitePrivacy | None = None
    secure_sums: bool = False
    approval: bool = False
    encoder: Sha256 | None = None


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
