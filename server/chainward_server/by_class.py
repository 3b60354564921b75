"""A final model class by class: what its validation counts choose, and what its test counts say of that."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from chainward_server.context import Run
from chainward_server.results import ByClass, ClassScores, DataSummary
from chainward_server.scoring import Counted, Split
from chainward_shared.errors import ChainwardError
from chainward_shared.evaluation.operating import (
    Calibration,
    OperatingPoint,
    fitted_temperature,
    net_benefits,
    operating_points,
    reliability,
    summed,
    tallies_at,
    tallies_decided,
)
from chainward_shared.familiarity import Familiarity
from chainward_shared.model_record import ModelRecord
from chainward_shared.models import Architecture
from chainward_shared.pixels import scaling
from chainward_shared.weights import StateDict, digest

logger = logging.getLogger("chainward")


def judged(run: Run, name: str, architecture: Architecture, state: StateDict) -> ModelRecord:
    """Return what the file of a final model says of it; the figures behind it are in the results then.

    Parameters
    ----------
    name : "chain" or "student"
    """
    try:
        counted = run.counted(architecture, state)
        found = by_class(counted, len(run.results.data.classes))
    except ChainwardError as error:
        logger.warning("the %s has no calibration and no operating points: %s", name, error)
        found = none_of(len(run.results.data.classes), str(error))
    run.results.by_class[name] = found
    record = model_record(run.checkpoints.run_id, name, architecture, run.results.data, found)
    return record.model_copy(update={"familiarity": _familiarity(run, state) if name == "chain" else None})


def _familiarity(run: Run, state: StateDict) -> Familiarity | None:
    """Return what a statistics round has told of the embeddings of the very model that the chain leaves; None without such."""
    key = run.results.released or next((head.key for head in reversed(run.results.heads)), None)
    if key is None or not run.checkpoints.has_model(key):
        return None
    if digest(run.checkpoints.load_model(key, run.template)) != digest(state):
        return None
    return Familiarity.from_metadata(run.checkpoints.metadata_of(key))


def by_class(counted: Mapping[Split, Counted], classes: int) -> ByClass:
    """Return calibration and operating points out of validation counts, and each class's test images by them."""
    validation, test = (counted[split].parts for split in ("val", "test"))
    chosen = summed(validation)
    calibration, points = fitted_temperature(chosen), operating_points(chosen, classes)
    if not test:
        return ByClass(calibration=calibration, points=points)
    histograms = summed(test)
    temperature = calibration.temperature
    return ByClass(
        calibration=calibration,
        points=points,
        sites={
            site: _class_scores(counts.confusion, counts.histograms, points)
            for site, counts in counted["test"].counts.items()
        },
        pooled=_class_scores(np.sum([part.confusion for part in test], axis=0), histograms, points),
        as_given=reliability(histograms),
        as_calibrated=[] if temperature is None else reliability(histograms, temperature),
        net_benefit=net_benefits(histograms, temperature or 1.0),
    )


def none_of(classes: int, why: str) -> ByClass:
    """Return that nothing is known of a model, and why."""
    return ByClass(calibration=Calibration(missing=why), points=[OperatingPoint(missing=why)] * classes)


def model_record(
    run_id: str, name: str, architecture: Architecture, data: DataSummary, found: ByClass | None
) -> ModelRecord:
    """Return what a model's file says of it.

    Parameters
    ----------
    found : None of a run that kept no such figures
    """
    found = found or none_of(len(data.classes), "the run kept no counts of its validation images")
    mean, std = scaling(architecture.pixels)
    return ModelRecord(
        run=run_id,
        model=name,
        task=data.task,
        classes=data.classes,
        size=data.image_size,
        network_size=architecture.image_size,
        channels=data.channels,
        preparations={site.site: site.preparation for site in data.sites if site.preparation is not None},
        mean=mean if isinstance(mean, list) else [mean],
        std=std if isinstance(std, list) else [std],
        synthetic=data.synthetic,
        calibration=found.calibration,
        points=found.points,
    )


def _class_scores(confusion: np.ndarray, histograms: np.ndarray, points: list[OperatingPoint]) -> list[ClassScores]:
    decided, at_points = tallies_decided(confusion), tallies_at(histograms, points)
    return [ClassScores(decided=first, at_point=second) for first, second in zip(decided, at_points, strict=True)]
