"""What a model says of images, as rows of a table and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chainward_shared import __version__
from chainward_shared.evaluation.classification import DECISION
from chainward_shared.evaluation.scores import Scores
from chainward_shared.familiarity import FAMILIAR_WITHIN
from chainward_shared.files import write_atomically
from chainward_shared.model_record import ModelRecord, at_points, calibrated, class_log_odds
from chainward_shared.outside import visible
from chainward_simulations.predict.inputs import Problem
from chainward_simulations.predict.models import Outputs, Predictor

USE = "research only; not a medical device"


@dataclass(frozen=True)
class Answer:
    """What a model says of one image; lists are in the order of the classes.

    Attributes
    ----------
    classes : what it decides: the most probable class, or multi-label all findings from a probability of 0.5 on
    probabilities : as the model gives them, and as the run scored them
    calibrated : each class for itself, after the temperature; None where the model has none
    found : whether each class is found at its operating point; None where it has none
    unfamiliarity : how far it is from the training images, 1 the mean of validation images; None where the model can't tell
    reasons : why the answer is not to be used, no longer than a code's meaning in DICOM each; none where it may be
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    calibrated: tuple[float, ...] | None
    found: tuple[bool | None, ...]
    unfamiliarity: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def abstains(self) -> str | None:
        """Return why the answer is not to be used; None where there is no reason."""
        return "; ".join(self.reasons) or None

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return it as plain JSON values."""
        by_class = [
            {
                "class": name,
                "probability": self.probabilities[k],
                "calibrated": None if self.calibrated is None else self.calibrated[k],
                "found": self.found[k],
            }
            for k, name in enumerate(classes)
        ]
        return {
            "image": self.image,
            "predicted": list(self.classes),
            "abstains": self.abstains,
            "unfamiliarity": self.unfamiliarity,
            "classes": by_class,
        }


@dataclass(frozen=True)
class Abstain:
    """When a model abstains.

    Attributes
    ----------
    below : where the probability of what it decides is lower; multi-label: of any of its decisions. The calibrated one where
        there is one
    beyond : where an image is further from the training images, in times the mean of validation images
    """

    below: float = 0.5
    beyond: float = FAMILIAR_WITHIN

    def reasons(self, certainty: float, unfamiliarity: float | None) -> tuple[str, ...]:
        """Return why it does, if it does."""
        found = []
        if certainty < self.below:
            found.append(f"probability {certainty:.2f} is below {self.below:g}")
        if unfamiliarity is not None and unfamiliarity > self.beyond:
            times = f"{unfamiliarity:.1f}" if unfamiliarity < 1000 else "over 1000"
            found.append(f"unlike the training images: {times} times as far as usual")
        return tuple(found)


def answers(names: Sequence[str], outputs: Outputs, record: ModelRecord, abstain: Abstain) -> list[Answer]:
    """Return the answers to some images.

    Parameters
    ----------
    names : what the images are called
    """
    logits, far = outputs.logits, outputs.unfamiliarity
    log_odds = class_log_odds(logits, record.task)
    given = probabilities(logits, record)
    after = calibrated(log_odds, record.calibration)
    sure = given if after is None else after
    if record.task == "multilabel":
        decided = [tuple(np.flatnonzero(row >= DECISION).tolist()) for row in given]
        certainty = np.maximum(sure, 1 - sure).min(axis=1)
    else:
        decided = [(int(row.argmax()),) for row in given]
        certainty = sure[np.arange(len(sure)), given.argmax(axis=1)]
    return [
        Answer(
            image=name,
            classes=tuple(record.classes[k] for k in decided[i]),
            probabilities=tuple(given[i].tolist()),
            calibrated=None if after is None else tuple(after[i].tolist()),
            found=tuple(found),
            unfamiliarity=None if far is None else float(far[i]),
            reasons=abstain.reasons(float(certainty[i]), None if far is None else float(far[i])),
        )
        for i, (name, found) in enumerate(zip(names, at_points(log_odds, record.points), strict=True))
    ]


def probabilities(logits: np.ndarray, record: ModelRecord) -> np.ndarray:
    """Return probabilities, float64 (n, classes), as sites score them: softmax, or multi-label a sigmoid for each finding."""
    import torch

    values = torch.from_numpy(np.asarray(logits, dtype=np.float64))
    found: np.ndarray = (values.sigmoid() if record.task == "multilabel" else values.softmax(dim=1)).numpy()
    return found


@dataclass
class Predictions:
    """All that came of one call.

    Attributes
    ----------
    scores : where a data file says what the images are
    """

    predictor: Predictor
    answers: list[Answer] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    scores: Scores | None = None

    def csv(self) -> str:
        """Return a row for each image, with the digest of the model; none for those that can't be used."""
        record = self.predictor.record
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [visible(name) for name in record.classes]
        writer.writerow(
            [
                "image",
                "predicted",
                "abstains",
                *(["unfamiliarity"] if record.familiarity is not None else []),
                *(f"probability:{name}" for name in names),
                *(f"calibrated:{name}" for name in names if record.calibration.temperature is not None),
                *(f"found:{name}" for name in names),
                "model",
            ]
        )
        for one in self.answers:
            found = ["" if value is None else str(value).lower() for value in one.found]
            after = [] if one.calibrated is None else [f"{value:.6f}" for value in one.calibrated]
            given = [f"{value:.6f}" for value in one.probabilities]
            words = [_cell(one.image), _cell("; ".join(one.classes)), one.abstains or ""]
            words += [] if one.unfamiliarity is None else [f"{one.unfamiliarity:.2f}"]
            writer.writerow([*words, *given, *after, *found, self.predictor.sha256])
        return text.getvalue()

    def json(self) -> str:
        """Return everything, the images that can't be used included."""
        record = self.predictor.record
        content = {
            "schema": 1,
            "chainward": __version__,
            "use": USE,
            "model": {"sha256": self.predictor.sha256, **record.in_short()},
            "images": [one.to_json(record.classes) for one in self.answers],
            "unusable": [{"image": problem.name, "reason": visible(problem.reason)} for problem in self.problems],
            "scores": None if self.scores is None else self.scores.model_dump(),
        }
        return json.dumps(content, indent=1) + "\n"


def write(path: Path, text: str) -> None:
    """Write a table or JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _cell(text: str) -> str:
    """Return text from outside as a cell that no spreadsheet takes for a formula."""
    shown = visible(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown
