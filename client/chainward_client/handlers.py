"""What a site does with a message: thin handlers, one per kind, over whatever node it is (`node.py`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from chainward_client.admission import admitted, admitted_statistics
from chainward_client.card import site_card
from chainward_client.incoming import incoming_frame, incoming_state
from chainward_client.node import Node
from chainward_client.private_files import for_the_owner_alone
from chainward_client.private_site import PrivateWork
from chainward_client.private_statistics import private_sums_of
from chainward_client.request_check import check_architecture
from chainward_client.score_limits import ScoredModels
from chainward_client.scoring import scored
from chainward_client.site import OpenSite
from chainward_client.statistics import sums_of
from chainward_client.store import SiteStore
from chainward_client.training.link import train_link
from chainward_client.training.student import train_student
from chainward_shared.console import show_progress
from chainward_shared.errors import (
    ChainwardError,
    PolicyRefusal,
    PrivacyError,
    ProtocolError,
)
from chainward_shared.models.start import travelling
from chainward_shared.protocol import (
    AtWorkRequest,
    BaseTask,
    Body,
    CardRequest,
    EvaluateTask,
    HelloRequest,
    LinkResult,
    LinkTask,
    MaskedSum,
    SitePrivacy,
    StatisticsResult,
    StatisticsTask,
    StudentResult,
    StudentTask,
    SumKeys,
    SumKeysTask,
    SumSharesTask,
    SumTask,
    SumUnmaskTask,
    TrainingLog,
    fingerprint,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.protocol.run_plan import RunPlan
from chainward_shared.secure_sums import as_tensor, fixed_point, flat
from chainward_shared.weights import StateDict, digest, rounded, to_arrays

logger = logging.getLogger("chainward.client")

B = TypeVar("B", bound=Body)

Handler = Callable[[Message, Node], RecordDict]


def client_app(node: type[Node]) -> ClientApp:
    """Return the Flower `ClientApp` whose nodes are of this kind."""
    app = ClientApp()
    app.query()(_answering(query, node))
    app.train("link")(_answering(link, node))
    app.train("student")(_answering(student, node))
    app.evaluate()(_answering(score, node))
    app.evaluate("statistics")(_answering(statistics, node))
    return app


def _answering(handler: Handler, node: type[Node]) -> Callable[[Message, Context], Message]:
    """Turn an error into the `Refusal` that the node makes of it; what it makes none of stays an exception."""

    def answer(message: Message, context: Context) -> Message:
        show_progress()
        started = time.monotonic()
        asked: Node | None = None
        try:
            with for_the_owner_alone():
                asked = node(context.node_config)
                asked.note(message.content)
                content = handler(message, asked)
        except Exception as error:
            refusal = node.refusal(error)
            if refusal is None:
                raise
            logger.warning("refused: %s", error, exc_info=not isinstance(error, ChainwardError))
            content = pack(refusal)
        if asked is not None:
            asked.note(message.content, content, time.monotonic() - started)
        return Message(content, reply_to=message)

    return answer


def query(message: Message, node: Node) -> RecordDict:
    """Say who is here, whether anyone is at work on a task, how a run's plan stands, or describe the site's data; or take in
    pretrained weights."""
    content = message.content
    if kind_of(content) == AtWorkRequest.KIND:
        return pack(node.at_work(unpack(content, AtWorkRequest)[0]))
    if kind_of(content) == HelloRequest.KIND:
        return pack(node.hello(unpack(content, HelloRequest)[0], message.metadata.dst_node_id))
    if kind_of(content) == BaseTask.KIND:
        task, arrays = unpack(content, BaseTask)
        name, bases = node.bases(task)
        return pack(bases.answer(task, arrays.get("piece"), name))
    if (step := _SUM_STEPS.get(kind_of(content))) is not None:
        return step(content, node)
    if kind_of(content) == RunPlan.KIND:
        return pack(node.consider(unpack(content, RunPlan)[0]))
    site = node.open(unpack(content, CardRequest)[0].simulated)
    required = site.secure_sums is not None and site.secure_sums.required
    privacy = _site_privacy(site)
    return pack(site_card(site.data, site.policy, privacy, secure_sums=required, asks=site.asks))


def _site_privacy(site: OpenSite) -> SitePrivacy | None:
    """Return what the site says of its policy; a ledger that can't be read doesn't keep it from taking part in the rest."""
    if site.policy is None:
        return None
    head = None
    try:
        privacy = site.open_privacy()
        head = None if privacy is None else privacy.ledger.head
    except PrivacyError as error:
        logger.error("nothing can be trained privately here: %s", error)
    return SitePrivacy(terms=site.policy.terms, required=site.policy.required, head=head)


def _work(site: OpenSite, task: LinkTask | StudentTask) -> PrivateWork | None:
    return admitted(
        site.policy,
        site.open_privacy,
        run=task.run_id,
        hop=task.hop,
        asked=task.recipe.privacy,
        seen=task.seen_head,
        privileged=task.recipe.privileged is not None,
    )


def link(message: Message, node: Node) -> RecordDict:
    """Train one link of the chain, or this hospital alone."""
    task, arrays = unpack(message.content, LinkTask)
    with node.at_work_on(task, message.metadata.ttl) as site:
        return _link(task, arrays, site)


def _link(task: LinkTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> RecordDict:
    check_architecture(task.architecture, site.described)
    work = _work(site, task)
    store = SiteStore(site.state_dir, task.run_id)
    store.tidy()
    answer = store.load_answer(task, LinkResult)
    if answer is None:
        base = site.bases.load(task.architecture)
        predecessor = None
        if task.predecessor_digest is not None:
            predecessor = incoming_state(
                arrays.get("predecessor"), "predecessor", task.architecture, task.predecessor_digest, base
            )
        state, log = train_link(
            site.data,
            task.architecture,
            task.recipe,
            predecessor,
            strand=task.strand,
            lap=task.lap,
            alone=task.trained_alone,
            base=base,
            features=site.features,
            state_dir=site.state_dir,
            work=work,
            checkpoint=store.checkpoint(task),
        )
        state = rounded(state, task.recipe.transfer)
        result = LinkResult(hop=task.hop, site=site.site, digest=digest(state), training=_told(log, work))
        answer = result, travelling(state, task.architecture)
        store.save_answer(task, *answer)
    result, state = answer
    return pack(_stated(result, work), {"model": to_arrays(state)})


def _told(log: TrainingLog, work: PrivateWork | None) -> TrainingLog:
    """Return what is said of a training: of a private one the time only roughly, for it varies with what was sampled."""
    return log if work is None else log.model_copy(update={"seconds": float(f"{log.seconds:.0e}")})


def _stated(result: B, work: PrivateWork | None) -> B:
    """Return the result with the statement of what the ledger holds now: also where its answer was stored before."""
    return result if work is None else result.model_copy(update={"statement": work.statement()})


def student(message: Message, node: Node) -> RecordDict:
    """Train the compact student for one round; keep the auxiliary teacher here."""
    task, arrays = unpack(message.content, StudentTask)
    with node.at_work_on(task, message.metadata.ttl) as site:
        return _student(task, arrays, site)


def _student(task: StudentTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> RecordDict:
    for architecture in (task.architecture, task.large_architecture):
        if architecture is not None:
            check_architecture(architecture, site.described, any_size=True)
    work = _work(site, task)
    store = SiteStore(site.state_dir, task.run_id)
    answer = store.load_answer(task, StudentResult)
    if answer is None:
        current = incoming_state(arrays.get("student"), "student", task.architecture, task.student_digest)
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
            training=_told(trained.log, work),
            auxiliary_kept=trained.auxiliary_kept,
        )
        answer = result, state
        store.save_answer(task, *answer)
    result, state = answer
    return pack(_stated(result, work), {"student": to_arrays(state)})


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


def score(message: Message, node: Node) -> RecordDict:
    """Score a model on this site's own images, and let out what the site's policy lets out."""
    task, arrays = unpack(message.content, EvaluateTask)
    with node.at_work_on(task, message.metadata.ttl) as site:
        return scored(task, arrays, site)


def statistics(message: Message, node: Node) -> RecordDict:
    """Sum up a model's embeddings of this site's labelled images; masked, where a secure sum is asked for."""
    if kind_of(message.content) == SumTask.KIND:
        return _masked_sum(message, node)
    task, arrays = unpack(message.content, StatisticsTask)
    with node.at_work_on(task, message.metadata.ttl) as site:
        if site.secure_sums is not None and site.secure_sums.required:
            raise PolicyRefusal(
                "this site gives sums in secure sums alone (secure_sums.required in its site.yaml); set federation.secure-sums"
            )
        if task.form is not None:
            return _bounded_sums(task, arrays, site)
        result, sums = _sums(task, arrays, site)
        return pack(result, {"sums": to_arrays(sums)})


def _bounded_sums(task: StatisticsTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> RecordDict:
    """Return the sums of a private run; those that were sent where the same was asked before."""
    work, state = _admitted_sums(task, arrays, site)
    store = SiteStore(site.state_dir, task.run_id)
    answer = store.load_answer(task, StatisticsResult)
    if answer is None:
        frame = incoming_frame(arrays.get("frame"), task)
        if work is None:
            _admit_model(task, site)
        answer = private_sums_of(task, site.data, state, frame, work, site.limits, site.features)
        store.save_answer(task, *answer)
    result, sums = answer
    return pack(_stated(result, work), {"sums": to_arrays(sums)})


def _admitted_sums(
    task: StatisticsTask, arrays: dict[str, ArrayRecord], site: OpenSite
) -> tuple[PrivateWork | None, StateDict]:
    """Return what sums over a model's embeddings spend through, and the model."""
    # a student, whose size may be another, has no private sums
    check_architecture(task.architecture, site.described, any_size=task.form is None)
    work = admitted_statistics(site.policy, site.open_privacy, task)
    base = site.bases.load(task.architecture)
    return work, incoming_state(arrays.get("model"), "model", task.architecture, task.digest, base)


