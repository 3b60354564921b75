"""The membership attack: its figures against loops written out, and that it finds a model that knows its patients by heart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from chainward_client.data.site_data import Cases
from chainward_client.privacy_audit.membership import attack_membership, calibrated, case_losses
from chainward_shared.errors import DataError
from chainward_shared.preprocessing import to_float


def names(count: int, prefix: str = "in") -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def test_auc_is_the_share_of_pairs_in_which_the_member_has_the_smaller_loss():
    generator = np.random.default_rng(0)
    inside, outside = generator.integers(0, 9, 30).astype(float), generator.integers(3, 12, 40).astype(float)
    pairs = [1.0 if a < b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    found = attack_membership(inside, names(30), outside, names(40, "out"), repeats=20)
    assert found.auc == pytest.approx(np.mean(pairs))
    assert (found.members, found.outsiders) == (30, 40)


def test_found_members_and_advantage_are_those_of_the_best_threshold():
    generator = np.random.default_rng(1)
    inside, outside = generator.normal(0, 1, 300), generator.normal(1, 1, 1000)
    found = attack_membership(inside, names(300), outside, names(1000, "out"), repeats=20)
    thresholds = np.concatenate([inside, outside, [-np.inf]])
    rates = [(float(np.mean(inside <= at)), float(np.mean(outside <= at))) for at in thresholds]
    for share, most in zip(found.found, (0.01, 0.001), strict=True):
        assert share == pytest.approx(max(true for true, false in rates if false <= most))
    assert found.advantage == pytest.approx(max(true - false for true, false in rates))


def test_a_rate_that_too_few_outsiders_can_show_is_not_given():
    loss = np.arange(150.0)
    assert attack_membership(loss, names(150), loss, names(150, "out"), repeats=5).found[1] is None
    assert attack_membership(loss, names(150), loss[:99], names(99, "out"), repeats=5).found == (None, None)


def test_a_patient_counts_once_with_the_mean_over_the_images():
    many = attack_membership(
        np.array([0.0, 4.0, 1.0]), ["a", "a", "b"], np.array([3.0, 1.5, 1.5]), ["x", "y", "y"], repeats=5
    )
    assert (many.members, many.outsiders) == (2, 2)
    assert many.auc == pytest.approx(np.mean([2.0 < 3.0, 2.0 < 1.5, 1.0 < 3.0, 1.0 < 1.5]))


@pytest.mark.slow
def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    true = 0.7602  # P(N(0,1) < N(1,1)) = Phi(1 / sqrt 2)
    hits = 0
    for turn in range(200):
        found = attack_membership(
            generator.normal(0, 1, 60), names(60), generator.normal(1, 1, 60), names(60, "out"), seed=turn, repeats=200
        )
        hits += found.low <= true <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_interval_is_that_of_redrawn_patients_one_by_one():
    generator = np.random.default_rng(5)
    inside, outside = generator.integers(0, 6, 25).astype(float), generator.integers(2, 8, 35).astype(float)
    areas = []
    for _ in range(3000):
        a, b = generator.choice(inside, 25), generator.choice(outside, 35)
        areas.append(np.mean((a[:, None] < b) + 0.5 * (a[:, None] == b)))
    found = attack_membership(inside, names(25), outside, names(35, "o"), repeats=3000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=0.01)


def test_the_same_seed_gives_the_same_interval():
    inside, outside = np.arange(20.0), np.arange(20.0) + 3
    one, two, other = (
        attack_membership(inside, names(20), outside, names(20, "o"), seed=s, repeats=50) for s in (1, 1, 2)
    )
    assert one == two
    assert (one.low, one.high) != (other.low, other.high)


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([], ["x"], "found 0 and 1 patients"),
        (["a"], [], "found 1 and 0 patients"),
        (["a", "b"], ["b"], "patient 'b' is both member and outsider"),
    ],
)
def test_who_is_compared_with_whom_is_checked(inside, outside, message):
    with pytest.raises(DataError, match=message):
        attack_membership(np.zeros(len(inside)), inside, np.zeros(len(outside)), outside)


def test_a_loss_that_is_not_a_number_is_refused():
    with pytest.raises(DataError, match="not finite"):
        attack_membership(np.array([np.nan]), ["a"], np.array([1.0]), ["x"])


# --- calibration ---


def test_a_calibrated_loss_is_that_beyond_the_references_that_have_not_seen_the_case():
    references = np.array([[1.0, np.nan, 2.0], [3.0, 5.0, np.nan]])
    assert calibrated(np.array([10.0, 10.0, 10.0]), references).tolist() == [8.0, 5.0, 8.0]
    with pytest.raises(DataError, match="no reference model that was not trained on it"):
        calibrated(np.zeros(2), np.array([[1.0, np.nan]]))


def test_calibration_finds_members_that_differ_less_than_cases_do():
    generator = np.random.default_rng(3)
    difficulty = generator.exponential(3.0, 800)
    reference = difficulty + generator.normal(0, 0.1, 800)
    losses = difficulty + generator.normal(0, 0.1, 800)
    losses[:400] -= 0.3
    plain = attack_membership(losses[:400], names(400), losses[400:], names(400, "o"), repeats=100)
    better = calibrated(losses, reference[None])
    sharp = attack_membership(better[:400], names(400), better[400:], names(400, "o"), repeats=100)
    assert plain.auc < 0.6 < 0.9 < sharp.auc


# --- models ---


def cases_of(n: int, seed: int, classes: int = 4) -> Cases:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 12, 12), dtype=torch.uint8, generator=generator)
    return Cases(images, torch.randint(0, classes, (n,), generator=generator), np.array(names(n, f"p{seed}")))


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 4))


def test_losses_are_the_cross_entropy_of_each_case_one_by_one():
    model, cases = linear(), cases_of(300, 1)
    slow = [
        -torch.log_softmax(model(to_float(image[None])).double(), 1)[0, label].item()
        for image, label in zip(cases.images, cases.labels, strict=True)
    ]
    np.testing.assert_allclose(case_losses(model, cases, 1), slow, rtol=1e-5, atol=1e-6)
    several = Cases(cases.images, functional.one_hot(cases.labels, 4).float(), cases.patients)
    logits = model(to_float(cases.images)).double()
    signs = several.labels.double() * 2 - 1
    by_hand = functional.softplus(-signs * logits).mean(dim=1).detach()
    np.testing.assert_allclose(case_losses(model, several, 1), by_hand, rtol=1e-5, atol=1e-6)
    assert case_losses(model, cases.take([]), 1).shape == (0,)


def test_images_are_brought_to_the_size_that_the_model_sees():
    cases = cases_of(5, 2)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 4))
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    case_losses(model, cases, 1, image_size=6)
    assert seen == [(5, 1, 6, 6)]


def test_a_model_that_knows_its_patients_by_heart_is_caught_and_an_untrained_one_is_not():
    inside, outside = cases_of(120, 3), cases_of(120, 4)
    model = linear()

    def attack():
        return attack_membership(
            case_losses(model, inside, 1),
            inside.patients,
            case_losses(model, outside, 1),
            outside.patients,
            repeats=200,
        )

    untrained = attack()
    assert untrained.low < 0.5 < untrained.high
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(150):
        optimizer.zero_grad()
        functional.cross_entropy(model(to_float(inside.images)), inside.labels).backward()
        optimizer.step()
    trained = attack()
    assert trained.low > 0.9
    assert trained.advantage > 0.9
