"""Which runs have asked to train here, and what a person has decided: a file in the site's state folder.

An approval holds for one plan, by its digest, and for a time. It is looked at before every piece of work and again before the
answer leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chainward_client.approval.listing import ANEW, FILE, KEPT, Asked, Decision
from chainward_client.kept_records import locked, read_kept, write_kept
from chainward_shared import __version__
from chainward_shared.errors import ApprovalNeeded, ConfigError, PolicyRefusal
from chainward_shared.outside import Line
from chainward_shared.protocol import LinkTask, StudentTask, fingerprint
from chainward_shared.protocol.run_plan import Approval, PlannedTask, RunPlan, beyond

logger = logging.getLogger("chainward.client")

MOST_WAITING = 20
"""Plans that may wait for a decision at once; whoever asks floods nobody."""
DAYS = 30.0
"""For which an approval holds unless the person says otherwise, and for which a plan waits for a decision."""
LONGEST_DAYS = 366.0
SPARE = 2
"""A plan's trainings may be asked for so many times as often: links that are made up for are trained under another name."""


class AskedRun(Asked):
    """A plan that has reached this site, and what became of it. `plan`: whole, and checked."""

    model_config = ConfigDict(extra="forbid")

    plan: RunPlan

    @model_validator(mode="after")
    def _of_this_build(self) -> AskedRun:
        self.digest = self.plan.digest  # a later build may know more of a plan than the one that has written it down
        return self


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_: Literal[1] = Field(default=1, alias="schema")
    written_by: Line = ""
    runs: Annotated[list[AskedRun], Field(max_length=10 * KEPT)] = Field(default_factory=list)


