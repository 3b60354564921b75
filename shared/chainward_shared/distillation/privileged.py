"""The losses of privileged teachers: per example, zero where a case has nothing privileged.

Distillation from teachers that see what the model never will: Lopez-Paz et al. 2016, "Unifying Distillation and Privileged
Information", arXiv:1511.03643.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from chainward_shared.distillation.losses import distillation_loss

_NEVER = -1e4
"""Logit of a class that is left out: its probability is 0 in float32, and finite arithmetic stays finite."""


def logit_loss(
    logits: Tensor, teacher_logits: Tensor, taught: Tensor, temperature: float, *, multilabel: bool = False
) -> Tensor:
    """Return `distillation_loss` of each example over the classes that its teacher has been taught, (batch,).

    A class of which the site has no case has no meaning in its teacher's logits: it drops out on both sides, so that
    student and teacher are compared as distributions over the others, and the student's logit of it gets no gradient.

    Parameters
    ----------
    logits, teacher_logits : float (batch, classes)
    taught : bool (batch, classes); a row of False, of a case without privileged data, costs nothing
    temperature, multilabel : as in `distillation_loss`
    """
    return distillation_loss(
        torch.where(taught, logits, _NEVER),
        torch.where(taught, teacher_logits, _NEVER),
        temperature,
        multilabel=multilabel,
    )


def embedding_loss(projected: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """Return ``1 - cos(projected, teacher)`` of each example, (batch,), from 0 to 2.

    Parameters
    ----------
    projected : the student's embeddings after the projector, float (batch, d)
    teacher : the teachers' embeddings, float (batch, d)
    present : bool (batch, d), the dimensions that hold something. Only they are compared: a teacher of reports has no
        say on a case without report. A row of False costs nothing
    """
    cosine = functional.cosine_similarity(projected * present, teacher * present, dim=1)
    return torch.where(present.any(dim=1), 1 - cosine, 0.0)
