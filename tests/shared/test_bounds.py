"""No request can hold what makes no sense: every number has a range, every text and list a length, and no model is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MaxLen
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from chainward_shared import protocol
from chainward_shared.bounds import SMALLEST_WEIGHT, ZeroOrAtLeast
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, PolicyRefusal, ProtocolError
from chainward_shared.models import Architecture
from chainward_shared.privacy import dp_sgd
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.protocol import Body, EvaluateTask, LinkTask, StudentTask, pack, unpack
from chainward_shared.recipes import LinkRecipe, PlannedTraining, PrivacyRecipe, PrivilegedRecipe, StudentRecipe

REQUESTS = [
    body
    for body in vars(protocol).values()
    if isinstance(body, type) and issubclass(body, Body) and body.__name__.endswith(("Request", "Task"))
]
"""All that a coordinator sends to a site."""

HOSTILE = [1e-45, 1e-300, 1e38, 1e308, -1, -1e-30, math.nan, math.inf, -math.inf, 10**12, 10**30, 2**63, 10**400]

ARCHITECTURE = Architecture(
    name="vit_tiny_patch16_224", num_classes=3, in_chans=1, image_size=32, options={"img_size": 32, "depth": 1}
)
PRIVATE = PrivacyRecipe(delta=1e-5, noise_multiplier=1.0, run=(PlannedTraining(epochs=1, batch_size=8),))
PRIVILEGED = PrivilegedRecipe(use="all")
ASKED: dict[str, Any] = {"run_id": "run", "architecture": ARCHITECTURE}
LINK = LinkTask(hop="hop", strand=0, lap=0, recipe=LinkRecipe(seed=1, privacy=PRIVATE, privileged=PRIVILEGED), **ASKED)
STUDENT = StudentTask(
    round=1,
    recipe=StudentRecipe(seed=1, stage="distil", privacy=PRIVATE, privileged=PRIVILEGED, large_weight=1.0),
    student_digest="0" * 64,
    large_digests=["0" * 64],
    large_architecture=ARCHITECTURE,
    **ASKED,
)
SCORES = EvaluateTask(splits=["val"], threads=1, digest="0" * 64, **ASKED)


def single(constraint: Any) -> list[Any]:
    """Return what a constraint consists of: pydantic's `Field` and `StringConstraints` hold several."""
    if isinstance(constraint, GroupedMetadata):
        return list(constraint)
    return getattr(constraint, "metadata", None) or [constraint]


