"""One interface over every kind of site data: what training and evaluation see, wherever the images come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class PrivilegedCases:
    """What only the hospital may see of its cases; row i belongs to image i. Never leaves the site.

    Attributes
    ----------
    texts : one free-text report per case, None where missing; or None if the site has no reports
    table : one value per case for each tabular column (float or category), None where missing; or None
    masks : uint8 (n, H, W), 1 inside the region of interest; for scoring only; or None
    """

    texts: tuple[str | None, ...] | None = None
    table: Mapping[str, tuple[float | str | None, ...]] | None = None
    masks: torch.Tensor | None = None


@dataclass(frozen=True)
class Cases:
    """The cases of one split, decoded and in memory.

    Attributes
    ----------
    images : uint8 (n, channels, H, W)
    labels : int64 (n,), index into the site's classes
    patients : str (n,), the patient (or lesion) of each image; the unit of splitting
    privileged : reports, table and regions of interest of the same cases
    """

    images: torch.Tensor
    labels: torch.Tensor
    patients: np.ndarray
    privileged: PrivilegedCases = field(default_factory=PrivilegedCases)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SiteData:
    """All that one site trains and is evaluated on.

    Attributes
    ----------
    site : id of the site
    classes : class names, in the order of the label indices
    splits : the cases of "train", "val" and "test"
    synthetic : True for phantoms; shown wherever results are shown
    notes : one line each, things a person should know about this site's data (a class without cases, say)
    """

    site: str
    classes: tuple[str, ...]
    splits: Mapping[SplitName, Cases]
    synthetic: bool = False
    notes: tuple[str, ...] = ()

    def class_counts(self, split: SplitName) -> list[int]:
        """Return the number of cases of each class in `split`, in the order of `classes`."""
        return torch.bincount(self.splits[split].labels, minlength=len(self.classes)).tolist()
