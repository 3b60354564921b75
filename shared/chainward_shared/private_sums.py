"""Sums over embeddings that can leave a site with noise: what each patient adds is one vector no longer than 1.

An embedding is first brought into a frame that the coordinator chose without looking at this release: moved by a centre,
projected on axes, and shortened to length 1 if it is longer. From an image with the classes u and the embedding z comes the
vector of u, the logarithm of the length that z had, u times z and, where the form has them, the products of the values of z with
each other, with weights of which the squares add up to 1; a patient adds the mean of these vectors. Whatever the images, the
model and the frame, it is no longer than 1 (`LENGTH`).

Vectors are cut to multiples of `GRAIN` towards 0 and summed up as integers: a sum with a patient and one without differ by that
patient's vector exactly, in whatever order they are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from chainward_shared.discriminant import finite, symmetric
from chainward_shared.outside import Record

LENGTH = 1.0
"""What one patient (or image) adds is no longer than this."""

GRAIN = 2.0**-32
"""Of which every number that a patient adds is a multiple: 2^31 patients can be summed up exactly."""

MOST_DIMENSIONS = 4096

_SHARES = {
    (True, False): (0.1, 0.02, 0.88, 0.0),
    (True, True): (0.1, 0.02, 0.58, 0.3),
    (False, False): (0.05, 0.05, 0.9, 0.0),
}
"""Squared weights of members, lengths, sums and moments in a patient's vector, by whether classes are told apart and whether
there are moments."""

_OCTAVES = 12.0
"""Lengths are told from 2^-12 to 2^12 of what the frame makes 1."""


class SumsForm(Record):
    """What private sums consist of. It travels with the task, and the same form goes to every site.

    `dimension`: of embeddings in the frame. `labels`: whether classes are told apart; False: all images are one group.
    `moments`: whether second moments are among them, which only those that tell classes apart have.
    """

    dimension: Annotated[int, Field(ge=1, le=MOST_DIMENSIONS)]
    labels: bool
    moments: bool

    @model_validator(mode="after")
    def _moments_go_with_labels(self) -> SumsForm:
        if self.moments and not self.labels:
            raise ValueError("second moments go with sums that tell classes apart")
        return self

    def weights(self) -> dict[str, float]:
        """Return the weight of each part of a patient's vector."""
        shares = zip(("members", "lengths", "sums", "moments"), _SHARES[self.labels, self.moments], strict=True)
        return {name: share**0.5 for name, share in shares if share}

    def groups(self, classes: int, *, multilabel: bool) -> int:
        """Return how many groups of images are told apart; see `memberships`."""
        return (classes + multilabel) if self.labels else 1

    def sizes(self, groups: int) -> dict[str, int]:
        """Return how many numbers each part has."""
        d = self.dimension
        whole = {"members": groups, "lengths": 1, "sums": groups * d, "moments": d * (d + 1) // 2}
        return {name: whole[name] for name in self.weights()}


@dataclass(frozen=True)
class Frame:
    """Where embeddings are looked at: ``axes @ (embedding - centre)``, float64 (d,) and (dimension, d)."""

    centre: Tensor
    axes: Tensor

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Frame:
        """Return the frame that `state` made tensors of."""
        return cls(state["centre"], state["axes"])

    def state(self) -> dict[str, Tensor]:
        """Return the frame as tensors, as it travels."""
        return {"centre": self.centre, "axes": self.axes}

    def within(self, embeddings: Tensor) -> Tensor:
        """Return embeddings (n, d) in the frame, at their full length, float64 (n, dimension)."""
        return finite((finite(embeddings) - self.centre) @ self.axes.T)


def frame_template(dimension: int, size: int) -> dict[str, Tensor]:
    """Return names, shapes and dtypes of a frame for embeddings of `size` numbers, as it travels."""
    return Frame(torch.zeros(size, dtype=torch.float64), torch.zeros((dimension, size), dtype=torch.float64)).state()


def shortened(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows with those that are longer than 1 shortened to that, and of each its length, from -1 (2^-12 and less) to 1."""
    lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    octaves = lengths.clamp(min=2.0**-_OCTAVES, max=2.0**_OCTAVES).log2() / _OCTAVES
    return values / lengths.clamp(min=1.0), octaves


def memberships(labels: Tensor, classes: int, form: SumsForm) -> Tensor:
    """Return of each image one vector of length 1 at most that says of which groups it is, float64 (n, groups).

    Its class, as one of `classes`; multi-label: that it is there, and its findings, ``1 + classes`` values of the same size.
    """
    if not form.labels:
        return torch.ones(len(labels), 1, dtype=torch.float64)
    if labels.ndim == 1:
        return torch.nn.functional.one_hot(labels.long(), classes).double()
    present = torch.cat([torch.ones(len(labels), 1), labels.clamp(0, 1)], dim=1).double()
    return present / (1 + classes) ** 0.5


def vectors(values: Tensor, octaves: Tensor, members: Tensor, form: SumsForm) -> Tensor:
    """Return the vector of each image, no longer than 1, float64 (n, m).

    Parameters
    ----------
    values, octaves : embeddings in the frame, `shortened`, (n, dimension) and (n, 1)
    members : as of `memberships`, (n, groups)
    """
    weights = form.weights()
    parts = [weights["members"] * members, weights["lengths"] * octaves]
    parts += [weights["sums"] * (members[:, :, None] * values[:, None, :]).flatten(1)]
    if form.moments:
        rows, columns = np.triu_indices(form.dimension)
        twice = torch.where(torch.from_numpy(rows == columns), 1.0, 2.0**0.5).double()  # as long as the whole matrix
        parts.append(weights["moments"] * twice * values[:, rows] * values[:, columns])
    return torch.cat(parts, dim=1)


def in_grains(of_units: Tensor) -> Tensor:
    """Return vectors (n, m) in whole `GRAIN`s, none longer than 1, int64."""
    lengths = torch.linalg.vector_norm(of_units, dim=1, keepdim=True)
    below = 1 - 2.0**-40  # what rounding could add to a length of 1
    return (of_units / lengths.clamp(min=LENGTH) * (below / GRAIN)).trunc().long()


@dataclass(frozen=True)
class NoisySums:
    """Sums of one site or of several, with noise, in a frame.

    Attributes
    ----------
    members : units of each group, (groups,)
    length : geometric mean of the embeddings' lengths in the frame
    sums : of their embeddings, (groups, dimension)
    moments : of all units, (dimension, dimension); None where the form has none
    noise : standard deviation of the noise in each number of `members`, `sums` and `moments`, by name; that of the moments off
        the diagonal is smaller by the square root of 2
    """

    members: np.ndarray
    length: float
    sums: np.ndarray
    moments: np.ndarray | None
    noise: dict[str, float]

    @classmethod
    def of(cls, release: np.ndarray, noise: float, form: SumsForm, groups: int) -> NoisySums:
        """Return what a release, float64 (m,), says, where every number in it has noise of this standard deviation."""
        sizes, weights = form.sizes(groups), form.weights()
        split = np.split(np.asarray(release, dtype=np.float64), np.cumsum(list(sizes.values()))[:-1])
        parts = {name: part / weights[name] for name, part in zip(sizes, split, strict=True)}
        moments = None
        if form.moments:
            rows, columns = np.triu_indices(form.dimension)
            moments = symmetric(parts["moments"] / np.where(rows == columns, 1, 2**0.5), form.dimension)
        sums = parts["sums"].reshape(groups, form.dimension)
        mean = float(parts["lengths"][0]) / max(1.0, float(parts["members"].sum()))
        length = 2.0 ** (_OCTAVES * min(1.0, max(-1.0, mean)))
        noises = {name: noise / weight for name, weight in weights.items()}
        return cls(parts["members"], length, sums, moments, noises)
