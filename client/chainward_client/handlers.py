"""What a site does with a message: thin handlers, one per kind, over whatever node it is (`node.py`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from chainward_client.answers import masked_sum, stated, student_of, sums_over_embeddings, told
from chainward_client.card import site_card
from chainward_client.kept_records import for_the_owner_alone
from chainward_client.node import Node
from chainward_client.request_check import admitted, check_architecture, incoming_state
from chainward_client.scoring import scored
from chainward_client.site import OpenSite
from chainward_client.store import SiteStore
from chainward_client.training.link import train_link
from chainward_shared.console import show_progress
from chainward_shared.errors import ChainwardError, PolicyRefusal, PrivacyError
from chainward_shared.models.start import travelling
from chainward_shared.protocol import (
    AtWorkRequest,
    BaseTask,
    CardRequest,
    EvaluateTask,
    HelloRequest,
    LinkResult,
    LinkTask,
    SitePrivacy,
    StatisticsTask,
    StudentTask,
    SumKeys,
    SumKeysTask,
    SumSharesTask,
    SumTask,
    SumUnmaskTask,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.protocol.run_plan import RunPlan
from chainward_shared.weights import digest, rounded, to_arrays

logger = logging.getLogger("chainward.client")

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
    if kind_of(content) in _SUM_STEPS:
        return _sum_step(content, node)
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
        if (privacy := site.open_privacy()) is not None:
            head = privacy.ledger.head
    except PrivacyError as error:
        logger.error("nothing can be trained privately here: %s", error)
    return SitePrivacy(terms=site.policy.terms, required=site.policy.required, head=head)


def link(message: Message, node: Node) -> RecordDict:
    """Train one link of the chain, or this hospital alone."""
    task, arrays = unpack(message.content, LinkTask)
    with node.at_work_on(task, message.metadata.ttl) as site:
        return _link(task, arrays, site)


def _link(task: LinkTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> RecordDict:
    check_architecture(task.architecture, site.described)
    work = admitted(site.policy, site.open_privacy, task)
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
        result = LinkResult(hop=task.hop, site=site.site, digest=digest(state), training=told(log, work))
        answer = result, travelling(state, task.architecture)
        store.save_answer(task, *answer)
    result, state = answer
    return pack(stated(result, work), {"model": to_arrays(state)})


def student(message: Message, node: Node) -> RecordDict:
    """Train the compact student for one round; keep the auxiliary teacher here."""
    task, arrays = unpack(message.content, StudentTask)
    with node.at_work_on(task, message.metadata.ttl) as site:
        _in_the_open(site)
        result, state, _ = student_of(task, arrays, site)
        return pack(result, {"student": to_arrays(state)})


def score(message: Message, node: Node) -> RecordDict:
    """Score a model on this site's own images, and let out what the site's policy lets out."""
    task, arrays = unpack(message.content, EvaluateTask)
    with node.at_work_on(task, message.metadata.ttl) as site:
        _in_the_open(site)
        return scored(task, arrays, site)


def statistics(message: Message, node: Node) -> RecordDict:
    """Sum up a model's embeddings of this site's labelled images; or send the numbers of a secure sum, masked."""
    if kind_of(message.content) == SumTask.KIND:
        asked, arrays = unpack(message.content, SumTask)
        with node.at_work_on(asked.work, message.metadata.ttl) as site:
            answer, sums = masked_sum(asked, arrays, site)
            return pack(answer, {"sum": to_arrays(sums)})
    task, arrays = unpack(message.content, StatisticsTask)
    with node.at_work_on(task, message.metadata.ttl) as site:
        _in_the_open(site)
        result, sums = sums_over_embeddings(task, arrays, site)
        return pack(result, {"sums": to_arrays(sums)})


def _in_the_open(site: OpenSite) -> None:
    """Refuse to answer with the site's own sums where it gives them in secure sums alone."""
    if site.secure_sums is not None and site.secure_sums.required:
        raise PolicyRefusal(
            "this site gives sums in secure sums alone (secure_sums.required in its site.yaml); set federation.secure-sums"
        )


_SUM_STEPS: dict[str, type[SumKeysTask | SumSharesTask | SumUnmaskTask]] = {
    task.KIND: task for task in (SumKeysTask, SumSharesTask, SumUnmaskTask)
}
"""The steps of a secure sum for which no data are read."""


def _sum_step(content: RecordDict, node: Node) -> RecordDict:
    task, _ = unpack(content, _SUM_STEPS[kind_of(content)])
    part = node.open_for_sum(task.round.run_id, task.simulated).participation(task.round)
    if isinstance(task, SumKeysTask):
        return pack(SumKeys(offer=part.offer(task.round)))
    if isinstance(task, SumSharesTask):
        return pack(part.share(task.round, task.offers))
    return pack(part.unmask(task.round, task.answered))
