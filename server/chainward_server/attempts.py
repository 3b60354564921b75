"""Asking again: what has come of a piece of work at each site, and when another try may help."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from chainward_server.sites import Failure, Result, Summed, Trained
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import LinkResult, StatisticsResult
from chainward_shared.weights import StateDict, digest

logger = logging.getLogger("chainward")


@dataclass
class Attempted(Generic[Result]):
    """What has come of one piece of work at one site so far.

    Attributes
    ----------
    answer : the one that passed all checks; None as long as there is none
    failure : why the last try that failed did
    """

    attempts: int = 0
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    answer: Trained[Result] | None = None
    failure: Failure | None = None

    @property
    def open(self) -> bool:
        """Whether asking (again) may help: there is no answer yet, the site's policy has not said no, and no person there was
        waited for already."""
        return self.answer is None and not (self.failure and (self.failure.final or self.failure.waiting))

    @property
    def unreached(self) -> bool:
        """Whether there is no answer because the site, or the person who approves runs there, could not be reached."""
        return self.answer is None and self.failure is not None and self.failure.unreached


class Outcomes(dict[str, Attempted[Result]], Generic[Result]):
    """What has come of one piece of work at each site, in the order in which they were given."""

    @property
    def answers(self) -> dict[str, Trained[Result]]:
        """The answers that passed all checks."""
        return {site: outcome.answer for site, outcome in self.items() if outcome.answer is not None}

    def summed(self, state: StateDict, seconds: float, *, noise: float = 0.0) -> Summed:
        """Return what the answers add up to, `state`, with whose they are and why others are missing."""
        failed = {
            site: outcome.failure or Failure("no reason given", 0.0)
            for site, outcome in self.items()
            if outcome.answer is None
        }
        down, up = sum(one.bytes_down for one in self.values()), sum(one.bytes_up for one in self.values())
        return Summed(state, list(self.answers), list(self), noise, failed, seconds, down, up)


def check_answer(answer: Trained[LinkResult] | Trained[StatisticsResult], what: str, key: str, site: str) -> None:
    """Check that an answer is to the hop, or the round, that was asked for, and arrived whole.

    Raises
    ------
    ChainwardError
        It is another's, or damaged.
    """
    result = answer.result
    if (result.hop, result.site) != (key, site):
        raise ChainwardError(f"it answers {what} '{result.hop}' of site '{result.site}'; expected '{key}' of '{site}'")
    check_digest(answer.model, result.digest)


def check_digest(model: StateDict, stated: str) -> None:
    """Raise `ChainwardError` where a model has not the digest that its site has stated."""
    if digest(model) != stated:
        raise ChainwardError("its digest is not the one stated; the message was damaged on its way")


def attempted(
    sites: Iterable[str],
    ask: Callable[[Sequence[str], int], Iterator[tuple[str, Trained[Result] | Failure]]],
    check: Callable[[str, Trained[Result]], None],
    *,
    retries: int,
    keep: Callable[[str, Trained[Result]], None] = lambda site, answer: None,
) -> Outcomes[Result]:
    """Ask each of `sites`, and those that failed again, `retries` times at most; return what came of it, in their order.

    Parameters
    ----------
    ask : asks some sites; its second argument says how often they were asked before, 0 first
    check : raises `ChainwardError` with the reason where an answer can't be used
    keep : takes each answer that can be used, when it comes
    """
    outcomes = Outcomes[Result]({site: Attempted[Result]() for site in sites})
    for attempt in range(1 + retries):
        asked = [site for site, outcome in outcomes.items() if outcome.open]
        if not asked:
            break
        for site, reply in ask(asked, attempt):
            outcome = outcomes[site]
            outcome.attempts += 1
            outcome.seconds += reply.seconds
            outcome.bytes_down += reply.bytes_down
            outcome.bytes_up += reply.bytes_up
            if isinstance(reply, Trained):
                try:
                    check(site, reply)
                except ChainwardError as error:
                    reply = Failure(f"site '{site}' sent a model that can't be used: {error}", reply.seconds)
                else:
                    keep(site, reply)
                    outcome.answer = reply
                    continue
            outcome.failure = reply
            if outcome.open and attempt < retries:
                logger.warning("%s; trying again", reply.reason)
    return outcomes
