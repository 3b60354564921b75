"""A private site's part in a statistics round: one release of sums, to which every patient adds one vector no longer than 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.bounded_sums import SumsRelease
from chainward_client.data.site_data import Cases, SiteData
from chainward_client.entropy import OperatingSystem
from chainward_client.limits import check_enough
from chainward_client.private_site import PrivateWork, declared_units
from chainward_client.site_config import SiteLimits
from chainward_client.statistics import rarest
from chainward_client.training.features import Features
from chainward_client.training.link import labelled_cases
from chainward_client.training.passes import passes
from chainward_shared.models import build_model
from chainward_shared.models.heads import check_head
from chainward_shared.models.taps import Taps
from chainward_shared.private_sums import Frame
from chainward_shared.protocol import StatisticsResult, StatisticsTask
from chainward_shared.weights import StateDict, digest


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
        return _in_frame(model, cases, task, frame, features)

    if work is None:
        train = labelled_cases(data, task)
        check_enough(len(train), rarest(train, len(data.classes)), limits)
        # a site without a policy adds its share for those that rely on it
        noise = 0.0 if task.shared_noise is None else task.shared_noise.each
        release = SumsRelease(task.form, "patient")
        sums = {"release": release.noised(_exact(release, data, train, embedded), noise, OperatingSystem())}
    else:
        assert task.privacy is not None
        check_enough(declared_units(work.site.policy, data), limits.statistics_class, limits)
        release = SumsRelease(task.form, work.site.policy.unit)
        with work.statistics(task.privacy, data, stage=int(task.form.labels), shared=task.shared_noise) as noise:
            exact = _exact(release, data, labelled_cases(data, task, private=True), embedded)
            sums = {"release": release.noised(exact, noise, work.site.entropy)}
    result = StatisticsResult(hop=task.hop, site=data.site, digest=digest(sums), images=0, validation=0, noise=noise)
    return result, sums


def _exact(release: SumsRelease, data: SiteData, cases: Cases, embeddings: Callable[[Cases], Tensor]) -> Tensor:
    """Return the exact sum over labelled images; where no patients are known, each is one of its own."""
    patients = cases.patients if data.has_patient_ids else np.arange(len(cases)).astype(str)
    values = embeddings(cases) if len(cases) else torch.zeros(0, release.form.dimension, dtype=torch.float64)
    return release.exact(values, cases.labels, patients, len(data.classes))


def _in_frame(model: nn.Module, cases: Cases, task: StatisticsTask, frame: Frame, features: Features | None) -> Tensor:
    found = []
    with Taps(model, embedding=True) as taps:
        for _ in passes(model, cases.images, task.threads, task.architecture.image_size, features):
            assert taps.embedding is not None
            found.append(frame.within(taps.embedding.cpu()))
    return torch.cat(found)
