"""All images of a site through a model as it is, in batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from chainward_client.precision import best_device, training_environment
from chainward_client.training.features import Features
from chainward_shared.models.taps import Taps
from chainward_shared.preprocessing import resized, scaled_for

BATCH = 256


def passes(
    model: nn.Module, images: torch.Tensor, threads: int, image_size: int = 0, features: Features | None = None
) -> Iterator[torch.Tensor]:
    """Yield the logits of uint8 `images`, at most `BATCH` of them at once, computed in fp32; parameters as of
    `evaluation.class_probabilities`.

    Between one and the next, what `Taps` have kept is of the same images.
    """
    size = image_size or images.shape[-1]
    device = best_device()
    kept = None if features is None else features.of(model, images, "none", threads)
    seen, called = (images, model) if kept is None else (kept[0], kept[1].rest)
    model.to(device).eval()

    def logits(batch: torch.Tensor) -> torch.Tensor:
        if kept is not None:
            return called(batch[:, 0].to(device).float())  # type: ignore[no-any-return]
        return called(scaled_for(model, resized(batch, size).to(device)))  # type: ignore[no-any-return]

    for batch in seen.split(BATCH):
        with training_environment(threads, seed=0), torch.inference_mode():
            found = logits(batch)
        yield found
    model.to("cpu")


def embeddings(
    model: nn.Module, images: torch.Tensor, threads: int, image_size: int, features: Features | None
) -> Iterator[torch.Tensor]:
    """Yield the input of the model's classifier, on the CPU, for as many images at once as `passes` takes."""
    with Taps(model, embedding=True) as taps:
        for _ in passes(model, images, threads, image_size, features):
            yield taps.embedding.cpu()
