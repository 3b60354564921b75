"""A membership-inference attack: does a model betray which patients it was trained on, by being surer about them?

Loss threshold: Yeom et al. 2018, "Privacy Risk in Machine Learning". Calibrated by the difficulty of each case: Watson et
al. 2022, "On the Importance of Difficulty Calibration in Membership Inference Attacks". Reported as Carlini et al. 2022,
"Membership Inference Attacks From First Principles", ask: the share of members found while nearly no outsider is accused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from chainward_client.data.site_data import Cases
from chainward_client.training.features import Features
from chainward_client.training.passes import BATCH, passes
from chainward_shared.errors import DataError
from chainward_shared.seeds import numpy_generator

FALSE_POSITIVE_RATES = (0.01, 0.001)
REPEATS = 1000


@dataclass(frozen=True)
class MembershipAttack:
    """How well members are told from outsiders; everything counts patients, each by the mean over the own images.

    Attributes
    ----------
    members, outsiders : patients that the model was and was not trained on
    auc : chance that a random member looks more like one than a random outsider; 0.5 is a coin
    low, high : its 95 % interval, by bootstrap over patients
    found : share of members found (true positive rate) at each of `FALSE_POSITIVE_RATES`; None where there are too few
        outsiders to tell so small a rate
    advantage : largest difference of true and false positive rate (Yeom et al.); 0: none. By luck it is above 0
    """

    members: int
    outsiders: int
    auc: float
    low: float
    high: float
    found: tuple[float | None, ...]
    advantage: float


def case_losses(
    model: nn.Module, cases: Cases, threads: int, *, image_size: int = 0, features: Features | None = None
) -> np.ndarray:
    """Return the cross-entropy of each case, float64 (n,), computed in fp32; multi-label: the mean over the findings.

    Parameters
    ----------
    image_size : side of the images that the model sees; 0, the default: as they are
    features : where the output of a frozen trunk is kept; None, the default: nowhere
    """
    if len(cases) == 0:
        return np.zeros(0)
    losses = []
    batches = zip(passes(model, cases.images, threads, image_size, features), cases.labels.split(BATCH), strict=True)
    for found, labels in batches:
        logits = found.double().cpu()
        if labels.ndim == 2:
            losses.append(
                functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").mean(1)
            )
        else:
            losses.append(functional.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses).numpy()


def calibrated(losses: np.ndarray, of_references: np.ndarray) -> np.ndarray:
    """Return by how much more each case costs the model than models that were not trained on it (Watson et al. 2022, eq. 3).

    Parameters
    ----------
    losses : of the model under attack, (n,)
    of_references : of one or more reference models, (references, n); not a number where one was trained on the case

    Raises
    ------
    DataError
        A case has no reference that was not trained on it.
    """
    if np.isnan(of_references).all(axis=0).any():
        raise DataError("a case has no reference model that was not trained on it; train more references")
    return np.asarray(losses - np.nanmean(of_references, axis=0))


def attack_membership(
    losses: np.ndarray,
    patients: Sequence[str] | np.ndarray,
    outside_losses: np.ndarray,
    outside_patients: Sequence[str] | np.ndarray,
    *,
    seed: int = 0,
    repeats: int = REPEATS,
) -> MembershipAttack:
    """Take whoever has a small loss for a member.

    Parameters
    ----------
    losses, patients : of the cases that the model was trained on, (n,) each; losses may be `calibrated`
    outside_losses, outside_patients : of cases of the same kind that it never saw, (m,) each
    seed : of the bootstrap
    repeats : of the bootstrap

    Raises
    ------
    DataError
        There are no members or no outsiders, a patient is both, or a loss is not a number.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    inside, outside = set(map(str, patients)), set(map(str, outside_patients))
    if not inside or not outside:
        raise DataError(f"an attack needs members and outsiders; found {len(inside)} and {len(outside)} patients")
    if both := inside & outside:
        raise DataError(f"patient {min(both)!r} is both member and outsider; leave such patients out")
    if not (np.isfinite(losses).all() and np.isfinite(outside_losses).all()):
        raise DataError("a loss is not finite; the model can't be attacked by its losses")
    members = -_by_patient(losses, patients)
    outsiders = -_by_patient(outside_losses, outside_patients)
    truth = np.repeat([1, 0], [len(members), len(outsiders)])
    score = np.concatenate([members, outsiders])
    false_positives, true_positives, _ = roc_curve(truth, score, drop_intermediate=False)
    low, high = np.quantile(_bootstrapped(members, outsiders, seed, repeats), [0.025, 0.975])
    return MembershipAttack(
        members=len(members),
        outsiders=len(outsiders),
        auc=float(roc_auc_score(truth, score)),
        low=float(low),
        high=float(high),
        found=tuple(
            float(true_positives[false_positives <= rate].max()) if rate * len(outsiders) >= 1 else None
            for rate in FALSE_POSITIVE_RATES
        ),
        advantage=float((true_positives - false_positives).max()),
    )


def _bootstrapped(members: np.ndarray, outsiders: np.ndarray, seed: int, repeats: int) -> np.ndarray:
    """Return the areas under the curve of patients drawn with replacement, (repeats,)."""
    generator = numpy_generator(seed, "membership", "bootstrap")
    values, place = np.unique(np.concatenate([members, outsiders]), return_inverse=True)
    of_members, of_outsiders = place[: len(members)], place[len(members) :]
    areas = np.empty(repeats)
    for turn in range(repeats):
        inside = np.bincount(generator.choice(of_members, len(members)), minlength=len(values))
        outside = np.bincount(generator.choice(of_outsiders, len(outsiders)), minlength=len(values))
        areas[turn] = inside @ (np.cumsum(outside) - outside / 2)  # outsiders below each value, ties half
    return np.asarray(areas / (len(members) * len(outsiders)))


def _by_patient(values: np.ndarray, patients: Sequence[str] | np.ndarray) -> np.ndarray:
    _, which = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    return np.asarray(np.bincount(which, weights=values) / np.bincount(which))
