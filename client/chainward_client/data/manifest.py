"""The CSV manifest of one site or several: read and checked whole, decoded only for the rows asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from chainward_client.data.description import ManifestDescription
from chainward_client.data.image_store import ImageStore, opened
from chainward_client.data.images import load_images, measured_values
from chainward_client.data.manifest_columns import ManifestColumns, torn_patients
from chainward_client.data.manifest_file import read_cells
from chainward_client.data.regions import box_masks, load_masks
from chainward_client.data.scale import Scale, measure
from chainward_client.data.table import Pictures, Table
from chainward_shared.data_notes import NO_PATIENTS
from chainward_shared.errors import DataError, nearest

if TYPE_CHECKING:  # pandas takes a second to import
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Manifest(Table):
    """A checked manifest.

    Attributes
    ----------
    rows : int64 (n,), the rows' numbers as a spreadsheet shows them (the header is row 1)
    images : str (n,), file names
    """

    extensions: ClassVar[tuple[str, ...]] = ()
    """Endings of files, beside those of images, that names may leave out."""

    description: ManifestDescription
    rows: np.ndarray
    images: np.ndarray

    def member(self, store: ImageStore, index: int) -> str:
        """Return the path of a row's image inside the folder or zip.

        Raises
        ------
        ImageProblem
            If there is none, or more than one.
        """
        return store.find(str(self.images[index]))

    def _measured_scale(self) -> Scale:
        with opened(self.description.image_location, self.extensions) as store:
            return measure(len(self), lambda index: self._deep_values(store, index))

    def _deep_values(self, store: ImageStore, index: int) -> np.ndarray | None:
        return measured_values(store, str(self.images[index]))

    def _decoded(self, indices: np.ndarray) -> Pictures:
        location, shape = self.description.image_location, self.description.image
        names, rows = self.images[indices].tolist(), self.rows[indices].tolist()
        images, sizes = load_images(location, names, rows, shape, self.scale)
        return images, self._masks(indices, sizes), []

    def _masks(self, indices: np.ndarray, sizes: Sequence[tuple[int, int]], **of_files: Any) -> torch.Tensor | None:
        """Return the masks of rows, or those of their boxes; `sizes` and `of_files` as in `load_masks`."""
        if self.masks is not None:
            location, names = self.description.mask_location, [self.masks[index] for index in indices]
            return load_masks(location, names, self.rows[indices].tolist(), sizes, self.description.image, **of_files)
        return None if self.boxes is None else self._box_masks(self.boxes[indices], indices, sizes)

    def _box_masks(self, boxes: np.ndarray, indices: np.ndarray, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        try:
            return box_masks(boxes, self.rows[indices].tolist(), sizes, self.description.image)
        except DataError as error:
            raise DataError(f"{self.description.manifest.name}: {error}") from None


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
    torn = torn_patients(manifest.patients, manifest.splits, check.rows, quoted=quoted)
    if torn and columns.patient is not None:
        check.problems.append(f"column '{columns.patient}': {torn}")
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
