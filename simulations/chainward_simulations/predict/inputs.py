"""The images to predict: files, folders, zips, CSV lists and data files, decoded as they were for training, in batches.

A file that can't be used is named, with its reason, and passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chainward_client.data.description import ManifestDescription, load_description
from chainward_client.data.dicom_file import is_dicom, parse, require_pydicom
from chainward_client.data.dicom_picture import picture
from chainward_client.data.dicom_settings import DicomBlock, OwnWindow
from chainward_client.data.formats.dicom import EXTENSIONS, DicomManifest
from chainward_client.data.image_store import ImageStore, files_below
from chainward_client.data.images import fit_image, open_image, to_channels
from chainward_client.data.manifest_file import read_cells
from chainward_client.data.scale import Scale
from chainward_client.data.sources import read_table
from chainward_client.data.table import Table
from chainward_client.data.unusable import ImageProblem, UnusableFiles
from chainward_shared.errors import DataError, nearest
from chainward_shared.model_record import ModelRecord
from chainward_shared.preparation import Preparation

BATCH = 64
NAME_COLUMNS = ("image", "file", "filename", "path", "image_id", "name")
_PICTURES = frozenset(
    ending for ending in Image.registered_extensions() if ending not in (".pdf", ".eps", ".ps", ".h5")
)
_DATA_FILES, _LISTS = (".yaml", ".yml"), (".csv", ".tsv")


@dataclass(frozen=True)
class Problem:
    """An image that can't be used, and why."""

    name: str
    reason: str


@dataclass
class Batch:
    """Some images, decoded, and those beside them that can't be used.

    Attributes
    ----------
    names : what the images are called in the output
    images : uint8 (n, channels, size, size)
    files : where each lies; None where it is not a file of its own
    truths : the class of each, as a data file gives it (multi-label: 0 and 1 of each); None where that isn't known
    problems : of the same batch
    """

    names: list[str] = field(default_factory=list)
    images: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))
    files: list[Path | None] = field(default_factory=list)
    truths: np.ndarray | None = None
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """How many images there are, and their batches."""

    count: int
    batches: Callable[[], Iterator[Batch]]


def open_inputs(
    places: Sequence[Path],
    record: ModelRecord,
    preparation: Preparation | None,
    *,
    column: str | None = None,
    images: Path | None = None,
    split: str | None = None,
) -> Inputs:
    """Return the images at some places: one data file, or any number of files, folders, zips and CSV lists.

    Parameters
    ----------
    preparation : how they are brought to the model's square; None: as a data file says, if that is one of the model's ways
    column : of a CSV list, with the files' names; default: the first of `NAME_COLUMNS` that is there
    images : folder of the files that a CSV list names; default: the list's own
    split : of a data file: only the images of this one

    Raises
    ------
    DataError
        There is nothing at a place, or a data file can't be used or prepares its images in another way than the model's sites.
    """
    data_files = [place for place in places if place.suffix.lower() in _DATA_FILES]
    if data_files and len(places) > 1:
        raise DataError(f"{data_files[0]}: a data file is predicted by itself; name no other inputs beside it")
    if data_files:
        return _of_data_file(data_files[0], record, preparation, split)
    if split is not None:
        raise DataError("--split chooses among the rows of a data file; give a data.yaml as the input")
    if preparation is None:
        raise DataError(_which_fit(record))
    found = [file for place in places for file in _files(place, column, images)]
    if not found:
        raise DataError(f"{places[0]}: no image in it; expected pictures or DICOM files")
    if any(path is not None and path.suffix.lower() in EXTENSIONS for _, path in found):
        require_pydicom()
    return Inputs(len(found), lambda: _decoded(found, record, preparation))


def _files(place: Path, column: str | None, images: Path | None) -> list[tuple[str, Path | None]]:
    """Return the names of the images at a place, and where each lies; None: there is none of that name."""
    if place.is_dir():
        return [(name, Path(entry.path)) for name, entry in files_below(place) if _may_be_image(Path(entry.path))]
    if not place.is_file():
        raise DataError(f"{place}: no such file or folder")
    if place.suffix.lower() == ".zip":
        raise DataError(f"{place.name}: unpack the zip and name the folder, or describe it in a data file")
    if place.suffix.lower() in _LISTS:
        return _listed(place, column, images or place.parent)
    return [(place.name, place)]


def _may_be_image(path: Path) -> bool:
    ending = path.suffix.lower()
    if ending in _PICTURES or ending in EXTENSIONS:
        return True
    if path.name == "DICOMDIR" or path.name.startswith("."):
        return False
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def _listed(file: Path, column: str | None, folder: Path) -> list[tuple[str, Path | None]]:
    frame = read_cells(file)
    present = list(frame.columns)
    chosen = column or next((name for name in NAME_COLUMNS if name in present), None)
    if chosen is None or chosen not in present:
        wanted = (
            f"column '{column}'{nearest(column, present)}" if column else f"no column called {', '.join(NAME_COLUMNS)}"
        )
        raise DataError(f"{file.name}: {wanted}; columns there: {', '.join(present)}: name one with --column")
    with ImageStore(folder, EXTENSIONS) as store:
        found: list[tuple[str, Path | None]] = []
        for name in frame[chosen].astype(str):
            try:
                found.append((name, folder / store.find(name)))
            except ImageProblem:
                found.append((name, None))
    return found


