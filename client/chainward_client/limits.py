"""What a hospital lets a coordinator ask: of its machines, the `limits` block of site.yaml, and of exact scores, its `scores`.

The types of a message keep out what makes no sense anywhere; these limits are the hospital's own. A task that is beyond one
is refused before data are read, privacy is reserved or a model is built. Nothing is trimmed to fit: another number of
epochs or threads would give another model than the one that the run asks for.

Exact scores answer questions: of a test split of one image, sums of confidences under crafted models give every pixel. A
least number of cases makes an answer one about many, and a most number of models keeps the questions few. Neither is a
guarantee, as noise is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, RootModel

from chainward_client.data.site_data import SiteData, SplitName
from chainward_client.kept_records import locked, read_kept, write_kept
from chainward_client.site_config import ScoreLimits, SiteLimits
from chainward_shared.errors import PolicyRefusal
from chainward_shared.evaluation.classification import PredictionCounts
from chainward_shared.models import Architecture, count_parameters, skeleton
from chainward_shared.protocol import EvaluateTask
from chainward_shared.words import shown

logger = logging.getLogger("chainward.client")

FILE = "scored-models.json"
KEPT_DAYS = 30
_CONFIDENCE_DECIMALS = 2

_LIMIT_OF = {
    "epochs": "epochs",
    "frozen_epochs": "epochs",
    "rounds": "rounds",
    "round": "rounds",
    "laps": "laps",
    "lap": "laps",
    "batch_size": "batch_size",
    "image_size": "image_size",
    "threads": "threads",
    "times": "trainings",
}
"""The limit of a field, wherever in a task it stands."""


def check_limits(task: BaseModel, limits: SiteLimits) -> None:
    """Check a task, or a part of one, against the hospital's own limits.

    Raises
    ------
    PolicyRefusal
        Something asked is beyond one: the field, what was asked, what is allowed, and by whose word.
    ModelError
        timm can't build a model of the task.
    """
    models = [("model", task)] if isinstance(task, Architecture) else []
    for where, value in _fields(task):
        if isinstance(value, Architecture):
            models.append((where, value))
        elif (limit := _LIMIT_OF.get(where.rpartition(".")[2])) is not None:
            _refuse_above(where, value, limit, limits)
    for where, architecture in models:  # last: only now their sizes are known to be such that they may be laid out
        _refuse_above(f"{where}.parameters", count_parameters(skeleton(architecture)), "parameters", limits)


def enough(images: int, rarest: int, limits: SiteLimits) -> bool:
    """Return whether sums go over enough images for the hospital to let them out; see `check_enough`."""
    return images >= limits.statistics_images and rarest >= limits.statistics_class


def check_enough(images: int, rarest: int, limits: SiteLimits) -> None:
    """Check that sums go over enough images for the hospital to let them out.

    Parameters
    ----------
    images : labelled training images
    rarest : of them, those of the class with the fewest that the site has

    Raises
    ------
    PolicyRefusal
        They don't. Neither number is in the message.
    """
    for found, limit, of in (
        (images, "statistics_images", "labelled training images"),
        (rarest, "statistics_class", "images of some class"),
    ):
        least = getattr(limits, limit)
        if found < least:
            raise PolicyRefusal(
                f"the hospital has too few {of} for the sums over their embeddings to leave it: it wants at least {least} "
                f"(limits.{limit} in its site.yaml); go on without it, or set chain.head and student.head to 'trained'"
            )


def _fields(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value in a model, and in the models within it, with its place."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        yield f"{prefix}{name}", value
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, BaseModel):
                yield from _fields(part, f"{prefix}{name}.")


def _refuse_above(where: str, asked: object, limit: str, limits: SiteLimits) -> None:
    most = getattr(limits, limit)
    if not isinstance(asked, int) or asked <= most:
        return
    whose = "set in its site.yaml" if limit in limits.model_fields_set else "the default, as its site.yaml sets none"
    raise PolicyRefusal(
        f"{where} = {shown(asked)} is more than this hospital does at a coordinator's word: at most {most} "
        f"(limits.{limit}, {whose}); ask for less, or agree with the hospital on more"
    )


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
