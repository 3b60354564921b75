"""A hospital's own limits: what is beyond them is refused before anything is opened, reserved or built."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from pydantic import BaseModel

import chainward_client.node as node_module
from chainward_client.app import app
from chainward_client.limits import check_enough, check_limits, enough
from chainward_client.node import LONGEST_WAIT
from chainward_client.site_config import SiteLimits, load_site_config
from chainward_client.store import SiteStore
from chainward_shared.errors import DataError, PolicyRefusal
from chainward_shared.models import Architecture, architecture, count_parameters, resolve_architecture, skeleton
from chainward_shared.protocol import Body, EvaluateTask, LinkTask, Refusal, StatisticsTask, StudentTask, pack, unpack
from chainward_shared.recipes import LinkRecipe, PlannedTraining, PrivacyRecipe, PrivilegedRecipe, StudentRecipe

SMALL = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
DIGEST = "0" * 64
PRIVATE = PrivacyRecipe(delta=1e-5, noise_multiplier=1.0, run=(PlannedTraining(epochs=1, batch_size=8, times=1),))
LINK = LinkTask(
    run_id="r",
    hop="h",
    strand=0,
    lap=0,
    architecture=SMALL,
    recipe=LinkRecipe(seed=1, epochs=1, threads=1, privacy=PRIVATE, privileged=PrivilegedRecipe(use="all", epochs=1)),
)
STUDENT = StudentTask(
    run_id="r",
    round=1,
    architecture=SMALL,
    recipe=StudentRecipe(seed=1, stage="distil", epochs=1, rounds=1, threads=1, large_weight=1.0),
    student_digest=DIGEST,
    large_digests=[DIGEST],
    large_architecture=SMALL,
)
SCORES = EvaluateTask(run_id="r", architecture=SMALL, splits=["val"], threads=1, digest=DIGEST)
TYPES = {LINK.KIND: "train.link", STUDENT.KIND: "train.student", SCORES.KIND: "evaluate"}

BEYOND = [
    (LINK, "recipe.epochs", 1_001, "limits.epochs"),
    (LINK, "recipe.threads", 65, "limits.threads"),
    (LINK, "recipe.privileged.epochs", 1_001, "limits.epochs"),
    (LINK, "recipe.privacy.batch_size", 4_097, "limits.batch_size"),
    (LINK, "recipe.privacy.run.0.times", 10_001, "limits.trainings"),
    (LINK, "recipe.privacy.run.0.epochs", 1_001, "limits.epochs"),
    (LINK, "recipe.privacy.run.0.batch_size", 4_097, "limits.batch_size"),
    (LINK, "architecture.image_size", 1_025, "limits.image_size"),
    (STUDENT, "round", 1_001, "limits.rounds"),
    (STUDENT, "recipe.rounds", 1_001, "limits.rounds"),
    (STUDENT, "recipe.frozen_epochs", 1_001, "limits.epochs"),
    (STUDENT, "large_architecture.image_size", 1_025, "limits.image_size"),
    (SCORES, "threads", 65, "limits.threads"),
    (SCORES, "architecture.image_size", 1_025, "limits.image_size"),
]


def changed(task: Body, place: str, value: int) -> Body:
    """Return the task with another value at a place, as it would arrive."""
    document = json.loads(task.model_dump_json())
    *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner: Any = document
    for part in path:
        inner = inner[part]
    inner[last] = value
    return type(task).model_validate(document)


@pytest.fixture
def deployed(tmp_path):
    """Return the node configuration of a hospital whose data file is nowhere: opening it would fail in other words."""

    def written(**limits: int) -> dict[str, str]:
        block = {"site": "ash", "data": "nowhere.yaml", "state": str(tmp_path / "state")}
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(block | ({"limits": limits} if limits else {})))
        return {"site-config": str(tmp_path / "site.yaml")}

    return written


def answer_to(task: Body, node_config: dict[str, str], *, ttl: float = 3600.0) -> Refusal:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(pack(task), dst_node_id=7, message_type=TYPES[task.KIND], ttl=ttl)
    context = Context(run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config={})
    return unpack(app(message, context).content, Refusal)[0]


@pytest.mark.parametrize(
    ("task", "place", "value", "limit"), BEYOND, ids=lambda one: one if isinstance(one, str) else ""
)
def test_what_is_beyond_a_limit_is_refused_with_what_was_asked_what_is_allowed_and_by_whose_word(
    deployed, tmp_path, task, place, value, limit
):
    refusal = answer_to(changed(task, place, value), deployed())
    assert refusal.final, "asking again is no use"
    assert refusal.reason.startswith(f"{place.replace('.0.', '.')} = {value} is more than this hospital does")
    assert f"at most {value - 1} ({limit}, the default" in refusal.reason
    assert "\n" not in refusal.reason
    assert not (tmp_path / "state").exists(), "nothing was reserved or locked"


@pytest.mark.parametrize("task", [LINK, STUDENT, SCORES], ids=lambda task: task.KIND)
def test_what_is_within_the_limits_is_taken_up(deployed, task):
    assert "own log" in answer_to(task, deployed()).reason, "the data file is nowhere"


def test_a_hospital_sets_its_own_limits_above_and_below_the_default(deployed):
    asked = changed(LINK, "recipe.epochs", 200)
    refusal = answer_to(asked, deployed(epochs=199))
    assert "recipe.epochs = 200" in refusal.reason
    assert "at most 199 (limits.epochs, set in its site.yaml)" in refusal.reason
    assert "own log" in answer_to(changed(LINK, "recipe.epochs", 5_000), deployed(epochs=5_000)).reason


def test_a_model_with_more_parameters_than_the_hospital_allows_is_never_built(deployed, monkeypatch):
    real = architecture._create

    def only_laid_out(asked: Architecture, device: str) -> Any:
        assert device == "meta", "a model was built"
        return real(asked, device)

    monkeypatch.setattr(architecture, "_create", only_laid_out)
    size = count_parameters(skeleton(SMALL))
    for task, place in ((LINK, "architecture"), (STUDENT, "architecture"), (SCORES, "architecture")):
        refusal = answer_to(task, deployed(parameters=size - 1))
        assert f"{place}.parameters = {size} is more" in refusal.reason
    assert "own log" in answer_to(LINK, deployed(parameters=size)).reason


@pytest.mark.slow
def test_the_largest_model_that_a_message_can_name_is_refused_by_default():
    widest = {"embed_dim": 16_384, "num_heads": 1, "depth": 128, "img_size": 32}
    huge = Architecture(name="vit_tiny_patch16_224", num_classes=3, in_chans=1, image_size=32, options=widest)
    with pytest.raises(PolicyRefusal, match=r"architecture\.parameters"):
        check_limits(SCORES.model_copy(update={"architecture": huge}), SiteLimits())


def test_every_limit_is_the_limit_of_something(deployed):
    named = {limit.removeprefix("limits.") for *_, limit in BEYOND} | {"parameters", "laps"}
    named |= {"statistics_images", "statistics_class"}  # the fewest images: `check_enough`
    assert named == set(SiteLimits.model_fields)


def test_laps_are_limited_below_what_a_message_can_name(deployed):
    refusal = answer_to(changed(LINK, "lap", 50), deployed(laps=49))
    assert "lap = 50" in refusal.reason


def test_fields_of_models_within_lists_are_checked_too():
    class Inner(BaseModel):
        threads: int

    class Outer(BaseModel):
        many: list[Inner]

    check_limits(Outer(many=[Inner(threads=64)]), SiteLimits())
    with pytest.raises(PolicyRefusal, match=r"many\.threads = 65"):
        check_limits(Outer(many=[Inner(threads=1), Inner(threads=65)]), SiteLimits())


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"epoch": 5}, "there is no key 'limits.epoch' (did you mean 'epochs'?); keys are epochs, rounds"),
        ({"epochs": 0}, "limits.epochs: input should be greater than or equal to 1, found 0"),
        ({"threads": 10**12}, "limits.threads: input should be less than or equal to 256, found 1000000000000"),
        ({"parameters": 1.5}, "limits.parameters"),
        (5, "limits: "),
    ],
)
def test_limits_that_can_not_be_meant_are_refused_and_named(tmp_path, block, words):
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"site": "ash", "data": "d.yaml", "limits": block}))
    with pytest.raises(DataError) as caught:
        load_site_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ttl", [1e300, float("inf"), float("nan"), -1.0])
def test_no_sender_makes_a_site_wait_for_longer_than_the_site_itself_would(deployed, monkeypatch, ttl):
    waited = []
    monkeypatch.setattr(
        node_module.SiteStore,
        "lock",
        lambda *_: pytest.fail("not before the wait is known") if waited else Noted(waited),
    )
    node = node_module.DeployedNode(deployed())
    with pytest.raises(DataError), node.at_work_on(LINK, ttl):
        pass
    assert waited == [LONGEST_WAIT]


class Noted:
    """A lock that notes for how long it would wait."""

    def __init__(self, waited: list[float]) -> None:
        self.waited = waited

    def hold(self, seconds: float) -> Any:
        from contextlib import nullcontext

        self.waited.append(seconds)
        return nullcontext()


# --- the numbers of rounds ---


def test_a_round_of_any_number_is_stored_and_found_without_counting_up_to_it(tmp_path):
    store = SiteStore(tmp_path, "r")
    state = {"a": skeleton(SMALL).state_dict()["stem.0.weight"].new_zeros(3, device="cpu")}
    last = 10**15
    store.save_auxiliary(state, SMALL, after_round=last)
    assert store.load_auxiliary(before_round=last) is None
    assert store.load_auxiliary(before_round=last + 1) is not None
    store.save_auxiliary(state, SMALL, after_round=last + 5)
    assert store.load_auxiliary(before_round=last + 5) is None, "the teacher of long ago is gone"


STATISTICS = StatisticsTask(
    run_id="r", hop="head", architecture=SMALL, label_fraction=1.0, seed=1, threads=1, digest=DIGEST
)


@pytest.mark.parametrize(
    ("images", "rarest", "limits", "named"),
    [
        (9, 3, SiteLimits(), "limits.statistics_images"),
        (3, 1, SiteLimits(statistics_images=4), "limits.statistics_images"),
        (50, 1, SiteLimits(statistics_class=2), "limits.statistics_class"),
    ],
)
def test_sums_over_fewer_images_than_a_hospital_wants_do_not_leave_it(images, rarest, limits, named):
    with pytest.raises(PolicyRefusal, match=named) as refusal:
        check_enough(images, rarest, limits)
    assert not enough(images, rarest, limits)
    assert f" {images} " not in str(refusal.value), "how many there are is not told"


def test_sums_over_enough_images_do():
    check_enough(10, 1, SiteLimits())
    assert enough(10, 1, SiteLimits())


@pytest.mark.parametrize(("field", "asked"), [("threads", 65), ("architecture.image_size", 1_025)])
def test_a_statistics_round_is_held_to_the_limits_of_every_request(field, asked):
    task = STATISTICS.model_copy(
        update={"threads": asked}
        if field == "threads"
        else {"architecture": SMALL.model_copy(update={"image_size": asked})}
    )
    with pytest.raises(PolicyRefusal, match=field):
        check_limits(task, SiteLimits())
