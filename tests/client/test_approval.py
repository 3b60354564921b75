"""A hospital where a person approves every run: nothing is trained, scored, summed up or taken in before that."""

from __future__ import annotations

import json
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

import chainward_client.node as node_module
from chainward_client.app import app
from chainward_client.approval import record as record_module
from chainward_client.approval.record import MOST_WAITING, Approvals
from chainward_client.cli import app as command
from chainward_client.site_ledger import create_site_ledger
from chainward_server.approvals import run_plan
from chainward_shared.config import RunConfig
from chainward_shared.errors import ApprovalNeeded, ConfigError, PolicyRefusal, StoreError
from chainward_shared.models import Start, resolve_architecture
from chainward_shared.private_sums import SumsForm
from chainward_shared.protocol import (
    BaseTask,
    Body,
    EvaluateTask,
    LinkTask,
    Refusal,
    Round,
    SharedNoise,
    StatisticsTask,
    StudentTask,
    SumKeysTask,
    SumSharesTask,
    SumUnmaskTask,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.protocol.run_plan import RunPlan, RunPlanState, beyond
from chainward_shared.recipes import PrivacyRecipe

DIGEST = "0" * 64
START = Start(name="weights", file="1" * 64, digest="2" * 64, part="head")
MODEL = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32).model_copy(
    update={"start": START}
)
SMALL = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=64)
CONFIG = RunConfig.from_flat(
    {
        "chain.epochs": 2,
        "chain.laps": 2,
        "student.rounds": 2,
        "privacy.mode": "by-policy",
        "privacy.epsilon": 3.0,
        "federation.contact": "Dr Ash, \x1b[31mtelephone 1\u202e",
    }
)
SUMMED = {"statistics": True, "student_statistics": True}
PLAN = run_plan(CONFIG, "run-1", [MODEL, SMALL]).model_copy(update=SUMMED)
LINK = LinkTask(run_id="run-1", hop="h", strand=0, lap=0, architecture=MODEL, recipe=PLAN.link)
ALONE = LINK.model_copy(update={"hop": "alone", "trained_alone": True, "recipe": PLAN.alone})
STUDENT = StudentTask(run_id="run-1", round=1, architecture=SMALL, recipe=PLAN.students[0], student_digest=DIGEST)
SUMS = StatisticsTask(run_id="run-1", hop="h", architecture=MODEL, label_fraction=1.0, seed=0, threads=1, digest=DIGEST)
PRIVATE = PrivacyRecipe(epsilon=1.0)
PRIVATE_PLAN = PLAN.model_copy(update={"link": PLAN.link.model_copy(update={"privacy": PRIVATE})})
PRIVATE_SUMS = SUMS.model_copy(
    update={
        "privacy": PRIVATE,
        "form": SumsForm(dimension=2, labels=True, moments=False),
        "frame_digest": DIGEST,
    }
)
SCORES = EvaluateTask(run_id="run-1", architecture=SMALL, splits=["val"], threads=1, digest=DIGEST)
BASE = BaseTask(run_id="run-1", architecture=MODEL, bytes=9, sha256=DIGEST, offset=0)
TASKS = {
    "link": (LINK, "train.link"),
    "alone": (ALONE, "train.link"),
    "student": (STUDENT, "train.student"),
    "sums": (SUMS, "evaluate.statistics"),
    "scores": (SCORES, "evaluate"),
    "base": (BASE, "query"),
}
KINDS = pytest.mark.parametrize("kind", TASKS)


@pytest.fixture
def hospital(tmp_path):
    """The site.yaml of a hospital whose data file is nowhere: opening it would fail in other words."""
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"site": "ash", "data": "nowhere.yaml", "state": "state", "runs": "ask"}))
    return path


@pytest.fixture
def approvals(tmp_path):
    return Approvals(tmp_path / "state")


