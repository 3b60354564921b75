"""Scoring of a model on a site's own images."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from chainward_client.data.site_data import Cases
from chainward_client.training.precision import best_device, training_environment
from chainward_shared.pixels import to_float

BATCH = 256


def predict(model: nn.Module, images: torch.Tensor, threads: int) -> np.ndarray:
    """Return the class probabilities of uint8 `images` (n, c, h, w) as float64 (n, classes), computed in fp32."""
    device = best_device()
    model.to(device).eval()
    with training_environment(threads, seed=0), torch.inference_mode():
        parts = [
            model(to_float(images[start : start + BATCH].to(device))).double().softmax(dim=1).cpu()
            for start in range(0, len(images), BATCH)
        ]
    model.to("cpu")
    return torch.cat(parts).numpy()


def class_probabilities(model: nn.Module, cases: Cases, classes: int, threads: int) -> np.ndarray:
    """Return the class probabilities of all `cases`, float64 (n, classes); (0, classes) where there are none."""
    return predict(model, cases.images, threads) if len(cases) else np.zeros((0, classes))
