"""The schedules of temperature and moving average: ends, middle, and that they never turn back."""

from __future__ import annotations

import math

import pytest

from chainward_shared.distillation.schedules import annealed_temperature, ema_decay


def test_the_temperature_starts_where_it_is_told_and_falls_by_the_factor():
    assert [annealed_temperature(epoch, 4.0, 0.5) for epoch in range(2)] == [4.0, 2.0]
    assert annealed_temperature(3, 10.0, 0.9) == pytest.approx(7.29)


def test_the_temperature_never_falls_below_one():
    assert [annealed_temperature(epoch, 4.0, 0.5) for epoch in (2, 3, 500)] == [1.0, 1.0, 1.0]


def test_without_decay_the_temperature_stays():
    assert annealed_temperature(1_000, 4.0, 1.0) == 4.0


def test_the_moving_average_starts_at_its_start_is_half_way_in_the_middle_and_ends_at_one():
    assert ema_decay(0, 100, 0.996) == pytest.approx(0.996, abs=1e-12)
    assert ema_decay(50, 100, 0.996) == pytest.approx(0.998, abs=1e-12)
    assert ema_decay(100, 100, 0.996) == 1.0


def test_the_moving_average_follows_a_half_cosine():
    assert ema_decay(25, 100, 0.9) == pytest.approx(1 - 0.1 * (1 + math.sqrt(0.5)) / 2, abs=1e-12)


def test_the_moving_average_only_rises():
    decays = [ema_decay(step, 37, 0.5) for step in range(38)]
    assert decays == sorted(decays)
    assert len(set(decays)) == 38


def test_a_run_without_steps_has_the_decay_of_its_start():
    assert ema_decay(0, 0, 0.9) == pytest.approx(0.9)
