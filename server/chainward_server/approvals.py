"""Sites where a person approves every run: what they are told of it, and which of them still wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.serverapp import Grid

from chainward_server.report.formats import duration
from chainward_server.request import B, Reply, Request, read_reply
from chainward_server.sites import Failure
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture
from chainward_shared.protocol import Body, EvaluateTask, LinkTask
from chainward_shared.protocol.run_plan import PlannedTask, RunPlan, RunPlanState

logger = logging.getLogger("chainward")

POLL_SECONDS = 15.0
"""Between two questions to a site whether a person there has decided; each costs it about a second of a processor."""
ANSWER_SECONDS = 60.0
"""In which a site must say how a plan stands, else the question counts as not asked."""
TELL_SECONDS = 600.0
WITHDRAWALS = 5
"""Times in a run that a site may say that it is approved and then that it waits: approvals end, and others are given."""


def run_plan(config: RunConfig, run_id: str, architectures: list[Architecture]) -> RunPlan:
    """Return what a run will ask of each site; `architectures`: the chain's, and the students' where there are any."""
    model, *small = architectures
    chain, student = config.chain, config.student
    stages = [config.student_recipe("distil")] + (
        [config.student_recipe("finetune")] if student.finetune_rounds else []
    )
    return RunPlan(
        run_id=run_id,
        asked_by=config.federation.contact,
        model=model,
        link=config.link_recipe(),
        laps=chain.laps,
        strands=chain.strands,
        alone=config.link_recipe(laps=chain.laps) if chain.compare_alone else None,
        student=small[0] if small else None,
        students=stages if small else [],
        rounds=student.rounds + student.finetune_rounds if small else 0,
        statistics=chain.head == "statistics",
        noise_from=config.federation.secure_noise_from,
        student_statistics=bool(small) and student.head == "statistics",
    )


class Asking(Protocol):
    """Sends requests to sites: `exchange.Exchange`."""

    grid: Grid

    def ask(self, requests: Mapping[str, Request], expected: type[B], deadline: float) -> dict[str, Reply[B] | Failure]:
        """Send every request at once and wait for all."""

    def push(self, site: str, request: Request, deadline: float) -> str | None:
        """Send one request and return its id."""


@dataclass
class _Site:
    """How a run stands at one site. `reason`: why it was refused; `answered`: when it last said so; `question`: the message that
    is under way."""

    state: str = "waiting"
    reason: str = ""
    question: str | None = None
    asked: float = float("-inf")
    answered: float = float("-inf")
    withdrawn: int = 0
    since: float = field(default_factory=time.time)


class Approvals:
    """Asks the sites whether the run is approved, beside all other work, and says who waits.

    Parameters
    ----------
    plan : what is to be approved
    sites : those where a person approves runs
    patience : seconds from now on for which work at a site waits for its person; later it fails, until they have decided
    note : told which sites wait, and since when (seconds since 1970), whenever that changes
    admitted : called with a site when it has approved the run, before it gets work
    """

    def __init__(
        self,
        plan: RunPlan,
        sites: Iterable[str],
        patience: float,
        *,
        note: Callable[[Mapping[str, float]], None],
        admitted: Callable[[str], None],
    ) -> None:
        self.plan, self.patience, self.note, self.admitted = plan, patience, note, admitted
        self._sites = {site: _Site() for site in sites}
        self._until = time.monotonic() + patience
        self._told = float("-inf")

    @property
    def waiting(self) -> list[str]:
        """The sites where nobody has decided yet."""
        return [site for site, one in self._sites.items() if one.state == "waiting"]

    def announce(self, exchange: Asking) -> None:
        """Send the plan to all the sites at once, so that their people can decide at the same time."""
        requests = {site: Request("query", self.plan) for site in self._sites}
        for site, reply in exchange.ask(requests, RunPlanState, ANSWER_SECONDS).items():
            self._settle(site, reply)
        self._note()
        if self.waiting:
            self._tell()

    def held(self, exchange: Asking, asked: Mapping[str, Request], begun: float) -> dict[str, Failure | None]:
        """Return the sites that get nothing now, of those that are `asked` for work: with the reason where they won't at all.

        Parameters
        ----------
        begun : when (`time.monotonic`) the piece of work was begun: after `patience` a site is asked once more for each
        """
        mine = [site for site, one in asked.items() if site in self._sites and isinstance(one.body, PlannedTask)]
        found: dict[str, Failure | None] = {}
        for site in mine:
            one = self._sites[site]
            if one.state == "waiting":
                self._look(exchange, site, one, begun)
            if one.state == "refused":
                found[site] = Failure(one.reason, 0.0, refused=True, final=True)
            elif one.state == "waiting":
                found[site] = self._given_up(site, asked[site].body, one, begun)
        if self.waiting and time.monotonic() - self._told > TELL_SECONDS:
            self._tell()
        return found

    def withdraw(self, site: str) -> bool:
        """Take note that a site, asked for work, has said that it waits for a person; False where it has done so too often."""
        before = self._sites.get(site, _Site()).withdrawn
        if before >= WITHDRAWALS:
            return False
        self._sites[site] = _Site(withdrawn=before + 1)
        self._until = time.monotonic() + self.patience
        self._note()
        self._tell()
        return True

    def _look(self, exchange: Asking, site: str, one: _Site, begun: float) -> None:
        """Take in a site's answer, and ask it again when it is time."""
        now = time.monotonic()
        if one.question is not None:
            for message in exchange.grid.pull_messages([one.question]):
                one.question, one.answered = None, now
                self._settle(site, read_reply(site, message, RunPlanState, now - one.asked))
        late = now > self._until and one.asked < begun
        free = one.question is None or now - one.asked > ANSWER_SECONDS
        if one.state == "waiting" and free and (late or now - one.asked > POLL_SECONDS):
            one.asked = now
            one.question = exchange.push(site, Request("query", self.plan), ANSWER_SECONDS)

    def _given_up(self, site: str, task: Body, one: _Site, begun: float) -> Failure | None:
        now = time.monotonic()
        # scores, and the comparison with a hospital alone, are what nobody waits for
        patient = not isinstance(task, EvaluateTask) and not (isinstance(task, LinkTask) and task.trained_alone)
        if patient and (now <= self._until or (one.answered < begun and now - begun <= ANSWER_SECONDS)):
            return None
        waited = duration(time.time() - one.since)
        return Failure(
            f"site '{site}' waits for a person there to approve the run (for {waited}; federation.approval-patience)",
            0.0,
            waiting=True,
        )

    def _refused(self, site: str, reason: str) -> None:
        self._sites[site].state, self._sites[site].reason = "refused", reason
        logger.warning("%s", reason)
        self._note()

    def _settle(self, site: str, reply: Reply[RunPlanState] | Failure) -> None:
        if isinstance(reply, Failure):
            if reply.final:
                self._refused(site, reply.reason)
            return
        answer = reply.body
        if answer.site != site or answer.plan != self.plan.digest or answer.approval == "waiting":
            return
        if answer.approval == "refused":
            self._refused(site, f"site '{site}' refused: a person there has refused run {self.plan.run_id}")
            return
        self._sites[site].state = "approved"
        logger.info("%s: a person there has approved the run", site)
        self._note()
        self.admitted(site)

    def _note(self) -> None:
        self.note({site: one.since for site, one in self._sites.items() if one.state == "waiting"})

    def _tell(self) -> None:
        self._told = time.monotonic()
        left = max(0.0, self._until - self._told)
        logger.warning(
            "waiting for the approval of a person at %s; work there waits up to %s for it, and then goes by chain.on-failure",
            ", ".join(self.waiting),
            duration(left),
        )
