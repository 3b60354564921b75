"""Rules that decide on figures: which site is next, whether a link forgot too much, which strand is best.

Pure functions of validation scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

from chainward_shared.evaluation.scores import Scores


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


def best_strand(validation: Mapping[int, Scores]) -> int:
    """Return the strand with the highest pooled validation balanced accuracy, the first of equal ones."""
    return max(sorted(validation), key=lambda strand: _balanced_accuracy(validation[strand], unknown=-1.0))


def _balanced_accuracy(score: Scores | None, *, unknown: float) -> float:
    return unknown if score is None or score.balanced_accuracy is None else score.balanced_accuracy
