"""Localisation scores against slow references, chance and perfection, and what sites may pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import bootstrap

from chainward_shared.errors import DataError
from chainward_shared.evaluation.localisation import (
    METRICS,
    LocalisationSums,
    LocalisationValues,
    Moments,
    pool_sums,
    score_maps,
)


def squares(n: int, side: int = 8, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    masks = torch.zeros(n, size, size, dtype=torch.uint8)
    for mask in masks:
        row, column = generator.integers(0, size - side, 2)
        mask[row : row + side, column : column + side] = 1
    return masks


def noise(n: int, size: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, size, size, generator=torch.Generator().manual_seed(seed))


def values_of(lift: np.ndarray) -> LocalisationValues:
    n = len(lift)
    return LocalisationValues(lift, np.zeros(n), np.zeros(n), np.zeros(n), rows=np.arange(n), left_out=0)


# --- one image ---


def slow_scores(map_: np.ndarray, mask: np.ndarray) -> tuple[float, float, float, float]:
    pixels = [(float(v), int(m)) for v, m in zip(map_.ravel(), mask.ravel(), strict=True)]
    area = sum(m for _, m in pixels)
    lift = sum(v for v, m in pixels if m) / sum(v for v, _ in pixels) / (area / len(pixels))
    ranked = sorted(pixels, key=lambda pixel: -pixel[0])
    pointing = float(ranked[0][1])
    hits, precision_sum = 0, 0.0
    for rank, (_, m) in enumerate(ranked, start=1):
        if m:
            hits += 1
            precision_sum += hits / rank
    intersection = sum(m for _, m in ranked[:area])
    return lift, pointing, precision_sum / area, intersection / (area + area - intersection)


def test_scores_equal_the_slow_ones():
    masks = squares(12)
    maps = noise(12) ** 2 + 0.02 * masks
    found = score_maps(maps, masks)
    assert len(found) == 12
    for row in range(12):
        expected = slow_scores(maps[row].numpy(), masks[row].numpy())
        assert [getattr(found, metric)[row] for metric in METRICS] == pytest.approx(expected)
    assert 0 < found.pointing.mean() < 1  # the pointing game was won and lost


@pytest.mark.slow
def test_a_map_by_chance_has_lift_one():
    found = score_maps(noise(400), squares(400))
    assert found.lift.mean() == pytest.approx(1, abs=0.02)
    share = 64 / 1024
    assert found.pointing.mean() == pytest.approx(share, abs=0.04)
    assert found.auprc.mean() == pytest.approx(share, abs=0.02)
    assert found.iou.mean() == pytest.approx(share / (2 - share), abs=0.01)


def test_a_perfect_map_has_all_of_its_mass_inside():
    masks = squares(3)
    found = score_maps(masks.float(), masks)
    assert found.lift.tolist() == pytest.approx([1024 / 64] * 3)
    for metric in ("pointing", "auprc", "iou"):
        assert getattr(found, metric).tolist() == pytest.approx([1.0] * 3)


def test_a_map_of_zeros_scores_as_chance_does():
    found = score_maps(torch.zeros(2, 32, 32), squares(2))
    share = 64 / 1024
    assert found.lift.tolist() == [1, 1]
    assert found.pointing.tolist() == pytest.approx([share] * 2)
    assert found.auprc.tolist() == pytest.approx([share] * 2)
    assert found.iou.tolist() == pytest.approx([share / (2 - share)] * 2)


def test_the_pointing_game_by_hand():
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    mask[0, :2, :2] = 1
    inside, outside, both = torch.zeros(3, 1, 4, 4)
    inside[0, 1, 1] = outside[0, 3, 3] = both[0, 0, 0] = both[0, 3, 0] = 1
    assert score_maps(inside, mask).pointing.tolist() == [1]
    assert score_maps(outside, mask).pointing.tolist() == [0]
    assert score_maps(both, mask).pointing.tolist() == [0.5]


def test_iou_takes_as_many_pixels_as_the_region_has():
    mask = torch.tensor([[[1, 1, 0, 0]]], dtype=torch.uint8)
    assert score_maps(torch.tensor([[[0.9, 0.1, 0.8, 0.0]]]), mask).iou.tolist() == pytest.approx([1 / 3])
    # of three that tie for one place, one lies inside
    assert score_maps(torch.tensor([[[0.9, 0.5, 0.5, 0.5]]]), mask).iou.tolist() == pytest.approx([4 / 3 / (4 - 4 / 3)])


# --- what can't be scored ---


def test_empty_and_all_covering_regions_are_left_out_and_counted():
    masks = squares(5)
    masks[1], masks[3] = 0, 1
    found = score_maps(noise(5), masks)
    assert (len(found), found.left_out, found.rows.tolist()) == (3, 2, [0, 2, 4])
    none = score_maps(noise(2), torch.zeros(2, 32, 32, dtype=torch.uint8))
    assert (len(none), none.left_out) == (0, 2)
    assert LocalisationSums.of(none).scores().lift is None


def test_no_images_at_all():
    found = score_maps(torch.zeros(0, 8, 8), torch.zeros(0, 8, 8, dtype=torch.uint8))
    assert (len(found), found.left_out) == (0, 0)


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (noise(2), squares(2, size=64), r"masks of shape \(2, 64, 64\).*maps of shape \(2, 32, 32\)"),
        (noise(2), squares(3), "can't be scored"),
        (noise(2)[0], squares(2)[0], "can't be scored"),
        (noise(2), 255 * squares(2), "holds the value 255"),
        (noise(2) - 1, squares(2), "negative or not finite"),
        (noise(2) * float("nan"), squares(2), "negative or not finite"),
        (noise(2) + float("inf"), squares(2), "negative or not finite"),
    ],
)
def test_what_is_no_map_or_mask_is_refused_in_one_line(maps, masks, message):
    with pytest.raises(DataError, match=message) as error:
        score_maps(maps, masks)
    assert "\n" not in str(error.value)


# --- intervals ---


@pytest.mark.slow
def test_intervals_cover_the_truth():
    generator, covered, trials, truth = np.random.default_rng(0), 0, 300, 1.6
    for _ in range(trials):
        scores = LocalisationSums.of(values_of(generator.gamma(4.0, truth / 4.0, 60))).scores()
        covered += scores.lift.low <= truth <= scores.lift.high
    assert 0.90 <= covered / trials <= 0.98


def test_the_interval_is_that_of_a_bootstrap_on_many_images():
    values = score_maps(noise(300) + 0.2 * squares(300), squares(300))
    scores = LocalisationSums.of(values).scores()
    for metric in METRICS:
        column, found = getattr(values, metric), getattr(scores, metric)
        drawn = bootstrap((column,), np.mean, n_resamples=1_000, method="percentile", rng=np.random.default_rng(0))
        low, high = drawn.confidence_interval
        assert found.mean == pytest.approx(column.mean())
        assert (low, high) == pytest.approx((found.low, found.high), abs=0.12 * (high - low))


def test_one_image_has_no_interval():
    scores = LocalisationSums.of(values_of(np.array([2.5]))).scores()
    assert (scores.lift.mean, scores.lift.low, scores.lift.high) == (2.5, None, None)


def test_intervals_stay_inside_the_range_of_a_metric():
    masks = squares(3)
    hits, misses = masks.float(), 1 - masks.float()
    one_hit = LocalisationSums.of(score_maps(torch.stack([hits[0], misses[1], misses[2]]), masks)).scores()
    two_hits = LocalisationSums.of(score_maps(torch.stack([hits[0], hits[1], misses[2]]), masks)).scores()
    assert (one_hit.lift.low, one_hit.iou.low, two_hits.iou.high) == (0, 0, 1)
    assert two_hits.lift.high > 1024 / 64  # has no end of its own


# --- sums over sites ---


def test_sums_of_sites_pool_to_the_mean_over_all_images():
    masks, maps = squares(30), noise(30) + 0.3 * squares(30)
    masks[4] = 0
    whole = score_maps(maps, masks)
    parts = [score_maps(maps[a:b], masks[a:b]) for a, b in ((0, 3), (3, 11), (11, 30))]
    pooled = pool_sums(LocalisationSums.of(part) for part in parts)
    assert (pooled.n, pooled.left_out) == (29, 1)
    for metric in METRICS:
        values = getattr(whole, metric)
        found = getattr(pooled.scores(), metric)
        half = 1.959964 * values.std(ddof=1) / np.sqrt(29)
        assert found.mean == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((max(0, values.mean() - half), values.mean() + half), rel=1e-6)
    joined = LocalisationValues.joined(parts)
    assert joined.rows.tolist() == whole.rows.tolist()
    assert joined.lift.tolist() == whole.lift.tolist()
    assert joined.left_out == 1


def test_no_sites_pool_to_nothing():
    assert pool_sums([]).scores() == LocalisationSums.of(LocalisationValues.joined([])).scores()
    assert pool_sums([]).scores().lift is None


def test_sums_survive_their_way_over_the_wire():
    sums = LocalisationSums.of(score_maps(noise(7), squares(7)))
    assert LocalisationSums.model_validate_json(sums.model_dump_json()) == sums


@pytest.mark.parametrize(
    "impossible",
    [
        {"n": -1},
        {"n": 2, "lift": Moments(sum=10, squares=1)},
        {"n": 2, "iou": Moments(sum=3, squares=9)},
        {"n": 0, "lift": Moments(sum=1, squares=1)},
        {"n": 2, "lift": {"sum": float("nan"), "squares": 1.0}},
        {"n": 2, "lift": {"sum": -1.0, "squares": 1.0}},
        {"n": 2, "maps": []},
    ],
)
def test_sums_that_cant_be_are_refused(impossible):
    with pytest.raises(ValidationError):
        LocalisationSums(**impossible)
