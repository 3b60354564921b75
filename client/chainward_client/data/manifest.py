"""The CSV manifest of one site or several: read and checked whole, decoded only for the rows asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from chainward_client.data.description import ManifestDescription
from chainward_client.data.image_store import opened
from chainward_client.data.images import load_images, measured_values
from chainward_client.data.manifest_columns import ManifestColumns
from chainward_client.data.manifest_file import read_cells
from chainward_client.data.regions import box_masks, load_masks
from chainward_client.data.scale import Scale, ScaleOfSet, measure
from chainward_client.data.site_data import Cases, PrivilegedCases
from chainward_shared.data_notes import NO_PATIENTS
from chainward_shared.errors import DataError, nearest

if TYPE_CHECKING:  # pandas takes a second to import
    import pandas as pd


@dataclass(frozen=True)
class Manifest:
    """A checked manifest; entry i of every field belongs to its i-th row.

    Attributes
    ----------
    description : where the images are and what they are brought to
    classes : class names, in the order of the label indices
    rows : int64 (n,), the rows' numbers as a spreadsheet shows them (the header is row 1)
    images : str (n,), file names
    labels : int64 (n,); multi-label: float32 (n, classes), 1 for each finding, else 0
    patients : str (n,)
    splits : str (n,), or None without a split column
    sites : str (n,), or None without a site column
    texts, table : as in `PrivilegedCases`
    masks : file names of the masks, None where missing; or None
    boxes : float (n, 4), NaN where missing; or None
    notes : things a person should know; without ids of patients, because notes may leave the site
    """

    description: ManifestDescription
    classes: tuple[str, ...]
    rows: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    splits: np.ndarray | None
    sites: np.ndarray | None
    texts: tuple[str | None, ...] | None
    table: Mapping[str, tuple[float | str | None, ...]] | None
    masks: tuple[str | None, ...] | None
    boxes: np.ndarray | None
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def scale(self) -> ScaleOfSet:
        """Return the scale of the images of more than 8 bits: of all rows, whichever of them are asked for."""
        return ScaleOfSet(self.description.image.scale, self._measured_scale)

    def _measured_scale(self) -> Scale:
        with opened(self.description.image_location) as store:
            return measure(len(self), lambda index: measured_values(store, str(self.images[index])))

    def cases(self, indices: np.ndarray) -> Cases:
        """Decode the rows at `indices`, in that order.

        Raises
        ------
        DataError
            If one of their images, masks or boxes can't be used.
        """
        shape = self.description.image
        rows = self.rows[indices].tolist()
        names = self.images[indices].tolist()
        images, sizes = load_images(self.description.image_location, names, rows, shape, self.scale)
        masks = None
        if self.masks is not None:
            of_masks = [self.masks[index] for index in indices]
            masks = load_masks(self.description.mask_location, of_masks, rows, sizes, shape)
        elif self.boxes is not None:
            try:
                masks = box_masks(self.boxes[indices], rows, sizes, shape)
            except DataError as error:
                raise DataError(f"{self.description.manifest.name}: {error}") from None
        return self.with_labels(indices, images, masks)

    def with_labels(self, indices: np.ndarray, images: torch.Tensor, masks: torch.Tensor | None) -> Cases:
        """Return the cases of decoded images and masks."""
        privileged = replace(PrivilegedCases(self.texts, self.table).take(indices.tolist()), masks=masks)
        return Cases(images, torch.from_numpy(self.labels[indices]), self.patients[indices], privileged)


def read_manifest(
    description: ManifestDescription, cells: pd.DataFrame | None = None, *, quoted: bool = True
) -> Manifest:
    """Read and check the whole manifest of `description`; no image is opened.

    Parameters
    ----------
    description : the data file
    cells : as `read_cells` makes them; default: those of its manifest, a CSV file
    quoted : whether messages may name images and patients

    Raises
    ------
    DataError
        One line that counts every kind of problem found and names the first row of each.
    """
    path, columns = description.manifest, description.columns
    frame = read_cells(path) if cells is None else cells
    _check_columns(path, frame, columns.by_key())
    check = ManifestColumns(frame)
    check.leave_out(columns.label_columns, description.ignore_labels)
    if not len(check.rows):
        raise _refusal(path, "every label is one of ignore_labels; expected rows with a class")

    images = check.filled(columns.image)
    if not isinstance(columns.label, str):
        labels = check.yes_or_no(columns.label)
    elif description.task == "multilabel":
        labels = check.findings(columns.label, description.classes, description.no_finding)
    else:
        labels = check.labels(columns.label, description.classes)
    manifest = Manifest(
        description=description,
        classes=description.classes,
        rows=check.rows,
        images=images,
        labels=labels,
        patients=images if columns.patient is None else check.patients(columns.patient),
        splits=None if columns.split is None else check.splits(columns.split),
        sites=None if columns.site is None else check.filled(columns.site),
        texts=None if columns.text is None else check.texts(columns.text),
        table={name: check.tabular(name, column) for name, column in columns.tabular.items()} or None,
        masks=None if columns.mask is None else check.file_names(columns.mask),
        boxes=None if columns.box is None else check.boxes(columns.box),
        notes=((NO_PATIENTS,) if columns.patient is None else ()) + tuple(check.notes),
    )
    check.no_repeats(columns.image, images, quoted=quoted)
    if columns.patient is not None and manifest.splits is not None:
        check.patients_in_one_split(columns.patient, manifest.patients, manifest.splits, quoted=quoted)
    if check.problems:
        raise _refusal(path, "; ".join(check.problems))
    return manifest


def _check_columns(path: Path, frame: pd.DataFrame, by_key: Mapping[str, str]) -> None:
    present = list(frame.columns)
    problems = [
        f"column '{name}' (columns.{key}) is missing{nearest(name, present)}"
        for key, name in by_key.items()
        if name not in present
    ]
    if problems:
        hint = "; the file is separated by '|', expected commas" if len(present) == 1 and "|" in present[0] else ""
        raise _refusal(path, f"{'; '.join(problems)}; columns there: {', '.join(present)}{hint}")
    repeated = [name for name in by_key.values() if present.count(name) > 1]
    if repeated:
        raise _refusal(path, f"column '{repeated[0]}' is there {present.count(repeated[0])} times; rename one")


def _refusal(path: Path, problem: str) -> DataError:
    """Return the error on one line, whatever line breaks the cells hold."""
    return DataError(" ".join(f"{path.name}: {problem}".split()))
