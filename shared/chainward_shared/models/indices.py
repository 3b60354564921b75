"""Which of a teacher's channels a student takes along one axis."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, TypeAlias

import torch

from chainward_shared.errors import ModelError

Variant: TypeAlias = Literal["A", "B"]


def uniform_indices(teacher: int, student: int, variant: Variant = "A") -> torch.LongTensor:
    """Return the `student` channels, ascending, that are taken out of `teacher` ones. Shape (student,),
    int64.

    "A" is uniform selection (Xu et al., "Initializing Models with Larger Ones", ICLR 2024, arXiv 2311.18823,
    section 3): every ``teacher / student``-th channel from 0 where that is whole, else ``round(linspace(0,
    teacher - 1, student))``. "B" is a second selection that shares as few channels with "A" as the sizes
    allow, none at all when the student is at most half as wide: "A" moved by one channel where the ratio is
    whole, else evenly out of the channels "A" left over, which are filled up with channels of "A" where they
    are too few. With equal sizes both are the identity.

    Raises:
        ModelError: `student` is not within 1..`teacher`, or `variant` is neither "A" nor "B".
    """
    if not 1 <= student <= teacher:
        raise ModelError(
            f"can't select {student} channels out of {teacher}: choose a student of 1 to {teacher} channels"
        )
    if variant not in ("A", "B"):
        raise ModelError(f"weight selection has no variant '{variant}': choose 'A' or 'B'")
    indices = _even(teacher, student) if variant == "A" else _odd(teacher, student)
    return torch.tensor(indices, dtype=torch.int64)  # type: ignore[return-value]


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