def answer(body: Body, message_type: str, site_yaml) -> RecordDict:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(pack(body), dst_node_id=7, message_type=message_type)
    context = Context(
        run_id=1, node_id=7, node_config={"site-config": str(site_yaml)}, state=RecordDict(), run_config={}
    )
    return app(message, context).content


def refusal(kind: str, site_yaml) -> Refusal:
    return unpack(answer(*TASKS[kind], site_yaml), Refusal)[0]


def stands(site_yaml, plan: RunPlan = PLAN) -> str:
    state, _ = unpack(answer(plan, "query", site_yaml), RunPlanState)
    assert (state.site, state.plan) == ("ash", plan.digest)
    return state.approval


def passes(kind: str, site_yaml) -> bool:
    """Whether a task gets as far as the data, which are nowhere, or is answered."""
    content = answer(*TASKS[kind], site_yaml)
    return kind_of(content) != Refusal.KIND or "own log" in unpack(content, Refusal)[0].reason


# -- nothing before


@KINDS
def test_nothing_is_done_before_a_person_has_approved_and_the_coordinator_hears_that_it_waits(hospital, kind, tmp_path):
    for plan_known in (False, True):
        if plan_known:
            assert stands(hospital) == "waiting"
        said = refusal(kind, hospital)
        assert said.waiting and not said.final
        assert "waits for the approval of a person at this hospital" in said.reason
    left = {path.name for path in (tmp_path / "state").rglob("*")}
    assert left == {"approvals.json", "approvals.lock", "journal.jsonl"}, "no lock, no base, no reservation"


@KINDS
def test_what_is_within_the_plan_is_done_once_it_is_approved(hospital, approvals, kind):
    stands(hospital)
    approvals.decide(PLAN.digest, "approved", "ash")
    assert stands(hospital) == "approved"
    assert passes(kind, hospital)


@KINDS
def test_a_run_that_a_person_has_refused_is_refused_for_good(hospital, approvals, kind):
    stands(hospital)
    approvals.decide(PLAN.digest, "refused", "ash")
    said = refusal(kind, hospital)
    assert said.final and "has refused run run-1" in said.reason
    assert stands(hospital) == "refused"


def test_a_hospital_that_does_not_ask_goes_on_as_before(hospital):
    hospital.write_text(hospital.read_text().replace("runs: ask", "runs: any"))
    assert stands(hospital) == "approved"
    assert all(passes(kind, hospital) for kind in ("link", "student", "sums", "scores"))


def test_a_misspelt_answer_to_runs_is_refused(hospital):
    hospital.write_text(hospital.read_text().replace("runs: ask", "runs: asc"))
    result = CliRunner().invoke(command, ["runs", str(hospital)])
    assert "runs" in str(result.exception)


# -- an approval is for what was shown, and for nothing else

OTHER_PLANS = {
    "another run": {"run_id": "run-2"},
    "another recipe": {"link": PLAN.link.model_copy(update={"epochs": 3})},
    "more epsilon": {
        "link": PLAN.link.model_copy(update={"privacy": PLAN.link.privacy.model_copy(update={"epsilon": 4.0})})
    },
    "other weights": {"model": MODEL.model_copy(update={"start": START.model_copy(update={"digest": "3" * 64})})},
    "more rounds": {"rounds": 99},
    "more laps": {"laps": 9},
    "other words about itself": {"asked_by": "somebody else"},
}


@pytest.mark.parametrize("change", OTHER_PLANS.values(), ids=OTHER_PLANS)
def test_another_plan_waits_for_an_approval_of_its_own(hospital, approvals, change):
    stands(hospital)
    approvals.decide(PLAN.digest, "approved", "ash")
    other = PLAN.model_copy(update=change)
    assert stands(hospital, other) == "waiting"
    assert stands(hospital) == "approved", "a plan that waits takes nothing from the one that is approved"
    approvals.decide(other.digest, "approved", "ash")
    assert stands(hospital, other) == "approved"
    assert stands(hospital) == ("approved" if other.run_id != PLAN.run_id else "waiting"), "one plan of a run at a time"


