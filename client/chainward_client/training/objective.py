"""What a training minimises, and the batches that it is computed of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chainward_client.training.augmentation import augmented
from chainward_client.training.features import is_features, one_view
from chainward_shared.pixels import Pixels
from chainward_shared.settings import Augmentation


@dataclass
class Batch:
    """One batch, and as many random views of its images as an objective asks for.

    Attributes
    ----------
    images, labels : the labelled images, uint8 (n, c, h, w), or their features, (n, views, ...), and their labels
    rows : int64 (n,), which of the training's cases they are
    unlabelled : images without a label that go with them, uint8 (m, c, h, w); None where there are none
    pixels : how the model's pixels are scaled
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    unlabelled: Tensor | None
    augmentation: Augmentation
    generator: torch.Generator
    pixels: Pixels | None = None

    def view(self) -> Tensor:
        """Return a new random view of the images, float32 (n + m, c, h, w), labelled ones first; of features, (n + m, ...)."""
        images = self.images if self.unlabelled is None else torch.cat([self.images, self.unlabelled])
        if is_features(images):
            return one_view(images, self.generator)
        return augmented(images, self.augmentation, self.generator, self.pixels)


class Objective:
    """What a training minimises. Only `losses` must be given."""

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        """Prepare for a training on `device`."""

    def extra_modules(self) -> list[nn.Module]:
        """Return what is trained beside the model and never leaves: a projector, say. Private training clips its gradients with
        the model's."""
        return []

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of `extra_modules`."""
        return [parameter for module in self.extra_modules() for parameter in module.parameters()]

    def start_epoch(self, epoch: int) -> None:
        """Prepare for `epoch`, 0-based."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each example, (n,), or (n + m,) where the batch has m unlabelled images; each a function of
        its own example."""
        raise NotImplementedError

    def after_step(self, model: nn.Module) -> None:
        """Follow a step of the optimiser."""

    def epoch_log(self) -> dict[str, float]:
        """Return what to note of the epoch that ended, by the names of `TrainingLog`'s lists."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what the objective has learnt by the end of an epoch, but for `extra_parameters`: a moving average, say."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
