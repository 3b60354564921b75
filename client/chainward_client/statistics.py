"""A site's part in a statistics round: sums over a model's embeddings of its images.

In a private run that is one release of sums, to which every patient adds one vector no longer than 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.bounded_sums import SumsRelease
from chainward_client.data.site_data import Cases, SiteData
from chainward_client.entropy import Entropy
from chainward_client.limits import check_enough, enough
from chainward_client.private_site import PrivateWork, declared_units
from chainward_client.site_config import SiteLimits
from chainward_client.training.features import Features
from chainward_client.training.link import labelled_cases
from chainward_client.training.passes import BATCH, embeddings
from chainward_shared.discriminant import HeadSums
from chainward_shared.errors import ProtocolError
from chainward_shared.models import build_model
from chainward_shared.models.heads import check_head
from chainward_shared.private_sums import Frame
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
    found = embeddings(model, cases.images, task.threads, task.architecture.image_size, features)
    for labels, embedded in zip(cases.labels.split(BATCH), found, strict=True):
        total = total + HeadSums.of(embedded, labels, len(total.counts), weights)
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


def private_sums_of(
    task: StatisticsTask,
    data: SiteData,
    state: StateDict,
    frame: Frame,
    work: PrivateWork | None,
    limits: SiteLimits,
    features: Features | None = None,
) -> tuple[StatisticsResult, StateDict]:
    """Return the release that a statistics round asks of a private site, or, without `work`, the same sums without noise.

    What can be known without looking at a single record is checked first; then the release is reserved, and only then images
    are read. Whatever the images, and whatever model and frame the coordinator chose, the answer is of the same kind.

    Parameters
    ----------
    state : weights of the whole model
    frame : in which embeddings are looked at
    work : what the release is paid from
    limits : with `work` held against the units that the site declares, since their true number is private
    features : where the output of a frozen trunk is kept; None: nowhere

    Raises
    ------
    PolicyRefusal, LedgerError
        Nothing was spent.
    SpentError
        It failed after the reservation.
    ModelError
        The model's classifier isn't one linear layer.
    """
    assert task.form is not None
    check_head(task.architecture)
    model = build_model(task.architecture)
    model.load_state_dict(state)

    def embedded(cases: Cases) -> Tensor:
        size = task.architecture.image_size
        return torch.cat([frame.within(one) for one in embeddings(model, cases.images, task.threads, size, features)])

    if work is None:
        train = labelled_cases(data, task)
        check_enough(len(train), rarest(train, len(data.classes)), limits)
        # a site without a policy adds its share for those that rely on it
        noise = 0.0 if task.shared_noise is None else task.shared_noise.each
        release = SumsRelease(task.form, "patient")
        sums = {"release": release.noised(_exact(release, data, train, embedded), noise, Entropy())}
    else:
        assert task.privacy is not None
        check_enough(declared_units(work.site.policy, data), limits.statistics_class, limits)
        release = SumsRelease(task.form, work.site.policy.unit)
        with work.statistics(task.privacy, data, stage=int(task.form.labels), shared=task.shared_noise) as noise:
            exact = _exact(release, data, labelled_cases(data, task, private=True), embedded)
            sums = {"release": release.noised(exact, noise, work.site.entropy)}
    result = StatisticsResult(hop=task.hop, site=data.site, digest=digest(sums), images=0, validation=0, noise=noise)
    return result, sums


def _exact(release: SumsRelease, data: SiteData, cases: Cases, embedded: Callable[[Cases], Tensor]) -> Tensor:
    """Return the exact sum over labelled images; where no patients are known, each is one of its own."""
    patients = cases.patients if data.has_patient_ids else np.arange(len(cases)).astype(str)
    values = embedded(cases) if len(cases) else torch.zeros(0, release.form.dimension, dtype=torch.float64)
    return release.exact(values, cases.labels, patients, len(data.classes))


def rarest(cases: Cases, classes: int) -> int:
    """Return the images of the class that has the fewest of those that occur; multi-label: with, or without, a finding."""
    if cases.labels.ndim == 2:
        present = cases.labels.sum(dim=0)
        counts = torch.cat([present, len(cases) - present])
    else:
        counts = torch.bincount(cases.labels, minlength=classes)
    return int(counts[counts > 0].min()) if bool((counts > 0).any()) else 0
