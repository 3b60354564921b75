"""The average of the sites' models: as a slow loop computes it, and with no site in it that could take over."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from chainward_server.aggregation import (
    aggregate,
    capped,
    check_drift,
    distance,
    length,
    median,
    shortened,
    shortening,
    trimmed_mean,
)
from chainward_shared.errors import ChainwardError
from chainward_shared.weights import weighted_average


def model(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": scale * torch.randn(3, 4, generator=generator),
        "bias": scale * torch.randn(5, generator=generator),
        "batches": torch.tensor(7 + seed),
    }


def values(state):
    return [float(value) for name in ("weight", "bias") for value in state[name].flatten()]


def by_hand(models, mean):
    return [mean(list(column)) for column in zip(*map(values, models), strict=True)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12])
def test_the_median_is_that_of_each_weight(count):
    models = [model(seed) for seed in range(count)]
    assert values(median(models, [1.0] * count)) == pytest.approx(by_hand(models, statistics.median), abs=1e-6)


@pytest.mark.parametrize(("count", "out"), [(1, 0), (2, 0), (3, 1), (4, 1), (7, 1), (12, 2)])
def test_the_trimmed_mean_leaves_the_extremes_of_each_weight_out(count, out):
    models = [model(seed) for seed in range(count)]
    expected = by_hand(models, lambda column: statistics.fmean(sorted(column)[out : count - out]))
    assert values(trimmed_mean(models, [1.0] * count)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mean", [median, trimmed_mean])
def test_one_liar_of_three_can_not_move_a_robust_mean_beyond_the_honest_ones(mean):
    honest = [model(0), model(1)]
    found = values(mean([*honest, model(2, scale=1e6)], [1.0] * 3))
    for value, first, second in zip(found, *map(values, honest), strict=True):
        assert min(first, second) - 1e-6 <= value <= max(first, second) + 1e-6


def test_counters_are_those_of_the_first_site_whatever_the_mean():
    for mean in (weighted_average, median, trimmed_mean):
        assert mean([model(0), model(1), model(2)], [1.0] * 3)["batches"] == 7


# -- shares


@pytest.mark.parametrize("sizes", [[5, 5], [30, 24, 27], [1], [50, 50], [10**6, 10**6, 1]])
def test_sizes_that_keep_to_the_cap_are_weights_as_they_are(sizes):
    assert capped(sizes, 0.5) == sizes


@pytest.mark.parametrize(
    "sizes",
    [[10**12, 20, 30], [10**30, 1, 1, 1], [9, 1], [100, 90, 1], [10**400, 10**400, 1], [0, 0, 5], [-5, 10**12, 3]],
)
@pytest.mark.parametrize("most", [1e-6, 0.2, 0.34, 0.5, 0.9])
def test_no_site_has_more_than_the_cap_whatever_it_states(sizes, most):
    weights = capped(sizes, most)
    allowed = max(most, 1 / len(sizes))
    assert all(0 <= weight <= allowed * math.fsum(weights) * (1 + 1e-9) for weight in weights)
    by_size = [weight for _, weight in sorted(zip(sizes, weights, strict=True))]
    assert all(one <= other * (1 + 1e-9) for one, other in itertools.pairwise(by_size)), "a larger site weighs no less"


def test_what_a_site_states_too_much_goes_to_the_others_by_their_sizes():
    assert capped([10**12, 20, 30], 0.5) == pytest.approx([0.5, 0.2, 0.3])
    assert capped([600, 300, 100], 0.5) == pytest.approx([0.5, 0.375, 0.125])
    assert capped([90, 9, 1], 0.4) == pytest.approx([0.4, 0.4, 0.2])


# -- lengths


def test_lengths_are_euclidean_over_the_floating_point_tensors():
    first, second = model(0), model(1)
    assert length(first) == pytest.approx(math.hypot(*values(first)))
    assert distance(first, second) == pytest.approx(math.dist(values(first), values(second)))


def test_an_update_far_longer_than_the_others_is_shortened_to_the_bound_and_the_others_are_not():
    assert shortening([1.0, 2.0, 3.0], 3.0) == [1, 1, 1]
    assert shortening([1.0, 2.0, 100.0], 3.0) == [1, 1, pytest.approx(0.06)]
    assert shortening([1.0, 1000.0], 3.0) == [1, pytest.approx(0.003)], "of two, the longer doesn't set the measure"
    assert shortening([0.0, 0.0, 5.0], 3.0) == [1, 1, 1]
    assert shortening([7.0], 1.0) == [1]


def test_a_shortened_update_keeps_its_direction():
    start, end = model(0), model(1)
    short = shortened(end, start, 0.25)
    assert values(short) == pytest.approx(
        [a + 0.25 * (b - a) for a, b in zip(values(start), values(end), strict=True)], abs=1e-6
    )
    assert {name: tensor.dtype for name, tensor in short.items()} == {n: t.dtype for n, t in end.items()}


@pytest.mark.parametrize(("scale", "refused"), [(1.5, False), (12.0, True), (1e30, True)])
def test_a_model_too_far_from_its_start_is_refused_by_the_key_that_says_so(scale, refused):
    start = model(0)
    far = {name: tensor * scale if tensor.is_floating_point() else tensor for name, tensor in start.items()}
    if not refused:
        check_drift(far, start, 10.0, "student.max-drift")
        return
    with pytest.raises(ChainwardError, match=r"times their former length away.*student\.max-drift allows 10"):
        check_drift(far, start, 10.0, "student.max-drift")


# -- all together


def near(start, seed):
    return {
        name: tensor + 0.01 * other if tensor.is_floating_point() else tensor
        for (name, tensor), other in zip(start.items(), model(seed).values(), strict=True)
    }


def aggregated(models, sizes, start, mean="mean"):
    return aggregate(models, start, sizes, mean=mean, max_share=0.5, max_update=3.0)


def test_the_mean_of_honest_sites_is_the_weighted_average_to_the_bit():
    start = model(0)
    models = {site: near(start, seed) for seed, site in enumerate("abc", start=1)}
    average, parts = aggregated(models, {"a": 30, "b": 20, "c": 25}, start)
    plain = weighted_average(list(models.values()), [30, 20, 25])
    assert all(torch.equal(average[name], plain[name]) for name in plain)
    assert [part.share for part in parts.values()] == pytest.approx([30 / 75, 20 / 75, 25 / 75])
    assert all(part.factor == 1 for part in parts.values())
    assert parts["a"].moved == pytest.approx(distance(models["a"], start) / length(start))


@pytest.mark.parametrize("mean", ["mean", "median", "trimmed-mean"])
def test_a_site_that_lies_about_everything_moves_the_average_by_no_more_than_its_bounds(mean):
    start = model(0)
    honest = {site: near(start, seed) for seed, site in enumerate("ab", start=1)}
    liar = {name: torch.full_like(tensor, 100) for name, tensor in start.items()}
    average, parts = aggregated({**honest, "liar": liar}, {"a": 30, "b": 20, "liar": 10**12}, start, mean)
    longest = max(distance(state, start) for state in honest.values())
    assert distance(average, start) <= 0.5 * 3 * longest + 0.5 * longest
    assert parts["liar"].share <= 0.5
    assert parts["liar"].moved > 100
    assert parts["liar"].factor < 0.01
