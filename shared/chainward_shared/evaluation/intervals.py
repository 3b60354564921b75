"""Confidence intervals of proportions that hold for ten cases as for ten thousand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)
"""Of 95 % intervals: how many standard deviations they reach to either side."""


def wilson(found: int, of: int) -> tuple[float, float] | None:
    """Return the ends of the 95 % score interval of a proportion (Wilson 1927); None of none.

    It is never of width zero, whatever was found: of 10 of 10 it says 0.72 to 1.
    """
    if of == 0:
        return None
    share, part = found / of, Z**2 / of
    middle = (share + part / 2) / (1 + part)
    half = Z * math.sqrt(share * (1 - share) / of + part / (4 * of)) / (1 + part)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of_proportions(counts: Sequence[tuple[int, int]]) -> tuple[float, float] | None:
    """Return the ends of a 95 % interval of the mean of independent proportions, such as a balanced accuracy.

    The distances of each proportion to the ends of its Wilson interval are added in squares (method of variance estimates
    recovery: Newcombe 1998; Zou & Donner 2008).

    Parameters
    ----------
    counts : how many were found, of how many, for each proportion; none of 0
    """
    ends = [(found / of, *interval) for found, of in counts if (interval := wilson(found, of))]
    if not ends:
        return None
    mean = sum(share for share, _, _ in ends) / len(ends)
    below = math.sqrt(sum((share - low) ** 2 for share, low, _ in ends)) / len(ends)
    above = math.sqrt(sum((high - share) ** 2 for share, _, high in ends)) / len(ends)
    return max(0.0, mean - below), min(1.0, mean + above)
