"""What of a site's work leaves in a secure sum: its numbers, masked, and what a private site says of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord

from chainward_client.answers import student_of, sums_over_embeddings
from chainward_client.scoring import scores_and_counts
from chainward_client.secure_sums import kind_of_sum
from chainward_client.site import OpenSite
from chainward_shared.errors import PolicyRefusal, ProtocolError
from chainward_shared.privacy.statements import Statement
from chainward_shared.protocol import MaskedSum, Round, StatisticsTask, StudentTask, SumTask, SumWork, fingerprint
from chainward_shared.secure_sums import as_tensor, fixed_point, flat
from chainward_shared.summands import counts_summand, fraction_bits, student_summand
from chainward_shared.weights import StateDict


@dataclass(frozen=True)
class _Summand:
    """What a site adds. `noise`, `statement`: as of `MaskedSum`."""

    state: StateDict
    noise: float = 0.0
    statement: Statement | None = None


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
    found: list[_Summand] = []

    def numbers() -> np.ndarray:
        found.append(_summand(work, arrays, site, task.round))
        return fixed_point(flat(found[0].state), len(task.round.members), fraction_bits(work))

    sent = site.participation(task.round).mask(task.round, task.shares, numbers, kind_of_sum(task))
    answer = MaskedSum(site=site.site, noise=found[0].noise, statement=found[0].statement)
    return answer, {"sum": as_tensor(sent)}


def _summand(work: SumWork, arrays: dict[str, ArrayRecord], site: OpenSite, round_: Round) -> _Summand:
    if isinstance(work, StudentTask):
        result, student, start = student_of(work, arrays, site)
        moved = student_summand(student, start, result.auxiliary_kept, round_.weight(site.site))
        return _Summand(moved, statement=result.statement)
    if isinstance(work, StatisticsTask):
        sums, state = sums_over_embeddings(work, arrays, site, together=site.participation(round_).noise_from(round_))
        return _Summand(state, sums.noise, sums.statement)
    if work.localisation:
        raise ProtocolError("where a model looks is no part of a secure sum")
    scores, counts = scores_and_counts(work, arrays, site)
    if scores.release == "withhold":
        raise PolicyRefusal("the site withholds its scores of this model")
    return _Summand(counts_summand(counts), statement=scores.statement)
