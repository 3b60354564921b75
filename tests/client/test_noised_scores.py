"""What a run promises, "at most this epsilon", holds for its trainings and its noised scores together."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from small_recipes import SMALL_LINK

from chainward_client.data.site_data import Cases, SiteData
from chainward_client.private_site import PrivateSite
from chainward_shared.errors import PolicyRefusal
from chainward_shared.privacy.accounting import epsilons, spent
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.recipes import PlannedTraining, PrivacyRecipe

DELTA = 1e-4
POLICY = PrivacyPolicy(epsilon=20.0, delta=DELTA, metrics="noised", metrics_epsilon=0.5, metrics_releases=3)
RUN = (PlannedTraining(epochs=2, batch_size=40, times=2),)


@pytest.fixture(scope="module")
def data() -> SiteData:
    cases = Cases(
        torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 2, np.array([f"p{i}" for i in range(40)])
    )
    return SiteData("oak", ("a", "b"), {"train": cases, "val": cases, "test": cases})


def recipe(epsilon: float | None, noise: float | None = None):
    privacy = PrivacyRecipe(delta=DELTA, epsilon=epsilon, noise_multiplier=noise, run=RUN)
    return SMALL_LINK.model_copy(update={"epochs": 2, "batch_size": 40, "privacy": privacy})


def site_of(tmp_path, policy=POLICY) -> PrivateSite:
    return PrivateSite.open(policy, tmp_path, "oak", create=True)


def train(site, data, asked, run="r", hop="h"):
    with site.work(run, hop).training(asked, data, phase="link") as private:
        private.steps_done = private.dp_sgd.steps


@pytest.mark.slow
@pytest.mark.parametrize("order", ["trainings first", "scores first", "in between"])
@pytest.mark.parametrize("epsilon", [2.0, 8.0])
def test_trainings_and_noised_scores_of_a_run_stay_within_its_epsilon_whatever_comes_first(
    tmp_path, data, order, epsilon
):
    site, asked = site_of(tmp_path), recipe(epsilon)
    work = [lambda: train(site, data, asked, hop="one"), lambda: train(site, data, asked, hop="two")]
    scores = [lambda hop=hop: site.work("r", f"scores-{hop}").release() for hop in range(6)]
    steps = {
        "trainings first": [*work, *scores],
        "scores first": [*scores, *work],
        "in between": [*scores[:2], work[0], *scores[2:4], work[1], *scores[4:]],
    }[order]
    released = [step() for step in steps]
    assert released.count(True) == 3
    assert released.count(False) == 3, "what is beyond the limit is withheld"
    site.ledger.reload()
    found = epsilons(site.ledger.mechanisms("r"), DELTA)
    assert found.problem is None
    assert 0.98 * epsilon < found.enforced <= epsilon * 1.0001
    with pytest.raises(PolicyRefusal, match="over what the run asks for"):
        train(site, data, asked, hop="three")


@pytest.mark.slow
def test_a_training_leaves_room_for_scores_that_are_never_asked(tmp_path, data):
    site, asked = site_of(tmp_path), recipe(4.0)
    for hop in ("one", "two"):
        train(site, data, asked, hop=hop)
    without = site_of(tmp_path / "other", POLICY.model_copy(update={"metrics": "withhold", "metrics_epsilon": None}))
    for hop in ("one", "two"):
        train(without, data, asked, hop=hop)
    mine, theirs = (spent(one.ledger.mechanisms("r"), DELTA) for one in (site, without))
    assert mine < 3.9 < theirs <= 4.0004


def test_scores_that_leave_a_run_nothing_are_refused_with_what_would_help(tmp_path, data):
    with pytest.raises(PolicyRefusal, match=r"noised scores alone, 3 releases at epsilon 0\.5 .* metrics_releases"):
        train(site_of(tmp_path), data, recipe(1.0))


@pytest.mark.slow
def test_a_cap_on_a_day_holds_whatever_the_runs_are_called(tmp_path, data, monkeypatch):
    policy = PrivacyPolicy(epsilon=20.0, delta=DELTA, epsilon_per_run=3.0, epsilon_per_day=4.0)
    site, asked = site_of(tmp_path, policy), recipe(2.9)
    now = datetime(2026, 3, 1, tzinfo=UTC)
    monkeypatch.setattr("chainward_shared.privacy.ledger.now", lambda: now)
    train(site, data, asked, run="run-1", hop="one")
    train(site, data, asked, run="run-1", hop="two")
    for minutes in (1, 600, 1439):
        now = datetime(2026, 3, 1, tzinfo=UTC) + timedelta(minutes=minutes)
        with pytest.raises(PolicyRefusal, match=r"of 4 spent in the last 24 hours"):
            train(site, data, asked, run=f"other-run-{minutes}")
    now = datetime(2026, 3, 2, 0, 1, tzinfo=UTC)
    train(site, data, asked, run="run-2")
    now = datetime(2026, 2, 1, tzinfo=UTC)  # a clock that is put back frees nothing
    with pytest.raises(PolicyRefusal, match="in the last 24 hours"):
        train(site, data, asked, run="run-3")


def test_a_cap_on_a_day_counts_noised_scores_too(tmp_path):
    policy = POLICY.model_copy(update={"epsilon_per_day": 1.0})
    site = site_of(tmp_path, policy)
    assert [site.work(f"run-{i}", "scores").release() for i in range(4)] == [True, True, False, False]
