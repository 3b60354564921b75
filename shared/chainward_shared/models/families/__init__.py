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
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from pydantic import JsonValue

from chainward_shared.models.indices import Variant, uniform_indices

AxisLabels: TypeAlias = tuple[str | None, ...]


@dataclass(frozen=True)
class Axis:
    """One channel axis: its size in the teacher, and the channels (student,) that are taken out of it."""

    size: int
    indices: torch.Tensor

    @classmethod
    def uniform(cls, teacher: int, student: int, variant: Variant) -> Axis:
        """Return the axis under `uniform_indices`."""
        return cls(teacher, uniform_indices(teacher, student, variant))

    def repeated(self, times: int) -> Axis:
        """Return `times` such axes laid end to end, as in a fused projection: the same channels out of each
        part."""
        parts = [self.indices + part * self.size for part in range(times)]
        return Axis(self.size * times, torch.cat(parts))


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
    rules: ClassVar[tuple[tuple[re.Pattern[str], AxisLabels], ...]]
    """Pattern of a parameter's full name -> labels of its leading axes; None or no label keeps an axis whole.

    A bias has the first of its weight's labels. ``{0}`` in a label is the first group of the pattern.
    """

    @abstractmethod
    def matches(self, model: Any) -> bool:
        """Tell whether `model` is of this family."""

    @abstractmethod
    def sizes(self, model: Any) -> dict[str, int]:
        """Return every width and depth by a name for messages; none may be larger in a student than in its
        teacher."""

    @abstractmethod
    def patch_size(self, model: Any) -> int:
        """Return the side in pixels of the patches that the model cuts its image into; 0 if it does not."""

    @abstractmethod
    def scaled_options(self, model: Any, width: float, depth: float) -> dict[str, JsonValue]:
        """Return the timm arguments of the same model with its widths and depths multiplied."""

    @abstractmethod
    def channels(self, teacher: Any, student: Any, variant: Variant) -> Mapping[str, Axis]:
        """Return the selection along each axis that `rules` label."""

    def labels(self, parameter: str) -> AxisLabels | None:
        """Return the labels of the leading axes of `parameter`, or None if no rule covers it."""
        for pattern, labels in self.rules:
            if match := pattern.fullmatch(parameter):
                return tuple(label and label.format(*match.groups()) for label in labels)
        return None


_FAMILIES: dict[str, Family] = {}
AnyFamily = TypeVar("AnyFamily", bound=type[Family])


def register(family: AnyFamily) -> AnyFamily:
    """Add a family to those that are supported."""
    _FAMILIES[family.name] = family()
    return family


def supported_families() -> tuple[str, ...]:
    """Return the names of the families whose weights can be selected."""
    return tuple(sorted(_FAMILIES))


def describe_families() -> str:
    """Return the supported families with examples, for a message."""
    return "; ".join(f"{name} ({_FAMILIES[name].examples})" for name in supported_families())


def find_family(model: Any) -> Family | None:
    """Return the family that `model` belongs to, or None."""
    return next((family for family in _FAMILIES.values() if family.matches(model)), None)


def scaled_width(width: int, factor: float, multiple: int = 8) -> int:
    """Return ``width * factor`` rounded to the nearest `multiple`, halves up, and at least one `multiple`."""
    return max(1, int(width * factor / multiple + 0.5)) * multiple


def scaled_depth(depth: int, factor: float) -> int:
    """Return ``depth * factor`` rounded to a whole number, halves up, and at least 1."""
    return max(1, int(depth * factor + 0.5))


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
