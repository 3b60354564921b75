"""The messages: they arrive as they were sent, and nothing travels with them that has no name on the allow-list."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from chainward_server.approvals import run_plan
from chainward_shared import protocol
from chainward_shared.config import RunConfig
from chainward_shared.errors import ProtocolError
from chainward_shared.evaluation.localisation import LocalisationSums, Moments
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import Architecture, Start
from chainward_shared.protocol import (
    PROTOCOL_VERSION,
    AtWork,
    AtWorkRequest,
    BaseState,
    BaseTask,
    Body,
    CardRequest,
    EvaluateResult,
    EvaluateTask,
    Hello,
    HelloRequest,
    LinkResult,
    LinkTask,
    MaskedSum,
    Offer,
    Refusal,
    Round,
    RunPlanState,
    SimulatedSite,
    SiteCard,
    SiteRefusal,
    StatisticsResult,
    StatisticsTask,
    StudentResult,
    StudentTask,
    SumKeys,
    SumKeysTask,
    SumShares,
    SumSharesTask,
    SumTask,
    SumUnmasking,
    SumUnmaskTask,
    TrainingLog,
    kind_of,
    pack,
    unpack,
)

LARGE = {f"large_{i}" for i in range(8)}
MAY_TRAVEL = {
    "predecessor",
    "model",
    "student",
    "auxiliary",
    "sums",
    "sum",
    "frame",
    "counts_val",
    "counts_test",
    "piece",
} | LARGE

SIMULATED = SimulatedSite(index=1, source="phantom", num_sites=6, label_skew=0.0, seed=3, state_dir="/state")
ARCHITECTURE = Architecture(name="test_convnext", num_classes=3, in_chans=1, image_size=32)
STARTED = ARCHITECTURE.model_copy(
    update={"start": Start(name="test_convnext.x", file="0" * 64, digest="1" * 64, part="head")}
)
LOG = TrainingLog(epochs=2, steps=4, images=40, loss=[1.0, 0.1 + 0.2], seconds=1.5, precision="fp32")
SCORES = Scores(n=3, accuracy=1 / 3, balanced_accuracy=0.5, macro_auc=None, ece=0.1)

STATISTICS = StatisticsTask(
    run_id="run", hop="head", architecture=ARCHITECTURE, label_fraction=0.3, seed=1, threads=1, digest="ab" * 32
)
ROUND = Round(run_id="run", hop="head", task="ab" * 32, attempt=7, members=("oak", "ash", "elm"), threshold=2)
OFFER = Offer(site="oak", channel="AbC=", mask="dEf+/=", identity="ab" * 32, signature="0123")
PLAN = run_plan(RunConfig(), "run", [ARCHITECTURE])

MESSAGES: list[Body] = [
    SIMULATED,
    HelloRequest(source="phantom", num_sites=0, label_skew=0.0),
    Hello(site=None, simulated_sites=["oak", "ash"], partition=2),
    AtWorkRequest(run_id="run", task="0" * 64),
    AtWork(site="oak", at_work=True),
    CardRequest(simulated=SIMULATED),
    SiteCard(
        site="oak",
        classes=["a", "b"],
        image_size=32,
        channels=1,
        train=5,
        val=2,
        test=1,
        class_counts={"train": [3, 2]},
        synthetic=True,
        notes=["no case of class 'b' in test"],
    ),
    BaseTask(run_id="run", architecture=STARTED, bytes=9, sha256="0" * 64, offset=3, simulated=SIMULATED),
    BaseState(site="oak", complete=False, received=3),
    LinkTask(
        run_id="run",
        hop="0-1",
        strand=0,
        lap=1,
        architecture=ARCHITECTURE,
        recipe=RunConfig().link_recipe(),
        predecessor_digest="ab" * 32,
        simulated=SIMULATED,
    ),
    LinkResult(hop="0-1", site="oak", digest="ab" * 32, training=LOG),
    StudentTask(
        run_id="r",
        round=1,
        architecture=ARCHITECTURE,
        recipe=RunConfig().student_recipe("distil"),
        student_digest="ab" * 32,
        auxiliary_digest="cd" * 32,
    ),
    StudentResult(round=1, site="oak", digest="ab" * 32, training=LOG, auxiliary_kept=0.25),
    EvaluateTask(
        run_id="run", architecture=ARCHITECTURE, splits=["val", "test"], localisation=True, threads=1, digest="ab" * 32
    ),
    EvaluateResult(
        site="oak",
        scores={"val": SCORES, "test": SCORES},
        localisation=LocalisationSums(n=2, left_out=1, lift=Moments(sum=3.0, squares=5.0)),
    ),
    STATISTICS,
    StatisticsResult(hop="head", site="oak", digest="ab" * 32, images=20, validation=5),
    SumKeysTask(round=ROUND, simulated=SIMULATED),
    SumKeys(offer=OFFER),
    SumSharesTask(round=ROUND, offers=[OFFER]),
    SumShares(site="oak", shares={"ash": "gAAAAABo_-0="}),
    SumTask(round=ROUND, statistics=STATISTICS, shares={"ash": "gAAAAABo_-0="}),
    MaskedSum(site="oak"),
    SumUnmaskTask(round=ROUND, answered=["oak", "ash", "elm"]),
    SumUnmasking(site="oak", seeds={"ash": "00ff"}, keys={}),
    PLAN,
    RunPlanState(site="oak", approval="waiting", plan="ab" * 32),
    Refusal(reason="the disk is full"),
]
STUDENT = next(body for body in MESSAGES if isinstance(body, StudentResult))
EACH = pytest.mark.parametrize("body", MESSAGES, ids=lambda body: body.KIND)


def arrays_called(*names: str) -> dict[str, ArrayRecord]:
    return {name: ArrayRecord({"weight": Array(np.full(3, i, np.float32))}) for i, name in enumerate(names)}


def enveloped(**changes: object) -> RecordDict:
    """A `Hello` whose envelope is changed; None takes an entry out."""
    envelope = dict(pack(Hello(site="oak")).config_records["chainward"]) | changes
    return RecordDict({"chainward": ConfigRecord({k: v for k, v in envelope.items() if v is not None})})


def bodies() -> list[type[Body]]:
    found, waiting = [], [Body]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        found += [cls for cls in subclasses if "KIND" in vars(cls)]
        waiting += subclasses
    return found


# --- what arrives ---


@EACH
def test_a_message_arrives_as_it_was_sent(body):
    sent = arrays_called(*sorted(body.ARRAYS))
    content = pack(body, sent)
    assert kind_of(content) == body.KIND
    received, arrays = unpack(content, type(body))
    assert received == body
    assert arrays == sent


@EACH
def test_a_message_may_come_without_arrays(body):
    assert unpack(pack(body), type(body)) == (body, {})


def test_every_kind_of_message_is_tried_here():
    assert {type(body) for body in MESSAGES} == {
        cls for cls in bodies() if cls.__module__.startswith(protocol.__name__)
    }


def test_kinds_have_names_of_their_own():
    kinds = [cls.KIND for cls in bodies()]
    assert len(set(kinds)) == len(kinds)


# --- what may travel ---


def test_no_message_may_carry_anything_but_the_weights_and_counts_of_the_design():
    for cls in bodies():
        assert cls.ARRAYS <= MAY_TRAVEL, f"{cls.__name__} may carry {sorted(cls.ARRAYS - MAY_TRAVEL)}"


@pytest.mark.parametrize(
    ("weight", "digests", "architecture"),
    [(1.0, [], None), (1.0, [], ARCHITECTURE), (1.0, ["ab" * 32], None), (0.0, ["ab" * 32], ARCHITECTURE)],
)
def test_large_models_without_weight_weight_without_models_or_models_of_no_architecture_are_refused(
    weight, digests, architecture
):
    recipe = RunConfig().student_recipe("distil").model_copy(update={"large_weight": weight})
    given = {"run_id": "r", "round": 1, "architecture": ARCHITECTURE, "student_digest": "ab" * 32, "recipe": recipe}
    with pytest.raises(ValidationError, match=f"weight {weight:g}, {len(digests)} digests"):
        StudentTask(**given, large_digests=digests, large_architecture=architecture)


def test_more_large_models_than_may_teach_at_once_are_refused():
    recipe = RunConfig().student_recipe("distil").model_copy(update={"large_weight": 1.0})
    given = {"run_id": "r", "round": 1, "architecture": ARCHITECTURE, "student_digest": "ab" * 32, "recipe": recipe}
    StudentTask(**given, large_digests=["ab" * 32] * 8, large_architecture=ARCHITECTURE)
    with pytest.raises(ValidationError, match="at most 8"):
        StudentTask(**given, large_digests=["ab" * 32] * 9, large_architecture=ARCHITECTURE)


def test_from_a_site_come_only_the_trained_model_and_counts():
    from_site = {
        cls.KIND: set(cls.ARRAYS) for cls in (Hello, SiteCard, LinkResult, StudentResult, EvaluateResult, Refusal)
    }
    assert from_site == {
        "hello": set(),
        "site-card": set(),
        "link-result": {"model"},
        "student-result": {"student"},
        "evaluate-result": {"counts_val", "counts_test"},
        "refusal": set(),
    }


@EACH
@pytest.mark.parametrize("name", ["privileged", "texts", "model.privileged", ""])
def test_a_foreign_array_can_not_be_packed(body, name):
    with pytest.raises(ProtocolError, match=f"a message '{body.KIND}' may not carry the arrays '{name}'"):
        pack(body, arrays_called(*body.ARRAYS, name))


@EACH
def test_a_foreign_array_is_refused_on_arrival(body):
    content = pack(body)
    content["privileged"] = arrays_called("x")["x"]
    with pytest.raises(
        ProtocolError, match=f"a message '{body.KIND}' carries the arrays 'privileged', which it may not"
    ):
        unpack(content, type(body))


def test_a_student_does_not_bring_its_auxiliary_teacher():
    with pytest.raises(ProtocolError, match="'auxiliary'"):
        pack(STUDENT, arrays_called("student", "auxiliary"))


# --- what is refused ---


def test_another_kind_is_refused_and_both_are_named():
    with pytest.raises(ProtocolError, match="a message 'hello' arrived where 'site-card' was expected"):
        unpack(pack(Hello(site="oak")), SiteCard)


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 1, 0, str(PROTOCOL_VERSION), None])
def test_another_protocol_version_is_refused_and_both_are_named(version):
    with pytest.raises(
        ProtocolError, match=rf"version {version!r} arrived.* speaks {PROTOCOL_VERSION}; install the same"
    ):
        unpack(enveloped(protocol=version), Hello)


@pytest.mark.parametrize(
    "content",
    [RecordDict(), RecordDict({"config": ConfigRecord({"lr": 0.1})}), enveloped(kind=None), enveloped(body=None)],
    ids=["empty", "another app's", "no kind", "no body"],
)
def test_a_message_without_the_envelope_is_refused(content):
    with pytest.raises(ProtocolError, match="without Chainward's envelope"):
        unpack(content, Hello)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "site: field required"),
        ({"site": "oak", "patient": "Jane"}, "patient: extra inputs are not permitted, found 'Jane'"),
        ({"site": 5}, "site: input should be a valid string, found 5"),
    ],
)
def test_a_missing_extra_or_wrong_field_is_refused_and_named(fields, named):
    with pytest.raises(ProtocolError, match=f"a message 'hello' with a bad field: {named}"):
        unpack(enveloped(body=json.dumps(fields)), Hello)


def test_a_field_inside_a_recipe_is_named_with_its_place():
    task = json.loads(next(body for body in MESSAGES if isinstance(body, LinkTask)).model_dump_json())
    task["recipe"]["label_fraction"] = 2.0
    with pytest.raises(ProtocolError, match=r"'link-task' with a bad field: recipe\.label_fraction: .*, found 2\.0"):
        unpack(enveloped(kind="link-task", body=json.dumps(task)), LinkTask)


@pytest.mark.parametrize("body", ["", "{", "[]", "null"])
def test_a_body_that_is_no_record_is_refused(body):
    with pytest.raises(ProtocolError, match="a message 'hello' with a bad field"):
        unpack(enveloped(body=body), Hello)


@pytest.mark.parametrize("expected", [Hello, LinkResult, EvaluateResult])
def test_a_refusal_speaks_in_the_sites_own_words(expected):
    with pytest.raises(SiteRefusal) as caught:
        unpack(pack(Refusal(reason="/data/cases.csv: row 7: no image")), expected)
    assert str(caught.value) == "/data/cases.csv: row 7: no image"


def test_a_damaged_refusal_is_a_protocol_error_too():
    with pytest.raises(ProtocolError, match="a message 'refusal' with a bad field: reason"):
        unpack(enveloped(kind="refusal", body="{}"), Hello)
