"""Over which sites a hospital has unmasked secure sums, so that no two of them give away a single one; and how sums are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainward_shared.bounds import PositiveFraction
from chainward_shared.errors import PolicyRefusal, StoreError
from chainward_shared.files import write_atomically
from chainward_shared.outside import SiteId
from chainward_shared.words import first_problem

Kind = Literal["statistics", "students", "scores"]
"""Of which numbers a sum is: from sums of two kinds no difference can be taken."""

LONGEST_ANSWER = 60.0
"""Seconds that a question waits for another one about the same sum."""


class _Sets(BaseModel):
    """Of each kind of sum the sets of sites; `sets`: of statistics; `students`: with the weight of each site in the mean."""

    model_config = ConfigDict(extra="forbid")

    sets: list[list[SiteId]] = Field(default_factory=list)
    scores: list[list[SiteId]] = Field(default_factory=list)
    students: list[dict[SiteId, PositiveFraction]] = Field(default_factory=list)

    def weights(self, kind: Kind) -> list[dict[str, float]]:
        if kind == "students":
            return [dict(one) for one in self.students]
        return [dict.fromkeys(one, 1.0) for one in (self.sets if kind == "statistics" else self.scores)]

    def add(self, weights: Mapping[str, float], kind: Kind) -> None:
        if kind == "students":
            self.students.append(dict(weights))
        else:
            (self.sets if kind == "statistics" else self.scores).append(sorted(weights))


class GivenSums:
    """The sites over which a site has unmasked sums, and what each was multiplied by."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, weights: Mapping[str, float], kind: Kind) -> None:
        """Note a sum, unless it and some of those known are together the numbers of a single site.

        Parameters
        ----------
        weights : what the numbers of each site in it were multiplied by

        Raises
        ------
        PolicyRefusal
            They are.
        StoreError
            The file can't be read or written.
        """
        with locked(self.file):
            known = read_kept(self.file, _Sets) or _Sets()
            sums, new = known.weights(kind), dict(sorted(weights.items()))
            if new in sums:
                return
            if alone := singled_out([*sums, new]):
                raise PolicyRefusal(
                    f"from this sum and earlier ones the numbers of site '{alone}' alone would follow if the models are alike; "
                    "wait until the same sites are there as before, with the same weights (or set secure_sums.differences: true "
                    "in each site.yaml)"
                )
            known.add(new, kind)
            write_kept(self.file, known)


def singled_out(sums: Sequence[Mapping[str, float]]) -> str | None:
    """Return a site whose numbers alone are a combination of these sums, of sites times weights; None where there is none."""
    sites = sorted({site for weights in sums for site in weights})
    rows = np.array([[weights.get(site, 0.0) / max(weights.values()) for site in sites] for weights in sums])
    rank = np.linalg.matrix_rank(rows)
    for site, alone in zip(sites, np.eye(len(sites)), strict=True):
        if np.linalg.matrix_rank(np.vstack([rows, alone])) == rank:
            return site
    return None


M = TypeVar("M", bound=BaseModel)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Let no other process work on a file meanwhile.

    Raises
    ------
    StoreError
        Its folder can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(file.with_suffix(".lock"), timeout=LONGEST_ANSWER, mode=0o600)
        lock.acquire()
    except OSError as error:
        raise StoreError(f"{file.parent}: can't be written ({error}); free space or fix its rights") from error
    try:
        yield
    finally:
        lock.release()


def read_kept(file: Path, model: type[M]) -> M | None:
    """Return what was kept in a file; None where there is none. Raises `StoreError` where it can't be read."""
    try:
        return model.model_validate_json(file.read_bytes()) if file.exists() else None
    except (OSError, ValidationError) as error:
        raise StoreError(f"{file}: damaged ({first_problem(error)}); restore it from a backup") from error


def write_kept(file: Path, model: BaseModel) -> None:
    """Keep something in a file, for its owner alone. Raises `StoreError` where it can't be written."""
    try:
        write_atomically(file, model.model_dump_json().encode(), mode=0o600)
    except OSError as error:
        raise StoreError(f"{file}: can't be written ({error.strerror}); free space or fix its rights") from error
