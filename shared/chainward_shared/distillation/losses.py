"""The losses of the chain and of the students: small, pure, one idea each.

Shapes: logits (batch, classes), float; labels (batch,), int64, or (batch, classes), float of 0 and 1, where an image may
have several findings (multi-label). Every loss returns one value per example, (batch,), so that it stays a function of
one record.

Multi-label: each class is a yes-or-no question of its own, answered by the sigmoid of its logit, and a loss is the *mean*
over the classes. A sum would grow with the number of findings asked for, and with it the weight of classification and
distillation beside attention and embedding losses, and the norm that private training clips.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from chainward_shared.settings import ClassBalance, TeacherTrust


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Return the cases of each class as the losses take them, int64.

    Single-label, labels (cases,): (classes,). Multi-label, labels (cases, classes): (classes, 2), the cases without and
    with each finding.
    """
    if labels.ndim == 1:
        return torch.bincount(labels, minlength=classes)
    positives = (labels > 0.5).sum(dim=0)
    return torch.stack([len(labels) - positives, positives], dim=1)


def class_log_prior(counts: Tensor) -> Tensor:
    """Return the logarithm of the class frequencies, (classes,), minus infinity for a class without cases.

    Such a class drops out of the adjusted cross-entropy: its logit gets no gradient from a site that has never seen it,
    and is left to the predecessor. (Smoothed frequencies instead let a hospital with cases of one class only pull every
    image to that class: PneumoniaMNIST over six skewed sites, balanced accuracy of the chain 0.91 before such a link and
    0.56 after it.)
    """
    return (counts.float() / counts.sum()).log()


def classification_loss(
    logits: Tensor, labels: Tensor, counts: Tensor, balance: ClassBalance, strength: float = 1.0
) -> Tensor:
    """Return the cross-entropy of each example, (batch,), with the chosen handling of class imbalance.

    Multi-label: the mean over the classes of the binary cross-entropy, see `binary_cross_entropy`.

    Parameters
    ----------
    counts : training cases of each class at this site, as `class_counts` gives them: (classes,) or (classes, 2)
    balance :
        "site-prior": cross-entropy of ``logits + strength * log prior`` (logit adjustment, Menon et al. 2021, eq. 10,
        strength is their tau; with 1 the balanced softmax of Ren et al. 2020, eq. 4). With 1 the logits themselves
        estimate the same class-balanced posterior at every site, however different their class mixes: what
        distillation between sites needs. With less they keep part of the site's own mix. A class without cases drops
        out at every strength.
        "weighted": each example weighted by n / (classes present * count of its class).
        "none": plain cross-entropy.
    strength : of "site-prior", in [0, 1]
    """
    if labels.ndim == 2:
        return binary_cross_entropy(logits, labels, counts, balance, strength)
    if balance == "site-prior":
        log_prior = class_log_prior(counts)
        adjustment = torch.where(counts > 0, strength * log_prior, log_prior)
        return functional.cross_entropy(logits + adjustment, labels, reduction="none")
    loss = functional.cross_entropy(logits, labels, reduction="none")
    if balance == "weighted":
        present = (counts > 0).sum()
        weights = counts.sum() / (present * counts.clamp(min=1).float())
        return loss * weights[labels]
    return loss


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, counts: Tensor, balance: ClassBalance, strength: float = 1.0
) -> Tensor:
    """Return the mean over the classes of the binary cross-entropy of each example, (batch,).

    Parameters
    ----------
    counts : training cases without and with each finding at this site, (classes, 2)
    balance :
        "site-prior": of ``logits + strength * log(with / without)``, the two-class case of the softmax's adjustment. A
        finding that no case of this site has, or every case has, adds nothing and its logit gets no gradient here, for
        the reason that `class_log_prior` gives.
        "weighted": each answer weighted by n / (answers present * count of this answer), so that the images with and
        without a finding weigh the same.
        "none": plain.
    """
    with_and_without = counts.float()
    if balance == "site-prior":
        asked = (counts > 0).all(dim=1)
        log_odds = torch.where(asked, (with_and_without[:, 1] / with_and_without[:, 0].clamp(min=1)).log(), 0.0)
        loss = functional.binary_cross_entropy_with_logits(logits + strength * log_odds, labels, reduction="none")
        return torch.where(asked, loss, 0.0).mean(dim=1)
    loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if balance == "weighted":
        present = (counts > 0).sum(dim=1, keepdim=True)
        weights = with_and_without.sum(dim=1, keepdim=True) / (present * with_and_without.clamp(min=1))
        loss = loss * torch.where(labels > 0.5, weights[:, 1], weights[:, 0])
    return loss.mean(dim=1)


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, *, multilabel: bool = False
) -> Tensor:
    """Return ``T^2 KL(softmax(teacher/T) || softmax(student/T))`` of each example, (batch,) (Hinton et al. 2015, sec. 2).

    `multilabel`: the mean over the classes of ``T^2 KL(sigmoid(teacher/T) || sigmoid(student/T))``, each a divergence of two
    Bernoulli distributions.
    """
    return ensemble_distillation_loss(logits, teacher_logits[None], temperature, multilabel=multilabel)


def ensemble_distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, *, multilabel: bool = False
) -> Tensor:
    """Return ``T^2 KL(mean over m of softmax(teacher_m/T) || softmax(student/T))`` of each example, (batch,).

    The average of several teachers' softened probabilities as one teacher (Hinton et al. 2015, sec. 1 and 2); with one
    teacher it is `distillation_loss`.

    Parameters
    ----------
    teacher_logits : of m teachers, at least one, (m, batch, classes)
    multilabel : probabilities are those of each finding for itself, and the loss the mean over them
    """
    models = math.log(len(teacher_logits))
    if multilabel:
        divergence = torch.zeros_like(logits)
        for sign in (1, -1):  # the finding is there, it isn't
            of_teachers = functional.logsigmoid(sign * teacher_logits / temperature).logsumexp(dim=0) - models
            of_student = functional.logsigmoid(sign * logits / temperature)
            divergence = divergence + functional.kl_div(of_student, of_teachers, reduction="none", log_target=True)
        return temperature**2 * divergence.mean(dim=1)
    teachers = functional.log_softmax(teacher_logits / temperature, dim=2).logsumexp(dim=0) - models
    student = functional.log_softmax(logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teachers, reduction="none", log_target=True).sum(dim=1)


def teacher_trust(teacher_logits: Tensor, labels: Tensor, trust: TeacherTrust) -> Tensor:
    """Return how far the predecessor is believed on each example, (batch,), in [0, 1].

    "label": the predecessor's probability of the label, relative to that of its favourite class: 1 where it agrees
    with the label, towards 0 the surer it contradicts. A function of this example and the predecessor only. Multi-label:
    the mean over the classes of the same ratio for each yes-or-no answer; a product would be next to 0 for any image as
    soon as there are many findings to be wrong about.
    "none": 1 everywhere.
    """
    if trust == "none":
        return torch.ones(len(labels), device=teacher_logits.device)
    if labels.ndim == 2:
        margin = torch.where(labels > 0.5, teacher_logits, -teacher_logits)
        return margin.clamp(max=0).exp().mean(dim=1)  # sigmoid(m) / max(sigmoid(m), sigmoid(-m)) = exp(min(m, 0))
    log_probabilities = functional.log_softmax(teacher_logits, dim=1)
    of_label = log_probabilities.gather(1, labels[:, None]).squeeze(1)
    return (of_label - log_probabilities.max(dim=1).values).exp()
