"""Accounting: the reference values, agreement of three libraries, composition of unlike mechanisms, and what fits."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from chainward_shared.errors import PrivacyError
from chainward_shared.privacy import accounting
from chainward_shared.privacy.accounting import (
    Mechanism,
    epsilons,
    largest_steps,
    solve_noise_multiplier,
    spent,
)
from chainward_shared.privacy.calibration import analytic_noise, release_mechanisms, release_noise

DELTA = 1e-5
REFERENCE = Mechanism("dp-sgd", 1.0, 0.01, 1000)
UNLIKE = [REFERENCE, Mechanism("dp-sgd", 0.8, 0.02, 300), Mechanism("dp-sgd", 3.0, 1.0, 2)]
RELEASES = Mechanism("laplace", 20.0, 1.0, 3)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon of one Gaussian release, by bisection on its exact delta (Balle and Wang 2018, theorem 8)."""
    low, high = 0.0, 100.0
    for _ in range(200):
        epsilon = (low + high) / 2
        a, b = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        exact = norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)
        low, high = (epsilon, high) if exact > delta else (low, epsilon)
    return high


def test_the_reference_of_the_design_notes_is_met_to_three_decimals():
    found = epsilons([REFERENCE], DELTA)
    assert (round(found.rdp, 3), round(found.prv, 3), round(found.pld, 3)) == (2.101, 1.838, 1.828)
    assert found.problem is None
    assert found.enforced == found.pld == spent([REFERENCE], DELTA)


@pytest.mark.slow
def test_without_sampling_every_accountant_bounds_the_exact_epsilon_of_a_gaussian():
    exact = gaussian_epsilon(2.0 / math.sqrt(5), DELTA)  # five releases are one with less noise
    found = epsilons([Mechanism("dp-sgd", 2.0, 1.0, 5)], DELTA)
    assert exact - 1e-6 <= found.pld <= 1.001 * exact
    assert exact <= found.prv <= 1.01 * exact
    assert exact <= found.rdp


@pytest.mark.slow
@pytest.mark.parametrize(
    "mechanisms",
    [
        UNLIKE,
        [*UNLIKE, RELEASES],
        [RELEASES],
        [Mechanism("laplace", 5.0, 1.0, 1)],
        [Mechanism("laplace", 30.0, 1.0, 100)],
        [Mechanism("dp-sgd", 50.0, 0.05, 1000)],
        [Mechanism("dp-sgd", 1000.0, 0.01, 1000)],
        [Mechanism("dp-sgd", 1.0, 0.1, 1)],
        [Mechanism("dp-sgd", 0.3, 0.1, 200)],
    ],
    ids=lambda mechanisms: "+".join(f"{m.kind}-{m.noise_multiplier:g}-{m.steps}" for m in mechanisms),
)
def test_the_three_accountants_order_and_agree_on_unlike_mechanisms(mechanisms):
    found = epsilons(mechanisms, DELTA)
    assert found.problem is None
    assert abs(found.prv - found.pld) <= max(0.02 * found.pld, accounting.SMALLEST_DIFFERENCE)
    assert found.rdp > 0.999 * found.pld


@pytest.mark.slow
def test_unlike_mechanisms_cost_what_dp_accounting_and_its_own_renyi_accountant_say():
    google = dp_accounting.pld.PLDAccountant()
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    renyi = RdpAccountant(orders)
    for one in [*UNLIKE, RELEASES]:
        event = (
            dp_accounting.LaplaceDpEvent(one.noise_multiplier)
            if one.kind == "laplace"
            else dp_accounting.PoissonSampledDpEvent(
                one.sample_rate, dp_accounting.GaussianDpEvent(one.noise_multiplier)
            )
        )
        google.compose(event, one.steps)
        renyi.compose(event, one.steps)
    found = epsilons([*UNLIKE, RELEASES], DELTA)
    assert found.pld == pytest.approx(google.get_epsilon(DELTA), rel=1e-3)
    assert found.rdp == pytest.approx(renyi.get_epsilon(DELTA), rel=1e-3)


