"""The one-run audit: its bound against sums written out, against mechanisms of known epsilon, and on real training."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from chainward_client.privacy_audit.one_run import audit_training, epsilon_lower_bound, p_value
from chainward_client.privacy_audit.sabotage import without_clipping, without_noise
from chainward_client.private_training import PrivateTraining
from chainward_shared.errors import PrivacyError
from chainward_shared.privacy.accounting import solve_noise_multiplier
from chainward_shared.privacy.dp_sgd import DpSgd


def test_without_delta_the_p_value_is_the_tail_of_coins_that_are_right_with_the_odds_of_epsilon():
    q = math.exp(1.2) / (1 + math.exp(1.2))
    by_hand = sum(
        math.prod(q if right else 1 - q for right in rights) for rights in product((0, 1), repeat=6) if sum(rights) >= 5
    )
    assert p_value(10, 6, 5, 1.2, 0.0) == pytest.approx(by_hand)


def test_delta_adds_twice_its_share_of_the_worst_run_of_probabilities():
    m, r, v, epsilon, delta = 40, 20, 16, 0.8, 1e-3
    q = 1 / (1 + math.exp(-epsilon))
    worst = max(sum(binom.pmf(v - j, r, q) for j in range(1, i + 1)) / i for i in range(1, v + 1))
    expected = binom.sf(v - 1, r, q) + 2 * m * delta * worst
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(expected)


def test_all_right_bounds_epsilon_as_the_rule_of_three_says():
    # q^100 = 0.05 is q = 0.9705
    q = 0.05**0.01
    assert epsilon_lower_bound(200, 100, 100, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-6)


def test_half_right_refutes_nothing_and_a_large_delta_excuses_all():
    assert epsilon_lower_bound(200, 100, 50, 1e-5) == 0
    assert epsilon_lower_bound(200, 100, 100, 0.5) == 0
    with pytest.raises(PrivacyError, match="impossible"):
        epsilon_lower_bound(100, 50, 51, 1e-5)


def test_the_bound_grows_with_right_guesses_and_shrinks_with_confidence_and_delta():
    bounds = [epsilon_lower_bound(400, 200, right, 1e-5) for right in range(100, 201, 10)]
    assert bounds == sorted(bounds)
    assert epsilon_lower_bound(400, 200, 180, 1e-5, 0.99) < epsilon_lower_bound(400, 200, 180, 1e-5, 0.9)
    assert epsilon_lower_bound(400, 200, 180, 1e-3) < epsilon_lower_bound(400, 200, 180, 1e-6)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_of_known_epsilon_is_bounded_below_it_and_near_it_with_many_canaries(epsilon):
    right = 1 / (1 + math.exp(-epsilon))
    generator = np.random.default_rng(0)
    trials = 2000
    corrects = generator.binomial(500, right, trials)
    bound = {int(c): epsilon_lower_bound(500, 500, int(c), 0.0) for c in set(corrects)}
    wrong = np.mean([bound[int(c)] > epsilon for c in corrects])
    assert wrong <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / trials)
    many = epsilon_lower_bound(200_000, 200_000, int(generator.binomial(200_000, right)), 0.0)
    assert 0.95 * epsilon < many < epsilon * 1.01


# --- real training ---

CANARIES, STEPS = 400, 12
DP_SGD = DpSgd(
    unit="patient",
    delta=1e-5,
    noise_multiplier=solve_noise_multiplier(1.0, 1e-5, [(1.0, STEPS)]),
    sample_rate=1.0,
    expected_batch=CANARIES / 2,
    steps=STEPS,
    clip=1.0,
)


def test_honest_training_stays_below_its_claim():
    found = audit_training(DP_SGD, canaries=CANARIES)
    assert found.claimed == pytest.approx(1.0, abs=0.01)
    assert found.problem is None
    assert found.measured < found.claimed < found.ceiling
    assert not found.blind


@pytest.mark.slow
def test_weak_privacy_is_measured_above_zero_and_below_its_claim():
    loose = DP_SGD.model_copy(update={"noise_multiplier": solve_noise_multiplier(12.0, 1e-5, [(1.0, STEPS)])})
    found = audit_training(loose, canaries=CANARIES)
    assert 1.0 < found.measured < found.claimed
    assert found.blind, "so few guesses can't refute so large an epsilon, and the audit says so"


@pytest.mark.parametrize("sabotage", [without_noise, without_clipping])
def test_training_without_noise_or_clipping_betrays_every_canary(sabotage):
    found = audit_training(DP_SGD, canaries=CANARIES, training=sabotage)
    assert found.correct == found.guesses
    assert found.measured == pytest.approx(found.ceiling)
    assert found.measured > 3 * found.claimed
    assert "guesses 200 of 200 coins: epsilon is at least" in str(found.problem)


@pytest.mark.slow
def test_noise_ten_times_too_small_is_found_out():
    claimed = DP_SGD.model_copy(update={"noise_multiplier": DP_SGD.noise_multiplier / 10})

    def weak(plan):
        return PrivateTraining(claimed)

    found = audit_training(DP_SGD, canaries=2000, training=weak)
    assert found.measured > found.claimed


def test_too_few_canaries_are_refused():
    with pytest.raises(PrivacyError, match="an attack on 4 canaries says nothing"):
        audit_training(DP_SGD, canaries=4)
