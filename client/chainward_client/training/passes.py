"""All images of a site through a model as it is, in batches; also through the pretrained weights that the chain starts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from chainward_client.precision import best_device, training_environment
from chainward_client.training.features import Features, digest_of_images
from chainward_shared.models import Architecture
from chainward_shared.models.start import initial_model
from chainward_shared.models.taps import Taps, embedding_size
from chainward_shared.preprocessing import resized, scaled_for
from chainward_shared.weights import StateDict

BATCH = 256


def passes(
    model: nn.Module, images: Tensor, threads: int, image_size: int = 0, features: Features | None = None
) -> Iterator[Tensor]:
    """Yield the logits of uint8 `images`, at most `BATCH` of them at once, computed in fp32; parameters as of
    `evaluation.class_probabilities`.

    Between one and the next, what `Taps` have kept is of the same images.
    """
    size = image_size or images.shape[-1]
    device = best_device()
    kept = None if features is None else features.of(model, images, "none", threads)
    seen, called = (images, model) if kept is None else (kept[0], kept[1].rest)
    model.to(device).eval()

    def logits(batch: Tensor) -> Tensor:
        if kept is not None:
            return called(batch[:, 0].to(device).float())  # type: ignore[no-any-return]
        return called(scaled_for(model, resized(batch, size).to(device)))  # type: ignore[no-any-return]

    for batch in seen.split(BATCH):
        with training_environment(threads, seed=0), torch.inference_mode():
            found = logits(batch)
        yield found
    model.to("cpu")


def embeddings(
    model: nn.Module, images: Tensor, threads: int, image_size: int, features: Features | None
) -> Iterator[Tensor]:
    """Yield the input of the model's classifier, on the CPU, for as many images at once as `passes` takes."""
    with Taps(model, embedding=True) as taps:
        for _ in passes(model, images, threads, image_size, features):
            yield taps.embedding.cpu()


@dataclass(frozen=True)
class StartImages:
    """Images of cases, and the start through which a teacher sees them.

    The start never changes, so a teacher is the same beside every link; and what it sees of a case is a function of this
    case's image alone.

    Parameters
    ----------
    architecture : of the chain's model
    base : the pretrained weights that it starts from
    images : uint8 (n, c, h, w)
    threads : of the computation
    features : where the output of a frozen trunk is kept; None: nowhere
    """

    architecture: Architecture
    base: StateDict
    images: Tensor
    threads: int
    features: Features | None = None

    @property
    def key(self) -> list[str]:
        """What decides the vectors: the architecture, with the digest of its start, and the SHA-256 of the images."""
        return [self.architecture.model_dump_json(), digest_of_images(self.images)]

    def vectors(self) -> np.ndarray:
        """Return the input of the start's classifier, float32 (n, d), every row scaled to mean square 1."""
        model = initial_model(self.architecture, 0, self.base)
        width = embedding_size(model)
        found = embeddings(model, self.images, self.threads, self.architecture.image_size, self.features)
        parts = torch.cat([torch.zeros(0, width), *found])
        vectors: np.ndarray = (normalize(parts, dim=1) * width**0.5).numpy()
        return vectors
