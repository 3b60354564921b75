"""How many models a hospital without noise on its scores scores, and on how many cases at least.

Exact scores answer questions: of a test split of one image, sums of confidences under crafted models give every pixel. A
least number of cases makes an answer one about many, and a most number of models keeps the questions few. Neither is a
guarantee, as noise is.
"""

from __future__ import annotations

import logging
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

FILE = "scored-models.json"
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


def admit_model(state_dir: Path, run: str, model: str, limits: ScoreLimits) -> bool:
    """Note a model and return whether it may be scored. One that was scored in this run before may be again.

    Parameters
    ----------
    state_dir : the site's state folder: its processes count together, in a file there
    model : its digest
    limits : the site's

    Raises
    ------
    StoreError
        The file can't be read or written, or is damaged; nothing may be scored then.
    """
    path = state_dir / FILE
    with locked(path):
        known = read_kept(path, _Noted, "remove it, and the count of scored models begins anew")
        today, noted = _today(), [] if known is None else known.root
        if any((run, model) == (one.run, one.model) for one in noted):
            return True
        of_run = sum(one.run == run for one in noted)
        of_day = sum(one.day == today for one in noted)
        for what, found, most in (("run", of_run, limits.per_run), ("day", of_day, limits.per_day)):
            if found >= most:
                scored = "scores are withheld: %d models were scored in this %s, scores.per_%s is %d"
                logger.warning(scored, found, what, what, most)
                return False
        kept = sorted({one.day for one in noted} | {today})[-KEPT_DAYS:]
        noted = [one for one in noted if one.day in kept] + [_Scored(day=today, run=run, model=model)]
        write_kept(path, _Noted(noted))
        return True


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
