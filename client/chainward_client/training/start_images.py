"""Images of cases through the pretrained weights that the chain starts from: what privileged teachers see of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from chainward_client.training.features import Features, digest_of_images
from chainward_client.training.passes import embeddings
from chainward_shared.models import Architecture
from chainward_shared.models.start import initial_model
from chainward_shared.models.taps import embedding_size
from chainward_shared.weights import StateDict


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