class Approvals:
    """The runs that have asked one site; shared by its processes.

    Parameters
    ----------
    state_dir : the site's state folder
    now : the time, UTC
    """

    def __init__(self, state_dir: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path, self.now = state_dir / FILE, now

    def runs(self) -> list[AskedRun]:
        """Return all plans that are remembered, the newest first.

        Raises
        ------
        StoreError
            The file can't be read, or is damaged.
        """
        return sorted(self._read().runs, key=lambda one: one.asked, reverse=True)

    def ask(self, plan: RunPlan, units: Callable[[], int | None]) -> Approval:
        """Note a plan that has come, and return how it stands.

        Parameters
        ----------
        units : what the site declares; asked once, when the plan is new

        Raises
        ------
        PolicyRefusal
            Too many others wait already.
        StoreError
            The file can't be used.
        """
        known = self._of(plan.digest, self._read())
        if known is not None:
            return known.state(self.now())
        declared = units()  # may take a while: not under the lock
        with self._changing() as record:
            if known := self._of(plan.digest, record):
                return known.state(self.now())
            if sum(one.state(self.now()) == "waiting" for one in record.runs) >= MOST_WAITING:
                raise PolicyRefusal(
                    f"{MOST_WAITING} runs wait already for the approval of a person at this hospital; it takes no more"
                )
            record.runs.append(AskedRun(plan=plan, asked=self.now(), units=declared))
        logger.warning(
            "run %s asks to train here and waits for approval; see `chainward-site runs`, then `chainward-site approve`",
            plan.run_id,
        )
        return "waiting"

    def find(self, run: str, digest: str = "") -> AskedRun:
        """Return the newest plan of a run whose digest begins so.

        Raises
        ------
        ConfigError
            There is none.
        """
        runs = self.runs()
        for one in runs:
            if one.plan.run_id == run and one.plan.digest.startswith(digest):
                return one
        which = f"run {run!r}" + (f" with a plan {digest!r}" if digest else "")
        raise ConfigError(f"{which} has not asked to train here; `chainward-site runs` lists those that have")

    def decide(self, digest: str, decision: Decision, by: str, *, days: float = DAYS) -> AskedRun:
        """Note what a person has decided: an approval of exactly this plan, which ends that of the run's other plans; a refusal
        of the run, with all its plans.

        Parameters
        ----------
        digest : of the plan that the person was shown, whole
        days : for which an approval holds

        Raises
        ------
        ConfigError
            No such plan is remembered, or the days are none.
        StoreError
            The file can't be used.
        """
        if not 0 < days <= LONGEST_DAYS:
            raise ConfigError(f"--days {days:g}: expected more than 0 and at most {LONGEST_DAYS:g}")
        with self._changing() as record:
            one = self._of(digest, record)
            if one is None:
                raise ConfigError(
                    f"no run with the plan {digest[:12]} waits here any more; `chainward-site runs` lists"
                )
            now = self.now()
            others = [run for run in record.runs if run.plan.run_id == one.plan.run_id and run is not one]
            for other in others:
                if decision == "refused":
                    other.decision, other.by, other.decided, other.expires = decision, by, now, None
                elif other.expires is not None:
                    other.expires = min(other.expires, now)
            one.decision, one.by, one.decided, one.expires = decision, by, now, None
            if decision == "approved":
                one.links, one.students, one.expires = [], [], now + timedelta(days=days)
        return one

    def approved(self, run: str) -> AskedRun:
        """Return the plan of a run that a person has approved.

        Raises
        ------
        ApprovalNeeded
            Nobody has approved one, or the approval has expired.
        PolicyRefusal
            A person has refused the run.
        StoreError
            The file can't be used; nothing is trained then.
        """
        of_run = [one for one in self.runs() if one.plan.run_id == run]
        approved = [one for one in of_run if one.state(self.now()) == "approved"]
        if approved:
            return approved[0]
        if of_run and all(one.state(self.now()) == "refused" for one in of_run):
            raise PolicyRefusal(f"a person at this hospital has refused run {run}")
        raise ApprovalNeeded(
            f"run {run} waits for the approval of a person at this hospital (runs: ask in its site.yaml)"
        )

    def require(self, task: PlannedTask) -> None:
        """Check that a person has approved the plan that a task is part of.

        Raises
        ------
        ApprovalNeeded, StoreError
            As `approved`.
        PolicyRefusal
            A person has refused the run; or the task is not within the plan that was approved, or one training too many.
        """
        approved = self.approved(task.run_id)
        if problem := beyond(task, approved.plan):
            raise PolicyRefusal(
                f"what is asked is not in the plan that a person at this hospital has approved: {problem}; it needs an approval "
                "of its own"
            )
        self._count(task, approved)

    def _count(self, task: PlannedTask, approved: AskedRun) -> None:
        """Note a training that begins under an approval, once however often it is asked for again."""
        if not isinstance(task, LinkTask | StudentTask):
            return
        kind, plan, key = ("links" if isinstance(task, LinkTask) else "students"), approved.plan, fingerprint(task)
        if key in getattr(approved, kind):
            return
        planned = plan.links + (plan.alone is not None) if kind == "links" else plan.rounds
        with self._changing() as record:
            one = self._of(plan.digest, record)
            begun = [] if one is None else getattr(one, kind)
            if len(begun) >= SPARE * planned:
                raise PolicyRefusal(
                    f"the plan that a person at this hospital has approved has {planned} trainings of this kind, and "
                    f"{len(begun)} were begun; more need another approval"
                )
            begun.append(key)

    @staticmethod
    def _of(digest: str, record: _Record) -> AskedRun | None:
        return next((one for one in record.runs if one.plan.digest == digest), None)

    @contextmanager
    def _changing(self) -> Iterator[_Record]:
        """Hand out the record to be changed, nobody else changing it meanwhile, and write it."""
        with locked(self.path):
            record = self._read()
            yield record
            record.runs, record.written_by = self._kept(record.runs), __version__
            write_kept(self.path, record)

    def _kept(self, runs: list[AskedRun]) -> list[AskedRun]:
        now = self.now()
        stale = [one for one in runs if one.decision is None and now - one.asked > timedelta(days=DAYS)]
        runs = [one for one in runs if one not in stale]
        rank = {"approved": 2, "waiting": 1, "refused": 0}
        best = sorted(runs, key=lambda one: (rank[one.state(now)], one.asked), reverse=True)[:KEPT]
        return [one for one in runs if one in best]

    def _read(self) -> _Record:
        return read_kept(self.path, _Record, ANEW) or _Record()