def parts_of(annotation: Any, constraints: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield every plain type of an annotation, those within lists and unions included, with what constrains it."""
    if get_origin(annotation) is Annotated:
        inner, *found = get_args(annotation)
        flat = [part for one in found for part in single(one)]
        yield from parts_of(inner, (*constraints, *flat))
    elif get_origin(annotation) is Literal:
        return
    elif isinstance(annotation, type) and get_origin(annotation) is None:
        yield annotation, constraints
    else:
        origin = get_origin(annotation)
        if origin in (list, tuple, dict, set, frozenset):
            yield origin, constraints
            constraints = ()
        for part in get_args(annotation):
            if part is not Ellipsis:
                yield from parts_of(part, constraints)


def models_of(models: list[type[BaseModel]]) -> set[type[BaseModel]]:
    """Return the models, and all that stand within them."""
    found: set[type[BaseModel]] = set()
    waiting = list(models)
    while waiting:
        model = waiting.pop()
        if model not in found:
            found.add(model)
            waiting += [
                part
                for field in model.model_fields.values()
                for part, _ in parts_of(field.annotation)
                if isinstance(part, type) and issubclass(part, BaseModel)
            ]
    return found


def unbounded(model: type[BaseModel]) -> list[str]:
    """Return what of a model's fields may be as large, as small or as long as one likes."""
    problems = []
    for name, field in model.model_fields.items():
        for part, constraints in parts_of(
            field.annotation, tuple(part for one in field.metadata for part in single(one))
        ):
            kinds = {type(one) for one in constraints}
            if part in (int, float) and not (kinds & {Ge, Gt, ZeroOrAtLeast} and kinds & {Le, Lt}):
                problems.append(f"{model.__name__}.{name}: a number without a range")
            if part is float and (Gt in kinds or Lt in kinds) and model is not PrivacyPolicy:
                problems.append(f"{model.__name__}.{name}: a range that is open")
            if part in (str, list, tuple, dict, set, frozenset, bytes) and MaxLen not in kinds:
                problems.append(f"{model.__name__}.{name}: {part.__name__} without a largest length")
    return problems


def test_there_are_requests_of_every_kind():
    assert {"LinkTask", "StudentTask", "EvaluateTask", "HelloRequest", "CardRequest", "AtWorkRequest"} <= {
        body.__name__ for body in REQUESTS
    }
    assert {LinkRecipe, StudentRecipe, PrivacyRecipe, PrivilegedRecipe, Architecture} <= models_of(REQUESTS)


@pytest.mark.parametrize(
    "model", sorted(models_of(REQUESTS), key=lambda one: one.__name__), ids=lambda one: one.__name__
)
def test_no_field_that_reaches_a_site_lacks_a_range_or_a_length(model):
    assert unbounded(model) == []


def test_the_search_for_fields_without_a_range_finds_them():
    class Forgetful(BaseModel):
        free: int
        half: float = Field(ge=0)
        text: str | None = None
        many: list[Annotated[int, Field(ge=0, le=1)]] = []
        inside: tuple[float, ...] = Field((), max_length=3)
        open: float = Field(gt=0, le=1)
        good: Annotated[float, Field(ge=0, le=1)] = 0.0

    assert [problem.split(".")[1].split(":")[0] for problem in unbounded(Forgetful)] == [
        "free",
        "half",
        "text",
        "many",
        "inside",
        "open",
    ]


def places_of(content: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the place of every number in parsed JSON, those that are not given now (null) included."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places_of(value, (*place, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from places_of(value, (*place, index))
    elif content is None or (isinstance(content, int | float) and not isinstance(content, bool)):
        yield place


def with_value(content: Any, place: tuple[str | int, ...], value: object) -> Any:
    copied = json.loads(json.dumps(content))
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copied


TASKS = {task.KIND: task for task in (LINK, STUDENT, SCORES)}
PLACES = [
    pytest.param(task, place, id=f"{task.KIND} {'.'.join(map(str, place))}")
    for task in TASKS.values()
    for place in places_of(json.loads(task.model_dump_json()))
]


@pytest.mark.parametrize(("task", "place"), PLACES)
def test_a_hostile_number_anywhere_in_a_task_is_refused_in_a_line_or_harmless(task, place):
    document = json.loads(task.model_dump_json())
    for value in HOSTILE:
        content = pack(task)
        content.config_records["chainward"]["body"] = json.dumps(with_value(document, place, value))
        try:
            body, _ = unpack(content, type(task))
        except ChainwardError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 400
            continue
        assert is_sensible(body), f"{place} = {value!r} was accepted"


def is_sensible(model: BaseModel) -> bool:
    """Return whether every number in a model is 0 or of a size with which one can reckon, seeds aside."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, BaseModel) and not is_sensible(part):
                return False
            if isinstance(part, int | float) and name not in ("seed", "delta", "sequence"):
                sensible = math.isfinite(part) and (part == 0 or 1e-9 <= abs(part) <= 1e6)
                if not sensible:
                    return False
    return True


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip", 1e-33),
        ("noise_multiplier", 1e-300),
        ("noise_multiplier", 1e300),
        ("epsilon", 1e9),
        ("delta", 1e-300),
        ("delta", 0.75),
        ("share", 1e-9),
    ],
)
def test_a_private_training_that_means_nothing_can_not_be_written_down(field, value):
    with pytest.raises(ValidationError, match=field):
        PrivacyRecipe(**{"delta": 1e-5, "noise_multiplier": 1.0, field: value})


@pytest.mark.parametrize(
    "given", [{"epsilon": None, "noise_multiplier": None}, {"epsilon": 1.0, "noise_multiplier": 1.0}]
)
def test_a_task_whose_privacy_is_asked_for_twice_or_not_at_all_is_refused_in_words(given):
    document = json.loads(LINK.model_dump_json())
    document["recipe"]["privacy"] |= given
    content = pack(LINK)
    content.config_records["chainward"]["body"] = json.dumps(document)
    with pytest.raises(ProtocolError, match=r"recipe\.privacy: a private training needs either epsilon or noise"):
        unpack(content, LinkTask)


@pytest.mark.parametrize("field", ["unlabelled_weight", "attention_weight", "distillation_weight", "weight_decay"])
def test_a_weight_is_nothing_or_enough_to_matter(field):
    assert getattr(LinkRecipe(seed=0, **{field: 0.0}), field) == 0
    assert getattr(LinkRecipe(seed=0, **{field: SMALLEST_WEIGHT}), field) == SMALLEST_WEIGHT
    for value in (SMALLEST_WEIGHT / 2, 1e-25, -SMALLEST_WEIGHT):
        with pytest.raises(ValidationError, match=f"{field}\n  Input should be 0, or at least 1e-06"):
            LinkRecipe(seed=0, **{field: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 10**7}, "'depth' = 10000000: expected 0 to 128"),
        ({"depth": -1}, "'depth' = -1"),
        ({"depths": [3, 3, 10**12, 3]}, "'depths'"),
        ({"embed_dim": 10**30}, "'embed_dim' = about 10**30"),
        ({"mlp_ratio": 1e300}, "'mlp_ratio'"),
        ({"mlp_ratio": 1e-300}, "'mlp_ratio'"),
        ({"dims": [8] * 9}, "expected at most 8 values"),
        ({"dims": [[8]]}, "expected a number, a name"),
        ({"norm_layer": "x" * 65}, "at most 64 characters"),
        ({"norm_layer": {"a": 1}}, "expected a number, a name"),
        ({"act_layer": "relu"}, "must not set"),
        ({"pretrained": True}, "must not set"),
        ({f"option-{number}": 1 for number in range(1000)}, "at most 32 items"),
    ],
)
def test_an_option_that_no_model_of_ours_has_is_refused_before_anything_is_built(options, words):
    with pytest.raises((ChainwardError, ValidationError)) as caught:
        Architecture(name="vit_tiny_patch16_224", num_classes=3, in_chans=1, image_size=32, options=options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        "[" * 10**6,
        '{"run_id":' * 10**5,
        '{"run_id": "' + "x" * 10**6 + '"}',
        '{"round": ' + "9" * 10**6 + "}",
        '{"architecture": {"options": ' + "[" * 1000 + "]" * 1000 + "}}",
        json.dumps({str(number): number for number in range(10**5)}),
    ],
    ids=["deep list", "deep record", "long text", "long number", "deep options", "many fields"],
)
def test_a_hostile_body_is_refused_in_a_line_and_at_once(body):
    content = pack(STUDENT)
    content.config_records["chainward"]["body"] = body
    with pytest.raises(ChainwardError) as caught:
        unpack(content, StudentTask)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_body_beyond_the_largest_is_not_even_parsed(monkeypatch):
    content = pack(SCORES)
    content.config_records["chainward"]["body"] = " " * (protocol.envelope.MAX_BODY + 1)
    monkeypatch.setattr(EvaluateTask, "model_validate_json", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(ChainwardError, match="at most"):
        unpack(content, EvaluateTask)


def test_the_largest_configuration_still_gives_recipes():
    flat = {
        "chain.epochs": 100,
        "chain.laps": 100,
        "chain.strands": 512,
        "student.rounds": 10_000,
        "student.finetune-rounds": 10_000,
        "privacy.mode": "dp-sgd",
        "privacy.batch-size": 65_536,
        "privileged.mode": "all",
        "privileged.epochs": 10_000,
    }
    config = RunConfig.from_flat(flat)
    assert config.link_recipe(laps=100).epochs == 10_000
    assert config.student_recipe("finetune").privacy == config.privacy_recipe()


def test_every_annotation_of_a_range_is_understood_by_pydantic():
    weight = TypeAdapter(Annotated[float, ZeroOrAtLeast(0.5), Field(le=1)])
    assert [weight.validate_python(value) for value in (0, 0.5, 1)] == [0, 0.5, 1]
    for value in (-0.0001, 0.4999, 1.0001):
        with pytest.raises(ValidationError):
            weight.validate_python(value)


@pytest.mark.parametrize(
    ("asked", "epochs"),
    [
        ({"epsilon": 1.0, "run": (PlannedTraining(epochs=1_000, batch_size=1, times=10_000),)}, 1),
        ({"epsilon": 1.0}, 10_000),
        ({"noise_multiplier": 1.0}, 10_000),
    ],
)
def test_a_private_run_of_more_steps_than_can_be_accounted_for_is_refused_at_once(monkeypatch, asked, epochs):
    monkeypatch.setattr(dp_sgd, "solve_noise_multiplier", lambda *_: pytest.fail("it was accounted for"))
    with pytest.raises(PolicyRefusal, match="private steps are more than can be accounted for; at most 1000000"):
        dp_sgd.dp_sgd_of(PrivacyRecipe(delta=1e-5, **asked), units=1_000, epochs=epochs, batch_size=1)
