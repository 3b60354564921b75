"""Rules that decide on figures: which site is next, whether a link forgot too much, which strand is best.

Pure functions of validation scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from typing import Literal

from chainward_shared.evaluation.scores import Scores

Z_95 = 1.96
"""Half of a 95 % interval, in standard deviations of a normal distribution."""


def weakest_site(remaining: Sequence[str], validation: Mapping[str, Scores]) -> str:
    """Return the site of `remaining` where the predecessor's validation balanced accuracy is lowest.

    A site without a score comes last; of equal ones, and before the first link, the first of `remaining` is taken.
    """
    return min(remaining, key=lambda site: _balanced_accuracy(validation.get(site), unknown=2.0))


@dataclass(frozen=True)
class Forgetting:
    """Validation balanced accuracy of a link's predecessor and of the link, mean over the sites before it."""

    before: float
    after: float

    @property
    def lost(self) -> float:
        """What the link lost; negative where it gained."""
        return self.before - self.after


def forgetting(
    earlier_sites: Iterable[str], before: Mapping[str, Scores], after: Mapping[str, Scores]
) -> Forgetting | None:
    """Return what a link cost the sites that were trained before it; None where there is nothing to compare.

    Parameters
    ----------
    earlier_sites : sites whose links are part of the predecessor
    before, after : validation scores of each site, of the predecessor and of the link
    """
    pairs = [
        (_balanced_accuracy(before.get(site), unknown=nan), _balanced_accuracy(after.get(site), unknown=nan))
        for site in dict.fromkeys(earlier_sites)
    ]
    known = [pair for pair in pairs if not isnan(sum(pair))]
    if not known:
        return None
    return Forgetting(sum(old for old, _ in known) / len(known), sum(new for _, new in known) / len(known))


@dataclass(frozen=True)
class Gain:
    """Validation balanced accuracy before and after a link, all sites together, and half the 95 % interval of the difference.

    The interval takes the two figures to be independent. They are of the same images, so it is wider than it need be.
    """

    before: float
    after: float
    half_interval: float

    def enough(self, accept: Literal["not-worse", "better"]) -> bool:
        """Return whether the chain goes on from such a link."""
        least = self.half_interval if accept == "better" else 0.0
        return self.after - self.before > least or (accept == "not-worse" and self.after == self.before)


def gain(before: Scores, after: Scores, cases: Sequence[int]) -> Gain | None:
    """Return what a link gained; None where there is nothing to compare.

    Parameters
    ----------
    before, after : pooled validation scores of the link's predecessor and of the link
    cases : validation images of each class that there are; empty: unknown, and all classes are taken to have as many
    """
    figures = before.balanced_accuracy, after.balanced_accuracy
    if figures[0] is None or figures[1] is None:
        return None
    present = [count for count in cases if count > 0] or [max(1, after.n)]
    spread = sum(1 / count for count in present) / len(present) ** 2
    variance = sum(figure * (1 - figure) for figure in (figures[0], figures[1])) * spread
    return Gain(figures[0], figures[1], Z_95 * sqrt(variance))


def best_strand(validation: Mapping[int, Scores]) -> int:
    """Return the strand with the highest pooled validation balanced accuracy, the first of equal ones."""
    return max(sorted(validation), key=lambda strand: _balanced_accuracy(validation[strand], unknown=-1.0))


def best_model(validation: Mapping[str, Scores]) -> str:
    """Return the model with the highest pooled validation balanced accuracy, the last of equal ones."""
    return max(reversed(list(validation)), key=lambda name: _balanced_accuracy(validation[name], unknown=-1.0))


def _balanced_accuracy(score: Scores | None, *, unknown: float) -> float:
    return unknown if score is None or score.balanced_accuracy is None else score.balanced_accuracy
