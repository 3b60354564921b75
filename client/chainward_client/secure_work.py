"""What of a site's work leaves in a secure sum: its numbers, masked, and what a private site says of them."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord

from chainward_client.answers import student_of, sums_over_embeddings
from chainward_client.scoring import scores_and_counts
from chainward_client.secure_sums import kind_of_sum
from chainward_client.site import OpenSite
from chainward_shared.errors import PolicyRefusal, ProtocolError
from chainward_shared.protocol import MaskedSum, Round, StatisticsTask, StudentTask, SumTask, SumWork, fingerprint
from chainward_shared.secure_sums import as_tensor, fixed_point, flat
from chainward_shared.summands import counts_summand, fraction_bits, student_summand
from chainward_shared.weights import StateDict


def masked_sum(task: SumTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> tuple[MaskedSum, StateDict]:
    """Do the work of a secure sum, and return its numbers with masks on.

    Raises
    ------
    ProtocolError
        It is not the work that the sites have agreed on.
    PolicyRefusal
        The site gives no such numbers.
    ModelError
        One of them is too large to be added up.
    """
    work = task.work
    if task.round.task != fingerprint(work):
        raise ProtocolError("the sites have agreed on another sum than the one that is asked for")
    said: list[MaskedSum] = []

    def numbers() -> np.ndarray:
        answer, summand = _summand(work, arrays, site, task.round)
        said.append(answer)
        return fixed_point(flat(summand), len(task.round.members), fraction_bits(work))

    sent = site.participation(task.round).mask(task.round, task.shares, numbers, kind_of_sum(task))
    return said[0], {"sum": as_tensor(sent)}


def _summand(
    work: SumWork, arrays: dict[str, ArrayRecord], site: OpenSite, round_: Round
) -> tuple[MaskedSum, StateDict]:
    """Return what a site adds, and what it says of it."""
    if isinstance(work, StudentTask):
        result, student, start = student_of(work, arrays, site)
        moved = student_summand(student, start, result.auxiliary_kept, round_.weight(site.site))
        return MaskedSum(site=site.site, statement=result.statement), moved
    if isinstance(work, StatisticsTask):
        sums, state = sums_over_embeddings(work, arrays, site, together=site.participation(round_).noise_from(round_))
        return MaskedSum(site=site.site, noise=sums.noise, statement=sums.statement), state
    if work.localisation:
        raise ProtocolError("where a model looks is no part of a secure sum")
    scores, counts = scores_and_counts(work, arrays, site)
    if scores.release == "withhold":
        raise PolicyRefusal("the site withholds its scores of this model")
    return MaskedSum(site=site.site, statement=scores.statement), counts_summand(counts)
