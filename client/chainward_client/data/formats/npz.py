"""Reading of .npz files in the layout of MedMNIST: one array of images and one of labels per split."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from chainward_client.data.description import DataDescription, FilePath
from chainward_client.data.formats import data_format
from chainward_client.data.images import fitted
from chainward_client.data.scale import Scale, measure
from chainward_client.data.site_data import SPLITS, SplitName
from chainward_client.data.table import Pictures, Table
from chainward_client.data.unusable import counted
from chainward_shared.data_notes import NO_PATIENTS
from chainward_shared.errors import DataError, nearest


class NpzDescription(DataDescription):
    """One file in the layout of MedMNIST: `train_images`, `train_labels`, the same for `val` and `test`.

    Attributes
    ----------
    images : the .npz file
    task : "single" (default): labels (n,) or (n, 1); "multilabel": labels (n, classes) of 1 and 0
    classes : class names; default: the labels that occur, or as many as the labels have columns
    image : what every image is brought to
    ignore_labels : labels that mean "not labelled", 255 or -1 say: their images are left out, with a note that says how many
    """

    format: Literal["npz"]
    images: FilePath
    ignore_labels: tuple[int, ...] = ()

    @property
    def table_file(self) -> Path:
        """Return the file, which holds the labels, too."""
        return self.images

    @property
    def locations(self) -> tuple[Path, ...]:
        """Return the file."""
        return (self.images,)


@dataclass(frozen=True, kw_only=True)
class NpzCases(Table):
    """A checked file; its cases are counted through train, val and test, and each image is a patient of its own.

    Attributes
    ----------
    positions : int64 (n,), the place of each in the arrays of its split
    """

    description: NpzDescription
    splits: np.ndarray
    positions: np.ndarray

    def _measured_scale(self) -> Scale:
        with _opened(self.description.images) as archive:
            stored = {split: archive[f"{split}_images"] for split in SPLITS}
        return measure(len(self), lambda index: stored[self.splits[index]][self.positions[index]])

    def _decoded(self, indices: np.ndarray) -> Pictures:
        """Raise a DataError if the images are not numbers (n, H, W) or (n, H, W, 3), or not as many as the labels."""
        shape = self.description.image
        images = np.empty((len(indices), shape.channels, shape.size, shape.size), dtype=np.uint8)
        with _opened(self.description.images) as archive:
            for split in SPLITS:
                wanted = np.flatnonzero(self.splits[indices] == split)
                if len(wanted) == 0:
                    continue
                stored = _images(archive, self.description.images, split)
                for place in wanted:
                    pixels = stored[self.positions[indices[place]]]
                    if pixels.dtype != np.uint8:
                        pixels = self.scale().eight_bits(pixels)
                    images[place] = fitted(Image.fromarray(pixels), shape)
        return torch.from_numpy(images), None, []


@data_format("npz", NpzDescription, keeps_decoded=True)
def read_npz(description: NpzDescription) -> NpzCases:
    """Read and check the labels of all splits; the images stay in the file until cases are asked for.

    Raises
    ------
    DataError
        If the file is damaged or lacks an array, or labels are not whole numbers within the classes, or not of the
        description's task.
    """
    path = description.images
    with _opened(path) as archive:
        wanted = [f"{split}_{what}" for split in SPLITS for what in ("images", "labels")]
        missing = [f"'{name}'{nearest(name, archive.files)}" for name in wanted if name not in archive.files]
        if missing:
            there = ", ".join(archive.files) or "nothing"
            raise DataError(f"{path.name} lacks {', '.join(missing)}; arrays there: {there}")
        read = _findings if description.task == "multilabel" else _labels
        of_splits = [read(archive, path, split) for split in SPLITS]
    sizes = [len(values) for values in of_splits]
    splits, positions = np.repeat(np.array(SPLITS), sizes), np.concatenate([np.arange(size) for size in sizes])
    notes: tuple[str, ...] = (NO_PATIENTS,)
    if description.task == "multilabel":
        classes = description.classes or tuple(map(str, range(max(values.shape[1] for values in of_splits))))
        _check_findings(path, of_splits, classes)
        labels = np.concatenate(of_splits).astype(np.float32)
    else:
        values = np.concatenate(of_splits)
        kept = ~np.isin(values, description.ignore_labels)
        values, splits, positions = values[kept], splits[kept], positions[kept]
        if not kept.all():
            notes += (f"{np.count_nonzero(~kept)} images left out: their label is one of ignore_labels",)
        classes = description.classes or _occurring(path, values, splits)
        labels = _indices(path, values, splits, classes)
    return NpzCases(
        description=description,
        classes=classes,
        labels=labels,
        patients=np.array([f"{split}-{index}" for split, index in zip(splits, positions, strict=True)]),
        splits=splits,
        positions=positions,
        notes=notes,
    )


def _labels(archive: np.lib.npyio.NpzFile, path: Path, split: SplitName) -> np.ndarray:
    """Return whole numbers (n,), int64 or, where they may be too large for that, Python's."""
    values = archive[f"{split}_labels"]
    if values.ndim == 2 and values.shape[1] > 1:
        raise DataError(
            f"{path.name}: {split}_labels has {values.shape[1]} columns, expected shape (n,) or (n, 1); if they are "
            "several findings per image, set task: multilabel"
        )
    whole = values.dtype == bool or np.issubdtype(values.dtype, np.integer)
    if np.issubdtype(values.dtype, np.floating) and np.isfinite(values).all() and (np.abs(values) < 2**53).all():
        whole = bool((values == np.floor(values)).all())
    if values.ndim not in (1, 2) or not whole:
        raise DataError(
            f"{path.name}: {split}_labels is {values.dtype} {values.shape}; expected whole numbers, (n,) or (n, 1)"
        )
    flat: np.ndarray = values.reshape(-1)
    return flat.astype(object if flat.dtype == np.uint64 else np.int64)


