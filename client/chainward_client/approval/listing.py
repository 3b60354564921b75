"""How the runs stand that have asked a site, for whoever lists them: without the plans' models, which only PyTorch and timm can
check, and they take seconds to import."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from chainward_client.kept_records import read_kept
from chainward_shared import __version__
from chainward_shared.bounds import Sha256
from chainward_shared.outside import Count, Line, RunId

FILE = "approvals.json"
ANEW = "remove it, and runs ask for approval anew"
KEPT = 100
"""Plans that are remembered; decided ones go first, the oldest of them before the others."""

Decision = Literal["approved", "refused"]
Standing = Literal["approved", "waiting", "refused"]


class Asked(BaseModel):
    """What became of a plan that has reached this site.

    Attributes
    ----------
    digest : of the plan
    asked : when it first came
    units : patients (or images) that the site declares, for what the plan would cost; None where it has no privacy policy
    decision, by, decided, expires : None as long as nobody has decided; `expires`: of an approval
    links, students : fingerprints of the trainings that were begun under this approval
    """

    digest: Sha256 | None = None
    asked: datetime
    units: Count | None = None
    decision: Decision | None = None
    by: Line = ""
    decided: datetime | None = None
    expires: datetime | None = None
    links: list[Sha256] = Field(default_factory=list, max_length=1_000_000)
    students: list[Sha256] = Field(default_factory=list, max_length=1_000_000)

    def state(self, now: datetime) -> Standing:
        """Return how the plan stands: an approval that has expired waits for another one."""
        if self.decision == "refused":
            return "refused"
        valid = self.decision == "approved" and self.expires is not None and now < self.expires
        return "approved" if valid else "waiting"


class ListedPlan(BaseModel):
    """Of a plan what a list names."""

    model_config = ConfigDict(extra="ignore")

    run_id: RunId
    asked_by: Line = ""


class ListedRun(Asked):
    """A plan as a list shows it."""

    model_config = ConfigDict(extra="ignore")

    digest: Sha256
    plan: ListedPlan


class _Writer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    written_by: Line = ""


class _Listed(BaseModel):
    model_config = ConfigDict(extra="ignore")

    runs: Annotated[list[ListedRun], Field(max_length=10 * KEPT)] = Field(default_factory=list)


def listed_runs(state_dir: Path) -> list[ListedRun]:
    """Return all plans that a site remembers, the newest first.

    Raises
    ------
    StoreError
        The file can't be read, or is damaged.
    """
    path = state_dir / FILE
    writer = read_kept(path, _Writer, ANEW)
    if writer is not None and writer.written_by != __version__:
        # digests of another build may lack or be others: they follow from the plans themselves
        from chainward_client.approval.record import Approvals

        return [ListedRun.model_validate(one.model_dump()) for one in Approvals(state_dir).runs()]
    found = read_kept(path, _Listed, ANEW) or _Listed()
    return sorted(found.runs, key=lambda one: one.asked, reverse=True)
