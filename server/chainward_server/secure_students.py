"""A round of the students by a secure sum: the mean of all updates, of which the coordinator sees none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chainward_server.aggregation import capped, check_drift
from chainward_server.context import Run
from chainward_server.secure_rounds import summed_everywhere
from chainward_server.sites import Summed, Work
from chainward_shared.errors import ChainwardError
from chainward_shared.hops import student_key
from chainward_shared.protocol import MOST_WEIGHT, MaskedSum, StudentTask
from chainward_shared.summands import student_mean
from chainward_shared.weights import StateDict


def mean_student(
    run: Run, number: int, start: StateDict, work: Callable[[str], Work[StudentTask]]
) -> tuple[StateDict, float, Summed]:
    """Have all sites train a round of the student; return their mean, and what their auxiliary teachers have kept of the start.

    Weights are those of a mean in the open: sizes by the cards, none above ``student.max-share``, nor above what a hospital lets
    itself weigh. What one hospital has done to its student nobody sees, so that ``student.max-update`` holds for none;
    ``student.max-drift`` holds for the mean.

    Raises
    ------
    ChainwardError
        Too few sites took part to the end, or the mean is too far from where it started.
    """
    config = run.config.student

    def weights(members: Sequence[str]) -> dict[str, float]:
        found = capped([run.sites.sizes[site] for site in members], min(config.max_share, MOST_WEIGHT))
        return {site: weight / sum(found) for site, weight in zip(members, found, strict=True)}

    def check(site: str, answer: MaskedSum) -> None:
        run.privacy.take(answer.statement, site, student_key(number))

    summed = summed_everywhere(
        run.sites, f"student round {number}", work, retries=run.config.chain.retries, weights=weights, check=check
    )
    shares = weights(summed.members)
    total = sum(shares[site] for site in summed.sites)
    mean, kept = student_mean(summed.state, start, total)
    try:
        check_drift(mean, start, config.max_drift, "student.max-drift")
    except ChainwardError as error:
        raise ChainwardError(
            f"student round {number}: of the mean of {len(summed.sites)} sites, {error}; which of them it is can't be told"
        ) from error
    return mean, kept, summed
