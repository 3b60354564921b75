"""Rules that decide on figures: which site is next, whether a link forgot too much, which strand is best.

Pure functions of validation scores, so that the coordinator and the plain runner decide alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from chainward_shared.evaluation.scores import Scores


def weakest_site(remaining: Sequence[str], validation: Mapping[str, Scores]) -> str:
    """Return the site of `remaining` where the predecessor's validation balanced accuracy is lowest.

    A site without a score comes last; of equal ones, and before the first link, the first of `remaining` is taken.
    """
    scores = {site: _balanced_accuracy(validation.get(site)) for site in remaining}
    return min(remaining, key=lambda site: 2.0 if scores[site] is None else scores[site])


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
        (old, new)
        for site in dict.fromkeys(earlier_sites)
        if (old := _balanced_accuracy(before.get(site))) is not None
        and (new := _balanced_accuracy(after.get(site))) is not None
    ]
    if not pairs:
        return None
    return Forgetting(sum(old for old, _ in pairs) / len(pairs), sum(new for _, new in pairs) / len(pairs))


def best_strand(validation: Mapping[int, Scores]) -> int:
    """Return the strand with the highest pooled validation balanced accuracy, the first of equal ones."""
    scores = {strand: _balanced_accuracy(score) for strand, score in validation.items()}
    return max(sorted(scores), key=lambda strand: -1.0 if scores[strand] is None else scores[strand])


def _balanced_accuracy(score: Scores | None) -> float | None:
    return None if score is None else score.balanced_accuracy
