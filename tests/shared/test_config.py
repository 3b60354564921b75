"""The run configuration: what is accepted, what is refused and in which words, and what is generated from it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from chainward_shared.config import ConfigScalar, Option, RunConfig, options
from chainward_shared.config.docs import configuration_markdown, flower_app_config
from chainward_shared.errors import ConfigError
from chainward_shared.settings import (
    ArithmeticSettings,
    AugmentationSettings,
    LabelSettings,
    LinkSettings,
    StudentSettings,
)

REPOSITORY = Path(__file__).parents[2]


def refusal_of(flat: dict[str, ConfigScalar]) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(flat)
    message = str(caught.value)
    assert "\n" not in message, "a refusal is one line"
    return message


# --- parsing ---


def test_no_keys_give_the_defaults():
    assert RunConfig.from_flat({}) == RunConfig()


def test_a_configuration_survives_the_flat_form():
    flat = {"seed": 7, "chain.laps": 2, "chain.start": "fresh", "student.ema-decay": 0.9, "chain.compare-alone": False}
    config = RunConfig.from_flat(flat)
    assert RunConfig.from_flat(config.to_flat()) == config
    assert flat.items() <= config.to_flat().items()


def test_the_flat_form_has_every_key():
    assert list(RunConfig().to_flat()) == [option.key for option in options()]


def test_an_integer_does_where_a_number_is_expected():
    assert RunConfig.from_flat({"federation.deadline": 5}).federation.deadline == 5.0


def test_a_configuration_can_not_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().chain.laps = 2


def test_expected_sites_keep_their_order_without_blanks():
    assert RunConfig.from_flat({"federation.sites": " oak, ash ,,elm"}).expected_sites == ("oak", "ash", "elm")


# --- refusing ---


@pytest.mark.parametrize(
    ("key", "close"),
    [
        ("chain.lap", "chain.laps"),
        ("chain.batch_size", "chain.batch-size"),
        ("sede", "seed"),
        ("studnet.rounds", "student.rounds"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(key, close):
    assert refusal_of({key: 1}) == f"{key} = 1: there is no such key (did you mean '{close}'?)"


@pytest.mark.parametrize("key", ["zzz", "chain", "chain.", "chain.laps.more", ""])
def test_a_key_that_is_none_is_refused(key):
    assert refusal_of({key: 1}).startswith(f"{key} = 1: there is no such key")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("chain.laps", -1, ["chain.laps = -1", "greater than or equal to 0", "at least 0, at most 100", "default 1"]),
        (
            "chain.label-fraction",
            1.5,
            ["chain.label-fraction = 1.5", "number at least 1e-06, at most 1", "default 1.0"],
        ),
        (
            "chain.learning-rate",
            float("nan"),
            ["chain.learning-rate = nan", "at least 1e-09, at most 10", "default 0.001"],
        ),
        ("chain.learning-rate", float("inf"), ["chain.learning-rate = inf", "at least 1e-09, at most 10"]),
        (
            "student.ema-decay",
            1.0,
            ["student.ema-decay = 1.0", "0 or at least 1e-06, at most 0.999999", "default 0.996"],
        ),
        ("privacy.clip", 1e-33, ["privacy.clip = 1e-33", "number at least 0.0001, at most 1 000", "default 1.0"]),
        (
            "chain.unlabelled-weight",
            1e-25,
            ["should be 0, or at least 1e-06", "number that is 0 or at least 1e-06, at most 100", "default 0.0"],
        ),
        ("student.large-weight", -1.0, ["student.large-weight = -1.0", "should be 0, or at least 1e-06"]),
        ("chain.start", "hot", ["chain.start = 'hot'", "warm, fresh", "default 'warm'"]),
        ("chain.epochs", 1.5, ["chain.epochs = 1.5", "integer", "default 12"]),
        ("chain.epochs", "many", ["chain.epochs = 'many'", "integer at least 1, at most 10 000"]),
        ("seed", -1, ["seed = -1", "integer at least 0, below 2^63", "default 0"]),
        ("seed", 2**63, [f"seed = {2**63}", "below 2^63"]),
        ("chain.compare-alone", 3, ["chain.compare-alone = 3", "true or false", "default True"]),
        ("privacy.mode", "on", ("off, by-policy, dp-sgd", "default 'off'")),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed_and_the_default(key, value, words):
    message = refusal_of({key: value})
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"federation.sites": "oak,ash", "federation.num-sites": 3}, ["federation.num-sites = 3", "names 2"]),
        ({"federation.sites": "oak,ash,oak"}, ["federation.sites = 'oak,ash,oak'", "twice"]),
        ({"data.label-skew": 0.5}, ["data.label-skew = 0.5", "data.source = 'phantom'"]),
        ({"data.source": "cases.yaml"}, ["data.source = 'cases.yaml'", "absolute path"]),
        ({"chain.start": "fresh", "chain.distillation-weight": 0.0}, ["chain.start", "chain.distillation-weight"]),
        ({"student.model": "convnext_atto", "student.width": 0.25}, ["student.model", "student.width = 0.25"]),
        ({"student.model": "convnext_atto", "student.depth": 0.5}, ["student.model", "student.depth = 0.5"]),
        ({"student.start": "random", "student.selection": "random"}, ["student.selection", "student.start = 'random'"]),
        ({"student.start": "random", "student.layers": "spread"}, ["student.layers", "student.start = 'random'"]),
        (
            {"student.auxiliary": "frozen", "student.ema-schedule": "constant"},
            ["student.ema-schedule = 'constant'", "student.auxiliary = 'frozen'"],
        ),
        (
            {"student.auxiliary": "frozen", "student.frozen-epochs": 2},
            ["student.frozen-epochs = 2", "student.auxiliary = 'frozen'"],
        ),
        ({"student.rounds": 0, "student.finetune-rounds": 2}, ["student.finetune-rounds = 2", "student.rounds = 0"]),
        ({"chain.strands": 4, "federation.num-sites": 3}, ["chain.strands = 4", "number of sites, 3"]),
        ({"chain.strands": 3, "federation.sites": "oak,ash"}, ["chain.strands = 3", "number of sites, 2"]),
        ({"output.dir": "runs"}, ["output.dir = 'runs'", "relative", "absolute path"]),
        ({"chain.unlabelled-weight": 1.0}, ["chain.unlabelled-weight = 1.0", "chain.label-fraction = 1.0"]),
        ({"chain.epochs": 200, "chain.laps": 51}, ["chain.epochs = 200", "chain.laps = 51", "10,200", "10,000"]),
        (
            {"student.learning-rate": 1e-8, "student.finetune-factor": 0.01},
            ["student.finetune-factor = 0.01", "student.learning-rate = 1e-08", "below 1e-09"],
        ),
        ({"chain.merge": "average"}, ["chain.merge = 'average'", "chain.strands = 1"]),
        ({"chain.merge": "ensemble", "chain.strands": 2}, ["chain.merge = 'ensemble'", "student.large-weight"]),
        (
            {"chain.merge": "ensemble", "chain.strands": 9, "student.large-weight": 1.0},
            ["at most 8 strands", "chain.strands = 9"],
        ),
        ({"chain.order": "weakest-next", "chain.strands": 2}, ["chain.order = 'weakest-next'", "chain.strands = 2"]),
        (
            {"privileged.mode": "all", "privileged.logit-weight": 0.0, "privileged.embedding-weight": 0.0},
            ["privileged.mode = 'all'", "privileged.embedding-weight = 0"],
        ),
        ({"privileged.image": True}, ["privileged.image = true", "privileged.mode = 'off'"]),
        (
            {"privileged.image": True, "privileged.mode": "text", "privileged.target": "links"},
            ["privileged.image = true", "chain.start-from = ''"],
        ),
        (
            {"privileged.image": True, "privileged.mode": "text", "chain.start-from": "vit"},
            ["privileged.image = true", "privileged.target = 'both'"],
        ),
        ({"student.head": "statistics", "student.rounds": 0}, ["student.head = 'statistics'", "student.rounds = 0"]),
    ],
)
def test_keys_that_contradict_each_other_are_refused_and_named(flat, words):
    message = refusal_of(flat)
    assert [word for word in words if word not in message] == [], message
    assert "problems" not in message, "one contradiction is one problem"


@pytest.mark.parametrize(
    "flat",
    [
        {"federation.sites": "oak,ash", "federation.num-sites": 2},
        {"data.source": "/data/cases.yaml", "data.label-skew": 0.5},
        {"chain.start": "fresh"},
        {"chain.start": "fresh", "chain.distillation-weight": 0.0, "chain.attention-weight": 1.0},
        {"chain.label-fraction": 0.5, "chain.unlabelled-weight": 1.0},
        {"chain.strands": 2, "chain.merge": "average"},
        {"chain.strands": 2, "chain.merge": "ensemble", "student.large-weight": 0.5},
        {"privileged.mode": "table", "privileged.logit-weight": 0.0},
        {"chain.distillation-weight": 0.0},
        {"student.model": "convnext_atto"},
        {"student.rounds": 0},
        {"chain.strands": 3, "federation.num-sites": 3},
        {"output.dir": "~/runs"},
        {"output.dir": "/runs"},
    ],
)
def test_keys_that_agree_are_accepted(flat):
    assert flat.items() <= RunConfig.from_flat(flat).to_flat().items()


def test_all_problems_come_in_one_message():
    message = refusal_of({"chain.lap": 2, "chain.epochs": 0, "student.width": 2.0})
    assert message.startswith("3 problems in the run configuration: ")
    for key in ("chain.lap = 2", "chain.epochs = 0", "student.width = 2.0"):
        assert key in message


def test_all_contradictions_come_in_one_message():
    message = refusal_of({"data.label-skew": 0.5, "output.dir": "runs"})
    assert message.startswith("2 problems")
    assert "data.label-skew" in message
    assert "output.dir" in message


# --- recipes ---


def test_a_site_alone_gets_the_epochs_of_all_laps():
    config = RunConfig.from_flat({"chain.epochs": 5, "chain.laps": 3})
    assert config.link_recipe().epochs == 5
    assert config.link_recipe(laps=3).epochs == 15


@pytest.mark.parametrize(
    ("target", "links", "students"), [("links", True, False), ("students", False, True), ("both", True, True)]
)
def test_privileged_teachers_guide_what_they_are_meant_for_and_never_fine_tuning(target, links, students):
    config = RunConfig.from_flat({"privileged.mode": "text", "privileged.target": target})
    assert (config.link_recipe().privileged is not None) == links
    assert (config.student_recipe("distil").privileged is not None) == students
    assert config.student_recipe("finetune").privileged is None
    assert RunConfig().link_recipe().privileged is None


def test_fine_tuning_has_a_lower_rate_and_no_distillation():
    config = RunConfig.from_flat({"student.learning-rate": 0.01, "student.finetune-factor": 0.5})
    distil, finetune = config.student_recipe("distil"), config.student_recipe("finetune")
    assert (distil.learning_rate, distil.distillation_weight) == (0.01, config.student.distillation_weight)
    assert (finetune.learning_rate, finetune.distillation_weight) == (0.005, 0.0)


@pytest.mark.parametrize(
    ("table", "group", "stage"),
    [
        ("federation", ArithmeticSettings, "link"),
        ("data", AugmentationSettings, "link"),
        ("chain", LinkSettings, "link"),
        ("federation", ArithmeticSettings, "student"),
        ("data", AugmentationSettings, "student"),
        ("chain", LabelSettings, "student"),
        ("student", StudentSettings, "student"),
    ],
)
def test_every_setting_of_a_group_reaches_the_recipe(table, group, stage):
    for option in options():
        where, _, key = option.key.rpartition(".")
        name = key.replace("-", "_")
        if where != table or name not in group.model_fields:
            continue
        other = another_value(option)
        given = getattr(RunConfig(), table).model_copy(update={name: other})
        config = RunConfig().model_copy(update={table: given})
        recipe = config.link_recipe() if stage == "link" else config.student_recipe("distil")
        assert getattr(recipe, name) == other, option.key


def another_value(option: Option) -> ConfigScalar:
    """Return an allowed value of the option that is not its default."""
    if option.kind == "choice":
        return next(value for value in option.allowed.split(", ") if value != option.default)
    if option.kind == "true or false":
        return not option.default
    return option.default + 1 if option.kind == "integer" else option.default / 2 or 0.5


# --- what is generated from the models ---


def test_every_key_has_a_description_a_type_and_an_allowed_default():
    for option in options():
        assert option.description, f"{option.key} has no description"
        assert option.kind in {"choice", "true or false", "integer", "number", "text"}, f"{option.key}: {option.kind}"
        assert RunConfig.from_flat({option.key: option.default}) == RunConfig(), option.key


def test_the_configuration_reference_is_the_generated_one():
    assert (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8") == configuration_markdown()


def test_the_six_sites_app_holds_every_key_at_its_default():
    app = tomllib.loads((REPOSITORY / "simulations/six_sites/pyproject.toml").read_text(encoding="utf-8"))
    held = app["tool"]["flwr"]["app"]["config"]
    expected = RunConfig().tables()
    assert held == expected
    types = {name: {key: type(v) for key, v in table.items()} for name, table in expected.items() if name != "seed"}
    assert {name: {key: type(v) for key, v in held[name].items()} for name in types} == types  # 0 == 0.0 == False


def test_the_generated_app_tables_are_toml_of_the_defaults():
    assert tomllib.loads(flower_app_config())["tool"]["flwr"]["app"]["config"] == RunConfig().tables()


def test_private_trainings_of_a_run_are_planned_together_and_follow_the_settings():
    config = RunConfig.from_flat(
        {
            "privacy.mode": "dp-sgd",
            "privacy.batch-size": 100,
            "chain.laps": 2,
            "chain.strands": 3,
            "chain.epochs": 5,
            "chain.label-fraction": 0.5,
            "student.rounds": 4,
            "student.epochs": 7,
            "privileged.mode": "all",
            "privileged.epochs": 9,
        }
    )
    recipe = config.link_recipe().privacy
    assert recipe == config.student_recipe("finetune").privacy
    assert [(one.epochs, one.batch_size, one.times) for one in recipe.run] == [(5, 100, 6), (7, 100, 5), (9, 64, 2)]
    assert (recipe.sites, recipe.share) == ("all", 0.5)
    assert RunConfig().link_recipe().privacy is None


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"privacy.epsilon": 3.0}, "contradicts privacy.mode = 'off'"),
        ({"privacy.mode": "dp-sgd", "privacy.epsilon": 0.0}, "allowed: number at least 0.0001"),
        ({"privacy.mode": "dp-sgd", "privacy.delta": 1.0}, "at most 0.5"),
        ({"privacy.mode": "dp-sgd", "federation.precision": "bf16"}, "not verified for private training"),
        ({"privacy.mode": "dp-sgd", "privacy.simulated-budget": "a"}, "expected an epsilon above 0"),
        ({"privacy.mode": "dp-sgd", "privacy.simulated-budget": "0"}, "expected an epsilon above 0"),
        (
            {"privacy.mode": "dp-sgd", "privacy.simulated-sites": "a", "privacy.simulated-budget": "b=1"},
            "names 'b', which privacy.simulated-sites doesn't",
        ),
    ],
)
def test_privacy_that_can_not_be_meant_is_refused_in_words(flat, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        RunConfig.from_flat(flat)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"chain.refit": "links"}, "chain.head = 'trained'"),
        (
            {"chain.refit": "links", "chain.head": "statistics", "chain.merge": "average", "chain.strands": 2},
            "an average of classifiers",
        ),
        ({"chain.head": "statistics", "chain.refit": "links", "privacy.mode": "dp-sgd"}, "pay for a statistics round"),
        ({"federation.secure-sums": "on", "student.aggregation": "median"}, "student.aggregation='mean'"),
        ({"federation.secure-sums": "on", "chain.order": "weakest-next"}, "the scores of single sites"),
        ({"federation.secure-sums": "on", "chain.max-forgetting": 0.1}, "chain.max-forgetting=1"),
        ({"chain.laps": 0}, "chain.head = 'trained'"),
        ({"chain.laps": 0, "chain.head": "statistics"}, "chain.compare-alone=false"),
        ({"chain.laps": 0, "chain.head": "statistics", "chain.strands": 2}, "chain.strands=1"),
        ({"chain.laps": 0, "chain.head": "statistics", "chain.refit": "no"}, "chain.refit='end'"),
    ],
)
def test_heads_that_can_not_be_are_refused_in_words(given, says):
    with pytest.raises(ConfigError, match=says):
        RunConfig.from_flat(given)
