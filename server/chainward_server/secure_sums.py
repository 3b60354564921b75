"""The coordinator's part in secure sums: it carries messages between the sites, and sees nothing but what all add up to."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord

from chainward_server.exchange import Exchange
from chainward_server.request import Reply, Request
from chainward_server.sites import Failure, Summed, TooFewSitesError, Work
from chainward_shared.errors import ChainwardError, ProtocolError, WeightsError
from chainward_shared.protocol import (
    FEWEST_SITES,
    MOST_WEIGHT,
    Body,
    MaskedSum,
    Offer,
    Round,
    StatisticsTask,
    SumKeys,
    SumKeysTask,
    SumShares,
    SumSharesTask,
    SumTask,
    SumUnmasking,
    SumUnmaskTask,
    SumWork,
    fingerprint,
)
from chainward_shared.secure_sums import fewest_answers, from_tensor, real_numbers, shaped, unmasked
from chainward_shared.summands import fraction_bits
from chainward_shared.weights import StateDict, from_arrays

logger = logging.getLogger("chainward")

B = TypeVar("B", bound=Body)
Answer = TypeVar("Answer", SumKeys, SumShares, MaskedSum, SumUnmasking)


@dataclass
class SecureSum:
    """One round of a secure sum, from the keys to the sum.

    Parameters
    ----------
    exchange : brings messages to the sites
    work : what each site is asked for, the same of all
    template : names, shapes and dtypes of what is summed
    models : returns the arrays of the models that a site gets with its work
    threshold : share of the sites more than which must be there to unmask the sum
    weights, check : as of `Sites.summed`
    deadline, patience : seconds, as of other requests; `brief`: of the messages that need no work
    """

    exchange: Exchange
    work: Mapping[str, Work[Any]]
    template: StateDict
    models: Callable[[str], Mapping[str, ArrayRecord]]
    threshold: float
    deadline: float
    brief: float
    weights: Mapping[str, float] | None
    check: Callable[[str, MaskedSum], None]
    patience: float = 0.0
    noise: float = 0.0
    failed: dict[str, Failure] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    def run(self) -> Summed:
        """Return the sum over the sites that took part to the end.

        Raises
        ------
        TooFewSitesError
            They were too few.
        """
        started = time.monotonic()
        round_ = self._round()
        offers = self._offers(round_)
        shares = self._shares(round_, offers)
        total, answered = self._masked(round_, shares)
        state = self._unmasked(round_, offers, list(shares), total, answered)
        seconds = time.monotonic() - started
        return Summed(
            state, answered, list(round_.members), self.noise, self.failed, seconds, self.bytes_down, self.bytes_up
        )

    @property
    def _task(self) -> SumWork:
        work: SumWork = next(iter(self.work.values())).task
        return work

    def _round(self) -> Round:
        task = self._task
        members = tuple(self.work)
        if len(members) < FEWEST_SITES:
            raise TooFewSitesError(f"a secure sum takes {FEWEST_SITES} sites, there are {len(members)}", {})
        return Round(
            run_id=task.run_id,
            hop=task.hop,
            task=fingerprint(task),
            attempt=int(1000 * time.time()),  # later than any before, also after the coordinator was restarted
            members=members,
            threshold=self._fewest(members),
            weights=() if self.weights is None else tuple(self.weights[site] for site in members),
        )

    def _fewest(self, members: Sequence[str]) -> int:
        """Return how many must answer: of a sum to which each adds a share of the noise, those whose shares are enough."""
        together = (
            task.shared_noise.sites if isinstance(task := self._task, StatisticsTask) and task.shared_noise else 0
        )
        if together > len(members):
            raise TooFewSitesError(f"the noise of this sum takes {together} sites, there are {len(members)}", {})
        return max(fewest_answers(len(members), self.threshold), together)

    def _offers(self, round_: Round) -> list[Offer]:
        requests = {site: Request("query", self._for(site, SumKeysTask(round=round_))) for site in round_.members}
        offers = [reply.body.offer for _, reply in self._ask(requests, SumKeys, self.brief, self.patience)]
        self._enough(round_, offers, "have named keys")
        return offers

    def _shares(self, round_: Round, offers: Sequence[Offer]) -> dict[str, SumShares]:
        task, names = SumSharesTask(round=round_, offers=list(offers)), {offer.site for offer in offers}
        requests = {offer.site: Request("query", self._for(offer.site, task)) for offer in offers}
        shares = {}
        for site, reply in self._ask(requests, SumShares, self.brief):
            if (found := set(reply.body.shares)) == names:
                shares[site] = reply.body
            else:
                self._fail(site, f"has shared its secrets out among {len(found)} sites; {len(names)} take part")
        self._enough(round_, shares, "have shared out their secrets")
        return shares

    def _masked(self, round_: Round, shares: Mapping[str, SumShares]) -> tuple[np.ndarray, list[str]]:
        """Return what the sites' numbers add up to with their masks on, and which sites those are."""
        requests = {}
        for site in shares:
            received = {sender: of.shares[site] for sender, of in shares.items()}
            task = SumTask.of(round_, self.work[site].task, received)
            requests[site] = Request("evaluate.statistics", self._for(site, task), self.models(site))
        numbers = sum(tensor.numel() for tensor in self.template.values())
        total, answered = np.zeros(numbers, dtype=np.uint64), list[str]()
        expected = {"sum": torch.zeros(numbers, dtype=torch.int64)}
        for site, reply in self._ask(requests, MaskedSum, self.deadline, self.patience):
            try:
                if "sum" not in reply.arrays:
                    raise WeightsError("there are no arrays in it")
                numbers_of_site = from_tensor(from_arrays(reply.arrays["sum"], expected)["sum"])
                self.check(site, reply.body)
            except ChainwardError as error:
                self._fail(site, f"sent numbers that can't be used: {error}", reply.seconds)
                continue
            total += numbers_of_site
            self.noise = math.hypot(self.noise, reply.body.noise)
            answered.append(site)
        self._enough(round_, answered, "have answered")
        self._even(round_, answered)
        return total, [site for site in round_.members if site in answered]

    def _even(self, round_: Round, answered: Sequence[str]) -> None:
        site, share = round_.heaviest(answered)
        if share > MOST_WEIGHT * (1 + 1e-6):
            raise TooFewSitesError(
                f"without those that are missing site '{site}' has {share:.0%} of the weight; no hospital gives more than "
                f"{MOST_WEIGHT:.0%}",
                self.failed,
            )

    def _unmasked(
        self, round_: Round, offers: Sequence[Offer], senders: Sequence[str], total: np.ndarray, answered: list[str]
    ) -> StateDict:
        task = SumUnmaskTask(round=round_, answered=answered)
        dropped = [site for site in senders if site not in answered]
        requests = {site: Request("query", self._for(site, task)) for site in answered}
        given = [reply.body for _, reply in self._ask(requests, SumUnmasking, self.brief, self.patience)]
        self._enough(round_, given, "have unmasked the sum")
        seeds = {site: [bytes.fromhex(one.seeds[site]) for one in given if site in one.seeds] for site in answered}
        keys = {site: [bytes.fromhex(one.keys[site]) for one in given if site in one.keys] for site in dropped}
        try:
            found = unmasked(total, round_, offers, answered, dropped, seeds, keys)
        except ProtocolError as error:
            raise TooFewSitesError(str(error), self.failed) from error
        return shaped(real_numbers(found, fraction_bits(self._task)), self.template)

    def _ask(
        self, requests: Mapping[str, Request], expected: type[Answer], deadline: float, patience: float = 0.0
    ) -> Iterator[tuple[str, Reply[Answer]]]:
        """Yield the answers of sites that answer in their own name."""
        self.bytes_down += sum(request.bytes for request in requests.values())
        for site, reply in self.exchange.stream(requests, expected, deadline, patience=patience):
            if isinstance(reply, Failure):
                self.failed[site] = reply
                continue
            self.bytes_up += reply.bytes
            named = reply.body.offer.site if isinstance(reply.body, SumKeys) else reply.body.site
            if named == site:
                yield site, reply
            else:
                self._fail(site, f"answers as site '{named}'")

    def _for(self, site: str, task: B) -> B:
        return task.model_copy(update={"simulated": self.exchange.members[site].simulated})

    def _fail(self, site: str, what: str, seconds: float = 0.0) -> None:
        self.failed[site] = Failure(f"site '{site}' {what}", seconds, malformed=True)

    def _enough(self, round_: Round, sites: Sequence[object] | Mapping[str, object], what: str) -> None:
        needed = max(FEWEST_SITES, round_.threshold)
        if len(sites) < needed:
            raise TooFewSitesError(
                f"{len(sites)} of {len(round_.members)} sites {what}; a secure sum takes {needed} here", self.failed
            )
