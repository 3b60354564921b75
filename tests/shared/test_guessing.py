"""What anybody can guess of who was in a training, at most: against the exact curve of Gaussian noise, and an attack."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from chainward_shared.privacy.accounting import Mechanism, spent
from chainward_shared.privacy.guessing import most_auc, most_found

DELTA = 1e-5
RATES = [0.0, 0.001, 0.01, 0.1, 0.5, 1.0]


def gaussian(noise: float, releases: int = 1) -> Mechanism:
    return Mechanism("gaussian", noise, 1.0, releases)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.6, 1.5, 4.0])
def test_of_gaussian_noise_the_bound_is_the_curve_of_the_best_test_there_is(noise):
    exact = norm.cdf(norm.ppf(RATES) + 1 / noise)  # Neyman and Pearson: N(0, 1) against N(1 / noise, 1)
    found = np.array(most_found([gaussian(noise)], DELTA, RATES))
    assert (found >= exact - 1e-9).all() and (found <= exact + 0.01).all()
    area = norm.cdf(1 / noise / math.sqrt(2))
    assert area <= most_auc([gaussian(noise)], DELTA) <= area + 0.005


@pytest.mark.slow
def test_no_attack_on_a_release_finds_more_than_the_bound():
    rng, noise = np.random.default_rng(0), 1.0
    outside, inside = rng.normal(0, noise, 200_000), rng.normal(1, noise, 200_000)
    for rate, most in zip(RATES[1:4], most_found([gaussian(noise)], DELTA, RATES[1:4]), strict=True):
        reached = float((inside > np.quantile(outside, 1 - rate)).mean())
        assert most - 0.02 < reached < most + 0.005


@pytest.mark.slow
def test_more_spending_allows_more_and_all_kinds_of_work_count():
    work = [gaussian(2.0), Mechanism("dp-sgd", 1.0, 0.1, 50), Mechanism("laplace", 2.0, 1.0, 4)]
    areas = [most_auc(work[:count], DELTA) for count in range(4)]
    assert areas[0] == pytest.approx(0.5, abs=0.01)
    assert areas == sorted(areas) and len(set(areas)) == 4 and areas[3] < 1
    for count in (1, 2, 3):
        (at_most,) = most_found(work[:count], DELTA, [0.01])
        assert at_most <= math.exp(spent(work[:count], DELTA)) * 0.01 + DELTA + 1e-9, "what epsilon and delta alone say"


def test_without_noise_everybody_can_be_found_and_where_nothing_was_seen_nobody():
    assert most_found([gaussian(0.0)], DELTA, RATES) == [1.0] * len(RATES)
    assert most_auc([gaussian(0.0)], DELTA) == 1.0
    assert most_found([], DELTA, RATES) == RATES
