"""Kinds of backbones whose weights can be selected: one file each.

A new family is a new file in this folder with a subclass of `Family` under `@register`; nothing else needs to
change.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from pydantic import JsonValue

from chainward_shared.models.indices import Axis, Picker

AxisLabels: TypeAlias = tuple[str | None, ...]


class Family(ABC):
    """What weight selection must know about one kind of backbone.

    Models are passed as timm builds them; they may be on the meta device, only shapes are looked at.
    """

    name: ClassVar[str]
    examples: ClassVar[str]
    """Some timm names, for messages."""
    size_options: ClassVar[frozenset[str]]
    """The arguments of `timm.create_model` that set widths and depths."""
    classifier: ClassVar[re.Pattern[str]]
    """Matches the parameters of the last layer, the one with an output for each class."""
    layer: ClassVar[re.Pattern[str]]
    """Matches the start of the names of one layer's parameters, up to its number, which is the last group; the group
    before it is what the layer counts in: the model or a stage."""
    resamples_patches: ClassVar[bool] = False
    """Whether a student may have another patch size than its teacher; see `resampled`."""
    rules: ClassVar[tuple[tuple[re.Pattern[str], AxisLabels], ...]]
    """Pattern of a parameter's full name -> labels of its leading axes; None or no label keeps an axis whole.

    A bias has the first of its weight's labels; a number has none. ``{0}`` in a label is the first group of the
    pattern.
    """

    @abstractmethod
    def matches(self, model: Any) -> bool:
        """Tell whether `model` is of this family."""

    @abstractmethod
    def sizes(self, model: Any) -> dict[str, int]:
        """Return every width and depth by a name for messages; none may be larger in a student than in its
        teacher."""

    @abstractmethod
    def scaled_options(self, model: Any, width: float, depth: float) -> dict[str, JsonValue]:
        """Return the timm arguments of the same model with its widths and depths multiplied."""

    @abstractmethod
    def channels(self, teacher: Any, student: Any, picker: Picker) -> Mapping[str, Axis]:
        """Return the selection along each axis that `rules` label.

        Raises
        ------
        ModelError
            The kind of selection does not suit the models.
        """

    def patch_size(self, model: Any) -> int:
        """Return the side in pixels of the patches that the model cuts its image into; by default 0: it does not."""
        return 0

    def default_options(self, model: Any) -> dict[str, JsonValue]:
        """Return the timm arguments with which the chain builds a model of this family unless told otherwise."""
        return {}

    def kept_options(self, teacher: Any) -> dict[str, JsonValue]:
        """Return the timm arguments that give a student by another name what its teacher has and timm builds the name without."""
        return {}

    def difference(self, teacher: Any, student: Any) -> str:
        """Return in a few words in what, sizes and names aside, the student is built otherwise than its teacher, or
        an empty string."""
        return ""

    def resampled(self, parameter: str, weights: torch.Tensor, teacher: Any, student: Any) -> torch.Tensor:
        """Return selected `weights` as the student's image and patch size needs them; by default as they are."""
        return weights

    def labels(self, parameter: str) -> AxisLabels | None:
        """Return the labels of the leading axes of `parameter`, or None if no rule covers it."""
        for pattern, labels in self.rules:
            if match := pattern.fullmatch(parameter):
                return tuple(label and label.format(*match.groups()) for label in labels)
        return None


_REGISTERED: dict[str, Family] = {}
AnyFamily = TypeVar("AnyFamily", bound=type[Family])


def register(family: AnyFamily) -> AnyFamily:
    """Add a family to those that are supported."""
    _REGISTERED[family.name] = family()
    return family


@cache
def _families() -> dict[str, Family]:
    """Return the families by name, with every file of this folder imported, which imports timm."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _REGISTERED


def size_options() -> frozenset[str]:
    """Return the arguments of timm that decide the size of a model of some family."""
    return frozenset().union(*(family.size_options for family in _families().values()))


def describe_families() -> str:
    """Return the supported families with examples, for a message."""
    return "; ".join(f"{name} ({family.examples})" for name, family in sorted(_families().items()))


def find_family(model: Any) -> Family | None:
    """Return the family that `model` belongs to, or None."""
    return next((family for family in _families().values() if family.matches(model)), None)


def scaled_width(width: int, factor: float, multiple: int = 8) -> int:
    """Return ``width * factor`` rounded to the nearest `multiple`, halves up, and at least one `multiple`."""
    return max(1, int(width * factor / multiple + 0.5)) * multiple


def scaled_depth(depth: int, factor: float) -> int:
    """Return ``depth * factor`` rounded to a whole number, halves up, and at least 1."""
    return max(1, int(depth * factor + 0.5))
