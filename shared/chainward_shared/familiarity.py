"""How far an image is from the training images, by its embedding: what a model knows of the images that it was made from.

The squared Mahalanobis distance to one normal distribution of all training images (Lee et al. 2018, arXiv:1807.03888, but without
telling classes apart, which changes little for images of another kind: Ren et al. 2021, arXiv:2106.09022). Its covariance is
that of a factor model: a few axes, and a variance of its own for what is left of each number. All follows from the sums of a
statistics round, and so does the mean distance of validation images, in which distances are told; a quantile of theirs doesn't.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, StringConstraints, ValidationError, model_validator

from chainward_shared.errors import ModelError
from chainward_shared.outside import Count, Positive, Record
from chainward_shared.words import first_problem

if TYPE_CHECKING:  # PyTorch: whoever only reads a file's record need not wait for it
    from chainward_shared.discriminant import HeadSums

FAMILIAR_WITHIN = 3.0
"""Times the mean distance of validation images up to which an image counts as one of their kind. Of images like them no more than
a third can be further (Markov's inequality), and far fewer are."""

AXES = 32
IMAGES_PER_AXIS = 16
"""Training images for each axis, at least: none shows what a few images look like."""

FEWEST_VALIDATION = 30
"""Validation images from which the mean of their distances is taken."""

_FLOOR = 1e-4
"""Of the mean variance, added to every other: a number that never varied in training would else make anything infinitely far."""

_Packed = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]*={0,2}$", max_length=2**24)]


class MetadataRecord(Record):
    """What a model file says in its metadata, under a key of its own."""

    KEY: ClassVar[str]

    def to_metadata(self) -> dict[str, str]:
        """Return it as metadata of a safetensors or ONNX file."""
        return {self.KEY: self.model_dump_json()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self | None:
        """Return what `to_metadata` wrote; None where nothing is written.

        Raises
        ------
        ModelError
            It is damaged, or of a later version.
        """
        if cls.KEY not in metadata:
            return None
        try:
            return cls.model_validate_json(metadata[cls.KEY])
        except ValidationError as error:
            raise ModelError(f"the file's '{cls.KEY}' is damaged: {first_problem(error)}") from error


class Familiarity(MetadataRecord):
    """A normal distribution of embeddings, and how far validation images are from its middle.

    Arrays are base64 of little-endian float32.

    Attributes
    ----------
    size : of an embedding, d
    mean : (d,)
    axes : directions in which training images vary most, of length 1, (k, d)
    along : variance along each, (k,)
    beside : variance of what is left of each number of the embedding, (d,)
    usual : mean squared distance of the validation images
    train, validation : how many images it follows from
    """

    KEY: ClassVar[str] = "chainward.familiarity"

    size: Positive
    mean: _Packed
    axes: _Packed
    along: _Packed
    beside: _Packed
    usual: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    train: Count
    validation: Count

    @model_validator(mode="after")
    def _is_a_distribution(self) -> Familiarity:
        arrays = self.arrays
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("holds numbers that are not finite")
        if min(arrays["along"].min(initial=1), arrays["beside"].min()) <= 0:
            raise ValueError("holds a variance that isn't above 0")
        return self

    @classmethod
    def of_sums(cls, train: HeadSums, validation: HeadSums) -> Familiarity | None:
        """Return what follows from sums over training and validation images; None where they are too few, or all alike."""
        count, size = round(float(train.images)), len(train.total)
        axes = min(AXES, size - 1, count // IMAGES_PER_AXIS)
        if axes < 1 or float(validation.images) < FEWEST_VALIDATION:
            return None
        middle = train.total if train.weights is None else train.weights @ train.sums
        mean = _rounded(middle.numpy() / train.counted)
        covariance = train.second_moments / train.counted - np.outer(mean, mean)
        values, basis = np.linalg.eigh(covariance)
        level = float(values.clip(min=0).mean())
        if level <= np.finfo(np.float32).tiny:
            return None
        along, directions = values[::-1][:axes].clip(min=0), _rounded(basis.T[::-1][:axes])
        left = (np.diag(covariance) - along @ np.square(directions)).clip(min=0)
        around = _second_moments_around(mean, validation)
        arrays = {"mean": mean, "axes": directions, "along": along + _FLOOR * level, "beside": left + _FLOOR * level}
        packed = {name: _packed(array) for name, array in arrays.items()}
        usual = _mean_distance(around, *(_rounded(arrays[name]) for name in ("axes", "along", "beside")))
        if not 0 < usual < np.inf:
            return None
        return cls(size=size, **packed, usual=usual, train=count, validation=round(float(validation.images)))

    def distances(self, embeddings: np.ndarray) -> np.ndarray:
        """Return how far embeddings (n, d) are, squared, in units of what is usual: 1 is the mean of validation images, (n,)."""
        from chainward_shared.discriminant import LARGEST

        arrays = self.arrays
        finite = np.nan_to_num(np.asarray(embeddings, np.float64), nan=0.0, posinf=LARGEST, neginf=-LARGEST)
        away = finite.clip(-LARGEST, LARGEST) - arrays["mean"]
        places = away @ arrays["axes"].T
        left = away - places @ arrays["axes"]
        found: np.ndarray = np.square(places) @ (1 / arrays["along"]) + np.square(left) @ (1 / arrays["beside"])
        return found / self.usual

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, float64.

        Raises
        ------
        ValueError
            One has another shape than the others say.
        """
        flat = {name: _unpacked(getattr(self, name), name) for name in _ARRAYS}
        shape = len(flat["along"]), self.size
        if (len(flat["mean"]), len(flat["beside"]), len(flat["axes"])) != (self.size, self.size, shape[0] * shape[1]):
            raise ValueError(f"its arrays are not those of {shape[0]} axes and embeddings of {self.size} numbers")
        return flat | {"axes": flat["axes"].reshape(shape)}


_ARRAYS, _TYPE = ("mean", "axes", "along", "beside"), np.dtype("<f4")


def _second_moments_around(mean: np.ndarray, sums: HeadSums) -> np.ndarray:
    n, middle = float(sums.images), sums.total.numpy() / float(sums.images)
    found: np.ndarray = sums.second_moments / n - np.outer(middle, mean) - np.outer(mean, middle) + np.outer(mean, mean)
    return found


def _mean_distance(moments: np.ndarray, axes: np.ndarray, along: np.ndarray, beside: np.ndarray) -> float:
    """Return the mean squared distance of images with these second moments around the mean, (d, d)."""
    projected = axes @ moments
    inner = projected @ axes.T
    left = np.diag(moments) - 2 * np.einsum("kd,kd->d", axes, projected) + np.einsum("kd,kl,ld->d", axes, inner, axes)
    return float(np.diag(inner) @ (1 / along) + left @ (1 / beside))


def _rounded(array: np.ndarray) -> np.ndarray:
    """Return an array as it comes out of a file."""
    return np.asarray(array).astype(_TYPE).astype(np.float64)


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).astype(_TYPE).tobytes()).decode()


def _unpacked(text: str, name: str) -> np.ndarray:
    data = base64.b64decode(text, validate=True)
    if len(data) % _TYPE.itemsize:
        raise ValueError(f"'{name}' is not whole")
    return np.frombuffer(data, _TYPE).astype(np.float64)
