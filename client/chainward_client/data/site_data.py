"""One interface over every kind of site data: what training and evaluation see, wherever the images come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from chainward_client.data.columns import TabularColumn
from chainward_client.data.scale import Scale
from chainward_shared.distillation.losses import class_counts
from chainward_shared.preparation import Preparation
from chainward_shared.task import Task

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")

_Cell = TypeVar("_Cell")


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

    def take(self, rows: list[int] | slice) -> PrivilegedCases:
        """Return what belongs to the images `rows`, in that order; of a slice the masks are a view."""

        def taken(values: tuple[_Cell, ...]) -> tuple[_Cell, ...]:
            return values[rows] if isinstance(rows, slice) else tuple(values[row] for row in rows)

        return PrivilegedCases(
            texts=None if self.texts is None else taken(self.texts),
            table=None if self.table is None else {name: taken(values) for name, values in self.table.items()},
            masks=None if self.masks is None else self.masks[rows],
        )


@dataclass(frozen=True)
class Cases:
    """The cases of one split, decoded and in memory.

    Attributes
    ----------
    images : uint8 (n, channels, H, W)
    labels : int64 (n,), index into the site's classes; multi-label: float32 (n, classes), 1 for each finding, else 0
    patients : str (n,), the patient (or lesion) of each image; the unit of splitting
    privileged : reports, table and regions of interest of the same cases
    """

    images: torch.Tensor
    labels: torch.Tensor
    patients: np.ndarray
    privileged: PrivilegedCases = field(default_factory=PrivilegedCases)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | np.ndarray | slice) -> Cases:
        """Return the cases `rows`, in that order; of a slice the tensors are views."""
        chosen = rows if isinstance(rows, slice) else [int(row) for row in rows]
        return Cases(self.images[chosen], self.labels[chosen], self.patients[chosen], self.privileged.take(chosen))


@dataclass(frozen=True)
class PrivilegedSetup:
    """How a site's privileged teachers read its reports and table. Never leaves the site.

    Attributes
    ----------
    columns : the table's columns that the teachers may read, with their declared ranges or values
    label_words : words that give the label away in a report, beside the class names
    encoder : folder of a local Hugging Face encoder for the reports; None: hashed n-grams
    """

    columns: Mapping[str, TabularColumn] = field(default_factory=dict)
    label_words: tuple[str, ...] = ()
    encoder: Path | None = None


@dataclass(frozen=True)
class SiteData:
    """All that one site trains and is evaluated on.

    Attributes
    ----------
    site : id of the site
    classes : class names, in the order of the label indices
    splits : the cases of "train", "val" and "test"
    task : "single", or "multilabel" where an image may have several findings, or none
    synthetic : True for phantoms; shown wherever results are shown
    notes : one line each, things a person should know about this site's data (a class without cases, say)
    privileged : how its privileged teachers read its reports and table
    has_patient_ids : whether the data say which images are of one patient; else each image counts as a patient
    left_out : one line for each file that can't be used and was left out; never leaves the site
    scale : what is black and white in images of more than 8 bits, where that was measured; never leaves the site
    preparation : how its images became what a model sees; None where that is unknown
    key : a deployed hospital's secret, by which its patients keep their labels or not; None in a simulation, whose seed decides
    """

    site: str
    classes: tuple[str, ...]
    splits: Mapping[SplitName, Cases]
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    task: Task = "single"
    privileged: PrivilegedSetup = field(default_factory=PrivilegedSetup)
    has_patient_ids: bool = True
    left_out: tuple[str, ...] = ()
    scale: Scale | None = None
    preparation: Preparation | None = field(default_factory=Preparation)
    key: bytes | None = field(default=None, repr=False)

    def class_counts(self, split: SplitName) -> list[int]:
        """Return the number of cases of each class (multi-label: with each finding) in `split`, in the order of `classes`."""
        counts = class_counts(self.splits[split].labels, len(self.classes))
        cases: list[int] = (counts if self.task == "single" else counts[:, 1]).tolist()
        return cases

    def pictures(self) -> dict[SplitName, list[bytes]]:
        """Return a digest of the pixels of every image, by split."""
        return {
            split: [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in cases.images]
            for split, cases in self.splits.items()
        }

    def copies(self) -> int:
        """Return how many pictures, pixel for pixel, are in two splits under different names or patients."""
        return copies_in_splits([self.pictures()])[0]


def copies_in_splits(sites: Iterable[Mapping[SplitName, Iterable[bytes]]]) -> tuple[int, int]:
    """Return how many pictures are in two splits of one site, and how many others in two splits of different sites.

    Parameters
    ----------
    sites : `SiteData.pictures` of each
    """
    at_one: set[bytes] = set()
    splits_of: dict[bytes, set[str]] = {}
    for site in sites:
        here: dict[bytes, set[str]] = {}
        for split, pictures in site.items():
            for picture in pictures:
                here.setdefault(picture, set()).add(split)
        for picture, splits in here.items():
            splits_of.setdefault(picture, set()).update(splits)
            if len(splits) > 1:
                at_one.add(picture)
    return len(at_one), sum(len(splits) > 1 for splits in splits_of.values()) - len(at_one)
