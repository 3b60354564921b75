"""The losses where an image may have several findings, decision by decision against plain float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from chainward_shared.distillation.losses import (
    class_counts,
    classification_loss,
    distillation_loss,
    teacher_trust,
)

COUNTS = [[93, 7], [100, 0], [60, 40], [0, 100]]  # without and with: rare, never seen, common, seen in every case
ASKED = [0, 2]
BALANCES = ["site-prior", "weighted", "none"]
TEMPERATURES = [1.0, 2.5, 20.0]


def logits_of(seed: int, rows: int = 8, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, 4, generator=generator, dtype=torch.float64)


LOGITS, TEACHER = logits_of(0), logits_of(1)
LABELS = torch.tensor([[i & 1, 0, i >> 1 & 1, 1] for i in range(8)], dtype=torch.float32)
COUNTED = torch.tensor(COUNTS)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def reference_cross_entropy(row: list[float], labels: list[float], balance: str) -> float:
    losses = []
    for z, y, (without, having) in zip(row, labels, COUNTS, strict=True):
        if balance == "site-prior":
            if not (without and having):
                losses.append(0.0)
                continue
            z += math.log(having / without)
        loss = -math.log(sigmoid(z) if y else 1 - sigmoid(z))
        if balance == "weighted":
            kinds = (without > 0) + (having > 0)
            loss *= (without + having) / (kinds * max(1, having if y else without))
        losses.append(loss)
    return sum(losses) / len(losses)


def reference_distillation(row: list[float], teacher: list[float], temperature: float) -> float:
    total = 0.0
    for z, t in zip(row, teacher, strict=True):
        p, q = sigmoid(t / temperature), sigmoid(z / temperature)
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return temperature**2 * total / len(row)


def assert_elementwise(found: torch.Tensor, expected: list[float]) -> None:
    assert found.shape == (len(expected),)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


# --- counts ---


def test_counts_of_classes_are_those_of_bincount():
    labels = torch.tensor([0, 3, 3, 1])
    assert class_counts(labels, 5).tolist() == torch.bincount(labels, minlength=5).tolist() == [1, 1, 0, 2, 0]


def test_counts_of_findings_are_cases_without_and_with_each():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert class_counts(labels, 3).tolist() == [[1, 1], [2, 0], [0, 2]]


def test_a_site_without_cases_counts_none():
    assert class_counts(torch.zeros(0, 3), 3).tolist() == [[0, 0]] * 3


# --- cross-entropy ---


@pytest.mark.parametrize("balance", BALANCES)
def test_cross_entropy_is_the_mean_of_the_slow_binary_ones(balance):
    pairs = zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
    expected = [reference_cross_entropy(row, labels, balance) for row, labels in pairs]
    assert_elementwise(classification_loss(LOGITS, LABELS.double(), COUNTED, balance), expected)


def test_findings_that_a_site_never_or_always_sees_are_left_to_the_predecessor():
    logits = LOGITS.clone().requires_grad_()
    loss = classification_loss(logits, LABELS.double(), COUNTED, "site-prior")
    loss.sum().backward()
    assert loss.isfinite().all()
    assert torch.all(logits.grad[:, [1, 3]] == 0)
    assert torch.all(logits.grad[:, ASKED] != 0)


def test_a_site_that_sees_no_finding_at_all_teaches_nothing():
    logits = LOGITS.clone().requires_grad_()
    labels = torch.zeros(8, 4, dtype=torch.float64)
    loss = classification_loss(logits, labels, class_counts(labels, 4), "site-prior")
    loss.sum().backward()
    assert torch.all(loss == 0)
    assert torch.all(logits.grad == 0)


def test_with_the_prior_the_best_constant_logit_is_even_odds_however_rare_the_finding():
    labels = torch.zeros(100, 1)
    labels[:7] = 1
    counts = class_counts(labels, 1)
    for balance in ("site-prior", "weighted"):
        logit = torch.zeros(1, 1, requires_grad=True)
        classification_loss(logit.expand(100, 1), labels, counts, balance).mean().backward()
        assert logit.grad.item() == pytest.approx(0, abs=1e-6), balance
    logit = torch.zeros(1, 1, requires_grad=True)
    classification_loss(logit.expand(100, 1), labels, counts, "none").mean().backward()
    assert logit.grad.item() == pytest.approx(0.5 - 0.07)


def test_two_classes_as_one_finding_are_the_single_label_loss():
    """A softmax over (0, z) is the sigmoid of z."""
    z = LOGITS[:, 0]
    pair = torch.stack([torch.zeros_like(z), z], dim=1)
    y = LABELS[:, 0]
    counts = torch.tensor([93, 7])
    for balance in BALANCES:
        single = classification_loss(pair, y.long(), counts, balance)
        multi = classification_loss(z[:, None], y[:, None].double(), counts[None], balance)
        torch.testing.assert_close(multi, single, rtol=1e-6, atol=1e-9)
    teacher = torch.stack([torch.zeros_like(z), TEACHER[:, 0]], dim=1)
    torch.testing.assert_close(
        distillation_loss(z[:, None], TEACHER[:, :1], 3.0, multilabel=True), distillation_loss(pair, teacher, 3.0)
    )
    torch.testing.assert_close(
        teacher_trust(TEACHER[:, :1], y[:, None], "label"), teacher_trust(teacher, y.long(), "label")
    )


def test_twice_as_many_findings_of_the_same_kind_leave_every_loss_the_same():
    twice = (torch.cat([LOGITS, LOGITS], 1), torch.cat([TEACHER, TEACHER], 1), torch.cat([LABELS, LABELS], 1).double())
    for balance in BALANCES:
        once = classification_loss(LOGITS, LABELS.double(), COUNTED, balance)
        torch.testing.assert_close(
            classification_loss(twice[0], twice[2], torch.cat([COUNTED, COUNTED]), balance), once
        )
    torch.testing.assert_close(
        distillation_loss(twice[0], twice[1], 2.0, multilabel=True),
        distillation_loss(LOGITS, TEACHER, 2.0, multilabel=True),
    )
    torch.testing.assert_close(teacher_trust(twice[1], twice[2], "label"), teacher_trust(TEACHER, LABELS, "label"))


# --- distillation ---


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_distillation_is_the_mean_of_the_slow_binary_divergences(temperature):
    pairs = zip(LOGITS.tolist(), TEACHER.tolist(), strict=True)
    expected = [reference_distillation(row, teacher, temperature) for row, teacher in pairs]
    assert_elementwise(distillation_loss(LOGITS, TEACHER, temperature, multilabel=True), expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_distillation_is_zero_where_the_two_agree_and_a_shift_is_no_agreement(temperature):
    assert_elementwise(distillation_loss(LOGITS, LOGITS, temperature, multilabel=True), [0.0] * 8)
    assert (distillation_loss(LOGITS + 3.0, LOGITS, temperature, multilabel=True) > 0).all()


def test_distillation_of_a_very_sure_teacher_is_finite():
    sure = torch.tensor([[500.0, -500.0]])
    assert distillation_loss(-sure, sure, 1.0, multilabel=True).item() == pytest.approx(500.0)


def test_the_gradient_of_distillation_pulls_each_finding_towards_the_teacher():
    logits = LOGITS.clone().requires_grad_()
    distillation_loss(logits, TEACHER, 2.0, multilabel=True).sum().backward()
    expected = 2.0 * ((LOGITS / 2).sigmoid() - (TEACHER / 2).sigmoid()) / 4  # d/dz T^2 KL = T (q - p)
    torch.testing.assert_close(logits.grad, expected)


# --- trust ---


def test_trust_is_the_mean_over_the_findings_of_the_answers_relative_probability():
    expected = []
    for row, labels in zip(TEACHER.tolist(), LABELS.tolist(), strict=True):
        ratios = []
        for z, y in zip(row, labels, strict=True):
            p = sigmoid(z) if y else 1 - sigmoid(z)
            ratios.append(p / max(p, 1 - p))
        expected.append(sum(ratios) / len(ratios))
    assert_elementwise(teacher_trust(TEACHER, LABELS, "label"), expected)


def test_one_wrong_answer_of_four_leaves_three_quarters_of_the_trust():
    sure = torch.tensor([[30.0, -30.0, -30.0, 30.0]])
    assert teacher_trust(sure, torch.tensor([[1.0, 0.0, 1.0, 1.0]]), "label").item() == pytest.approx(0.75)
    assert teacher_trust(sure, torch.tensor([[1.0, 0.0, 0.0, 1.0]]), "label").item() == 1.0
    assert teacher_trust(sure, torch.tensor([[0.0, 1.0, 1.0, 0.0]]), "label").item() == pytest.approx(0.0, abs=1e-12)
    assert teacher_trust(sure, torch.ones(1, 4), "none").tolist() == [1.0]


# --- each value belongs to its own example ---


@pytest.mark.parametrize(
    "values",
    [
        *(lambda z, t, y, b=b: classification_loss(z, y, COUNTED, b) for b in BALANCES),
        lambda z, t, y: distillation_loss(z, t, 3.0, multilabel=True),
        lambda z, t, y: teacher_trust(t, y, "label"),
    ],
    ids=[*BALANCES, "distillation", "trust by label"],
)
def test_other_examples_do_not_change_a_value(values):
    together = values(LOGITS, TEACHER, LABELS.double())
    logits, teacher, labels = LOGITS.clone(), TEACHER.clone(), LABELS.double()
    logits[1:], teacher[1:], labels[1:] = logits_of(8, 7), logits_of(9, 7), 1 - labels[1:]
    assert values(logits, teacher, labels)[0] == together[0]
    assert values(LOGITS[:1], TEACHER[:1], labels[:1])[0] == pytest.approx(together[0].item(), abs=1e-9)
