"""The Flower `ClientApp` of a hospital: thin handlers, one per kind of message."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from chainward_client.data.site_data import SiteData
from chainward_client.data.sources import simulated_site_ids
from chainward_client.evaluation import class_probabilities, localisation_values
from chainward_client.noised_scores import noised, one_image_each
from chainward_client.policy import check_run
from chainward_client.private_site import PrivateWork, declared_units
from chainward_client.site import SITE_CONFIG_KEY, OpenSite, open_site, own_config
from chainward_client.store import SiteStore
from chainward_client.training.link import train_link
from chainward_client.training.student import train_student
from chainward_shared.console import show_progress
from chainward_shared.errors import (
    ChainwardError,
    DataError,
    ModelError,
    PolicyRefusal,
    PrivacyError,
    ProtocolError,
    WeightsError,
)
from chainward_shared.evaluation.classification import (
    COUNT_FIELDS,
    PredictionCounts,
    counts_to_arrays,
    counts_to_state,
    evaluate,
    pool,
)
from chainward_shared.evaluation.localisation import LocalisationSums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture, build_model, skeleton
from chainward_shared.privacy.entries import Head
from chainward_shared.protocol import (
    AtWork,
    AtWorkRequest,
    Body,
    CardRequest,
    EvaluateResult,
    EvaluateTask,
    Hello,
    HelloRequest,
    LinkResult,
    LinkTask,
    Refusal,
    SiteCard,
    SitePrivacy,
    StudentResult,
    StudentTask,
    fingerprint,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.recipes import TrainingRecipe
from chainward_shared.weights import StateDict, digest, from_arrays, rounded, to_arrays, to_full_arrays

logger = logging.getLogger("chainward.client")

app = ClientApp()

PRIVATE_REASON = "something is wrong at the site with its data, its disk or its software; the site's own log says what"

SHAREABLE = (PolicyRefusal, ModelError, ProtocolError, WeightsError)
"""Errors whose words may leave a hospital: they speak of the request. All others may name files, rows and patients."""

B = TypeVar("B", bound=Body)

Handler = Callable[[Message, Context], RecordDict]


def _answering(handler: Handler) -> Callable[[Message, Context], Message]:
    """Turn what a person can act on into a `Refusal`; anything else is a defect and stays an exception.

    What is wrong with a hospital's data or disk names files, rows and patients, and any exception may: at a deployed site
    that stays in the site's own log.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        show_progress()
        deployed = SITE_CONFIG_KEY in context.node_config
        try:
            content = handler(message, context)
        except Exception as error:
            private = not isinstance(error, SHAREABLE)
            if not deployed and not isinstance(error, ChainwardError):
                raise
            logger.warning("refused: %s", error, exc_info=not isinstance(error, ChainwardError))
            reason = PRIVATE_REASON if deployed and private else str(error)
            content = pack(Refusal(reason=reason, final=isinstance(error, PolicyRefusal)))
        return Message(content, reply_to=message)

    return answer


def _state(arrays: ArrayRecord | None, name: str, architecture: Architecture, expected: str | None) -> StateDict:
    """Return the checked weights called `name` out of a message."""
    if arrays is None:
        raise ProtocolError(f"the message lacks the arrays '{name}'")
    state = from_arrays(arrays, skeleton(architecture).state_dict())
    if digest(state) != expected:
        raise WeightsError(f"the arrays '{name}' don't have the digest that the message states; sent again?")
    return state


@app.query()
@_answering
def query(message: Message, context: Context) -> RecordDict:
    """Say who is here, whether anyone is at work on a task, or describe the site's data."""
    content = message.content
    if kind_of(content) == AtWorkRequest.KIND:
        return pack(_at_work(content, context))
    if kind_of(content) == HelloRequest.KIND:
        request, _ = unpack(content, HelloRequest)
        config = own_config(context.node_config)
        if config is not None:
            return pack(Hello(site=config.site))
        return pack(_hello_of_simulated_node(request, context))
    card, _ = unpack(content, CardRequest)
    site = open_site(context.node_config, card.simulated)
    data = site.data
    image = data.splits["train"].images
    told = site.policy is None or site.policy.metrics == "exact"
    privacy = _site_privacy(site)
    return pack(
        SiteCard(
            site=data.site,
            task=data.task,
            classes=list(data.classes),
            image_size=int(image.shape[-1]),
            channels=int(image.shape[1]),
            train=len(data.splits["train"]) if told or site.policy is None else declared_units(site.policy, data),
            val=len(data.splits["val"]) if told else None,
            test=len(data.splits["test"]) if told else None,
            class_counts={split: data.class_counts(split) for split in data.splits} if told else {},
            synthetic=data.synthetic,
            notes=list(data.notes) if told else [],
            privacy=privacy,
        )
    )