def test_renyi_divergence_of_laplace_noise_is_the_integral_that_defines_it():
    x = np.linspace(-300, 300, 2_000_001)
    scale = 4.0
    log_p, log_q = -np.abs(x) / scale - math.log(2 * scale), -np.abs(x - 1) / scale - math.log(2 * scale)
    for order in (1.5, 2.0, 8.0):
        integral = np.trapezoid(np.exp(order * log_p + (1 - order) * log_q), x)
        (found,) = accounting._rdp_curve("laplace", scale, 1.0, (order,))
        assert found == pytest.approx(math.log(integral) / (order - 1), rel=1e-4)


def test_the_distribution_of_the_laplace_loss_is_that_of_drawn_outputs():
    scale = 3.0
    outputs = np.random.default_rng(0).laplace(0, scale, 400_000)
    losses = (np.abs(outputs - 1) - np.abs(outputs)) / scale
    for t in (-1 / scale - 0.01, -1 / scale + 0.01, -0.1, 0.0, 0.2, 1 / scale - 0.01, 1 / scale + 0.01):
        assert accounting._LaplacePrv(scale).cdf(t) == pytest.approx((losses <= t).mean(), abs=0.004)


@pytest.mark.slow
def test_ten_entries_of_100_steps_cost_what_one_of_1000_costs_and_ten_fresh_accountants_hide_most_of_it():
    assert spent([Mechanism("dp-sgd", 1.0, 0.01, 100)] * 10, DELTA) == spent([REFERENCE], DELTA)
    rounds = [Mechanism("dp-sgd", 1.0, 0.1, 10)] * 10
    assert epsilons(rounds, DELTA).rdp == pytest.approx(7.90, abs=0.01)  # rule 4 of the design notes
    assert epsilons(rounds[:1], DELTA).rdp == pytest.approx(3.44, abs=0.01)


def test_order_does_not_matter():
    assert spent(UNLIKE, DELTA) == pytest.approx(spent(UNLIKE[::-1], DELTA), rel=1e-6)


def test_nothing_done_costs_nothing_and_no_noise_costs_everything():
    nothing = epsilons([Mechanism("dp-sgd", 1.0, 0.01, 0)], DELTA)
    assert (nothing.rdp, nothing.prv, nothing.pld, nothing.problem) == (0, 0, 0, None)
    assert spent([], DELTA) == 0
    without_noise = epsilons([REFERENCE, Mechanism("dp-sgd", 0.0, 0.01, 1)], DELTA)
    assert without_noise.rdp == without_noise.prv == without_noise.pld == math.inf


@pytest.mark.parametrize(
    ("rdp", "prv", "pld", "word"),
    [(2.1, 1.9, 1.828, "apart"), (1.7, 1.83, 1.828, "upper bound"), (2.1, math.nan, 1.8, None)],
)
def test_disagreement_is_said(rdp, prv, pld, word, monkeypatch):
    monkeypatch.setattr(accounting, "_rdp_epsilon", lambda merged, delta: rdp)
    monkeypatch.setattr(accounting, "_spent", lambda merged, delta: pld)

    def found_prv(merged, delta, error):
        if math.isnan(prv):
            raise RuntimeError("its mesh is too coarse")
        return prv

    monkeypatch.setattr(accounting, "_prv_epsilon", found_prv)
    assert (word or "too coarse") in str(epsilons([REFERENCE], DELTA).problem)


@pytest.mark.slow
@pytest.mark.parametrize("before", [[], [REFERENCE, RELEASES]], ids=["alone", "after a ledger"])
def test_the_solved_noise_multiplier_fits_and_a_little_less_does_not(before):
    noise = solve_noise_multiplier(3.0, DELTA, [(0.05, 200)], before)
    assert spent([*before, Mechanism("dp-sgd", noise, 0.05, 200)], DELTA) <= 3.0
    assert spent([*before, Mechanism("dp-sgd", noise / 1.002, 0.05, 200)], DELTA) > 3.0


@pytest.mark.slow
def test_the_largest_number_of_steps_fits_and_one_more_does_not():
    steps = largest_steps([REFERENCE], 1.0, 0.02, DELTA, 3.0)
    assert spent([REFERENCE, Mechanism("dp-sgd", 1.0, 0.02, steps)], DELTA) <= 3.0
    assert spent([REFERENCE, Mechanism("dp-sgd", 1.0, 0.02, steps + 1)], DELTA) > 3.0
    assert largest_steps([REFERENCE], 1.0, 0.02, DELTA, 1.8) == 0


