"""How many models a hospital without noise on its scores scores, and on how many cases at least.

Exact scores answer questions: of a test split of one image, sums of confidences under crafted models give every pixel. A
least number of cases makes an answer one about many, and a most number of models keeps the questions few. Neither is a
guarantee, as noise is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, RootModel

from chainward_client.data.site_data import SiteData, SplitName
from chainward_client.kept_records import locked, read_kept, write_kept
from chainward_client.site_config import ScoreLimits
from chainward_shared.evaluation.classification import PredictionCounts
from chainward_shared.protocol import EvaluateTask

logger = logging.getLogger("chainward.client")

KEPT_DAYS = 30
_CONFIDENCE_DECIMALS = 2


def too_few_cases(data: SiteData, task: EvaluateTask, limits: ScoreLimits) -> bool:
    """Return whether a split that a task asks for has cases, but too few for exact scores of them to leave."""
    asked: set[SplitName] = {*task.splits}
    if task.localisation:
        asked.add("test")
    small = [split for split in sorted(asked) if 0 < len(data.splits[split]) < limits.min_cases]
    if small:
        logger.warning(
            "scores are withheld: the %s split has %d cases, scores.min_cases is %d",
            small[0],
            len(data.splits[small[0]]),
            limits.min_cases,
        )
    return bool(small)


def coarse(counts: PredictionCounts) -> PredictionCounts:
    """Return the counts with sums of confidences that are rounded to two decimals."""
    calibration = counts.calibration.copy()
    calibration[:, 1] = np.round(calibration[:, 1], _CONFIDENCE_DECIMALS)
    return PredictionCounts(counts.confusion, calibration, counts.histograms)


class _Scored(BaseModel):
    model_config = ConfigDict(extra="forbid")

    day: str
    run: str
    model: str


class _Noted(RootModel[list[_Scored]]):
    pass


@dataclass(frozen=True)
class ScoredModels:
    """Which models a site has scored lately: a file in its state folder, shared by its processes.

    Attributes
    ----------
    path : of the file
    today : the day, as in "2026-01-31"
    """

    path: Path
    today: Callable[[], str] = lambda: datetime.now(UTC).date().isoformat()

    @classmethod
    def of(cls, state_dir: Path) -> ScoredModels:
        """Return those of the site with this state folder."""
        return cls(state_dir / "scored-models.json")

    def admit(self, run: str, model: str, limits: ScoreLimits) -> bool:
        """Note a model and return whether it may be scored. One that was scored in this run before may be again.

        Parameters
        ----------
        model : its digest
        limits : the site's

        Raises
        ------
        StoreError
            The file can't be read or written, or is damaged; nothing may be scored then.
        """
        with locked(self.path):
            return self._admit(run, model, limits)

    def _admit(self, run: str, model: str, limits: ScoreLimits) -> bool:
        known = read_kept(self.path, _Noted, "remove it, and the count of scored models begins anew")
        today, noted = self.today(), [] if known is None else known.root
        if any((run, model) == (one.run, one.model) for one in noted):
            return True
        of_run = sum(one.run == run for one in noted)
        of_day = sum(one.day == today for one in noted)
        for what, found, most in (("run", of_run, limits.per_run), ("day", of_day, limits.per_day)):
            if found >= most:
                logger.warning(
                    "scores are withheld: %d models were scored in this %s, scores.per_%s is %d",
                    found,
                    what,
                    what,
                    most,
                )
                return False
        kept = sorted({one.day for one in noted} | {today})[-KEPT_DAYS:]
        noted = [one for one in noted if one.day in kept] + [_Scored(day=today, run=run, model=model)]
        write_kept(self.path, _Noted(noted))
        return True