def _at_work(content: RecordDict, context: Context) -> AtWork:
    request, _ = unpack(content, AtWorkRequest)
    config = own_config(context.node_config)
    if config is None:
        raise ProtocolError("a simulated site was asked whether it is at work: only deployed ones are")
    store = SiteStore(config.state_dir(Path(str(context.node_config[SITE_CONFIG_KEY]))), request.run_id)
    return AtWork(site=config.site, at_work=store.lock(request.task).held)


@contextmanager
def _at_work_on(task: LinkTask | StudentTask | EvaluateTask, message: Message, context: Context) -> Iterator[OpenSite]:
    """Open the site, and let a deployed one be seen at work on the task, from before its data are read."""
    config = own_config(context.node_config)
    if config is None:
        yield open_site(context.node_config, task.simulated)
        return
    store = SiteStore(config.state_dir(Path(str(context.node_config[SITE_CONFIG_KEY]))), task.run_id)
    with store.lock(fingerprint(task)).hold(message.metadata.ttl):
        yield open_site(context.node_config, task.simulated)


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


def _work(site: OpenSite, run: str, hop: str, recipe: TrainingRecipe, seen: Head | None) -> PrivateWork | None:
    """Return what a training spends through; None where it goes without privacy.

    Raises
    ------
    PolicyRefusal
        The policy doesn't allow such a run here.
    LedgerError
        The ledger is damaged, or an older one than the coordinator has seen.
    """
    asked = recipe.privacy
    if asked is not None and asked.sites == "by-policy" and site.policy is None:
        return None
    unit = None if asked is None else asked.unit
    check_run(site.policy, private=asked is not None, unit=unit, privileged=recipe.privileged is not None)
    privacy = site.open_privacy() if asked is not None else None
    if privacy is None:
        return None
    if seen is not None:
        privacy.ledger.require(seen)
    return privacy.work(run, hop)


def _hello_of_simulated_node(request: HelloRequest, context: Context) -> Hello:
    partition = int(context.node_config.get("partition-id", 0))
    try:
        sites = simulated_site_ids(request.source, num_sites=request.num_sites, label_skew=request.label_skew)
    except DataError as error:
        return Hello(site=None, problem=str(error), partition=partition)
    return Hello(site=None, simulated_sites=list(sites), partition=partition)


@app.train("link")
@_answering
def link(message: Message, context: Context) -> RecordDict:
    """Train one link of the chain, or this hospital alone."""
    task, arrays = unpack(message.content, LinkTask)
    with _at_work_on(task, message, context) as site:
        return _link(task, arrays, site)


