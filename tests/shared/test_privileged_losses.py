"""The losses of privileged teachers, example by example against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from chainward_shared.distillation.losses import distillation_loss
from chainward_shared.distillation.privileged import embedding_loss, logit_loss


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGITS, TEACHER = drawn(0, 6, 4), drawn(1, 6, 4)
ALL = torch.ones(6, 4, dtype=torch.bool)


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_teacher_that_was_taught_every_class_distils_as_any_other(multilabel):
    found = logit_loss(LOGITS, TEACHER, ALL, 2.5, multilabel=multilabel)
    torch.testing.assert_close(found, distillation_loss(LOGITS, TEACHER, 2.5, multilabel=multilabel))


def test_a_class_that_the_teacher_was_not_taught_drops_out_on_both_sides():
    taught = ALL.clone()
    taught[:, 2] = False
    rest = [0, 1, 3]
    torch.testing.assert_close(
        logit_loss(LOGITS, TEACHER, taught, 2.0), distillation_loss(LOGITS[:, rest], TEACHER[:, rest], 2.0)
    )


def test_a_finding_that_the_teacher_was_not_taught_drops_out_too():
    taught = ALL.clone()
    taught[:, 2] = False
    rest = [0, 1, 3]
    torch.testing.assert_close(
        logit_loss(LOGITS, TEACHER, taught, 2.0, multilabel=True),
        distillation_loss(LOGITS[:, rest], TEACHER[:, rest], 2.0, multilabel=True) * 3 / 4,  # a mean over the classes
    )


@pytest.mark.parametrize("multilabel", [False, True])
def test_what_is_not_taught_gets_no_gradient_and_a_case_without_teacher_costs_nothing(multilabel):
    taught = ALL.clone()
    taught[:, 1] = False
    taught[4] = False
    logits = LOGITS.clone().requires_grad_()
    losses = logit_loss(logits, TEACHER, taught, 1.0, multilabel=multilabel)
    losses.sum().backward()
    assert losses[4] == 0
    assert (losses[[0, 1, 2, 3, 5]] > 0).all()
    assert logits.grad is not None
    assert torch.all((logits.grad == 0) == ~taught)


def test_the_embedding_loss_is_one_minus_the_cosine():
    projected, teacher = drawn(2, 5, 3), drawn(3, 5, 3)
    expected = []
    for p, t in zip(projected.tolist(), teacher.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(p, t, strict=True))
        expected.append(1 - dot / math.sqrt(sum(a * a for a in p)) / math.sqrt(sum(b * b for b in t)))
    found = embedding_loss(projected, teacher, torch.ones(5, 3, dtype=torch.bool))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_embedding_loss_knows_no_lengths_and_goes_from_0_to_2():
    teacher = drawn(3, 5, 3)
    present = torch.ones(5, 3, dtype=torch.bool)
    torch.testing.assert_close(embedding_loss(7 * teacher, teacher, present), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding_loss(-teacher, teacher, present), torch.full((5,), 2.0))


def test_only_the_dimensions_that_a_case_has_are_compared():
    projected, teacher = drawn(2, 4, 6), drawn(3, 4, 6)
    present = torch.zeros(4, 6, dtype=torch.bool)
    present[0] = True
    present[1, :2] = True
    present[2, 2:] = True
    found = embedding_loss(projected.requires_grad_(), teacher, present)
    for row, part in enumerate((slice(0, 6), slice(0, 2), slice(2, 6))):
        alone = torch.nn.functional.cosine_similarity(projected[row, part], teacher[row, part], dim=0)
        torch.testing.assert_close(found[row], 1 - alone)
    assert found[3] == 0
    found.sum().backward()
    assert projected.grad is not None
    assert projected.grad.isfinite().all()
    assert torch.all((projected.grad == 0) == ~present)
