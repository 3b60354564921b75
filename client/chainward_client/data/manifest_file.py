"""A CSV file as text cells, in whatever encoding and with whatever separator spreadsheets write it."""

from __future__ import annotations

import codecs
import csv
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from chainward_shared.errors import DataError

if TYPE_CHECKING:  # pandas takes a second to import
    import pandas as pd

_SEPARATORS = (",", ";", "\t")
_TOLD = re.compile(r'"?sep=([,;\t|])"?\r?\n', re.IGNORECASE)
_HOW_TO_SAVE = "save it as UTF-8 (Excel: Save As, file type 'CSV UTF-8')"


def read_cells(path: Path) -> pd.DataFrame:
    """Return all cells as text, with the header's names as columns, indexed by the row that a spreadsheet shows.

    Read are UTF-8, and UTF-16 or UTF-32 that begin with their byte-order mark; cells between commas, or, where the header has no
    comma, semicolons (what Excel writes in countries with a decimal comma) or tabulators.

    Raises
    ------
    DataError
        If there is no such file, it is no such text, or its rows are longer than its header.
    """
    import pandas as pd

    text = _text(path)
    separator = _separator(text)
    if told := _TOLD.match(text):  # a line of Excel's own, which it does not show as a row
        text, separator = text[told.end() :], told[1]
    try:
        # As text, so that patient 001 does not become 1; the header as a row, so that repeats are seen, and rows
        # that are longer than it are an error.
        frame = pd.read_csv(
            io.StringIO(text), sep=separator, header=None, dtype=str, na_filter=False, skip_blank_lines=False
        )
    except pd.errors.EmptyDataError:
        raise DataError(f"{path.name} is empty; expected a header and one row per image") from None
    except pd.errors.ParserError as error:
        reason = " ".join(str(error).replace("Error tokenizing data. C error:", "").split())
        raise DataError(f"{path.name} is not a well-formed CSV: {reason}") from None
    frame = _headed(frame.fillna(""))
    if frame.empty:
        raise DataError(f"{path.name} has a header but no rows; expected one row per image")
    return frame


def cells_of(rows: list[list[str]]) -> pd.DataFrame:
    """Return rows, the first of which is the header, as `read_cells` does those of a file."""
    import pandas as pd

    return _headed(pd.DataFrame(rows))


def _headed(frame: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    frame.columns = pd.Index([str(name).strip() for name in frame.iloc[0]])
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    frame = frame.iloc[1:]
    blank = (frame == "").all(axis=1)
    return frame[~blank]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"There is no manifest {path}") from None
    except OSError as error:
        raise DataError(f"Manifest {path} can't be read: {error.strerror or error}") from None
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                reason = f"its mark says {encoding.upper()}, byte {error.start + 1} of it is not"
                raise DataError(f"{path.name}: {reason}; {_HOW_TO_SAVE}") from None
    if b"\0" in data:
        where = data.index(b"\0")
        line = data.count(b"\n", 0, where) + 1
        raise DataError(f"{path.name} has a zero byte in line {line}: UTF-16 without its mark? {_HOW_TO_SAVE}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text: {_place(data, error.start)}; {_HOW_TO_SAVE}") from None


def _place(data: bytes, position: int) -> str:
    """Return where a byte stands, and which letter it is in Western Europe's code page."""
    start = max(data.rfind(b"\n", 0, position), data.rfind(b"\r", 0, position)) + 1
    line = len(data[:position].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))
    before = data[start:position].decode("latin-1")
    header = data.split(b"\n", 1)[0].decode("latin-1").removeprefix("\u00ef\u00bb\u00bf")
    separator = _separator(header)
    names = header.strip().split(separator)
    column = len(next(csv.reader([before + "x"], delimiter=separator)))
    name = (
        f" '{names[column - 1].strip()}'" if line > 1 and column <= len(names) and names[column - 1].isascii() else ""
    )
    letter = data[position : position + 1].decode("cp1252", "replace")
    meant = f", '{letter}' in Windows-1252" if letter.isprintable() and letter != "\ufffd" else ""
    return f"line {line}, column {column}{name}, byte 0x{data[position]:02X}{meant}"


def _separator(text: str) -> str:
    """Return what stands between the cells of the header: a comma, or where there is none, a semicolon or tabulator."""
    header = text.lstrip("\r\n").split("\n", 1)[0]
    quoted = header.split('"')[::2]  # what lies outside quotes
    return next((mark for mark in _SEPARATORS if any(mark in part for part in quoted)), ",")
