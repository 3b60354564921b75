"""The CSV manifest of one site or several: read and checked whole, decoded only for the rows asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from chainward_client.data.description import (
    SEPARATOR,
    CategoryColumn,
    CsvDescription,
    NumberColumn,
    TabularColumn,
)
from chainward_client.data.images import box_masks, counted, load_images, load_masks
from chainward_client.data.site_data import SPLITS, Cases, PrivilegedCases
from chainward_shared.errors import DataError, nearest
from chainward_shared.words import listed

if TYPE_CHECKING:  # pandas takes a second to import
    import pandas as pd

# How programs write an empty cell.
_MISSING = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "none", "<NA>"})
NO_PATIENTS = "no patient column: every image counts as a patient of its own"


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

    description: CsvDescription
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

    def cases(self, indices: np.ndarray) -> Cases:
        """Decode the rows at `indices`, in that order.

        Raises
        ------
        DataError
            If one of their images, masks or boxes can't be used.
        """
        shape = self.description.image
        rows = self.rows[indices].tolist()
        images, sizes = load_images(self.description.image_location, self.images[indices].tolist(), rows, shape)
        masks = None
        if self.masks is not None:
            names = [self.masks[index] for index in indices]
            masks = load_masks(self.description.mask_location, names, rows, sizes, shape)
        elif self.boxes is not None:
            try:
                masks = box_masks(self.boxes[indices], rows, sizes, shape)
            except DataError as error:
                raise DataError(f"{self.description.manifest.name}: {error}") from None
        return self._with_labels(indices, images, masks)

    def _with_labels(self, indices: np.ndarray, images: torch.Tensor, masks: torch.Tensor | None) -> Cases:
        """Return the cases of decoded images and masks."""
        privileged = PrivilegedCases(
            texts=None if self.texts is None else tuple(self.texts[index] for index in indices),
            table=None
            if self.table is None
            else {name: tuple(values[index] for index in indices) for name, values in self.table.items()},
            masks=masks,
        )
        return Cases(images, torch.from_numpy(self.labels[indices]), self.patients[indices], privileged)


def read_manifest(description: CsvDescription, *, quoted: bool = True) -> Manifest:
    """Read and check the whole manifest of `description`; no image is opened.

    Parameters
    ----------
    description : the data file
    quoted : whether messages may name images and patients

    Raises
    ------
    DataError
        One line that counts every kind of problem found and names the first row of each.
    """
    path, columns = description.manifest, description.columns
    frame = _read_csv(path)
    _check_columns(path, frame, columns.by_key())
    check = _Checks(frame)

    images = check.filled(columns.image)
    if not isinstance(columns.label, str):
        labels = check.yes_or_no(columns.label)
    elif description.task == "multilabel":
        labels = check.findings(columns.label, description.classes, description.no_finding)
    else:
        labels = check.labels(columns.label, description.classes)
    patients = images if columns.patient is None else check.filled(columns.patient)
    splits = None if columns.split is None else check.splits(columns.split)
    sites = None if columns.site is None else check.filled(columns.site)
    texts = None if columns.text is None else check.texts(columns.text)
    table = {name: check.tabular(name, column) for name, column in columns.tabular.items()}
    masks = None if columns.mask is None else check.file_names(columns.mask)
    boxes = None if columns.box is None else check.boxes(columns.box)
    check.no_repeats(columns.image, images, quoted=quoted)
    if columns.patient is not None and splits is not None:
        check.patients_in_one_split(columns.patient, patients, splits, quoted=quoted)
    if check.problems:
        raise _refusal(path, "; ".join(check.problems))

    return Manifest(
        description=description,
        classes=description.classes,
        rows=check.rows,
        images=images,
        labels=labels,
        patients=patients,
        splits=splits,
        sites=sites,
        texts=texts,
        table=table or None,
        masks=masks,
        boxes=boxes,
        notes=(NO_PATIENTS,) if columns.patient is None else (),
    )


def _read_csv(path: Path) -> pd.DataFrame:
    """Return all cells as text, indexed by spreadsheet row."""
    import pandas as pd

    try:
        # As text, so that patient 001 does not become 1; the header as a row, so that repeats are seen, and rows
        # that are longer than it are an error.
        frame = pd.read_csv(path, header=None, dtype=str, na_filter=False, skip_blank_lines=False, encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"There is no manifest {path}") from None
    except OSError as error:
        raise DataError(f"Manifest {path} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text (byte {error.start}); save it as 'CSV UTF-8'") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path.name} is empty; expected a header and one row per image") from None
    except pd.errors.ParserError as error:
        reason = " ".join(str(error).replace("Error tokenizing data. C error:", "").split())
        raise DataError(f"{path.name} is not a well-formed CSV: {reason}") from None
    frame = frame.fillna("")
    frame.columns = pd.Index([str(name).strip() for name in frame.iloc[0]])
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    frame = frame.iloc[1:]
    blank = (frame == "").all(axis=1)
    frame = frame[~blank]
    if frame.empty:
        raise DataError(f"{path.name} has a header but no rows; expected one row per image")
    return frame


def _check_columns(path: Path, frame: pd.DataFrame, by_key: Mapping[str, str]) -> None:
    present = list(frame.columns)
    problems = [
        f"column '{name}' (columns.{key}) is missing{nearest(name, present)}"
        for key, name in by_key.items()
        if name not in present
    ]
    if problems:
        separator = next((mark for mark in (";", "\t", "|") if len(present) == 1 and mark in present[0]), None)
        hint = f"; the file is separated by {separator!r}, expected commas" if separator else ""
        raise _refusal(path, f"{'; '.join(problems)}; columns there: {', '.join(present)}{hint}")
    repeated = [name for name in by_key.values() if present.count(name) > 1]
    if repeated:
        raise _refusal(path, f"column '{repeated[0]}' is there {present.count(repeated[0])} times; rename one")


def _refusal(path: Path, problem: str) -> DataError:
    """Return the error on one line, whatever line breaks the cells hold."""
    return DataError(" ".join(f"{path.name}: {problem}".split()))


class _Checks:
    """Turns the columns of a manifest into arrays, and collects what is wrong with them in `problems`."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self.rows: np.ndarray = frame.index.to_numpy(dtype=np.int64)
        self.problems: list[str] = []

    def filled(self, column: str) -> np.ndarray:
        """Return a column in which every row must hold something."""
        cells = self._cells(column)
        empty = [f"row {row}" for row, cell in zip(self.rows, cells, strict=True) if cell in _MISSING]
        self._report(column, "row without a value", "rows without a value", empty)
        return np.array(cells)

    def labels(self, column: str, classes: tuple[str, ...]) -> np.ndarray:
        """Return class indices. A column holds either: with classes 1 and 2, label 1 is a name."""
        cells = self._cells(column)
        index_of = _indices(set(cells), classes)
        missing: list[str] = []
        outside: list[str] = []
        for row, cell in zip(self.rows, cells, strict=True):
            if cell in index_of:
                continue
            if cell in _MISSING:
                missing.append(f"row {row}")
            else:
                outside.append(
                    f"row {row}, '{cell}'{nearest(cell, classes)}; expected {listed(classes, 12, last='or')}"
                )
        self._report(column, "row without a label", "rows without a label", missing)
        self._report(column, "label outside the classes", "labels outside the classes", outside)
        return np.array([index_of.get(cell, 0) for cell in cells], dtype=np.int64)

    def findings(self, column: str, classes: tuple[str, ...], no_finding: str | None) -> np.ndarray:
        """Return float32 (n, classes) of 1 and 0 from cells like "Effusion|Mass". Names or indices, as in `labels`.

        An empty cell means no finding, unless there is a word for that: then it is a row that nobody has labelled.
        """
        none = "" if no_finding is None else no_finding
        words_of = [[word.strip() for word in cell.split(SEPARATOR)] for cell in self._cells(column)]
        index_of = _indices({word for words in words_of for word in words if word != none}, classes)
        labels = np.zeros((len(words_of), len(classes)), dtype=np.float32)
        missing: list[str] = []
        unknown: list[str] = []
        torn: list[str] = []
        twice: list[str] = []
        for position, (row, words) in enumerate(zip(self.rows, words_of, strict=True)):
            found = [index_of[word] for word in words if word in index_of]
            strange = [word for word in words if word not in index_of and word != no_finding]
            labels[position, found] = 1
            if words == [none]:
                continue
            if len(words) == 1 and strange and strange[0] in _MISSING:
                expected = "an empty cell" if no_finding is None else f"'{no_finding}'"
                missing.append(f"row {row}, '{words[0]}'; expected {expected} where there is no finding")
            elif strange:
                unknown.append(
                    f"row {row}, '{strange[0]}'{nearest(strange[0], classes)}; expected {listed(classes, 12, last='or')}"
                )
            elif len(found) < len(words):
                torn.append(f"row {row}, '{SEPARATOR.join(words)}'; keep one or the other")
            elif len(set(found)) < len(found):
                twice.append(f"row {row}, '{SEPARATOR.join(words)}'; keep one of the two")
        self._report(column, "row without a label", "rows without a label", missing)
        self._report(column, "finding outside the classes", "findings outside the classes", unknown)
        self._report(column, "row with and without a finding", "rows with and without a finding", torn)
        self._report(column, "row that names a finding twice", "rows that name a finding twice", twice)
        return labels

    def yes_or_no(self, columns: Sequence[str]) -> np.ndarray:
        """Return float32 (n, columns) of 1 and 0 from columns that hold 1 and 0, or true and false."""
        labels = np.zeros((len(self.rows), len(columns)), dtype=np.float32)
        for position, column in enumerate(columns):
            missing: list[str] = []
            other: list[str] = []
            for index, cell in enumerate(self._cells(column)):
                value = {"true": 1.0, "false": 0.0}.get(cell.lower(), _number(cell))
                if cell in _MISSING:
                    missing.append(f"row {self.rows[index]}")
                elif value not in (0.0, 1.0):
                    other.append(f"row {self.rows[index]}, '{cell}'; expected 1 or 0")
                else:
                    labels[index, position] = value
            self._report(column, "row without a label", "rows without a label", missing)
            self._report(column, "label that is neither 1 nor 0", "labels that are neither 1 nor 0", other)
        return labels

    def splits(self, column: str) -> np.ndarray:
        """Return a column of train, val and test."""
        cells = self._cells(column)
        other = [
            f"row {row}, '{cell}'{nearest(cell.lower(), SPLITS)}; expected train, val or test"
            for row, cell in zip(self.rows, cells, strict=True)
            if cell not in SPLITS
        ]
        self._report(column, "row with another split", "rows with another split", other)
        return np.array(cells)

    def texts(self, column: str) -> tuple[str | None, ...]:
        """Return free text. A column of numbers is surely not the one that was meant."""
        cells = self._cells(column)
        texts = tuple(None if cell in _MISSING else cell for cell in cells)
        present = [text for text in texts if text is not None]
        if not present:
            self.problems.append(f"column '{column}' is empty in every row; expected text")
        elif all(_number(text) is not None for text in present):
            first = next(index for index, text in enumerate(texts) if text is not None)
            self.problems.append(
                f"column '{column}' holds numbers only (row {self.rows[first]}, '{present[0]}', ...); expected text"
            )
        return texts

    def tabular(self, column: str, declared: TabularColumn) -> tuple[float | str | None, ...]:
        """Return the values of one privileged column."""
        if isinstance(declared, CategoryColumn):
            return self._categories(column, declared)
        return self._numbers(column, declared)

    def file_names(self, column: str) -> tuple[str | None, ...]:
        """Return file names, None where missing."""
        return tuple(None if cell in _MISSING else cell for cell in self._cells(column))

    def boxes(self, columns: tuple[str, str, str, str]) -> np.ndarray:
        """Return float (n, 4), NaN in rows without a box."""
        edges = np.full((len(self.rows), 4), np.nan)
        for position, column in enumerate(columns):
            wrong: list[str] = []
            for index, cell in enumerate(self._cells(column)):
                if cell in _MISSING:
                    continue
                number = _number(cell)
                if number is None:
                    wrong.append(f"row {self.rows[index]}, '{cell}'; expected pixels")
                else:
                    edges[index, position] = number
            self._report(column, "value that is not a number", "values that are not numbers", wrong)
        missing = np.isnan(edges).sum(axis=1)
        partial = [f"row {row}" for row in self.rows[(missing > 0) & (missing < 4)]]
        if partial and not self.problems:  # an edge that is not a number has been reported already
            self._report(", ".join(columns), "box without all four edges", "boxes without all four edges", partial)
        return edges

    def no_repeats(self, column: str, images: np.ndarray, *, quoted: bool = True) -> None:
        """An image in two rows may have two labels, or be in train and in test."""
        rows_of = _positions(images)
        repeated = [
            (f"'{image}' in " if quoted else "") + f"rows {', '.join(str(self.rows[index]) for index in found)}"
            for image, found in rows_of.items()
            if len(found) > 1 and image not in _MISSING
        ]
        self._report(column, "image in more than one row", "images in more than one row", repeated)

    def patients_in_one_split(
        self, column: str, patients: np.ndarray, splits: np.ndarray, *, quoted: bool = True
    ) -> None:
        """A patient in train and in test makes the test worthless."""
        torn: list[str] = []
        for patient, found in _positions(patients).items():
            first_row: dict[str, int] = {}
            for index in found:
                first_row.setdefault(str(splits[index]), int(self.rows[index]))
            first_row = {split: row for split, row in first_row.items() if split in SPLITS}
            if len(first_row) > 1 and patient not in _MISSING:
                where = " and ".join(f"{split} (row {row})" for split, row in first_row.items())
                who = f"'{patient}' in " if quoted else ""
                torn.append(f"{who}{where}; put all rows of a patient into one split")
        self._report(column, "patient in more than one split", "patients in more than one split", torn)

    def _numbers(self, column: str, declared: NumberColumn) -> tuple[float | None, ...]:
        values: list[float | None] = []
        wrong: list[str] = []
        outside: list[str] = []
        for row, cell in zip(self.rows, self._cells(column), strict=True):
            number = None if cell in _MISSING else _number(cell)
            values.append(number)
            if cell in _MISSING:
                continue
            if number is None:
                wrong.append(f"row {row}, '{cell}'")
            elif not declared.min <= number <= declared.max:
                outside.append(f"row {row}, {cell}; expected {declared.min:g} to {declared.max:g}")
        self._report(column, "value that is not a number", "values that are not numbers", wrong)
        self._report(column, "value outside the declared range", "values outside the declared range", outside)
        return tuple(values)

    def _categories(self, column: str, declared: CategoryColumn) -> tuple[str | None, ...]:
        values: list[str | None] = []
        other: list[str] = []
        for row, cell in zip(self.rows, self._cells(column), strict=True):
            known = cell in declared.values
            values.append(cell if known else None)
            if not known and cell not in _MISSING:
                expected = f"{nearest(cell, declared.values)}; expected {listed(declared.values, 12, last='or')}"
                other.append(f"row {row}, '{cell}'{expected}")
        self._report(column, "value that is not declared", "values that are not declared", other)
        return tuple(values)

    def _cells(self, column: str) -> list[str]:
        return [str(cell).strip() for cell in self._frame[column]]

    def _report(self, column: str, kind: str, kinds: str, found: list[str]) -> None:
        if found:
            self.problems.append(f"column '{column}': {counted(kind, kinds, found)}")


def _indices(cells: Collection[str], classes: tuple[str, ...]) -> dict[str, int]:
    """Return the class index of every cell that has one. Cells are names, or if none of them is one, indices."""
    index_of = {name: index for index, name in enumerate(classes)}
    if any(cell in index_of for cell in cells):
        return index_of
    numbers = {cell: _number(cell) for cell in cells}
    return {
        cell: int(number)
        for cell, number in numbers.items()
        if number is not None and number.is_integer() and 0 <= number < len(classes)
    }


def _positions(values: np.ndarray) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for index, value in enumerate(values.tolist()):
        positions.setdefault(value, []).append(index)
    return positions


def _number(cell: str) -> float | None:
    """Return the finite number that a cell holds, or None."""
    try:
        number = float(cell.replace("_", "x"))  # Python would read 1_0 as 10
    except ValueError:
        return None
    return number if np.isfinite(number) else None
