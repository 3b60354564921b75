"""Columns of a manifest as arrays: every cell is checked, and what is wrong is collected, so that one message can say it all."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from chainward_client.data.columns import SEPARATOR, CategoryColumn, NumberColumn, TabularColumn
from chainward_client.data.site_data import SPLITS
from chainward_client.data.unusable import counted
from chainward_shared.errors import nearest
from chainward_shared.words import listed

if TYPE_CHECKING:  # pandas takes a second to import
    import pandas as pd

# How programs write an empty cell.
_MISSING = frozenset({"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "none", "<NA>"})
_WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+")


class ManifestColumns:
    """Turns the columns of a manifest into arrays, and collects what is wrong with them in `problems`."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self.rows: np.ndarray = frame.index.to_numpy(dtype=np.int64)
        self.problems: list[str] = []
        self.notes: list[str] = []

    def leave_out(self, columns: Sequence[str], labels: Collection[str]) -> None:
        """Leave out the rows in which one of `columns` holds one of `labels`, which mean that nobody has labelled the image."""
        if not labels:
            return
        barred = {_same_number(label) for label in labels}
        of_columns = [[_same_number(cell) in barred for cell in self._cells(column)] for column in columns]
        found = np.array([any(cells) for cells in zip(*of_columns, strict=True)], dtype=bool)
        if found.any():
            self.notes.append(f"{int(found.sum())} rows left out: their label is one of ignore_labels")
        self._frame = self._frame.iloc[np.flatnonzero(~found)]
        self.rows = self.rows[~found]

    def patients(self, column: str) -> np.ndarray:
        """Return ids of patients; two spellings of one id that programs make of each other (12 and 12.0) become one."""
        cells = self.filled(column)
        spellings: dict[str, set[str]] = {}
        for cell in set(cells.tolist()):
            spellings.setdefault(_same_id(cell), set()).add(cell)
        several = [found for found in spellings.values() if len(found) > 1]
        if several:
            self.notes.append(
                f"{len(several)} patients of column '{column}' are written in several ways (as 12 and 12.0, with other blanks or "
                "other forms of accented letters): each taken as one"
            )
        one = {cell: min(found, key=lambda each: (len(each), each)) for found in spellings.values() for cell in found}
        alike: dict[str, set[str]] = {}
        for same in spellings:
            alike.setdefault(same.casefold().lstrip("0"), set()).add(same)
        doubtful = sum(len(found) for found in alike.values() if len(found) > 1)
        if doubtful:
            self.notes.append(
                f"{doubtful} patients of column '{column}' differ from another only in case or leading zeros: taken as different"
            )
        return np.array([one[cell] for cell in cells.tolist()])

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
                outside.append(f"row {row}, {_instead(cell, classes)}")
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
                unknown.append(f"row {row}, {_instead(strange[0], classes)}")
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
        texts = self.file_names(column)
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
        return self._within(column, declared)

    def file_names(self, column: str) -> tuple[str | None, ...]:
        """Return file names, None where missing."""
        return tuple(None if cell in _MISSING else cell for cell in self._cells(column))

    def boxes(self, columns: tuple[str, str, str, str]) -> np.ndarray:
        """Return float (n, 4), NaN in rows without a box."""
        edges = np.array([self._numbers(column, "; expected pixels") for column in columns], dtype=np.float64).T
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

    def _within(self, column: str, declared: NumberColumn) -> tuple[float | None, ...]:
        values = tuple(self._numbers(column))
        outside = [
            f"row {row}, {cell}; expected {declared.min:g} to {declared.max:g}"
            for row, cell, number in zip(self.rows, self._cells(column), values, strict=True)
            if number is not None and not declared.min <= number <= declared.max
        ]
        self._report(column, "value outside the declared range", "values outside the declared range", outside)
        return values

    def _numbers(self, column: str, expected: str = "") -> list[float | None]:
        """Return a column of numbers, None where missing; `expected`: what to say of a cell that holds another thing."""
        cells = self._cells(column)
        values = [None if cell in _MISSING else _number(cell) for cell in cells]
        wrong = [
            f"row {row}, '{cell}'{expected}"
            for row, cell, number in zip(self.rows, cells, values, strict=True)
            if number is None and cell not in _MISSING
        ]
        self._report(column, "value that is not a number", "values that are not numbers", wrong)
        return values

    def _categories(self, column: str, declared: CategoryColumn) -> tuple[str | None, ...]:
        values: list[str | None] = []
        other: list[str] = []
        for row, cell in zip(self.rows, self._cells(column), strict=True):
            known = cell in declared.values
            values.append(cell if known else None)
            if not known and cell not in _MISSING:
                other.append(f"row {row}, {_instead(cell, declared.values)}")
        self._report(column, "value that is not declared", "values that are not declared", other)
        return tuple(values)

    def _cells(self, column: str) -> list[str]:
        return [str(cell).strip() for cell in self._frame[column]]

    def _report(self, column: str, kind: str, kinds: str, found: list[str]) -> None:
        if found:
            self.problems.append(f"column '{column}': {counted(kind, kinds, found)}")


def torn_patients(patients: np.ndarray, splits: np.ndarray | None, rows: np.ndarray, *, quoted: bool) -> str:
    """Return which patients are in more than one split, all (n,); an empty text where none is.

    A patient in train and in test makes the test worthless.
    """
    torn: list[str] = []
    for patient, found in _positions(patients).items():
        first_row: dict[str, int] = {}
        for index in found:
            if splits is not None and splits[index] in SPLITS:
                first_row.setdefault(str(splits[index]), int(rows[index]))
        if len(first_row) > 1 and patient not in _MISSING:
            where = " and ".join(f"{split} (row {row})" for split, row in first_row.items())
            who = f"'{patient}' in " if quoted else ""
            torn.append(f"{who}{where}; put all rows of a patient into one split")
    return counted("patient in more than one split", "patients in more than one split", torn) if torn else ""


def _instead(cell: str, names: Sequence[str]) -> str:
    return f"'{cell}'{nearest(cell, names)}; expected {listed(names, 12, last='or')}"


def _same_number(cell: str) -> str:
    """Return the cell, a whole number without the ".0" that programs add."""
    found = _WHOLE_FLOAT.fullmatch(cell.strip())
    return found[1] if found else cell.strip()


def _same_id(cell: str) -> str:
    return _same_number(" ".join(unicodedata.normalize("NFC", cell).split()))


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