def privacy(**changes):
    return PLAN.link.model_copy(update={"privacy": PLAN.link.privacy.model_copy(update=changes)})


BEYOND = {
    "another run": ("link", {"run_id": "run-2"}, "waits for the approval"),
    "epochs": ("link", {"recipe": PLAN.link.model_copy(update={"epochs": 3})}, "recipe.epochs"),
    "seed": ("student", {"recipe": PLAN.students[0].model_copy(update={"seed": 5})}, "recipe.seed"),
    "epsilon": ("link", {"recipe": privacy(epsilon=4.0)}, "recipe.privacy"),
    "no privacy": ("link", {"recipe": PLAN.link.model_copy(update={"privacy": None})}, "recipe.privacy"),
    "lap": ("link", {"lap": 2}, "lap 3 of 2"),
    "strand": ("link", {"strand": 1}, "strand 2 of 1"),
    "alone as a link": ("link", {"recipe": PLAN.alone}, "recipe.epochs"),
    "weights": (
        "link",
        {"architecture": MODEL.model_copy(update={"start": None})},
        "architecture: the weights it starts from",
    ),
    "part": (
        "sums",
        {"architecture": MODEL.model_copy(update={"start": START.model_copy(update={"part": "all"})})},
        "the weights it starts from",
    ),
    "round": ("student", {"round": 4}, "round 4 of 3"),
    "student": ("student", {"architecture": MODEL}, "architecture: image_size"),
    "labels": ("sums", {"label_fraction": 0.01}, "label_fraction"),
    "scored model": (
        "scores",
        {"architecture": SMALL.model_copy(update={"num_classes": 2})},
        "a model is to be scored",
    ),
    "base": (
        "base",
        {"architecture": MODEL.model_copy(update={"start": START.model_copy(update={"file": DIGEST})})},
        "starts",
    ),
}


@pytest.mark.parametrize(("kind", "change", "words"), BEYOND.values(), ids=BEYOND)
def test_a_task_that_is_not_in_the_approved_plan_is_refused_by_name(hospital, approvals, kind, change, words):
    stands(hospital)
    approvals.decide(PLAN.digest, "approved", "ash")
    task, message_type = TASKS[kind]
    said = unpack(answer(task.model_copy(update=change), message_type, hospital), Refusal)[0]
    assert words in said.reason
    assert said.final != said.waiting


def test_every_field_of_a_task_that_decides_what_is_trained_is_in_the_plan():
    free = {"run_id", "hop", "simulated", "seen_head", "predecessor_digest", "student_digest", "auxiliary_digest"}
    free |= {
        "class_weights",
        "large_digests",
        "digest",
        "bytes",
        "sha256",
        "offset",
        "splits",
        "localisation",
        "threads",
    }
    bound = {"architecture", "recipe", "lap", "strand", "round", "large_architecture", "label_fraction", "seed"}
    bound |= {"trained_alone", "privacy", "shared_noise"}
    free |= {"form", "frame_digest"}  # what is summed of the same images, at the same price
    for task, _ in TASKS.values():
        assert set(type(task).model_fields) <= free | bound
    assert beyond(ALONE.model_copy(update={"recipe": PLAN.link}), PLAN)
    assert beyond(ALONE, PLAN.model_copy(update={"alone": None}))
    assert beyond(STUDENT, PLAN.model_copy(update={"student": None}))
    of_student = SUMS.model_copy(update={"architecture": SMALL})
    for task, without in ((SUMS, "statistics"), (of_student, "student_statistics")):
        other = {"statistics", "student_statistics"} - {without}
        assert "architecture: " in str(beyond(task, PLAN.model_copy(update={without: False, other.pop(): True})))
        assert "embeddings are not in the plan" in str(
            beyond(task, PLAN.model_copy(update={"statistics": False, "student_statistics": False}))
        )
    assert beyond(PRIVATE_SUMS.model_copy(update={"privacy": PrivacyRecipe(epsilon=2.0)}), PRIVATE_PLAN)
    assert not beyond(PRIVATE_SUMS, PRIVATE_PLAN)
    shared = PRIVATE_SUMS.model_copy(update={"shared_noise": SharedNoise.of(9.0, 3)})
    assert "shared among 3 sites" in str(beyond(shared, PRIVATE_PLAN))
    assert not beyond(shared, PRIVATE_PLAN.model_copy(update={"noise_from": 3}))
    assert not any(beyond(task, PLAN) for task, _ in TASKS.values())


