"""How well anybody can guess whether a patient was in a training, at most, given what the training has spent.

Who accuses a share f of those who were not there finds at most ``exp(epsilon) f + delta`` of those who were, and passes over at
least ``exp(-epsilon) (1 - f - delta)`` of them (Kairouz, Oh and Viswanath 2015, arXiv:1311.0776). The bound is the least that
follows from all pairs of epsilon and delta that hold at once, not from the one that is reported alone: for Gaussian noise the
curve of Dong, Roth and Su 2022, arXiv:1905.02383, eq. 6. It is concave, so it bounds averages over patients, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chainward_shared.privacy.accounting import Mechanism, privacy_loss

_EPSILONS = np.concatenate([np.linspace(0, 20, 401), np.linspace(20.5, 60, 80)])
_RATES = np.unique(np.concatenate([[0.0], np.logspace(-6, -3, 100), np.linspace(1e-3, 1, 1000)]))


def most_found(mechanisms: Sequence[Mechanism], delta: float, rates: Sequence[float]) -> list[float]:
    """Return the largest share of members that can be found at each share of outsiders falsely accused.

    Parameters
    ----------
    mechanisms : all that was spent on what the attacker sees; none: nothing was seen
    delta : where epsilon is reported; it decides only how finely losses are computed
    rates : within [0, 1]

    Raises
    ------
    PrivacyError
        `delta` is not within (0, 1).
    """
    accused = np.asarray(rates, dtype=np.float64)
    if not any(one.steps for one in mechanisms):
        return [float(rate) for rate in accused]
    loss = privacy_loss(mechanisms, delta)
    if loss is None:
        return [1.0] * len(accused)
    deltas = np.asarray(loss.get_delta_for_epsilon(_EPSILONS))
    factors, deltas = np.exp(_EPSILONS)[:, None], deltas[:, None]
    few = (factors * accused + deltas).min(axis=0)
    many = (1 - (1 - accused - deltas) / factors).min(axis=0)  # the same, for who is not accused
    return [float(found) for found in np.minimum(few, many).clip(accused, 1.0)]


def most_auc(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return the largest area under the curve of who is found over who is falsely accused, 0.5 (a coin) to 1.

    Raises
    ------
    PrivacyError
        `delta` is not within (0, 1).
    """
    found = np.asarray(most_found(mechanisms, delta, list(_RATES)))
    return float(min(1.0, (found[1:] * np.diff(_RATES)).sum()))  # the right end of each step: never too little
