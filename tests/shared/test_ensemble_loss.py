"""Distillation from several teachers, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from chainward_shared.distillation.losses import distillation_loss, ensemble_distillation_loss


def logits_of(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def slow_sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("models", [1, 2, 8])
def test_an_ensemble_teaches_the_mean_of_its_softened_probabilities(models, temperature):
    student, teachers = logits_of(0, 5, 4), logits_of(1, models, 5, 4)
    found = ensemble_distillation_loss(student, teachers, temperature).tolist()
    for i in range(5):
        softened = [slow_softmax(teachers[m, i].tolist(), temperature) for m in range(models)]
        p = [sum(values) / models for values in zip(*softened, strict=True)]
        q = slow_softmax(student[i].tolist(), temperature)
        expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found[i] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("models", [1, 3])
def test_with_several_findings_each_is_averaged_for_itself(models):
    student, teachers = logits_of(0, 5, 4), logits_of(1, models, 5, 4)
    found = ensemble_distillation_loss(student, teachers, 2.0, multilabel=True).tolist()
    for i in range(5):
        terms = []
        for c in range(4):
            p = sum(slow_sigmoid(float(teachers[m, i, c]) / 2) for m in range(models)) / models
            q = slow_sigmoid(float(student[i, c]) / 2)
            terms.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        assert found[i] == pytest.approx(4 * sum(terms) / 4, rel=1e-4)


@pytest.mark.parametrize("multilabel", [False, True])
def test_one_teacher_or_the_same_one_twice_is_plain_distillation(multilabel):
    student, teacher = logits_of(0, 5, 4), logits_of(1, 5, 4)
    expected = distillation_loss(student, teacher, 3.0, multilabel=multilabel)
    for times in (1, 2):
        found = ensemble_distillation_loss(student, torch.stack([teacher] * times), 3.0, multilabel=multilabel)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("multilabel", [False, True])
def test_very_sure_teachers_that_contradict_each_other_stay_finite(multilabel):
    student = logits_of(0, 1, 3).requires_grad_()
    teachers = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]])
    loss = ensemble_distillation_loss(student, teachers, 1.0, multilabel=multilabel)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
