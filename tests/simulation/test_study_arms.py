"""Arms: what each comes to, what coincides, and what is refused, before anything is trained."""

from __future__ import annotations

import pytest

from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError
from chainward_simulations.study.arms import ARMS
from chainward_simulations.study.configured_arms import configure_arms
from chainward_simulations.study.settings import base_settings, parse_assignments, parse_seeds, typed

BASE = {"data.source": "phantom", "federation.threads": 1, "chain.epochs": 12}


def configured(name: str, base: dict | None = None, definitions: tuple[str, ...] = ()):
    (arm,) = configure_arms([name], definitions, {**BASE, **(base or {})}, 0)
    return arm


def changed(name: str, base: dict | None = None) -> dict:
    """The keys in which an arm's configuration differs from the study's settings."""
    given = RunConfig.from_flat({**BASE, **(base or {})}).to_flat()
    return {key: value for key, value in configured(name, base).config.to_flat().items() if value != given[key]}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_that_is_listed_can_be_configured_and_says_what_it_is(name):
    arm = configured(name, {"chain.label-fraction": 0.5, "chain.start-from": "weights"})
    assert arm.arm.about
    assert len(arm.arm.about) < 90


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chain", {}),
        ("chain-annealing", {"chain.temperature-decay": 0.9}),
        ("chain-weakest-next", {"chain.order": "weakest-next"}),
        ("chain-guarded", {"chain.max-forgetting": 0.05}),
        ("chain-fresh", {"chain.start": "fresh"}),
        ("chain-laps-2", {"chain.laps": 2, "chain.epochs": 6}),
        ("chain-laps-4", {"chain.laps": 4, "chain.epochs": 3}),
        ("chain-strands-3-average", {"chain.strands": 3, "chain.merge": "average"}),
        ("cyclic-3", {"chain.distillation-weight": 0.0, "chain.laps": 3, "chain.epochs": 4}),
        ("student-random", {"student.start": "random"}),
        ("chain-privileged-text", {"privileged.mode": "text"}),
        (
            "student-from-large",
            {"student.start": "random", "student.distillation-weight": 0.0, "student.large-weight": 1.0},
        ),
    ],
)
def test_an_arm_differs_from_the_settings_in_what_it_says(name, expected):
    assert changed(name) == expected


def test_all_arms_have_the_same_budget_of_epochs():
    for name in ("chain", "chain-laps-2", "chain-laps-4", "cyclic", "cyclic-3", "union", "alone", "fedavg"):
        config = configured(name).config
        assert config.chain.epochs * config.chain.laps == 12
        assert configured(name).plain_recipe.epochs == 12


@pytest.mark.parametrize(
    ("epochs", "rounds"), [(12, 4), (8, 4), (10, 5), (15, 5), (6, 3), (7, 7), (2, 2), (1, 1), (9, 3)]
)
def test_fedavg_has_about_four_rounds_that_share_the_epochs_evenly(epochs, rounds):
    assert configured("fedavg", {"chain.epochs": epochs}).rounds == rounds


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("chain", "chain-no-attention", True),
        ("cyclic", "chain-no-distillation", True),
        ("chain", "chain-fresh", False),
        ("fedavg", "fedprox", False),
        ("cyclic", "cyclic-3", False),
        ("alone", "alone-long", False),
        ("alone", "union", False),
        ("student", "student-random", False),
        ("chain", "student", False),
    ],
)
def test_arms_that_are_the_same_training_are_known_to_be(one, other, same):
    assert (configured(one).digest() == configured(other).digest()) is same


def test_what_a_baseline_does_not_use_does_not_make_it_another_training():
    for name in ("alone", "union", "fedavg", "cyclic-3"):
        unused = {"chain.temperature": 7.0, "student.width": 0.4}
        assert configured(name).digest() == configured(name, unused).digest()
        assert configured(name).digest() != configured(name, {"chain.learning-rate": 0.002}).digest()
        assert configured(name).digest() != configured(name).of_seed(1).digest()