def _decoded(files: list[tuple[str, Path | None]], record: ModelRecord, preparation: Preparation) -> Iterator[Batch]:
    decode = Decoder(record, preparation)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(files), BATCH):
            batch, arrays = Batch(), []
            part = files[start : start + BATCH]
            for (name, path), array in zip(part, pool.map(decode.attempt, (path for _, path in part)), strict=True):
                if isinstance(array, ImageProblem):
                    batch.problems.append(Problem(name, str(array)))
                else:
                    arrays.append(array)
                    batch.names.append(name)
                    batch.files.append(path)
            if arrays:
                batch.images = torch.from_numpy(np.stack(arrays))
            yield batch


class Decoder:
    """Brings a file to the square that a model expects, with the code that reads a hospital's images for training."""

    def __init__(self, record: ModelRecord, preparation: Preparation) -> None:
        self._size, self._channels, self._fit = record.size, record.channels, preparation.fit
        self._declared = None if preparation.scale is None else Scale(*preparation.scale)
        window = None
        if preparation.scale is not None:
            low, high = preparation.scale
            window = OwnWindow(center=(low + high) / 2, width=high - low)
        self._block = DicomBlock(
            window=window,
            view=1 if window is not None else preparation.view,
            frame=preparation.frame,
            orientation=preparation.orientation,
            laterality=preparation.laterality,
        )

    def attempt(self, path: Path | None) -> np.ndarray | ImageProblem:
        """Return uint8 (channels, size, size), or why there is none."""
        try:
            return self(path)
        except ImageProblem as problem:
            return problem

    def __call__(self, path: Path | None) -> np.ndarray:
        if path is None:
            raise ImageProblem("{} not found", "no file of this name, or several")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ImageProblem("unreadable {}", error.strerror or type(error).__name__) from None
        if is_dicom(data):
            require_pydicom()
            shown = picture(parse(data), self._block, self._scale).image
            image = shown.convert("L" if self._channels == 1 else "RGB")
        else:
            image = to_channels(open_image(data), self._channels, self._scale)
        array = np.asarray(fit_image(image, self._size, self._fit, resample=Image.Resampling.BICUBIC))
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def _scale(self) -> Scale:
        if self._declared is None:
            raise ImageProblem(
                "{} without a scale",
                "more than 8 bits and no window, and the model carries no scale of grey; give the values that are black and "
                "white: --scale LOW HIGH",
            )
        return self._declared


def _of_data_file(path: Path, record: ModelRecord, preparation: Preparation | None, split: str | None) -> Inputs:
    description = load_description(path)
    own = description.preparation
    known = {preparation} if preparation is not None else {*record.preparations.values()}
    if known and own not in known:
        wanted = "; ".join(sorted(_in_words(one) for one in known))
        raise DataError(
            f"{path.name} prepares images with {_in_words(own)}; the model's sites did with {wanted}: change it there"
        )
    if (description.image.size, description.image.channels) != (record.size, record.channels):
        raise DataError(
            f"{path.name} brings images to {description.image.size} pixels and {description.image.channels} channels; the model "
            f"expects {record.size} and {record.channels}: change it there"
        )
    table = read_table(path)
    if [*table.classes] != record.classes:
        raise DataError(
            f"{path.name} has the classes {[*table.classes]}; the model's are {record.classes}, in this order"
        )
    rows = np.arange(len(table))
    if split is not None:
        if table.splits is None:
            raise DataError(f"{path.name}: --split {split}, but the data file has no column 'split'")
        rows = rows[table.splits == split]
    if not len(rows):
        raise DataError(f"{path.name}: no image{'' if split is None else f' of the split {split}'}")
    return Inputs(len(rows), lambda: _of_table(table, rows))


def _of_table(table: Table, rows: np.ndarray) -> Iterator[Batch]:
    for start in range(0, len(rows), BATCH):
        part, batch = rows[start : start + BATCH], Batch()
        while len(part):
            try:
                cases = table.cases(part)
            except UnusableFiles as error:
                batch.problems += [Problem(f"row {file.row}", file.shown) for file in error.files]
                part = np.delete(part, [file.position for file in error.files])
                continue
            batch.images, batch.truths = cases.images, cases.labels.numpy()
            batch.names, batch.files = _names(table, part), _dicom_files(table, part)
            break
        yield batch


def _names(table: Table, rows: np.ndarray) -> list[str]:
    names = getattr(table, "images", None)
    if (
        isinstance(table.description, ManifestDescription)
        and isinstance(names, np.ndarray)
        and names.dtype.kind in "UO"
    ):
        return [str(name) for name in names[rows]]
    return [f"image {row}" for row in rows.tolist()]


def _dicom_files(table: Table, rows: np.ndarray) -> list[Path | None]:
    """Return where the DICOM files of rows lie, that reports may refer to them; None of other files, and in a zip."""
    if not isinstance(table, DicomManifest) or not table.description.image_location.is_dir():
        return [None] * len(rows)
    members = [table.members[row] for row in rows.tolist()]
    return [table.description.image_location / one if isinstance(one, str) else None for one in members]


def _which_fit(record: ModelRecord) -> str:
    if not record.preparations:
        return "the model's file does not say how images were made square; say it with --fit pad, crop or stretch"
    ways = "; ".join(f"{site}: {_in_words(one)}" for site, one in record.preparations.items())
    return f"the sites that trained the model prepared images differently ({ways}); choose with --site NAME, or --fit"


def _in_words(one: Preparation) -> str:
    defaults = Preparation()
    words = [f"fit {one.fit}"]
    words += [
        f"{name} {value}"
        for name, value in one.model_dump().items()
        if name != "fit" and value != getattr(defaults, name)
    ]
    return ", ".join(words)