def _link(task: LinkTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> RecordDict:
    work = _work(site, task.run_id, task.hop, task.recipe, task.seen_head)
    store = SiteStore(site.state_dir, task.run_id)
    store.tidy()
    answer = store.load_answer(task, LinkResult)
    if answer is None:
        predecessor = None
        if task.predecessor_digest is not None:
            predecessor = _state(arrays.get("predecessor"), "predecessor", task.architecture, task.predecessor_digest)
        state, log = train_link(
            site.data,
            task.architecture,
            task.recipe,
            predecessor,
            strand=task.strand,
            lap=task.lap,
            alone=task.trained_alone,
            state_dir=site.state_dir,
            work=work,
            checkpoint=store.checkpoint(task),
        )
        state = rounded(state, task.recipe.transfer)
        answer = LinkResult(hop=task.hop, site=site.data.site, digest=digest(state), training=log), state
        store.save_answer(task, *answer)
    result, state = answer
    return pack(_stated(result, work), {"model": to_arrays(state)})


def _stated(result: B, work: PrivateWork | None) -> B:
    """Return the result with the statement of what the ledger holds now: also where its answer was stored before."""
    return result if work is None else result.model_copy(update={"statement": work.statement()})


@app.train("student")
@_answering
def student(message: Message, context: Context) -> RecordDict:
    """Train the compact student for one round; keep the auxiliary teacher here."""
    task, arrays = unpack(message.content, StudentTask)
    with _at_work_on(task, message, context) as site:
        return _student(task, arrays, site)


def _student(task: StudentTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> RecordDict:
    work = _work(site, task.run_id, f"student-round-{task.round}", task.recipe, task.seen_head)
    store = SiteStore(site.state_dir, task.run_id)
    answer = store.load_answer(task, StudentResult)
    if answer is None:
        current = _state(arrays.get("student"), "student", task.architecture, task.student_digest)
        large = []
        if task.large_architecture is not None:
            large = [
                _state(arrays.get(f"large_{i}"), f"large_{i}", task.large_architecture, expected)
                for i, expected in enumerate(task.large_digests)
            ]
        trained = train_student(
            site.data,
            task.architecture,
            task.recipe,
            current,
            _auxiliary(task, arrays, store, site.data.site),
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
            site=site.data.site,
            digest=digest(state),
            training=trained.log,
            auxiliary_kept=trained.auxiliary_kept,
            examples=len(site.data.splits["train"]) if work is None else work.site.units(site.data),
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
        selected = _state(arrays.get("auxiliary"), "auxiliary", task.architecture, task.auxiliary_digest)
        store.save_auxiliary(selected, task.architecture, after_round=0)
    auxiliary = store.load_auxiliary(before_round=task.round)
    if auxiliary is None:
        raise ProtocolError(f"site '{site}' has no auxiliary teacher for round {task.round}; send it again")
    return auxiliary


@app.evaluate()
@_answering
def score(message: Message, context: Context) -> RecordDict:
    """Score a model on this site's own images, and let out what the site's policy lets out."""
    task, arrays = unpack(message.content, EvaluateTask)
    with _at_work_on(task, message, context) as site:
        return _score(task, arrays, site)


def _score(task: EvaluateTask, arrays: dict[str, ArrayRecord], site: OpenSite) -> RecordDict:
    release = "exact" if site.policy is None else site.policy.metrics
    if release == "withhold" or (release == "noised" and not task.splits):
        return pack(EvaluateResult(site=site.data.site, scores={}, release="withhold"))
    if release == "noised":
        return _noised_scores(task, site, arrays)
    result, counts = _scores(task, site.data, _model(task, arrays))
    return pack(result, {name: counts_to_arrays(of_split) for name, of_split in counts.items()})


def _model(task: EvaluateTask, arrays: dict[str, ArrayRecord]) -> nn.Module:
    model = build_model(task.architecture)
    model.load_state_dict(_state(arrays.get("model"), "model", task.architecture, task.digest))
    return model


def _scores(task: EvaluateTask, data: SiteData, model: nn.Module) -> tuple[EvaluateResult, dict[str, PredictionCounts]]:
    """Return the scores as they are, and the counts by name of their arrays."""
    scores: dict[str, Scores] = {}
    counts = {}
    size = task.architecture.image_size
    for split in task.splits:
        cases = data.splits[split]
        probabilities = class_probabilities(model, cases, len(data.classes), task.threads, image_size=size)
        labels = cases.labels.numpy()
        scores[split] = evaluate(probabilities, labels)
        counts[f"counts_{split}"] = PredictionCounts.of(probabilities, labels)
    values = None
    if task.localisation:
        values = localisation_values(model, data.splits["test"], task.threads, image_size=size)
    sums = None if values is None else LocalisationSums.of(values)
    return EvaluateResult(site=data.site, scores=scores, localisation=sums), counts


def _noised_scores(task: EvaluateTask, site: OpenSite, arrays: dict[str, ArrayRecord]) -> RecordDict:
    """Return scores with noise, charged to the ledger; the stored ones where the same was asked before."""
    privacy = site.open_privacy()
    assert privacy is not None
    if task.seen_head is not None:
        privacy.ledger.require(task.seen_head)
    work, store = privacy.work(task.run_id, task.hop), SiteStore(site.state_dir, task.run_id)
    answer = store.load_answer(task, EvaluateResult)
    if answer is None:
        model = _model(task, arrays)
        data, policy = site.data, privacy.policy
        if not work.release():
            return pack(EvaluateResult(site=data.site, scores={}, release="withhold"))
        if policy.unit == "patient":
            data = replace(data, splits={split: one_image_each(cases) for split, cases in data.splits.items()})
        exact = _scores(task.model_copy(update={"localisation": False}), data, model)[1]
        counts = {name: noised(of_split, policy, privacy.entropy) for name, of_split in exact.items()}
        scores = {split: pool([counts[f"counts_{split}"]]) for split in task.splits}
        result = EvaluateResult(site=data.site, scores=scores, release="noised")
        stored = {
            f"{name}.{part}": tensor for name, of in counts.items() for part, tensor in counts_to_state(of).items()
        }
        answer = result, stored
        store.save_answer(task, *answer)
    result, state = answer
    parts = {
        name: {key: state[f"{name}.{key}"] for key in COUNT_FIELDS} for name in map("counts_{}".format, task.splits)
    }
    return pack(_stated(result, work), {name: to_full_arrays(of_split) for name, of_split in parts.items()})
