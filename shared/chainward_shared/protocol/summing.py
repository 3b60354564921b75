"""A secure sum (`chainward_shared.secure_sums`), message by message: keys, shares, masked numbers, and what unmasks their sum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints, model_validator

from chainward_shared.bounds import FEWEST_SITES, PositiveFraction, Sha256
from chainward_shared.outside import MAX_SITES, Base64, BySite, Digest, Figure, HopKey, Record, RunId, SiteId
from chainward_shared.privacy.statements import Statement
from chainward_shared.protocol.envelope import Body
from chainward_shared.protocol.joining import SimulatedSite
from chainward_shared.protocol.scoring import EvaluateTask, StatisticsTask
from chainward_shared.protocol.training import StudentTask

Sealed = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_=-]+$", max_length=2_048)]
"""Shares that one site alone can read."""
Share = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2})+$", max_length=1_024)]


MOST_WEIGHT = 0.5
"""Of a mean in which one site has more than this share, the coordinator would know roughly what that site sent."""

SumWork = StatisticsTask | StudentTask | EvaluateTask
"""Work whose result is a sum over the sites: of embeddings, of a student's updates, of predictions that were counted."""


class Round(Record):
    """One secure sum, as all that take part must see it; each signs it with its keys.

    Attributes
    ----------
    task : SHA-256 of what is summed
    attempt : milliseconds since 1970 when it began; a later one has new keys, and ends those before it
    members : the sites that are asked to take part
    threshold : of how many the answers must be there at the end
    weights : what each member's numbers are multiplied by, in the order of the members; empty: by 1
    """

    run_id: RunId
    hop: HopKey
    task: Sha256
    attempt: int = Field(0, ge=0, lt=2**50)
    members: tuple[SiteId, ...] = Field(min_length=FEWEST_SITES, max_length=MAX_SITES)
    threshold: int = Field(ge=2, le=MAX_SITES)
    weights: tuple[PositiveFraction, ...] = Field((), max_length=MAX_SITES)

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> Round:
        if len(self.weights) not in (0, len(self.members)):
            raise ValueError(f"{len(self.weights)} weights of {len(self.members)} members; give each one, or none")
        return self

    def weight(self, site: str) -> float:
        """Return what a member's numbers are multiplied by."""
        return self.weights[self.members.index(site)] if self.weights else 1.0

    def heaviest(self, sites: Iterable[str]) -> tuple[str, float]:
        """Return the member that weighs most among `sites`, and its share of their weight."""
        weights = {site: self.weight(site) for site in sites}
        site = max(weights, key=lambda one: weights[one])
        return site, weights[site] / sum(weights.values())


class Offer(Record):
    """A site's public keys for one round.

    Attributes
    ----------
    channel : for the shares that other sites send it
    mask : for the masks in common with other sites
    identity, signature : the site's own public key, and its signature of round and keys; None in simulations
    """

    site: SiteId
    channel: Base64
    mask: Base64
    identity: Digest | None = None
    signature: Base64 | None = None


class SumKeysTask(Body):
    """Take part in a secure sum: name your keys for this round."""

    KIND: ClassVar[str] = "sum-keys-task"

    round: Round
    simulated: SimulatedSite | None = None


class SumKeys(Body):
    """A site's public keys, signed."""

    KIND: ClassVar[str] = "sum-keys"

    offer: Offer


class SumSharesTask(Body):
    """These sites take part: share your secrets out among them."""

    KIND: ClassVar[str] = "sum-shares-task"

    round: Round
    offers: list[Offer] = Field(max_length=MAX_SITES)
    simulated: SimulatedSite | None = None


class SumShares(Body):
    """A site's secrets, a share for each of the others; nobody but that site can read it."""

    KIND: ClassVar[str] = "sum-shares"

    site: SiteId
    shares: BySite[Sealed]


class SumTask(Body):
    """Do one piece of work, and send its numbers, masked. `shares`: what the others sent this site; only masks in common with
    them are added."""

    KIND: ClassVar[str] = "sum-task"
    ARRAYS: ClassVar[frozenset[str]] = StatisticsTask.ARRAYS | StudentTask.ARRAYS | EvaluateTask.ARRAYS

    round: Round
    statistics: StatisticsTask | None = None
    student: StudentTask | None = None
    scores: EvaluateTask | None = None
    shares: BySite[Sealed]
    simulated: SimulatedSite | None = None

    @model_validator(mode="after")
    def _one_piece_of_work(self) -> SumTask:
        if sum(one is not None for one in (self.statistics, self.student, self.scores)) != 1:
            raise ValueError("a secure sum is of statistics, of students or of scores; exactly one of them")
        return self

    @classmethod
    def of(cls, round_: Round, work: SumWork, shares: BySite[Sealed]) -> SumTask:
        """Return the task to do this work."""
        name = {StatisticsTask.KIND: "statistics", StudentTask.KIND: "student", EvaluateTask.KIND: "scores"}[work.KIND]
        return cls(round=round_, shares=shares, **{name: work})

    @property
    def work(self) -> SumWork:
        """What is to be done, for the site that the message says."""
        work = self.statistics or self.student or self.scores
        assert work is not None
        return work.model_copy(update={"simulated": self.simulated})

    @property
    def run_id(self) -> str:
        """The run that it is part of."""
        return self.work.run_id

    @property
    def hop(self) -> str:
        """Name of the piece of work."""
        return self.work.hop


class MaskedSum(Body):
    """A site's numbers, which without those of the others are noise; nothing else is told of them. `noise`, `statement`: of a
    private site, as in the answer to such work outside of a secure sum."""

    KIND: ClassVar[str] = "masked-sum"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"sum"})

    site: SiteId
    noise: Figure = Field(default=0.0, ge=0)
    statement: Statement | None = None


class SumUnmaskTask(Body):
    """These sites have answered: give the shares that take the masks off their sum."""

    KIND: ClassVar[str] = "sum-unmask-task"

    round: Round
    answered: list[SiteId] = Field(max_length=MAX_SITES)
    simulated: SimulatedSite | None = None


class SumUnmasking(Body):
    """Shares of the seeds of those that answered, and of the keys of those that dropped out; never both of one site."""

    KIND: ClassVar[str] = "sum-unmasking"

    site: SiteId
    seeds: BySite[Share]
    keys: BySite[Share]