def test_an_approval_expires(hospital, tmp_path):
    now = datetime(2026, 3, 1, tzinfo=UTC)
    approvals = Approvals(tmp_path / "state", lambda: now)
    approvals.ask(PLAN, lambda: None)
    approvals.decide(PLAN.digest, "approved", "ash", days=2)
    approvals.require(LINK)
    now += timedelta(days=2)
    with pytest.raises(ApprovalNeeded, match="waits for the approval"):
        approvals.require(LINK)
    for days in (0, -1, 400, float("nan")):
        with pytest.raises(ConfigError, match="--days"):
            approvals.decide(PLAN.digest, "approved", "ash", days=days)


def test_more_trainings_than_the_plan_has_need_another_approval(approvals):
    approvals.ask(PLAN, lambda: None)
    approvals.decide(PLAN.digest, "approved", "ash")
    planned = 2 * (2 + 1)
    for number in range(planned):
        task = LINK.model_copy(update={"hop": f"h-{number}"})
        approvals.require(task)
        approvals.require(task)  # asked for again: the same training
    with pytest.raises(PolicyRefusal, match="has 3 trainings of this kind, and 6 were begun"):
        approvals.require(LINK.model_copy(update={"predecessor_digest": DIGEST}))
    approvals.require(SCORES)
    approvals.decide(PLAN.digest, "approved", "ash")
    approvals.require(LINK.model_copy(update={"predecessor_digest": DIGEST}))


def test_an_approval_that_is_taken_back_while_the_site_is_at_work_lets_no_answer_out(hospital, approvals, monkeypatch):
    stands(hospital)
    approvals.decide(PLAN.digest, "approved", "ash")
    node = node_module.DeployedNode({"site-config": str(hospital)})
    monkeypatch.setattr(node_module, "open_site", lambda path: "the site")
    with pytest.raises(PolicyRefusal, match="has refused run run-1"), node.at_work_on(LINK, 5.0) as site:
        assert site == "the site"
        approvals.decide(PLAN.digest, "refused", "ash")


# -- several runs, many runs, damaged files


def test_two_runs_that_ask_at_the_same_time_are_both_noted_and_decided_apart(approvals, tmp_path):
    plans = [PLAN.model_copy(update={"run_id": f"run-{number}"}) for number in range(8)]
    threads = [
        threading.Thread(target=lambda plan=plan: Approvals(tmp_path / "state").ask(plan, lambda: 5)) for plan in plans
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.plan.run_id for one in approvals.runs()} == {plan.run_id for plan in plans}
    approvals.decide(plans[3].digest, "approved", "ash")
    assert [one.plan.run_id for one in approvals.runs() if one.decision] == ["run-3"]
    with pytest.raises(ApprovalNeeded):
        approvals.require(LINK.model_copy(update={"run_id": "run-4"}))


def test_a_coordinator_that_asks_without_end_fills_neither_the_list_nor_the_disk(hospital, approvals):
    approvals.ask(PLAN, lambda: None)
    approvals.decide(PLAN.digest, "approved", "ash")
    for number in range(MOST_WAITING):
        assert stands(hospital, PLAN.model_copy(update={"run_id": f"flood-{number}"})) == "waiting"
    said = unpack(answer(PLAN.model_copy(update={"run_id": "one-more"}), "query", hospital), Refusal)[0]
    assert f"{MOST_WAITING} runs wait already" in said.reason
    assert len(approvals.runs()) == MOST_WAITING + 1
    assert stands(hospital) == "approved"


