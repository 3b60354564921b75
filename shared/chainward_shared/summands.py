"""What a site adds to a secure sum: of each kind of work the tensors, their names and shapes, and how finely they are rounded.

Statistics and counts are added up as they are. Of a student it is the update, times the site's weight in the mean; a mean of
updates is far smaller than one of weights, and rounding shows in it sooner, so that more bits stand behind the point.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from chainward_shared.discriminant import sums_template
from chainward_shared.evaluation.classification import (
    COUNT_FIELDS,
    PredictionCounts,
    counts_from_state,
    counts_template,
    counts_to_state,
)
from chainward_shared.models import skeleton
from chainward_shared.models.heads import check_head
from chainward_shared.protocol import EvaluateTask, StudentTask, SumWork
from chainward_shared.secure_sums import FRACTION_BITS
from chainward_shared.task import Task
from chainward_shared.weights import StateDict

UPDATE_BITS = 40
"""Behind the point of a student's update: each weighted number is rounded to within 5e-13, and is at most 4 million over the
number of sites."""

_UPDATE, _KEPT = "update.", "auxiliary_kept"


def fraction_bits(work: SumWork) -> int:
    """Return how many bits stand behind the point of the numbers of some work."""
    return UPDATE_BITS if isinstance(work, StudentTask) else FRACTION_BITS


def summand_template(work: SumWork, task: Task) -> StateDict:
    """Return names, shapes and dtypes of what is added up, without values.

    Parameters
    ----------
    task : of the sites' data
    """
    architecture = work.architecture
    if isinstance(work, StudentTask):
        weights = skeleton(architecture).state_dict()
        named = {f"{_UPDATE}{name}": tensor for name, tensor in weights.items() if tensor.is_floating_point()}
        numbers = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in named.items()}
        return numbers | {_KEPT: torch.zeros(1, dtype=torch.float64)}
    if isinstance(work, EvaluateTask):
        counts = counts_template(architecture.num_classes, task)
        return {f"{split}.{name}": tensor for split in work.splits for name, tensor in counts.items()}
    if work.form is None:
        return sums_template(architecture.num_classes, check_head(architecture))
    groups = work.form.groups(architecture.num_classes, multilabel=task == "multilabel")
    return {"release": torch.zeros(sum(work.form.sizes(groups).values()), dtype=torch.float64)}


def student_summand(student: StateDict, start: StateDict, kept: float | None, weight: float) -> StateDict:
    """Return what a site adds to the mean of the students.

    Parameters
    ----------
    start : the student that all sites started from
    kept : see `StudentResult.auxiliary_kept`
    weight : of the site in the mean
    """
    moved = {
        f"{_UPDATE}{name}": weight * (tensor.double() - start[name].double())
        for name, tensor in student.items()
        if tensor.is_floating_point()
    }
    return moved | {_KEPT: torch.tensor([weight * (kept or 0.0)], dtype=torch.float64)}


def student_mean(total: StateDict, start: StateDict, weights: float) -> tuple[StateDict, float]:
    """Return the mean of the students and of what their auxiliary teachers have kept.

    Parameters
    ----------
    total : sum of what sites have added
    weights : sum of their weights
    """
    mean = {
        name: (tensor.double() + total[f"{_UPDATE}{name}"] / weights).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in start.items()
    }
    return mean, min(1.0, max(0.0, float(total[_KEPT]) / weights))


def counts_summand(counts: Mapping[str, PredictionCounts]) -> StateDict:
    """Return what a site adds to the counts of predictions, by split."""
    return {f"{split}.{name}": tensor for split, of in counts.items() for name, tensor in counts_to_state(of).items()}


def counts_in(total: StateDict, task: EvaluateTask) -> dict[str, PredictionCounts]:
    """Return the counts of all sites together, by split.

    Raises
    ------
    WeightsError
        They can't be counts.
    """
    return {
        split: counts_from_state({name: total[f"{split}.{name}"] for name in COUNT_FIELDS}) for split in task.splits
    }