def _occurring(path: Path, labels: np.ndarray, splits: np.ndarray) -> tuple[str, ...]:
    """Return the labels that occur as names of classes.

    Raises
    ------
    DataError
        If one can hardly be a class: below 0, or far above the number of labels that there are.
    """
    values = np.unique(labels).tolist()
    stray = [value for value in values if value < 0 or value >= 2 * max(2, len(values))]
    if stray:
        others = [str(value) for value in values if value not in stray]
        raise DataError(
            f"{path.name}: {_strange(labels, splits, stray)}; the other labels are {', '.join(others[:12]) or 'none'}. If it "
            f"means that nobody has labelled the image, set ignore_labels: [{stray[0]}]; if it is a class, name all of them with "
            "'classes'"
        )
    if len(values) < 2:
        raise DataError(f"{path.name} holds {len(values)} class; expected at least 2")
    return tuple(map(str, values))


def _indices(path: Path, labels: np.ndarray, splits: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """Return int64 class indices. Labels are names where all classes are numbers, else indices.

    Raises
    ------
    DataError
        Naming every label that is no class, with its count.
    """
    by_name = all(name.lstrip("-").isdigit() for name in classes)
    index_of = {int(name) if by_name else index: index for index, name in enumerate(classes)}
    kinds, inverse = np.unique(labels, return_inverse=True)
    if stray := [kind for kind in kinds.tolist() if kind not in index_of]:
        expected = ", ".join(classes[:12]) if by_name else f"0 to {len(classes) - 1}"
        raise DataError(
            f"{path.name}: {_strange(labels, splits, stray)}; expected {expected}. ignore_labels leaves out what nobody has "
            "labelled"
        )
    return np.array([index_of[kind] for kind in kinds.tolist()], dtype=np.int64)[inverse]


def _strange(labels: np.ndarray, splits: np.ndarray, stray: list[int]) -> str:
    """Return ``"a label outside the classes: 255 (8 in train, 2 in test)"``."""
    shown = []
    for value in stray[:5]:
        counts = {split: np.count_nonzero((labels == value) & (splits == split)) for split in SPLITS}
        shown.append(f"{value} ({', '.join(f'{count} in {split}' for split, count in counts.items() if count)})")
    more = f" and {len(stray) - 5} more" if len(stray) > 5 else ""
    what = "a label outside the classes" if len(stray) == 1 else f"{len(stray)} labels outside the classes"
    return f"{what}: {', '.join(shown)}{more}"


def _findings(archive: np.lib.npyio.NpzFile, path: Path, split: SplitName) -> np.ndarray:
    """Return (n, classes), 2 classes or more, of numbers that are still to be checked."""
    values: np.ndarray = archive[f"{split}_labels"]
    if values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1):
        raise DataError(
            f"{path.name}: {split}_labels has one label per image, and task: multilabel expects shape (n, classes); "
            "remove the task"
        )
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.integer) or values.dtype == bool):
        raise DataError(f"{path.name}: {split}_labels is {values.dtype} {values.shape}; expected 1 and 0, (n, classes)")
    return values


def _check_findings(path: Path, labels: list[np.ndarray], classes: tuple[str, ...]) -> None:
    for split, values in zip(SPLITS, labels, strict=True):
        if values.shape[1] != len(classes):
            raise DataError(
                f"{path.name}: {split}_labels has {values.shape[1]} columns; expected one for each of the "
                f"{len(classes)} classes"
            )
    problems = [
        f"{split}_labels[{row}, {column}] is {values[row, column]}"
        for split, values in zip(SPLITS, labels, strict=True)
        for row, column in np.argwhere((values != 0) & (values != 1))
    ]
    if problems:
        found = counted("label that is neither 1 nor 0", "labels that are neither 1 nor 0", problems)
        raise DataError(f"{path.name}: {found}")


def _images(archive: np.lib.npyio.NpzFile, path: Path, split: SplitName) -> np.ndarray:
    """Return numbers (count, H, W) or (count, H, W, 3)."""
    stored = archive[f"{split}_images"]
    if stored.ndim == 4 and stored.shape[3] == 1:
        stored = stored[..., 0]
    number = np.issubdtype(stored.dtype, np.integer) or np.issubdtype(stored.dtype, np.floating)
    if not number or not (stored.ndim == 3 or (stored.ndim == 4 and stored.shape[3] == 3)):
        raise DataError(
            f"{path.name}: {split}_images is {stored.dtype} {stored.shape}; expected numbers (n, H, W) or (n, H, W, 3)"
        )
    if np.issubdtype(stored.dtype, np.floating) and not np.isfinite(stored).all():
        raise DataError(f"{path.name}: {split}_images holds values that are not finite numbers")
    count = len(archive[f"{split}_labels"])
    if len(stored) != count:
        raise DataError(f"{path.name}: {split}_images has {len(stored)} entries, {split}_labels has {count}")
    return stored


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open the file, and turn whatever reading it raises into a DataError."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path.name} holds a single array; expected an .npz with train_images, train_labels, ...")
        with archive:
            yield archive
    except FileNotFoundError:
        raise DataError(f"There is no file {path}") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error):
            reason = "it holds Python objects, which are never loaded; save plain number arrays"
        else:
            reason = str(error)
        raise DataError(f"{path.name} can't be read as .npz: {reason}") from None
