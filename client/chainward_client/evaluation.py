"""Scoring of a model on a site's own images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from chainward_client.data.site_data import Cases
from chainward_client.precision import best_device, training_environment
from chainward_client.training.features import Features
from chainward_client.training.passes import BATCH, passes
from chainward_shared.evaluation.attention_maps import attention_maps
from chainward_shared.evaluation.localisation import LocalisationValues, score_maps
from chainward_shared.preprocessing import resized, scaled_for

_LARGEST = torch.finfo(torch.float32).max
"""What an infinite logit counts as: no finite one of a model is larger."""


def class_probabilities(
    model: nn.Module,
    cases: Cases,
    classes: int,
    threads: int,
    *,
    image_size: int = 0,
    features: Features | None = None,
) -> np.ndarray:
    """Return the class probabilities of all `cases`, float64 (n, classes), computed in fp32; (0, classes) where there are none.

    They sum to 1; multi-label: each is that of a finding, for itself. Whatever the weights: logits that are not finite saturate,
    because whether scoring fails would tell of single images. `image_size`: side of the images that the model sees; 0, the
    default: as they are. `features`: where the output of a frozen trunk is kept, and used if there is one.
    """
    if len(cases) == 0:
        return np.zeros((0, classes))
    found = [logits.double().cpu() for logits in passes(model, cases.images, threads, image_size, features)]
    logits = torch.cat(found).nan_to_num(nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    return (logits.sigmoid() if cases.labels.ndim == 2 else logits.softmax(dim=1)).numpy()


def localisation_values(
    model: nn.Module, cases: Cases, threads: int, *, image_size: int = 0
) -> LocalisationValues | None:
    """Score where `model` looks in the images that have a region of interest; None where the site has no regions at all.

    Maps as `attention_maps` makes them by default, of the class that the model predicts, computed in fp32. `rows` of the
    result index `cases`; images without a region are counted as left out. `image_size`: as in `class_probabilities`.
    """
    masks = cases.privileged.masks
    if masks is None:
        return None
    shares = masks.flatten(1).float().mean(dim=1)
    rows = torch.nonzero((shares > 0) & (shares < 1)).flatten()
    size = image_size or cases.images.shape[-1]
    device = best_device()
    model.to(device)
    parts = []
    with training_environment(threads, seed=0):
        for chosen in rows.split(BATCH):
            images = scaled_for(model, resized(cases.images[chosen], size).to(device))
            maps = attention_maps(model, images, size=(masks.shape[-2], masks.shape[-1])).cpu()
            maps = maps.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # says nothing of where the model looks
            parts.append(score_maps(maps, masks[chosen]))
    model.to("cpu")
    values = LocalisationValues.joined(parts)
    return replace(values, rows=rows.numpy()[values.rows], left_out=len(masks) - len(values))