def test_students_share_their_chain_and_not_with_another():
    shared = configured("chain").digest()
    for name in ("student", "student-random", "student-from-large"):
        assert configured(name).chain_digest() == shared
    assert configured("student", {"chain.temperature": 7.0}).chain_digest() != shared


def test_an_arm_of_ones_own_starts_from_another_and_says_so():
    definition = "strong=arm=fedprox mu=0.5 rounds=6 chain.learning-rate=0.002"
    arm = configured("strong", definitions=(definition,))
    assert (arm.arm.trainer, arm.arm.mu, arm.rounds) == ("federated", 0.5, 6)
    assert arm.config.chain.learning_rate == 0.002
    assert arm.arm.about == "fedprox with rounds=6 mu=0.5 chain.learning-rate=0.002"


@pytest.mark.parametrize(
    ("names", "definitions", "base", "said"),
    [
        (["chian"], (), {}, "there is no arm 'chian' (did you mean 'chain'?)"),
        (["chain", "alone", "chain"], (), {}, "'chain' is named twice"),
        ([], (), {}, "no arms"),
        (["chain-laps-5"], (), {}, "arm 'chain-laps-5': 5 laps can't share 12 epochs"),
        (["chain-unlabelled"], (), {}, "arm 'chain-unlabelled': chain.unlabelled-weight = 1.0 contradicts"),
        (["chain-strands-9"], (), {"federation.num-sites": 4}, "arm 'chain-strands-9': chain.strands = 9 contradicts"),
        (["student"], (), {"student.rounds": 0}, "arm 'student': student.rounds = 0"),
        ([], ("chain=chain.epochs=2",), {}, "there is an arm of this name already"),
        ([], ("x=chain.epoch=2",), {}, "chain.epoch=2: there is no such key (did you mean 'chain.epochs'?)"),
        ([], ("x=chain.epochs=two",), {}, "chain.epochs=two: expected an integer"),
        ([], ("x=data.label-skew=2",), {}, "data.label-skew is the same for all arms"),
        ([], ("x=mu=2",), {}, "mu is an option of fedavg and fedprox"),
        ([], ("x=arm=fedprox mu=-1",), {}, "mu=-1: expected a number of at least 0"),
        ([], ("x=arm=fedavg rounds=5",), {}, "5 rounds can't share 12 epochs"),
        ([], ("../x=chain.epochs=2",), {}, "expected NAME='key=value key=value'"),
        ([], ("x=chain.epochs",), {}, "expected key=value"),
        (["chain"], (), {"chain.label-fraction": 1.5}, "chain.label-fraction = 1.5"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(names, definitions, base, said):
    with pytest.raises(ChainwardError) as refused:
        configure_arms(names, definitions, {**BASE, **base}, 0)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["0,1,0", "", "a", "1.5", "-1", "0,,0", "9" * 30])
def test_seeds_that_are_none_are_refused(text):
    with pytest.raises(ChainwardError, match="--seeds"):
        parse_seeds(text)


def test_settings_are_read_in_the_type_of_their_key_with_or_without_quotes():
    words = ["chain.epochs=8 data.label-skew=0.5", 'chain.order="reversed" privileged.blank-label-words=true']
    assert typed(parse_assignments(words, "--set"), "--set") == {
        "chain.epochs": 8,
        "data.label-skew": 0.5,
        "chain.order": "reversed",
        "privileged.blank-label-words": True,
    }


@pytest.mark.parametrize("words", [["chain.epochs=8", "chain.epochs=9"], ["chain.epochs"], ["x='"], ["=8"]])
def test_settings_that_are_no_assignments_are_refused(words):
    with pytest.raises(ChainwardError, match="--set"):
        parse_assignments(words, "--set")


@pytest.mark.parametrize("key", ["seed", "data.source", "federation.num-sites"])
def test_what_an_option_says_is_not_said_again_by_set(key):
    with pytest.raises(ChainwardError, match="drop one of the two"):
        base_settings("phantom", 0, None, {key: 1})
