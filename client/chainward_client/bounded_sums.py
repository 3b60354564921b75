"""A release of sums to which every patient adds one vector no longer than 1, and noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chainward_client.entropy import Entropy
from chainward_client.private_training import units_of
from chainward_shared.private_sums import GRAIN, SumsForm, in_grains, memberships, shortened, vectors
from chainward_shared.settings import PrivacyUnit

_TOGETHER = 2**22
"""Numbers of patients' vectors that are in memory at once, about."""


@dataclass(frozen=True)
class SumsRelease:
    """How embeddings become a release.

    Attributes
    ----------
    form : of the sums
    unit : whose share is bounded: a patient's, or each image's
    """

    form: SumsForm
    unit: PrivacyUnit

    def exact(self, values: Tensor, labels: Tensor, patients: np.ndarray, classes: int) -> Tensor:
        """Return the sum of all units' vectors, float64 (m,); without an image: zeros.

        Parameters
        ----------
        values : embeddings in the frame, of any length, float64 (n, dimension)
        labels : as of `chainward_shared.private_sums.memberships`
        patients : str (n,)
        """
        members = memberships(labels, classes, self.form)
        total = torch.zeros(sum(self.form.sizes(members.shape[1]).values()), dtype=torch.int64)
        if len(values):
            for part in self.of_units(values, members, units_of(patients, self.unit)):
                total += self.bounded(part).sum(dim=0)
        return total.double() * GRAIN

    def of_units(self, values: Tensor, members: Tensor, units: list[np.ndarray]) -> Iterator[Tensor]:
        """Yield the vectors of units, some rows at a time: each the mean over the images, of which `units` has the rows."""
        size = sum(self.form.sizes(members.shape[1]).values())
        together = max(1, _TOGETHER // size)
        values, octaves = shortened(values)
        for start in range(0, len(units), together):
            block = units[start : start + together]
            rows = torch.from_numpy(np.concatenate(block))
            sizes = torch.tensor([len(of_one) for of_one in block])
            whose = torch.repeat_interleave(torch.arange(len(block)), sizes)
            means = torch.zeros(len(block), size, dtype=torch.float64)
            for some in torch.arange(len(rows)).split(together):  # a patient may have any number of images
                of_images = vectors(values[rows[some]], octaves[rows[some]], members[rows[some]], self.form)
                means.index_add_(0, whose[some], of_images / sizes[whose[some]][:, None])
            yield means

    def bounded(self, of_units: Tensor) -> Tensor:
        """Return vectors of units as integers, none longer than 1."""
        return in_grains(of_units)

    def noised(self, exact: Tensor, noise: float, entropy: Entropy) -> Tensor:
        """Return sums with Gaussian noise of this standard deviation on every number, float64."""
        (drawn,) = entropy.normal([exact.shape], torch.device("cpu"))
        return exact + noise * drawn.double()
