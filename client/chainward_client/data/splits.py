"""By what cases are divided evenly: their class, or what stands for it where an image may have several findings."""

from __future__ import annotations

import numpy as np


def strata(labels: np.ndarray) -> np.ndarray:
    """Return the stratum of every case, int64 (n,).

    Single-label, labels (n,): the class. Multi-label, labels (n, classes) of 0 and 1: the rarest of its findings among
    these cases (the lower index on a tie), so that a rare finding is divided evenly whatever else is in the image;
    cases without a finding form the stratum `classes`, one past the last finding.
    """
    if labels.ndim == 1:
        return labels
    present = labels > 0.5
    classes = labels.shape[1]
    by_rarity = np.argsort(present.sum(axis=0), kind="stable")
    found: np.ndarray = by_rarity[present[:, by_rarity].argmax(axis=1)]
    found[~present.any(axis=1)] = classes
    return found


def num_strata(labels: np.ndarray, classes: int) -> int:
    """Return how many strata cases of `classes` classes can have."""
    return classes if labels.ndim == 1 else classes + 1
