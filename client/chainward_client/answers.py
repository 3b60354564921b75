"""What a site's work comes to: a round of the student, sums over embeddings, or, in a secure sum, their numbers with masks on.

How it leaves is the handlers' business.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from flwr.app import ArrayRecord

from chainward_client.limits import admit_model
from chainward_client.private_site import PrivateWork
from chainward_client.request_check import admitted, check_architecture, incoming_frame, incoming_state
from chainward_client.scoring import scores_and_counts
from chainward_client.secure_sums import kind_of_sum
from chainward_client.site import OpenSite
from chainward_client.statistics import private_sums_of, sums_of
from chainward_client.store import SiteStore
from chainward_client.training.student import train_student
from chainward_shared.errors import PolicyRefusal, ProtocolError
from chainward_shared.protocol import (
    Body,
    MaskedSum,
    Round,
    StatisticsResult,
    StatisticsTask,
    StudentResult,
    StudentTask,
    SumTask,
    SumWork,
    TrainingLog,
    fingerprint,
)
from chainward_shared.secure_sums import as_tensor, fixed_point, flat
from chainward_shared.summands import counts_summand, fraction_bits, student_summand
from chainward_shared.weights import StateDict, digest, rounded

B = TypeVar("B", bound=Body)


def told(log: TrainingLog, work: PrivateWork | None) -> TrainingLog:
    """Return what is said of a training: of a private one the time only roughly, for it varies with what was sampled."""
    return log if work is None else log.model_copy(update={"seconds": float(f"{log.seconds:.0e}")})


def stated(result: B, work: PrivateWork | None) -> B:
    """Return the result with the statement of what the ledger holds now: also where its answer was stored before."""
    return result if work is None else result.model_copy(update={"statement": work.statement()})


def student_of(
    task: StudentTask, arrays: dict[str, ArrayRecord], site: OpenSite
) -> tuple[StudentResult, StateDict, StateDict]:
    """Return what a round of the student comes to, its weights, and those that it started from.

    Asked the same again, a site answers what it has answered before.
    """
    for architecture in (task.architecture, task.large_architecture):
        if architecture is not None:
            check_architecture(architecture, site.described, any_size=True)
    work = admitted(site.policy, site.open_privacy, task)
    store = SiteStore(site.state_dir, task.run_id)
    current = incoming_state(arrays.get("student"), "student", task.architecture, task.student_digest)
    answer = store.load_answer(task, StudentResult)
    if answer is None:
        large = []
        if task.large_architecture is not None:
            base = site.bases.load(task.large_architecture)
            large = [
                incoming_state(arrays.get(f"large_{i}"), f"large_{i}", task.large_architecture, expected, base)
                for i, expected in enumerate(task.large_digests)
            ]
        trained = train_student(
            site.data,
            task.architecture,
            task.recipe,
            current,
            _auxiliary(task, arrays, store, site.site),
            round_index=task.round - 1,
            large=large,
            large_architecture=task.large_architecture,
            features=site.features,
            state_dir=site.state_dir,
            work=work,
            checkpoint=store.checkpoint(task),
        )
        if trained.auxiliary is not None:
            store.save_auxiliary(trained.auxiliary, task.architecture, after_round=task.round)
        state = rounded(trained.student, task.recipe.transfer)
        result = StudentResult(
            round=task.round,
            site=site.site,
            digest=digest(state),
            training=told(trained.log, work),
            auxiliary_kept=trained.auxiliary_kept,
        )
        answer = result, state
        store.save_answer(task, *answer)
    result, state = answer
    return stated(result, work), state, current


def _auxiliary(task: StudentTask, arrays: dict[str, ArrayRecord], store: SiteStore, site: str) -> StateDict | None:
    """Return the auxiliary teacher of this round: this site's own, or the selection that came with the task."""
    if task.recipe.stage != "distil":
        return None
    if task.auxiliary_digest is not None:
        selected = incoming_state(arrays.get("auxiliary"), "auxiliary", task.architecture, task.auxiliary_digest)
        store.save_auxiliary(selected, task.architecture, after_round=0)
    auxiliary = store.load_auxiliary(before_round=task.round)
    if auxiliary is None:
        raise ProtocolError(f"site '{site}' has no auxiliary teacher for round {task.round}; send it again")
    return auxiliary


def sums_over_embeddings(
    task: StatisticsTask, arrays: dict[str, ArrayRecord], site: OpenSite, *, together: int = 1
) -> tuple[StatisticsResult, StateDict]:
    """Return the sums of a statistics round: as they are, never at a site with a privacy policy; or those of a private run,
    which are those that were sent where the same was asked before.

    `together`: of how many sites, this one among them, the noise may be taken together; 1 outside of secure sums.
    """
    if task.shared_noise is not None and task.shared_noise.sites > together:
        raise PolicyRefusal(
            f"these sums would have enough noise only with that of {task.shared_noise.sites} sites together; this site relies on "
            f"{together} here, itself among them (secure_sums.noise_from in its site.yaml): set "
            f"federation.secure-noise-from={together}"
        )
    check_architecture(task.architecture, site.described, any_size=True)  # of a student the size may be another
    work = admitted(site.policy, site.open_privacy, task)
    base = site.bases.load(task.architecture)
    state = incoming_state(arrays.get("model"), "model", task.architecture, task.digest, base)
    if task.form is None:
        _admit_model(task, site)
        return sums_of(task, site.data, state, site.limits, site.features)
    store = SiteStore(site.state_dir, task.run_id)
    answer = store.load_answer(task, StatisticsResult)
    if answer is None:
        frame = incoming_frame(arrays.get("frame"), task)
        if work is None:
            _admit_model(task, site)
        answer = private_sums_of(task, site.data, state, frame, work, site.limits, site.features)
        store.save_answer(task, *answer)
    result, sums = answer
    return stated(result, work), sums


def _admit_model(task: StatisticsTask, site: OpenSite) -> None:
    """Count a model about which sums leave without noise."""
    if site.scores is not None and not admit_model(site.state_dir, task.run_id, task.digest, site.scores):
        raise PolicyRefusal(
            "the hospital answers questions about no more models in this run, or today (scores.per_run, scores.per_day in "
            "its site.yaml)"
        )


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