def _sums(task: StatisticsTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> tuple[StatisticsResult, StateDict]:
    """Return exact sums; never those of a site with a privacy policy."""
    if task.form is not None:
        raise ProtocolError("the sums of a private run are no part of a secure sum")
    _, state = _admitted_sums(task, arrays, site)
    _admit_model(task, site)
    return sums_of(task, site.data, state, site.limits, site.features)


def _admit_model(task: StatisticsTask, site: OpenSite) -> None:
    """Count a model about which sums leave without noise."""
    if site.scores is not None and not ScoredModels.of(site.state_dir).admit(task.run_id, task.digest, site.scores):
        raise PolicyRefusal(
            "the hospital answers questions about no more models in this run, or today (scores.per_run, scores.per_day in "
            "its site.yaml)"
        )


def _masked_sum(message: Message, node: Node) -> RecordDict:
    task, arrays = unpack(message.content, SumTask)
    statistics = task.statistics.model_copy(update={"simulated": task.simulated})
    with node.at_work_on(statistics, message.metadata.ttl) as site:
        if task.round.task != fingerprint(statistics):
            raise ProtocolError("the sites have agreed on another sum than the one that is asked for")

        def numbers() -> np.ndarray:
            return fixed_point(flat(_sums(statistics, arrays, site)[1]), len(task.round.members))

        found = site.participation(task.round).mask(task.round, task.shares, numbers)
        return pack(MaskedSum(site=site.site), {"sum": to_arrays({"sum": as_tensor(found)})})


def _sum_keys(content: RecordDict, node: Node) -> RecordDict:
    task, _ = unpack(content, SumKeysTask)
    return pack(SumKeys(offer=node.open(task.simulated).participation(task.round).offer(task.round)))


def _sum_shares(content: RecordDict, node: Node) -> RecordDict:
    task, _ = unpack(content, SumSharesTask)
    return pack(node.open(task.simulated).participation(task.round).share(task.round, task.offers))


def _sum_unmasking(content: RecordDict, node: Node) -> RecordDict:
    task, _ = unpack(content, SumUnmaskTask)
    return pack(node.open(task.simulated).participation(task.round).unmask(task.round, task.answered))


_SUM_STEPS = {
    SumKeysTask.KIND: _sum_keys,
    SumSharesTask.KIND: _sum_shares,
    SumUnmaskTask.KIND: _sum_unmasking,
}
"""The steps of a secure sum for which no data are read."""
