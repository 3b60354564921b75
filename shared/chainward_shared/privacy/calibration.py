"""How much Gaussian noise releases of sums need: exactly, not by a bound (Balle and Wang 2018, arXiv:1805.06530)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from chainward_shared.errors import PrivacyError
from chainward_shared.privacy.accounting import MOST_NOISE, Mechanism, spent

_LEAST_NOISE = 1e-3
_PRECISION = 5e-4


def analytic_noise(epsilon: float, delta: float) -> float:
    """Return the smallest standard deviation with which one release of a sum is (epsilon, delta)-private where a unit changes
    it by a vector no longer than 1: the root of Balle and Wang's theorem 8.

    Raises
    ------
    PrivacyError
        A number is out of its range.
    """
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise PrivacyError(f"no noise has epsilon {epsilon} and delta {delta}; expected above 0, and within (0, 1)")
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def over(log_noise: float) -> float:
        noise = math.exp(log_noise)
        inside = float(log_ndtr(1 / (2 * noise) - epsilon * noise))
        outside = epsilon + float(log_ndtr(-1 / (2 * noise) - epsilon * noise))
        return math.exp(inside) - math.exp(min(outside, inside)) - delta

    if over(math.log(_LEAST_NOISE)) <= 0:
        return _LEAST_NOISE
    return float(math.exp(brentq(over, math.log(_LEAST_NOISE), math.log(MOST_NOISE), xtol=1e-10)))


def release_noise(
    epsilon: float, delta: float, releases: int, before: Sequence[Mechanism] = (), shares: Sequence[float] = (1.0,)
) -> float:
    """Return the noise multiplier of rounds of releases of sums that, after what was spent `before`, stay within epsilon.

    It is the analytic one, raised to what the enforced accountant asks for: by less than 0.1 % where nothing was spent before.

    Parameters
    ----------
    releases : number of rounds
    shares : of a round's budget that each release in it has, adding up to 1: its noise multiplier is the one returned over the
        square root of its share

    Raises
    ------
    PrivacyError
        A number is out of its range, or what was spent before leaves nothing.
    """
    if releases < 1:
        raise PrivacyError(f"{releases} releases have no noise multiplier; give at least 1")
    return _release_noise(epsilon, delta, releases, tuple(before), tuple(shares))


def release_mechanisms(noise: float, releases: int, shares: Sequence[float]) -> list[Mechanism]:
    """Return what rounds of releases of sums cost, one mechanism for each release of a round."""
    return [Mechanism("gaussian", noise / math.sqrt(share), 1.0, releases) for share in shares]


@lru_cache(maxsize=256)
def _release_noise(
    epsilon: float, delta: float, releases: int, before: tuple[Mechanism, ...], shares: tuple[float, ...]
) -> float:
    def fits(noise: float) -> bool:
        return spent([*before, *release_mechanisms(noise, releases, shares)], delta) <= epsilon

    too_little = analytic_noise(epsilon, delta) * math.sqrt(releases)
    enough, more = too_little, _PRECISION
    while not fits(enough):
        if enough > MOST_NOISE:
            raise PrivacyError(
                f"no noise keeps {releases} releases of sums within epsilon {epsilon:g} at delta {delta:g}: "
                f"{spent(before, delta):.4g} of it is spent already; raise the budget or ask for fewer"
            )
        too_little, enough, more = enough, enough * (1 + more), 2 * more
    while enough > too_little * (1 + _PRECISION):
        middle = math.sqrt(enough * too_little)
        too_little, enough = (too_little, middle) if fits(middle) else (middle, enough)
    return enough
