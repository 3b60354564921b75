"""A site's part in a secure sum: what it takes part in, what it keeps between the messages, and what it answers only once.

Whoever coordinates is not trusted with anything here. With a site's keys signed, and its partners' known from site.yaml, it
can't take a partner's place. From two sums over nearly the same model, one of them without one site, the numbers of that site
would follow: so a site remembers over which sites it has unmasked sums, and refuses one that would single a site out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field

from chainward_client.kept_records import locked, read_kept, write_kept
from chainward_client.site_config import SecureSums
from chainward_shared.bounds import PositiveFraction
from chainward_shared.errors import PolicyRefusal, ProtocolError
from chainward_shared.outside import SiteId
from chainward_shared.privacy.signing import fingerprint as key_fingerprint
from chainward_shared.protocol import FEWEST_SITES, MOST_WEIGHT, Offer, Round, SumShares, SumTask, SumUnmasking
from chainward_shared.secure_sums import Secrets, fewest_answers, is_genuine, masked, offered, opened, shares_for_others
from chainward_shared.words import listed

logger = logging.getLogger("chainward.client")


Kind = Literal["statistics", "students", "scores"]
"""Of which numbers a sum is: from sums of two kinds no difference can be taken."""


class _Sets(BaseModel):
    """Of each kind of sum the sets of sites; `sets`: of statistics; `students`: with the weight of each site in the mean."""

    model_config = ConfigDict(extra="forbid")

    sets: list[list[SiteId]] = Field(default_factory=list)
    scores: list[list[SiteId]] = Field(default_factory=list)
    students: list[dict[SiteId, PositiveFraction]] = Field(default_factory=list)

    def weights(self, kind: Kind) -> list[dict[str, float]]:
        if kind == "students":
            return [dict(one) for one in self.students]
        return [dict.fromkeys(one, 1.0) for one in (self.sets if kind == "statistics" else self.scores)]

    def add(self, weights: Mapping[str, float], kind: Kind) -> None:
        if kind == "students":
            self.students.append(dict(weights))
        else:
            (self.sets if kind == "statistics" else self.scores).append(sorted(weights))


class _Kept(BaseModel):
    """What a site keeps of a round. `secrets` are forgotten when the masks have been taken off.

    `unmasked`: over which sites an earlier attempt was unmasked, of the very same numbers.
    """

    model_config = ConfigDict(extra="forbid")

    round: Round
    secrets: Secrets | None
    offers: list[Offer] | None = None
    shares: SumShares | None = None
    received: dict[SiteId, str] | None = None
    kind: Kind = "statistics"
    unmasking: SumUnmasking | None = None
    unmasked: list[SiteId] | None = None

    @property
    def given(self) -> list[SiteId] | None:
        """Over which sites these numbers have been unmasked, in this attempt or before; None: over none."""
        return self.unmasked if self.unmasking is None else sorted(self.unmasking.seeds)


@dataclass(frozen=True)
class Participation:
    """One site's part in the secure sum of one task. No other process of the site answers for this sum meanwhile: two could
    each unmask another one.

    Attributes
    ----------
    file : where it is kept between the messages, of which each may reach another process
    given : where the site remembers over which sites it has unmasked sums, in all runs
    site : id of the site
    terms : what the site takes part in; None in a simulation, whose sites know each other
    identity : returns the key that the site signs with; None in a simulation
    """

    file: Path
    given: Path
    site: str
    terms: SecureSums | None
    identity: Callable[[], Ed25519PrivateKey] | None

    def offer(self, round_: Round) -> Offer:
        """Take part in a round: return public keys for it. A later attempt ends the ones before it.

        Raises
        ------
        PolicyRefusal
            The site's terms don't allow it.
        ProtocolError
            It is another round than the one that the site has begun.
        """
        self._admit(round_)
        with locked(self.file):
            kept = read_kept(self.file, _Kept)
            if kept is None or kept.round.attempt < round_.attempt:
                kept = _Kept(round=round_, secrets=Secrets.new(), unmasked=None if kept is None else kept.given)
                write_kept(self.file, kept)
        secrets = self._secrets(kept)
        self._same(kept, round_)
        return offered(secrets, round_, self.site, self.identity() if self.identity else None)

    def share(self, round_: Round, offers: Sequence[Offer]) -> SumShares:
        """Return the shares of the site's secrets for each of the sites that take part.

        Raises
        ------
        PolicyRefusal
            They are too few, or one of them is not who it says.
        ProtocolError
            The site was given other keys before.
        """
        with locked(self.file):
            kept = self._begun(round_)
            if kept.shares is None:
                self._check_offers(kept, offers)
                shares = shares_for_others(self._secrets(kept), round_, self.site, offers)
                kept.offers, kept.shares = list(offers), SumShares(site=self.site, shares=shares)
                write_kept(self.file, kept)
            elif kept.offers != list(offers):
                raise ProtocolError(f"site '{self.site}' has shared its secrets out among other keys in this round")
            return kept.shares

    def noise_from(self, round_: Round) -> int:
        """Return the noise of how many sites may be taken together in a round: never of more than must answer in the end."""
        return round_.threshold if self.terms is None else min(self.terms.noise_from, round_.threshold)

    def mask(
        self, round_: Round, received: dict[str, str], numbers: Callable[[], np.ndarray], kind: Kind = "statistics"
    ) -> np.ndarray:
        """Return the site's numbers, masked, uint64.

        Parameters
        ----------
        received : what the others have sent this site, by sender
        numbers : returns the numbers, fixed-point
        kind : of which they are

        Raises
        ------
        PolicyRefusal
            Too few sites take part.
        ProtocolError
            The shares can't be read, or the site was given others before.
        """
        with locked(self.file):
            kept = self._begun(round_)
            if kept.offers is None:
                raise ProtocolError(f"site '{self.site}' has not shared its secrets out in this round yet")
            if kept.received is None:
                if strangers := sorted(set(received) - {offer.site for offer in kept.offers}):
                    raise ProtocolError(f"there are shares of site '{strangers[0]}', which takes no part in this round")
                self._enough(round_, received, "have sent shares")
                opened(self._secrets(kept), self.site, kept.offers, received)
                kept.received, kept.kind = dict(received), kind
                write_kept(self.file, kept)
            elif kept.received != dict(received):
                raise ProtocolError(f"site '{self.site}' was given other shares in this round before")
        return masked(numbers(), self._secrets(kept), self.site, kept.offers, kept.received)

    def unmask(self, round_: Round, answered: Sequence[str]) -> SumUnmasking:
        """Return the shares that take the masks off the sum over the sites that have answered. Then nothing more is given.

        Raises
        ------
        PolicyRefusal
            Too few sites have answered, or the site has unmasked another sum.
        ProtocolError
            The site has masked nothing, or is not among those that have answered.
        """
        with locked(self.file):
            kept = self._begun(round_)
            if kept.received is None or kept.offers is None:
                raise ProtocolError(f"site '{self.site}' has masked nothing in this round yet")
            if kept.unmasking is None:
                if unknown := sorted(set(answered) - set(kept.received)):
                    raise ProtocolError(f"site '{unknown[0]}' is said to have answered, and has no part in this sum")
                self._enough(round_, answered, "have answered")
                self._check_weights(round_, answered)
                self._check_shares_of_noise(kept, answered)
                if self.terms is not None and not self.terms.differences:
                    add_given(self.given, {site: round_.weight(site) for site in answered}, kept.kind)
                held = opened(self._secrets(kept), self.site, kept.offers, kept.received)
                kept.unmasking = SumUnmasking(
                    site=self.site,
                    seeds={site: held[site].seed.hex() for site in sorted(answered)},
                    keys={site: held[site].key.hex() for site in sorted(set(held) - set(answered))},
                )
                kept.secrets = None
                write_kept(self.file, kept)
            elif set(kept.unmasking.seeds) != set(answered):
                raise PolicyRefusal(
                    f"site '{self.site}' has unmasked the sum '{round_.hop}' over other sites; it does so once"
                )
            return kept.unmasking

    def _admit(self, round_: Round) -> None:
        if self.site not in round_.members or len(set(round_.members)) != len(round_.members):
            raise ProtocolError(f"the members of this sum must be different sites, and '{self.site}' one of them")
        share = 0.5 if self.terms is None else self.terms.threshold
        least = fewest_answers(len(round_.members), share)
        if round_.threshold < least or round_.threshold > len(round_.members):
            raise PolicyRefusal(
                f"this sum can be unmasked by {round_.threshold} of {len(round_.members)} sites; site '{self.site}' wants it "
                f"to take {least} (secure_sums.threshold in its site.yaml, and federation.secure-threshold of the run)"
            )
        self._enough(round_, round_.members, "take part")
        self._check_weights(round_, round_.members)
        if self.terms is None:
            return
        strangers = [site for site in round_.members if site != self.site and site not in self.terms.partners]
        if strangers:
            raise PolicyRefusal(
                f"site '{self.site}' does not know the key of {listed(strangers)} (secure_sums.partners in its site.yaml), so "
                "anyone could stand in for it"
            )

    def _enough(self, round_: Round, sites: Collection[str], what: str) -> None:
        fewest = max(FEWEST_SITES if self.terms is None else self.terms.fewest, round_.threshold)
        if self.site not in sites or len(set(sites)) < fewest:
            raise PolicyRefusal(
                f"{len(set(sites))} sites {what}; site '{self.site}' adds its numbers to those of others where they are at least "
                f"{fewest}, itself among them"
            )

    def _check_weights(self, round_: Round, sites: Collection[str]) -> None:
        site, share = round_.heaviest(sites)
        if share > MOST_WEIGHT * (1 + 1e-6):
            raise PolicyRefusal(
                f"site '{site}' has {share:.0%} of the weight in this sum, from which its numbers would follow roughly; at most "
                f"{MOST_WEIGHT:.0%} is allowed"
            )

    def _check_shares_of_noise(self, kept: _Kept, answered: Collection[str]) -> None:
        """Refuse a second sum over other sites where noise may be shared: their difference has the shares of fewer sites."""
        relies = self.terms is not None and self.terms.noise_from > 1
        if relies and kept.given is not None and kept.given != sorted(answered):
            raise PolicyRefusal(
                f"these numbers were unmasked over {listed(kept.given)} before; with the noise of a sum shared among its sites "
                "(secure_sums.noise_from), they are added up over no others"
            )

    def _check_offers(self, kept: _Kept, offers: Sequence[Offer]) -> None:
        names = [offer.site for offer in offers]
        if len(set(names)) != len(names) or not set(names) <= set(kept.round.members):
            raise ProtocolError("the keys must be those of different members of this sum")
        self._enough(kept.round, names, "have named their keys")
        keys = [key for offer in offers for key in (offer.channel, offer.mask)]
        if len(set(keys)) != len(keys):
            raise ProtocolError("two of the keys are the same")
        mine = self._secrets(kept)
        for offer in offers:
            if offer.site == self.site:
                own = offered(mine, kept.round, self.site)
                if (offer.channel, offer.mask) != (own.channel, own.mask):
                    raise ProtocolError(f"these are not the keys that site '{self.site}' has named")
            elif self.terms is not None:
                self._recognise(offer, kept.round)

    def _recognise(self, offer: Offer, round_: Round) -> None:
        assert self.terms is not None
        known = self.terms.partners.get(offer.site, "")
        if not is_genuine(offer, round_) or offer.identity is None or key_fingerprint(offer.identity) != known:
            raise PolicyRefusal(
                f"the keys of site '{offer.site}' are not signed by the key that site '{self.site}' knows it by ({known}); "
                "somebody may be standing in for it, or secure_sums.partners in the site.yaml is out of date"
            )

    def _begun(self, round_: Round) -> _Kept:
        kept = read_kept(self.file, _Kept)
        if kept is None:
            raise ProtocolError(f"site '{self.site}' has named no keys for this sum; it starts with them")
        self._same(kept, round_)
        return kept

    def _same(self, kept: _Kept, round_: Round) -> None:
        if kept.round != round_:
            raise ProtocolError(f"site '{self.site}' takes part in another round of the sum '{round_.hop}'")

    def _secrets(self, kept: _Kept) -> Secrets:
        if kept.secrets is None:
            raise ProtocolError(f"for site '{self.site}' this round of the sum '{kept.round.hop}' is over")
        return kept.secrets


def kind_of_sum(task: SumTask) -> Kind:
    """Return which numbers a task adds up."""
    return "students" if task.student else "scores" if task.scores else "statistics"


def add_given(file: Path, weights: Mapping[str, float], kind: Kind) -> None:
    """Note a sum that is unmasked, unless it and some of those known are together the numbers of a single site.

    Parameters
    ----------
    file : where the site remembers them
    weights : what the numbers of each site in the sum were multiplied by

    Raises
    ------
    PolicyRefusal
        They are.
    StoreError
        The file can't be read or written.
    """
    with locked(file):
        known = read_kept(file, _Sets) or _Sets()
        sums, new = known.weights(kind), dict(sorted(weights.items()))
        if new in sums:
            return
        if alone := singled_out([*sums, new]):
            raise PolicyRefusal(
                f"from this sum and earlier ones the numbers of site '{alone}' alone would follow if the models are alike; "
                "wait until the same sites are there as before, with the same weights (or set secure_sums.differences: true "
                "in each site.yaml)"
            )
        known.add(new, kind)
        write_kept(file, known)


def singled_out(sums: Sequence[Mapping[str, float]]) -> str | None:
    """Return a site whose numbers alone are a combination of these sums, of sites times weights; None where there is none."""
    sites = sorted({site for weights in sums for site in weights})
    rows = np.array([[weights.get(site, 0.0) / max(weights.values()) for site in sites] for weights in sums])
    rank = np.linalg.matrix_rank(rows)
    for site, alone in zip(sites, np.eye(len(sites)), strict=True):
        if np.linalg.matrix_rank(np.vstack([rows, alone])) == rank:
            return site
    return None