def test_decided_plans_are_forgotten_before_those_that_hold(approvals, monkeypatch):
    monkeypatch.setattr(record_module, "KEPT", 3)
    approvals.ask(PLAN, lambda: None)
    approvals.decide(PLAN.digest, "approved", "ash")
    for number in range(5):
        other = PLAN.model_copy(update={"run_id": f"other-{number}"})
        approvals.ask(other, lambda: None)
        approvals.decide(other.digest, "refused", "ash")
    assert [one.plan.run_id for one in approvals.runs()] == ["other-4", "other-3", "run-1"]


def test_a_plan_beyond_the_hospitals_limits_is_refused_without_troubling_a_person(hospital, approvals):
    said = unpack(answer(PLAN.model_copy(update={"rounds": 1_001}), "query", hospital), Refusal)[0]
    assert said.final and "limits.rounds" in said.reason
    assert approvals.runs() == []


@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema": 1, "runs": [{}]}', b'{"schema": 2, "runs": []}', b"\xff"])
def test_nothing_is_trained_where_the_record_is_damaged(hospital, approvals, damage):
    approvals.ask(PLAN, lambda: None)
    approvals.decide(PLAN.digest, "approved", "ash")
    approvals.path.write_bytes(damage)
    with pytest.raises(StoreError, match="damaged"):
        approvals.require(LINK)
    assert "own log" in refusal("base", hospital).reason


def test_the_record_is_for_the_owner_alone(approvals):
    approvals.ask(PLAN, lambda: None)
    assert stat.S_IMODE(approvals.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(approvals.path.parent.stat().st_mode) == 0o700


# -- the commands


def invoke(*arguments, **options):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], **options)


@pytest.fixture
def private(hospital, tmp_path):
    content = yaml.safe_load(hospital.read_text()) | {"privacy": {"epsilon": 8.0, "delta": 1e-3, "units": 100}}
    hospital.write_text(yaml.safe_dump(content))
    create_site_ledger(tmp_path / "state", "ash")
    return hospital


@pytest.mark.slow
def test_approve_shows_the_plan_in_words_and_binds_to_what_was_shown(private, approvals):
    approvals.ask(PLAN, lambda: 100)
    shown = invoke("approve", private)
    assert isinstance(shown.exception, ConfigError), "no terminal, and no --plan"
    words = " ".join(shown.stdout.split())
    for part in (
        "run run-1",
        "nobody has checked: “Dr Ash, \\x1b[31mtelephone 1\\u202e”",
        "a link of the chain, 2 times (2 laps): test_convnext",
        "2 epochs at learning rate 0.001, batches of 32",
        "without the other hospitals, once, for comparison: 4 epochs",
        "a compact student, 3 rounds",
        "file SHA-256 " + "1" * 64,
        "as tensors " + "2" * 64,
        "at most epsilon 3 at delta 1e-05 here",
        "carried out to its end it would spend epsilon 2.",
        "at delta 0.001 per patient, of 100 declared patients",
        "spent so far 0 of 8; after the run 2.",
        "no scores: the policy withholds them",
        "sums over the embeddings of the images, with noise that the budget pays for",
        "bounded by the epsilon",
        f"plan {PLAN.digest}",
    ):
        assert part in words, part
    assert "\x1b" not in shown.stdout and "\u202e" not in shown.stdout
    assert approvals.runs()[0].decision is None
    assert invoke("approve", private, "--plan", PLAN.digest[:12], "--days", 3).exit_code == 0
    (one,) = approvals.runs()
    assert (one.decision, one.expires - one.decided) == ("approved", timedelta(days=3))
    assert "approved" in invoke("runs", private).stdout


