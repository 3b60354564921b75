"""What of a model's scores on the site's own images may leave, as the site's policy says."""

from __future__ import annotations

import numpy as np

from chainward_client.data.site_data import Cases
from chainward_client.entropy import Entropy
from chainward_shared.evaluation.classification import PredictionCounts
from chainward_shared.privacy.policy import PrivacyPolicy


def one_image_each(cases: Cases) -> Cases:
    """Return the first image of each patient: what a patient adds to a noised release must not grow with the images."""
    _, first = np.unique(cases.patients, return_index=True)
    return cases.take(np.sort(first))


def noised(counts: PredictionCounts, policy: PrivacyPolicy, entropy: Entropy) -> PredictionCounts:
    """Return the counts with a confusion matrix that one release with Laplace noise covers, and nothing else.

    One case adds 1 to one cell, or, multi-label, to one cell for each finding: that is the sensitivity (Dwork et al. 2006),
    and the noise has this scale over ``metrics_epsilon``. Rounding and cutting below zero are post-processing. Histograms
    and calibration have too many cells for noise to leave anything of them; they are zero.

    Parameters
    ----------
    counts : of one image for each unit. Splits share no patient, so that one charge covers the counts of several
    """
    assert policy.metrics_epsilon is not None
    cells_of_a_case = 1 if counts.confusion.ndim == 2 else len(counts.confusion)
    noise = laplace(counts.confusion.size, cells_of_a_case / policy.metrics_epsilon, entropy)
    confusion = np.rint(counts.confusion + noise.reshape(counts.confusion.shape)).clip(min=0).astype(np.int64)
    return PredictionCounts(confusion, np.zeros_like(counts.calibration), np.zeros_like(counts.histograms))


def laplace(n: int, scale: float, entropy: Entropy) -> np.ndarray:
    """Return `n` draws of Laplace noise, float64 (n,): the difference of two exponential ones."""
    first, second = (-np.log1p(-entropy.uniform(n)) for _ in range(2))
    noise: np.ndarray = scale * (first - second)
    return noise
