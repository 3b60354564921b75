"""The losses, element by element against plain float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from chainward_shared.distillation.losses import (
    class_log_prior,
    classification_loss,
    distillation_loss,
    teacher_trust,
)

COUNTS = [7, 0, 3, 90]  # a class that the site has never seen, and a frequent one
BALANCES = ["site-prior", "weighted", "none"]
TEMPERATURES = [1.0, 2.5, 4.0, 20.0]


def logits_of(seed: int, rows: int = 12, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, len(COUNTS), generator=generator, dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 3] * 3)
SEEN = torch.tensor([0, 2, 3] * 4)  # labels of classes that the site has
LOGITS, TEACHER = logits_of(0), logits_of(1)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def reference_cross_entropy(row: list[float], label: int, counts: list[int], balance: str) -> float:
    if balance == "site-prior":
        powers = [n / sum(counts) * math.exp(z) for z, n in zip(row, counts, strict=True)]
        return -math.log(powers[label] / sum(powers))
    loss = -math.log(softmax(row)[label])
    if balance == "weighted":
        present = sum(n > 0 for n in counts)
        loss *= sum(counts) / (present * max(1, counts[label]))
    return loss


def reference_distillation(row: list[float], teacher: list[float], temperature: float) -> float:
    p = softmax([z / temperature for z in teacher])
    q = softmax([z / temperature for z in row])
    return temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def assert_elementwise(found: torch.Tensor, expected: list[float]) -> None:
    assert found.shape == (len(expected),)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


# --- cross-entropy ---


@pytest.mark.parametrize("balance", BALANCES)
def test_cross_entropy_equals_the_slow_one(balance):
    expected = [
        reference_cross_entropy(row, label, COUNTS, balance)
        for row, label in zip(LOGITS.double().tolist(), SEEN.tolist(), strict=True)
    ]
    assert_elementwise(classification_loss(LOGITS, SEEN, torch.tensor(COUNTS), balance), expected)


def test_the_log_prior_is_that_of_the_sites_frequencies():
    found = class_log_prior(torch.tensor(COUNTS))
    assert found.tolist() == pytest.approx([math.log(0.07), -math.inf, math.log(0.03), math.log(0.9)])


def test_a_class_that_the_site_has_never_seen_is_left_to_the_predecessor():
    logits = LOGITS.clone().requires_grad_()
    loss = classification_loss(logits, SEEN, torch.tensor(COUNTS), "site-prior")
    loss.sum().backward()
    assert loss.isfinite().all()
    assert torch.all(logits.grad[:, 1] == 0)
    assert torch.all(logits.grad[:, [0, 2, 3]] != 0)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_strength_of_the_prior_scales_its_logarithm_and_a_class_without_cases_drops_out_at_any(strength):
    found = classification_loss(LOGITS, SEEN, torch.tensor(COUNTS), "site-prior", strength)
    for row, label, loss in zip(LOGITS.tolist(), SEEN.tolist(), found.tolist(), strict=True):
        powers = [(n / sum(COUNTS)) ** strength * math.exp(z) if n else 0.0 for z, n in zip(row, COUNTS, strict=True)]
        assert loss == pytest.approx(-math.log(powers[label] / sum(powers)), rel=1e-5)


def test_a_site_with_one_class_alone_teaches_nothing():
    logits = LOGITS.clone().requires_grad_()
    loss = classification_loss(logits, torch.full((12,), 3), torch.tensor([0, 0, 0, 9]), "site-prior")
    loss.sum().backward()
    assert torch.all(loss == 0)
    assert torch.all(logits.grad == 0)


def test_the_balances_agree_where_the_classes_are_balanced():
    even = torch.full((4,), 25)
    plain = classification_loss(LOGITS, LABELS, even, "none")
    for balance in ("site-prior", "weighted"):
        torch.testing.assert_close(classification_loss(LOGITS, LABELS, even, balance), plain)


def test_weights_average_to_one_over_the_sites_cases():
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    flat = torch.zeros(len(labels), 4, dtype=torch.float64)
    loss = classification_loss(flat, labels, torch.tensor(COUNTS), "weighted")
    assert loss.mean().item() == pytest.approx(math.log(4), rel=1e-5)


# --- distillation ---


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_distillation_equals_the_slow_one(temperature):
    expected = [
        reference_distillation(row, teacher, temperature)
        for row, teacher in zip(LOGITS.double().tolist(), TEACHER.double().tolist(), strict=True)
    ]
    assert_elementwise(distillation_loss(LOGITS, TEACHER, temperature), expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_distillation_is_zero_exactly_where_the_two_agree(temperature):
    shifted = LOGITS + 3.0  # softmax doesn't see a shift
    assert_elementwise(distillation_loss(LOGITS, LOGITS, temperature), [0.0] * 12)
    assert distillation_loss(shifted, LOGITS, temperature).abs().max() < 1e-3
    assert (distillation_loss(LOGITS, TEACHER, temperature) > 0).all()


def test_distillation_of_a_very_sure_teacher_is_finite():
    sure = torch.tensor([[500.0, -500.0, 0.0, 0.0]])
    assert distillation_loss(-sure, sure, 1.0).item() == pytest.approx(1000.0)


def test_the_gradient_of_distillation_pulls_towards_the_teacher():
    logits = LOGITS.clone().requires_grad_()
    distillation_loss(logits, TEACHER, 2.0).sum().backward()
    expected = 2.0 * ((LOGITS / 2).softmax(1) - (TEACHER / 2).softmax(1))  # d/dz T^2 KL = T (q - p)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-5)


# --- trust ---


def test_trust_is_the_probability_of_the_label_relative_to_the_favourite():
    expected = []
    for row, label in zip(TEACHER.double().tolist(), LABELS.tolist(), strict=True):
        probabilities = softmax(row)
        expected.append(probabilities[label] / max(probabilities))
    assert_elementwise(teacher_trust(TEACHER, LABELS, "label"), expected)


def test_a_predecessor_that_agrees_with_the_label_is_believed_fully_and_a_sure_contradiction_hardly():
    sure = torch.tensor([[30.0, 0.0], [30.0, 0.0], [0.0, 0.0]])
    trust = teacher_trust(sure, torch.tensor([0, 1, 1]), "label")
    assert trust.tolist() == pytest.approx([1.0, math.exp(-30), 1.0])


def test_trust_none_is_one_everywhere():
    assert teacher_trust(TEACHER, LABELS, "none").tolist() == [1.0] * 12


def test_trust_is_between_zero_and_one():
    trust = teacher_trust(logits_of(5, 12, scale=300.0), LABELS, "label")
    assert trust.min() >= 0
    assert trust.max() <= 1


# --- each value belongs to its own example ---


@pytest.mark.parametrize(
    "values",
    [
        *(lambda z, t, y, b=b: classification_loss(z, y, torch.tensor(COUNTS), b) for b in BALANCES),
        lambda z, t, y: distillation_loss(z, t, 3.0),
        lambda z, t, y: teacher_trust(t, y, "label"),
        lambda z, t, y: teacher_trust(t, y, "none"),
    ],
    ids=[*BALANCES, "distillation", "trust by label", "no trust"],
)
def test_other_examples_do_not_change_a_value(values):
    together = values(LOGITS, TEACHER, LABELS)
    logits, teacher, labels = LOGITS.clone(), TEACHER.clone(), LABELS.clone()
    logits[1:], teacher[1:], labels[1:] = logits_of(8, 11), logits_of(9, 11), 2
    assert values(logits, teacher, labels)[0] == together[0]
    assert values(LOGITS[:1], TEACHER[:1], LABELS[:1])[0] == pytest.approx(together[0].item(), abs=1e-6)