def test_a_site_without_a_policy_is_warned_that_nothing_bounds_what_the_weights_tell(hospital, approvals):
    approvals.ask(PLAN, lambda: None)
    words = " ".join(invoke("approve", hospital).stdout.split())
    assert "no differential privacy: nothing bounds" in words
    assert "learnt from the images without noise" in words
    assert "sums over the embeddings of the images" in words


@pytest.mark.slow
def test_a_plan_that_the_policy_would_refuse_says_so(private, approvals):
    over = PLAN.model_copy(update={"link": privacy(epsilon=50.0)})
    approvals.ask(over, lambda: 100)
    assert "this site would refuse: " in " ".join(invoke("approve", private).stdout.split())


@pytest.mark.parametrize("digits", ["", "0" * 12, PLAN.digest[:11], "x" * 64])
def test_a_plan_that_is_not_the_one_that_waits_is_not_approved(hospital, approvals, digits):
    approvals.ask(PLAN, lambda: None)
    result = invoke("approve", hospital, "run-1", "--plan", digits)
    assert isinstance(result.exception, ConfigError)
    assert approvals.runs()[0].decision is None


def test_with_two_runs_waiting_one_must_be_named(hospital, approvals):
    for run in ("run-1", "run-2"):
        approvals.ask(PLAN.model_copy(update={"run_id": run}), lambda: None)
    assert "run-2, run-1 can be meant" in str(invoke("approve", hospital).exception)
    assert invoke("refuse", hospital, "run-2", "--plan", approvals.find("run-2").plan.digest).exit_code == 0
    assert {one.plan.run_id: one.decision for one in approvals.runs()} == {"run-1": None, "run-2": "refused"}
    assert isinstance(invoke("approve", hospital, "nobody").exception, ConfigError)


def test_refusing_a_run_takes_back_the_approval_of_each_of_its_plans(hospital, approvals):
    other = PLAN.model_copy(update={"rounds": 9})
    approvals.ask(PLAN, lambda: None)
    approvals.decide(PLAN.digest, "approved", "ash")
    approvals.ask(other, lambda: None)
    assert invoke("refuse", hospital, "run-1", "--plan", other.digest).exit_code == 0
    with pytest.raises(PolicyRefusal, match="has refused run run-1"):
        approvals.require(LINK)


def test_runs_lists_as_json(hospital, approvals):
    assert json.loads(invoke("runs", hospital, "--json").stdout) == []
    approvals.ask(PLAN, lambda: None)
    (row,) = json.loads(invoke("runs", hospital, "--json").stdout)
    assert (row["run"], row["state"], row["plan"]) == ("run-1", "waiting", PLAN.digest)


def test_a_base_that_was_not_approved_leaves_no_byte_behind(hospital, tmp_path):
    import numpy as np
    from flwr.app import Array

    piece = ArrayRecord({"bytes": Array(np.zeros(9, dtype=np.uint8))})
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(pack(BASE, {"piece": piece}), dst_node_id=7, message_type="query")
    context = Context(
        run_id=1, node_id=7, node_config={"site-config": str(hospital)}, state=RecordDict(), run_config={}
    )
    assert unpack(app(message, context).content, Refusal)[0].waiting
    assert not list((tmp_path / "state").rglob("*.part"))


def test_a_site_names_no_keys_for_a_sum_of_a_run_that_nobody_has_approved(hospital, approvals):
    round_ = Round(run_id=PLAN.run_id, hop="head", task="0" * 64, members=("ash", "birch", "cedar"), threshold=2)
    steps = [
        SumKeysTask(round=round_),
        SumSharesTask(round=round_, offers=[]),
        SumUnmaskTask(round=round_, answered=["ash", "birch", "cedar"]),
    ]
    for step in steps:
        assert unpack(answer(step, "query", hospital), Refusal)[0].waiting
    approvals.ask(PLAN, lambda: None)
    approvals.decide(PLAN.digest, "refused", "a person")
    for step in steps:
        refused = unpack(answer(step, "query", hospital), Refusal)[0]
        assert refused.final and "has refused run" in refused.reason
