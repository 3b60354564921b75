"""Reading of .npz files in the layout of MedMNIST: one array of images and one of labels per split."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chainward_client.data.description import NpzDescription
from chainward_client.data.images import counted, fit_image, to_channels
from chainward_client.data.manifest import NO_PATIENTS
from chainward_client.data.site_data import SPLITS, Cases, SplitName
from chainward_shared.errors import DataError, nearest


@dataclass(frozen=True)
class NpzCases:
    """A checked file; entry i of every array belongs to its i-th case, counted through train, val and test.

    Attributes
    ----------
    description : where the file is and what its images are brought to
    classes : class names, in the order of the label indices
    labels : int64 (n,); multi-label: float32 (n, classes), 1 for each finding, else 0
    patients : str (n,), each image its own: the layout has no patients
    splits : str (n,)
    sites : None: the layout has no sites
    notes : things a person should know
    """

    description: NpzDescription
    classes: tuple[str, ...]
    labels: np.ndarray
    patients: np.ndarray
    splits: np.ndarray
    sites: None = None
    notes: tuple[str, ...] = (NO_PATIENTS,)

    def __len__(self) -> int:
        return len(self.labels)

    def cases(self, indices: np.ndarray) -> Cases:
        """Resize the images at `indices`, in that order.

        Raises
        ------
        DataError
            If the images are not uint8 (n, H, W) or (n, H, W, 3), or not as many as the labels.
        """
        shape = self.description.image
        images = np.empty((len(indices), shape.channels, shape.size, shape.size), dtype=np.uint8)
        with _opened(self.description.images) as archive:
            for split in SPLITS:
                in_split = np.flatnonzero(self.splits == split)
                wanted = np.flatnonzero(self.splits[indices] == split)
                if len(wanted) == 0:
                    continue
                stored = _images(archive, self.description.images, split, len(in_split))
                for position in wanted:
                    image = Image.fromarray(stored[indices[position] - in_split[0]])
                    image = to_channels(image, shape.channels)
                    image = fit_image(image, shape.size, shape.fit, resample=Image.Resampling.BICUBIC)
                    array = np.asarray(image)
                    images[position] = array if shape.channels == 1 else array.transpose(2, 0, 1)
        return Cases(torch.from_numpy(images), torch.from_numpy(self.labels[indices]), self.patients[indices])


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
        if description.task == "multilabel":
            labels = {split: _findings(archive, path, split) for split in SPLITS}
            columns = {split: values.shape[1] for split, values in labels.items()}
            classes = description.classes or tuple(str(index) for index in range(max(columns.values())))
            _check_findings(path, labels, classes)
            labels = {split: values.astype(np.float32) for split, values in labels.items()}
        else:
            labels = {split: _labels(archive, path, split) for split in SPLITS}
            highest = max((int(values.max()) for values in labels.values() if len(values)), default=-1)
            classes = description.classes or tuple(str(index) for index in range(highest + 1))
            _check_range(path, labels, classes)
    splits = np.repeat(np.array(SPLITS), [len(labels[split]) for split in SPLITS])
    patients = np.array([f"{split}-{index}" for split in SPLITS for index in range(len(labels[split]))])
    return NpzCases(description, classes, np.concatenate([labels[split] for split in SPLITS]), patients, splits)


def _labels(archive: np.lib.npyio.NpzFile, path: Path, split: SplitName) -> np.ndarray:
    """Return int64 (n,)."""
    values = archive[f"{split}_labels"]
    if values.ndim == 2 and values.shape[1] > 1:
        raise DataError(
            f"{path.name}: {split}_labels has {values.shape[1]} columns, expected shape (n,) or (n, 1); if they are "
            "several findings per image, set task: multilabel"
        )
    if values.ndim not in (1, 2) or not np.issubdtype(values.dtype, np.integer):
        raise DataError(
            f"{path.name}: {split}_labels is {values.dtype} {values.shape}; expected whole numbers, (n,) or (n, 1)"
        )
    return values.reshape(-1).astype(np.int64)


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


def _check_findings(path: Path, labels: dict[SplitName, np.ndarray], classes: tuple[str, ...]) -> None:
    for split, values in labels.items():
        if values.shape[1] != len(classes):
            raise DataError(
                f"{path.name}: {split}_labels has {values.shape[1]} columns; expected one for each of the "
                f"{len(classes)} classes"
            )
    problems = [
        f"{split}_labels[{row}, {column}] is {values[row, column]}"
        for split, values in labels.items()
        for row, column in np.argwhere((values != 0) & (values != 1))
    ]
    if problems:
        found = counted("label that is neither 1 nor 0", "labels that are neither 1 nor 0", problems)
        raise DataError(f"{path.name}: {found}")


def _check_range(path: Path, labels: dict[SplitName, np.ndarray], classes: tuple[str, ...]) -> None:
    problems = [
        f"{split}_labels[{position}] is {values[position]}; expected 0 to {len(classes) - 1}"
        for split, values in labels.items()
        for position in np.flatnonzero((values < 0) | (values >= len(classes)))
    ]
    if problems:
        raise DataError(f"{path.name}: {counted('label outside the classes', 'labels outside the classes', problems)}")
    if len(classes) < 2:
        raise DataError(f"{path.name} holds {len(classes)} class; expected at least 2")


def _images(archive: np.lib.npyio.NpzFile, path: Path, split: SplitName, count: int) -> np.ndarray:
    """Return uint8 (count, H, W) or (count, H, W, 3)."""
    stored = archive[f"{split}_images"]
    if stored.ndim == 4 and stored.shape[3] == 1:
        stored = stored[..., 0]
    if stored.dtype != np.uint8 or not (stored.ndim == 3 or (stored.ndim == 4 and stored.shape[3] == 3)):
        raise DataError(
            f"{path.name}: {split}_images is {stored.dtype} {stored.shape}; expected uint8 (n, H, W) or (n, H, W, 3)"
        )
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
