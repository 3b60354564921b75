"""A site's part in a statistics round: sums over a model's embeddings of its images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.limits import check_enough, enough
from chainward_client.site_config import SiteLimits
from chainward_client.training.features import Features
from chainward_client.training.link import labelled_cases
from chainward_client.training.passes import BATCH, passes
from chainward_shared.discriminant import HeadSums
from chainward_shared.errors import ProtocolError
from chainward_shared.models import build_model
from chainward_shared.models.heads import check_head
from chainward_shared.models.taps import Taps
from chainward_shared.protocol import StatisticsResult, StatisticsTask
from chainward_shared.weights import StateDict, digest


def sums_of(
    task: StatisticsTask, data: SiteData, state: StateDict, limits: SiteLimits, features: Features | None = None
) -> tuple[StatisticsResult, StateDict]:
    """Return the sums over the labelled training images, and those over the validation images, as they travel.

    Validation images of which there are too few are left out: the sums then go over none.

    An embedding is the input of the classifier in evaluation mode, of the image as it is, computed in fp32 and summed up in
    fp64. One that is not finite is cut off (`chainward_shared.discriminant.finite`): the answer is of the same kind.

    Parameters
    ----------
    state : weights of the whole model
    features : where the output of a frozen trunk is kept; None: nowhere

    Raises
    ------
    PolicyRefusal
        The site has too few training images for its own limits.
    ModelError
        The model's classifier isn't one linear layer.
    ProtocolError
        The weights of the classes are not those of this task.
    """
    size, classes = check_head(task.architecture), len(data.classes)
    train = labelled_cases(data, task)
    check_enough(len(train), rarest(train, classes), limits)
    model = build_model(task.architecture)
    model.load_state_dict(state)
    validation = data.splits["val"]
    if not enough(len(validation), rarest(validation, classes), limits):
        validation = validation.take(np.arange(0))
    sums: StateDict = {}
    for split, cases, weights in (("train", train, _weights(task, data)), ("val", validation, None)):
        sums |= _summed(model, cases, HeadSums.none(classes, size), weights, task, features).state(split)
    result = StatisticsResult(
        hop=task.hop, site=data.site, digest=digest(sums), images=len(train), validation=len(validation)
    )
    return result, sums


def _summed(
    model: nn.Module,
    cases: Cases,
    total: HeadSums,
    weights: Tensor | None,
    task: StatisticsTask,
    features: Features | None,
) -> HeadSums:
    """Return `total` and what the cases add to it."""
    if not len(cases):
        return total
    with Taps(model, embedding=True) as taps:
        batches = passes(model, cases.images, task.threads, task.architecture.image_size, features)
        for labels, _ in zip(cases.labels.split(BATCH), batches, strict=True):
            total = total + HeadSums.of(taps.embedding.cpu(), labels, len(total.counts), weights)
    return total


def _weights(task: StatisticsTask, data: SiteData) -> Tensor | None:
    """Return how much an image of each class counts in the second moments; None: each the same."""
    if not task.class_weights:
        return None
    if data.task == "multilabel" or len(task.class_weights) != len(data.classes):
        raise ProtocolError(
            f"class_weights has {len(task.class_weights)} numbers; expected one for each of {len(data.classes)} classes, "
            "and none where an image may have several findings"
        )
    return torch.tensor(task.class_weights, dtype=torch.float64)


def rarest(cases: Cases, classes: int) -> int:
    """Return the images of the class that has the fewest of those that occur; multi-label: with, or without, a finding."""
    if cases.labels.ndim == 2:
        present = cases.labels.sum(dim=0)
        counts = torch.cat([present, len(cases) - present])
    else:
        counts = torch.bincount(cases.labels, minlength=classes)
    return int(counts[counts > 0].min()) if bool((counts > 0).any()) else 0
