"""Which of a teacher's channels and layers a student takes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

import torch

from chainward_shared.errors import ModelError
from chainward_shared.seeds import torch_generator
from chainward_shared.settings import ChannelSelection, HeadSelection, LayerSelection

Variant: TypeAlias = Literal["A", "B"]


@dataclass(frozen=True)
class Selection:
    """How weights are selected (Xu et al. 2024, arXiv:2311.18823).

    Attributes
    ----------
    channels : "strided", the default: evenly spread, see `select_indices`. "consecutive": A the first channels,
        B those that follow. "random": one draw for each channel axis, the same wherever that axis occurs; B takes
        what A left. "random-inconsistent": a draw for each tensor, a control that shows what consistency is worth.
    heads : attention of a ViT. "whole", the default: whole heads, the same channels inside each. "mixed": the
        channels of all heads, laid end to end, as one axis, the same of queries, keys and values; the paper's.
    layers : "first", the default and the paper's: the first layers (of each stage). "spread": evenly over the
        depth, first and last included.
    seed : of the random draws. Default 0.
    """

    channels: ChannelSelection = "strided"
    heads: HeadSelection = "whole"
    layers: LayerSelection = "first"
    seed: int = 0


def select_indices(
    teacher: int, student: int, variant: Variant, channels: ChannelSelection, generator: torch.Generator
) -> torch.LongTensor:
    """Return the `student` channels, ascending, that are taken out of `teacher` ones. Shape (student,), int64.

    "A" and "B" share as few channels as the sizes allow, none when the student is at most half as wide; with equal
    sizes both are the identity.

    Strided, "A" is uniform selection (Xu et al. 2024, section 3): every ``teacher / student``-th channel from 0 where that
    is whole, else ``round(linspace(0, teacher - 1, student))``. "B" is "A" moved by one channel where the ratio is whole,
    else evenly out of the channels "A" left over, which are filled up with channels of "A" where they are too few.

    Parameters
    ----------
    generator : draws where `channels` is random; A and B need one of the same seed each.

    Raises
    ------
    ModelError
        `student` is not within 1..`teacher`, or `variant` or `channels` is unknown.
    """
    if not 1 <= student <= teacher:
        raise ModelError(
            f"can't select {student} channels out of {teacher}: choose a student of 1 to {teacher} channels"
        )
    if variant not in ("A", "B"):
        raise ModelError(f"weight selection has no variant '{variant}': choose 'A' or 'B'")
    if channels == "strided":
        indices = _even(teacher, student) if variant == "A" else _odd(teacher, student)
        return torch.tensor(indices, dtype=torch.int64)  # type: ignore[return-value]
    if channels == "consecutive":
        first = 0 if variant == "A" else min(student, teacher - student)
        return torch.arange(first, first + student)  # type: ignore[return-value]
    if channels not in ("random", "random-inconsistent"):
        raise ModelError(
            f"weight selection has no channels '{channels}': choose strided, consecutive, random or random-inconsistent"
        )
    drawn = torch.randperm(teacher, generator=generator)
    if variant == "B":  # what A left, filled up with channels of A where that is too few
        drawn = torch.cat([drawn[student:], drawn[:student]])
    return drawn[:student].sort().values  # type: ignore[return-value]


def select_layers(teacher: int, student: int, layers: LayerSelection) -> list[int]:
    """Return which of `teacher` layers the `student` ones are, ascending; see `Selection`. 1 of many is the first."""
    if layers == "first":
        return list(range(student))
    if layers == "spread":
        return _spread(teacher, student)
    raise ModelError(f"weight selection has no layers '{layers}': choose first or spread")


@dataclass(frozen=True)
class Axis:
    """One channel axis: its size in the teacher, and the channels (student,) that are taken out of it."""

    size: int
    indices: torch.Tensor

    def repeated(self, times: int) -> Axis:
        """Return `times` such axes laid end to end, as in a fused projection: the same channels out of each
        part."""
        parts = [self.indices + part * self.size for part in range(times)]
        return Axis(self.size * times, torch.cat(parts))


@dataclass(frozen=True)
class Picker:
    """Selects along the channel axes of one teacher and student.

    Attributes
    ----------
    tensor : the parameter that is selected, where each has a draw of its own; else empty.
    """

    selection: Selection
    variant: Variant
    tensor: str = ""

    def indices(self, axis: str, teacher: int, student: int) -> torch.LongTensor:
        """Return the channels of the axis called `axis`; the name decides a random draw."""
        generator = torch_generator(self.selection.seed, "student", "selection", axis, self.tensor)
        return select_indices(teacher, student, self.variant, self.selection.channels, generator)

    def axis(self, name: str, teacher: int, student: int, groups: int = 1) -> Axis:
        """Return the selection along one axis.

        Parameters
        ----------
        groups : equal parts of the axis that are normalised each by itself, as many in teacher and student. The
            same channels are taken out of each part, so that a part of the student is a sample of one part of
            the teacher and its mean and variance estimate that part's.
        """
        channels = self.indices(name, teacher // groups, student // groups)
        starts = torch.arange(groups) * (teacher // groups)
        return Axis(teacher, (starts.unsqueeze(1) + channels).flatten())


def _even(teacher: int, student: int) -> list[int]:
    if teacher % student == 0:
        return list(range(0, teacher, teacher // student))
    return _spread(teacher, student)


def _odd(teacher: int, student: int) -> list[int]:
    even = _even(teacher, student)
    if teacher == student:
        return even
    if teacher % student == 0:
        return [index + 1 for index in even]
    rest = sorted(set(range(teacher)) - set(even))
    if len(rest) >= student:
        return [rest[position] for position in _spread(len(rest), student)]
    return sorted(rest + [even[position] for position in _spread(student, student - len(rest))])


def _spread(length: int, count: int) -> list[int]:
    """Return ``round(linspace(0, length - 1, count))``, halves to even."""
    if count == 1:
        return [0]
    # exact fractions: a half that floating point misses would give sites of one chain different students
    return [round(Fraction(i * (length - 1), count - 1)) for i in range(count)]
