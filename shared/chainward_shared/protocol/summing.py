"""A secure sum (`chainward_shared.secure_sums`), message by message: keys, shares, masked numbers, and what unmasks their sum."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from chainward_shared.bounds import FEWEST_SITES, Sha256
from chainward_shared.outside import MAX_SITES, Base64, BySite, Digest, HopKey, RunId, SiteId
from chainward_shared.protocol.envelope import Body
from chainward_shared.protocol.joining import SimulatedSite
from chainward_shared.protocol.scoring import StatisticsTask

Sealed = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_=-]+$", max_length=2_048)]
"""Shares that one site alone can read."""
Share = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2})+$", max_length=1_024)]


class Round(BaseModel):
    """One secure sum, as all that take part must see it; each signs it with its keys.

    Attributes
    ----------
    task : SHA-256 of what is summed
    attempt : milliseconds since 1970 when it began; a later one has new keys, and ends those before it
    members : the sites that are asked to take part
    threshold : of how many the answers must be there at the end
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: RunId
    hop: HopKey
    task: Sha256
    attempt: int = Field(0, ge=0, lt=2**50)
    members: tuple[SiteId, ...] = Field(min_length=FEWEST_SITES, max_length=MAX_SITES)
    threshold: int = Field(ge=2, le=MAX_SITES)


class Offer(BaseModel):
    """A site's public keys for one round.

    Attributes
    ----------
    channel : for the shares that other sites send it
    mask : for the masks in common with other sites
    identity, signature : the site's own public key, and its signature of round and keys; None in simulations
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    """Send your numbers, masked. `shares`: what the others sent this site; only masks in common with them are added."""

    KIND: ClassVar[str] = "sum-task"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"model"})

    round: Round
    statistics: StatisticsTask
    shares: BySite[Sealed]
    simulated: SimulatedSite | None = None


class MaskedSum(Body):
    """A site's numbers, which without those of the others are noise; nothing else is told of them."""

    KIND: ClassVar[str] = "masked-sum"
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"sum"})

    site: SiteId


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
