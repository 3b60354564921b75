"""Over which sites a hospital has unmasked secure sums, so that no two of them give away a single one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from chainward_client.kept_records import locked, read_kept, write_kept
from chainward_shared.bounds import PositiveFraction
from chainward_shared.errors import PolicyRefusal
from chainward_shared.outside import SiteId

Kind = Literal["statistics", "students", "scores"]
"""Of which numbers a sum is: from sums of two kinds no difference can be taken."""


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


def add_given(file: Path, weights: Mapping[str, float], kind: Kind) -> None:
    """Note a sum that is unmasked, unless it and some of those known are together the numbers of a single site.

    Parameters
    ----------
    file : where the site remembers them
    weights : what the numbers of each site in the sum were multiplied by

    Raises
    ------
    PolicyRefusal
        They are.
    StoreError
        The file can't be read or written.
    """
    with locked(file):
        known = read_kept(file, _Sets) or _Sets()
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
        write_kept(file, known)


def singled_out(sums: Sequence[Mapping[str, float]]) -> str | None:
    """Return a site whose numbers alone are a combination of these sums, of sites times weights; None where there is none."""
    sites = sorted({site for weights in sums for site in weights})
    rows = np.array([[weights.get(site, 0.0) / max(weights.values()) for site in sites] for weights in sums])
    rank = np.linalg.matrix_rank(rows)
    for site, alone in zip(sites, np.eye(len(sites)), strict=True):
        if np.linalg.matrix_rank(np.vstack([rows, alone])) == rank:
            return site
    return None
