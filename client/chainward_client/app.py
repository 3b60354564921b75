"""The Flower `ClientApp` of a hospital: thin handlers, one per kind of message."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from chainward_client.data.sources import simulated_site_ids
from chainward_client.evaluation import class_probabilities, localisation_values
from chainward_client.site import SITE_CONFIG_KEY, open_site, own_config
from chainward_client.store import SiteStore
from chainward_client.training.link import train_link
from chainward_client.training.student import train_student
from chainward_shared.console import show_progress
from chainward_shared.errors import ChainwardError, DataError, ProtocolError, WeightsError
from chainward_shared.evaluation.classification import PredictionCounts, counts_to_arrays, evaluate
from chainward_shared.evaluation.localisation import LocalisationSums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture, build_model, skeleton
from chainward_shared.protocol import (
    CardRequest,
    EvaluateResult,
    EvaluateTask,
    Hello,
    HelloRequest,
    LinkResult,
    LinkTask,
    Refusal,
    SiteCard,
    StudentResult,
    StudentTask,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.weights import StateDict, digest, from_arrays, to_arrays

logger = logging.getLogger("chainward.client")

app = ClientApp()

PRIVATE_REASON = "something is wrong at the site with its data or its software; the site's own log says what"

Handler = Callable[[RecordDict, Context], RecordDict]


def _answering(handler: Handler) -> Callable[[Message, Context], Message]:
    """Turn what a person can act on into a `Refusal`; anything else is a defect and stays an exception.

    What is wrong with a hospital's data names files, rows and patients, and any exception may: at a deployed site that
    stays in the site's own log.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        show_progress()
        deployed = SITE_CONFIG_KEY in context.node_config
        try:
            content = handler(message.content, context)
        except Exception as error:
            private = not isinstance(error, ChainwardError) or isinstance(error, DataError)
            if not deployed and not isinstance(error, ChainwardError):
                raise
            logger.warning("refused: %s", error, exc_info=not isinstance(error, ChainwardError))
            content = pack(Refusal(reason=PRIVATE_REASON if deployed and private else str(error)))
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
def query(content: RecordDict, context: Context) -> RecordDict:
    """Say who is here, or describe the site's data."""
    if kind_of(content) == HelloRequest.KIND:
        request, _ = unpack(content, HelloRequest)
        config = own_config(context.node_config)
        if config is not None:
            return pack(Hello(site=config.site))
        return pack(_hello_of_simulated_node(request, context))
    card, _ = unpack(content, CardRequest)
    data = open_site(context.node_config, card.simulated).data
    image = data.splits["train"].images
    return pack(
        SiteCard(
            site=data.site,
            task=data.task,
            classes=list(data.classes),
            image_size=int(image.shape[-1]),
            channels=int(image.shape[1]),
            train=len(data.splits["train"]),
            val=len(data.splits["val"]),
            test=len(data.splits["test"]),
            class_counts={split: data.class_counts(split) for split in data.splits},
            synthetic=data.synthetic,
            notes=list(data.notes),
        )
    )


def _hello_of_simulated_node(request: HelloRequest, context: Context) -> Hello:
    partition = int(context.node_config.get("partition-id", 0))
    try:
        sites = simulated_site_ids(request.source, num_sites=request.num_sites, label_skew=request.label_skew)
    except DataError as error:
        return Hello(site=None, problem=str(error), partition=partition)
    return Hello(site=None, simulated_sites=list(sites), partition=partition)


@app.train("link")
@_answering
def link(content: RecordDict, context: Context) -> RecordDict:
    """Train one link of the chain, or this hospital alone."""
    task, arrays = unpack(content, LinkTask)
    site = open_site(context.node_config, task.simulated)
    data = site.data
    predecessor = None
    if task.predecessor_digest is not None:
        predecessor = _state(arrays.get("predecessor"), "predecessor", task.architecture, task.predecessor_digest)
    state, log = train_link(
        data,
        task.architecture,
        task.recipe,
        predecessor,
        strand=task.strand,
        lap=task.lap,
        alone=task.trained_alone,
        state_dir=site.state_dir,
    )
    result = LinkResult(hop=task.hop, site=data.site, digest=digest(state), training=log)
    return pack(result, {"model": to_arrays(state)})


@app.train("student")
@_answering
def student(content: RecordDict, context: Context) -> RecordDict:
    """Train the compact student for one round; keep the auxiliary teacher here."""
    task, arrays = unpack(content, StudentTask)
    site = open_site(context.node_config, task.simulated)
    current = _state(arrays.get("student"), "student", task.architecture, task.student_digest)
    store = SiteStore(site.state_dir, task.run_id)
    auxiliary = None
    if task.recipe.stage == "distil":
        if task.auxiliary_digest is not None:
            selected = _state(arrays.get("auxiliary"), "auxiliary", task.architecture, task.auxiliary_digest)
            store.save_auxiliary(selected, task.architecture, after_round=0)
        auxiliary = store.load_auxiliary(before_round=task.round)
        if auxiliary is None:
            raise ProtocolError(
                f"site '{site.data.site}' has no auxiliary teacher for round {task.round}; send it again"
            )
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
        auxiliary,
        round_index=task.round - 1,
        large=large,
        large_architecture=task.large_architecture,
        state_dir=site.state_dir,
    )
    if trained.auxiliary is not None:
        store.save_auxiliary(trained.auxiliary, task.architecture, after_round=task.round)
    result = StudentResult(
        round=task.round,
        site=site.data.site,
        digest=digest(trained.student),
        training=trained.log,
        auxiliary_kept=trained.auxiliary_kept,
        examples=len(site.data.splits["train"]),
    )
    return pack(result, {"student": to_arrays(trained.student)})


@app.evaluate()
@_answering
def score(content: RecordDict, context: Context) -> RecordDict:
    """Score a model on this site's own images."""
    task, arrays = unpack(content, EvaluateTask)
    data = open_site(context.node_config, task.simulated).data
    model = build_model(task.architecture)
    model.load_state_dict(_state(arrays.get("model"), "model", task.architecture, task.digest))
    scores: dict[str, Scores] = {}
    counts = {}
    for split in task.splits:
        cases = data.splits[split]
        size = task.architecture.image_size
        probabilities = class_probabilities(model, cases, len(data.classes), task.threads, image_size=size)
        labels = cases.labels.numpy()
        scores[split] = evaluate(probabilities, labels)
        counts[f"counts_{split}"] = counts_to_arrays(PredictionCounts.of(probabilities, labels))
    values = None
    if task.localisation:
        size = task.architecture.image_size
        values = localisation_values(model, data.splits["test"], task.threads, image_size=size)
    sums = None if values is None else LocalisationSums.of(values)
    return pack(EvaluateResult(site=data.site, scores=scores, localisation=sums), counts)