def test_a_spent_budget_has_no_noise_multiplier_and_the_error_says_what_was_spent():
    with pytest.raises(PrivacyError, match=r"no noise keeps 100 private steps .* 1\.828 of it is spent already"):
        solve_noise_multiplier(1.5, DELTA, [(0.1, 100)], [REFERENCE])


@pytest.mark.parametrize(
    ("kind", "noise", "rate", "steps"),
    [
        ("dp-sgd", -1.0, 0.1, 1),
        ("dp-sgd", math.nan, 0.1, 1),
        ("dp-sgd", 1.0, 0.0, 1),
        ("dp-sgd", 1.0, 1.1, 1),
        ("dp-sgd", 1.0, 0.1, -1),
        ("dp-sgd", 1.0, 0.1, 1.5),
        ("laplace", 1.0, 0.5, 1),
        ("gauss", 1.0, 0.5, 1),
    ],
)
def test_a_mechanism_out_of_range_is_refused(kind, noise, rate, steps):
    with pytest.raises(PrivacyError):
        Mechanism(kind, noise, rate, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_out_of_range_is_refused_also_where_nothing_was_done(delta):
    for mechanisms in ([], [REFERENCE]):
        with pytest.raises(PrivacyError, match="delta"):
            spent(mechanisms, delta)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_of_nothing_or_everything_is_refused(epsilon):
    with pytest.raises(PrivacyError, match="epsilon"):
        solve_noise_multiplier(epsilon, DELTA, [(0.1, 10)])


# --- releases of sums ---


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 3.0, 8.0, 60.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_analytic_noise_is_the_least_that_balle_and_wang_allow(epsilon, delta):
    def delta_of(noise: float) -> float:  # theorem 8, by the book
        shift = 1 / (2 * noise)
        return float(norm.cdf(shift - epsilon * noise) - math.exp(epsilon) * norm.cdf(-shift - epsilon * noise))

    noise = analytic_noise(epsilon, delta)
    assert delta_of(noise) == pytest.approx(delta, rel=1e-4)
    assert delta_of(0.99 * noise) > delta
    assert epsilon > 1 or noise < math.sqrt(2 * math.log(1.25 / delta)) / epsilon, "better than the classical bound"


@pytest.mark.slow
def test_a_release_of_sums_costs_what_was_asked_and_three_accountants_agree():
    for shares in ((1.0,), (0.05, 0.95)):
        noise = release_noise(3.0, 1e-5, 2, shares=shares)
        assert noise == pytest.approx(math.sqrt(2) * analytic_noise(3.0, 1e-5), rel=2e-3)
        mechanisms = release_mechanisms(noise, 2, shares)
        found = epsilons(mechanisms, 1e-5)
        assert found.problem is None
        assert 2.99 < found.enforced <= 3.0
        together = epsilons([*mechanisms, Mechanism("dp-sgd", 2.0, 0.1, 50), Mechanism("laplace", 4.0, 1.0, 3)], 1e-5)
        assert together.problem is None and together.enforced > found.enforced


@pytest.mark.slow
def test_releases_after_what_was_spent_get_more_noise_and_none_where_nothing_is_left():
    before = [Mechanism("laplace", 2.0, 1.0, 2)]
    noise = release_noise(3.0, 1e-5, 1, before)
    assert noise > release_noise(3.0, 1e-5, 1)
    assert spent([*before, Mechanism("gaussian", noise, 1.0, 1)], 1e-5) <= 3.0
    with pytest.raises(PrivacyError, match="no noise keeps 1 releases of sums"):
        release_noise(0.9, 1e-5, 1, before)


def test_a_gaussian_release_costs_what_a_step_of_training_with_everybody_in_it_does():
    step, release = (Mechanism(kind, 1.5, 1.0, 4) for kind in ("dp-sgd", "gaussian"))
    assert epsilons([step], 1e-5) == epsilons([release], 1e-5)
    with pytest.raises(PrivacyError, match="a release sees every unit"):
        Mechanism("gaussian", 1.5, 0.5, 1)
