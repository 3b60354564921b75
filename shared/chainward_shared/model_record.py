"""What a model file says of itself beside its architecture: how images become what it sees, and what its answers mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from chainward_shared.evaluation.operating import Calibration, OperatingPoint
from chainward_shared.familiarity import Familiarity, MetadataRecord
from chainward_shared.outside import BySite, Count, Figure, Name, PerClass, RunId, Word
from chainward_shared.preparation import Preparation
from chainward_shared.task import Task


class ModelRecord(MetadataRecord):
    """The whole way from an image to an answer.

    Attributes
    ----------
    version : of this record's form
    run, model : where the model comes from: the run's id, and "chain" or "student"
    task, classes : what it answers, classes in the order of its outputs
    size : side of the square, in pixels, that images are brought to first
    network_size : side of what the network sees; the square is resized to it where the two differ
    channels : 1 (grey) or 3 (RGB)
    preparations : how each site that trained it brought its images to the square
    mean, std : by channel, or one for all: the network sees ``(pixel / 255 - mean) / std``
    synthetic : whether it was trained on generated images
    calibration, points : chosen on the sites' validation images; `points` in the order of the classes
    familiarity : by which an image unlike the training images is noticed; None where no statistics round told it
    """

    KEY: ClassVar[str] = "chainward.record"

    version: Literal[1] = 1
    run: RunId
    model: Word
    task: Task
    classes: PerClass[Name]
    size: Count
    network_size: Count
    channels: Count
    preparations: BySite[Preparation] = Field(default_factory=dict)
    mean: list[Figure]
    std: list[Figure]
    synthetic: bool
    calibration: Calibration
    points: PerClass[OperatingPoint]
    familiarity: Familiarity | None = None

    @model_validator(mode="after")
    def _one_point_for_each_class(self) -> ModelRecord:
        if len(self.points) != len(self.classes):
            raise ValueError(f"{len(self.points)} operating points for {len(self.classes)} classes")
        return self

    @property
    def preparation(self) -> Preparation | None:
        """Return how all sites prepared their images; None where they differ, or none has said."""
        found = set(self.preparations.values())
        return found.pop() if len(found) == 1 else None

    def in_short(self) -> dict[str, Any]:
        """Return the record as plain JSON values, without the arrays of `familiarity`."""
        content: dict[str, Any] = self.model_dump(mode="json", exclude={"familiarity"})
        known = self.familiarity
        return content | {"familiarity": known and known.model_dump(include={"size", "train", "validation"})}


def class_log_odds(logits: np.ndarray, task: Task) -> np.ndarray:
    """Return the log-odds of each class against all others, float64 (n, classes), of logits of the same shape."""
    values = np.asarray(logits, dtype=np.float64)
    if task == "multilabel":
        return values
    return np.stack(
        [values[:, k] - np.logaddexp.reduce(np.delete(values, k, axis=1), axis=1) for k in range(values.shape[1])],
        axis=1,
    )


def calibrated(log_odds: np.ndarray, calibration: Calibration) -> np.ndarray | None:
    """Return the calibrated probability of each class, for itself; None without a temperature."""
    if calibration.temperature is None:
        return None
    found: np.ndarray = 1 / (1 + np.exp(-np.clip(log_odds / calibration.temperature, -700, 700)))
    return found


def at_points(log_odds: np.ndarray, points: Sequence[OperatingPoint]) -> list[list[bool | None]]:
    """Return for each image which classes are found at their operating points; None where a class has none."""
    return [
        [
            None if point.log_odds is None else bool(value >= point.log_odds)
            for value, point in zip(row, points, strict=True)
        ]
        for row in log_odds
    ]
