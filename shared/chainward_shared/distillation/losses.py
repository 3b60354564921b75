"""The losses of the chain and of the students: small, pure, one idea each.

Shapes: logits (batch, classes), float; labels (batch,), int64. Every loss returns one value per example, (batch,), so
that it stays a function of one record.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from chainward_shared.recipes import ClassBalance, TeacherTrust


def class_log_prior(counts: Tensor) -> Tensor:
    """Return the logarithm of the class frequencies, (classes,), minus infinity for a class without cases.

    Such a class drops out of the adjusted cross-entropy: its logit gets no gradient from a site that has never seen it,
    and is left to the predecessor. (Smoothed frequencies instead let a hospital with cases of one class only pull every
    image to that class: PneumoniaMNIST over six skewed sites, balanced accuracy of the chain 0.91 before such a link and
    0.56 after it.)
    """
    return (counts.float() / counts.sum()).log()


def classification_loss(logits: Tensor, labels: Tensor, counts: Tensor, balance: ClassBalance) -> Tensor:
    """Return the cross-entropy of each example, (batch,), with the chosen handling of class imbalance.

    Parameters
    ----------
    counts : training cases of each class at this site, (classes,)
    balance :
        "site-prior": cross-entropy of ``logits + log prior`` (balanced softmax, Ren et al. 2020, eq. 4; logit
        adjustment, Menon et al. 2021, eq. 10). The logits themselves then estimate the same class-balanced posterior
        at every site, however different their class mixes: what distillation between sites needs.
        "weighted": each example weighted by n / (classes present * count of its class).
        "none": plain cross-entropy.
    """
    if balance == "site-prior":
        return functional.cross_entropy(logits + class_log_prior(counts), labels, reduction="none")
    loss = functional.cross_entropy(logits, labels, reduction="none")
    if balance == "weighted":
        present = (counts > 0).sum()
        weights = counts.sum() / (present * counts.clamp(min=1).float())
        return loss * weights[labels]
    return loss


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(teacher/T) || softmax(student/T))`` of each example, (batch,) (Hinton et al. 2015, sec. 2)."""
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    student = functional.log_softmax(logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def teacher_trust(teacher_logits: Tensor, labels: Tensor, trust: TeacherTrust) -> Tensor:
    """Return how far the predecessor is believed on each example, (batch,), in [0, 1].

    "label": the predecessor's probability of the label, relative to that of its favourite class: 1 where it agrees
    with the label, towards 0 the surer it contradicts. A function of this example and the predecessor only.
    "none": 1 everywhere.
    """
    if trust == "none":
        return torch.ones(len(labels), device=teacher_logits.device)
    log_probabilities = functional.log_softmax(teacher_logits, dim=1)
    of_label = log_probabilities.gather(1, labels[:, None]).squeeze(1)
    return (of_label - log_probabilities.max(dim=1).values).exp()
