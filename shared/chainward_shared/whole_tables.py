"""Tables of which nothing is lost: on a terminal, however narrow, and in a file or a pipe.

Rich cuts what does not fit ("…"), and a run's id or a path that is cut can't be used. Here a table on a terminal gets columns as
wide as their longest word at least; where these don't fit beside each other, every row becomes a few lines, one for each cell.
What is no terminal gets a line for each row, without a frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from textwrap import wrap

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.style import StyleType
from rich.table import Column, Table
from rich.text import Text

from chainward_shared.outside import visible

NOTHING = "-"
"""Stands for an empty cell where there is no frame to see it by."""
_GAP = "  "
_WORDS = re.compile(r"\S+")
_FOLDS = re.compile(r"[^\s/._-]*[/._-]+|[^\s/._-]+\s*|\s+")


class _Drawn:
    """A table whose columns have their widths, drawn as Rich does."""

    def __init__(self, table: Table, widths: Sequence[int]) -> None:
        self.table = copy(table)
        self.table.title = self.table.caption = None
        self.table.columns = [
            replace(
                column,
                width=width,
                no_wrap=False,
                overflow="fold",
                _cells=[_cell(column, one, width) for one in column.cells],
            )
            for column, width in zip(table.columns, widths, strict=True)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.table.__rich_console__(console, options.update(no_wrap=False, overflow="fold"))


def of_text(table: Table) -> bool:
    """Return whether all cells are text: of a progress bar they aren't."""
    return all(isinstance(cell, str | Text) for column in table.columns for cell in column.cells)


def fitted(table: Table, console: Console, options: ConsoleOptions) -> RenderableType:
    """Return what shows a whole table on a terminal of this width, without a word of it broken.

    Columns get the width of their longest line where there is room. Where there isn't, the widest are wrapped, none to less than
    its longest word; where it is not to be wrapped (`no_wrap`), its longest line; where it folds (``overflow="fold"``), the
    longest part of a word, which may go on in the next line after a slash, a dot, a hyphen or an underscore. Where even this is
    too wide, rows become lines.
    """
    room = options.max_width - _frame(table, console, options)
    least = [_least(column) for column in table.columns]
    most = [max(_lines(column), default=1) for column in table.columns]
    if sum(least) > room:
        return _annotated(table, Group(*_as_lines(table, options.max_width)))
    return _annotated(table, _Drawn(table, _shared_out(room, least, most)))


def as_columns(table: Table) -> RenderableType:
    """Return a table for a file or a pipe: a line for each row, cells two spaces apart, none of them empty."""
    rows = [[_shown(column.header).plain for column in table.columns]] if table.show_header else []
    rows += [[cell.plain for cell in cells] for cells, _ in _rows(table)]
    rows = [[" ".join(cell.split()) or NOTHING for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    right = [column.justify == "right" for column in table.columns]
    lines = [_GAP.join(_padded(*cell) for cell in zip(row, widths, right, strict=True)).rstrip() for row in rows]
    return _annotated(table, Group(*(Text(line, no_wrap=True, overflow="ignore") for line in lines)))


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _annotated(table: Table, body: RenderableType) -> Group:
    """Put title and caption around a table, as wide as they like: they are not of its width."""
    title = [_shown(table.title, "table.title")] if table.title else []
    caption = [_shown(table.caption, "table.caption")] if table.caption else []
    return Group(*title, body, *caption)


def _as_lines(table: Table, width: int) -> Iterator[Text]:
    """Yield a table with a line for each cell that isn't empty, and an empty line between rows; words that are longer than a
    line stay in one piece."""
    headers = [_shown(column.header).plain for column in table.columns]
    margin = max(map(cell_len, headers)) + len(_GAP)
    for number, (cells, style) in enumerate(_rows(table)):
        if number:
            yield Text("")
        for header, cell in zip(headers, cells, strict=True):
            words = " ".join(cell.plain.split())
            pieces = wrap(words, max(width - margin, 20), break_long_words=False, break_on_hyphens=False)
            for place, piece in enumerate(pieces):
                front = "" if place else header
                line = Text(front + " " * (margin - cell_len(front)), style, no_wrap=True, overflow="ignore")
                yield line.append(piece, cell.style)


def _rows(table: Table) -> Iterator[tuple[list[Text], StyleType]]:
    """Yield the cells of every row, and its style."""
    columns = [[_shown(cell) for cell in column.cells] for column in table.columns]
    for row, cells in zip(table.rows, zip(*columns, strict=True), strict=True):
        yield list(cells), row.style or ""


def _shown(cell: RenderableType, style: StyleType = "") -> Text:
    """Return a cell as text that only shows itself, before anybody measures it."""
    given = cell if isinstance(cell, Text) else Text(str(cell), style)
    return Text("\n".join(map(visible, given.plain.split("\n"))), given.style or style)


def _lines(column: Column) -> list[int]:
    """Return the width of every line of a column."""
    cells = [column.header, *column.cells]
    return [cell_len(line) for cell in cells for line in _shown(cell).plain.split("\n")]


def _least(column: Column) -> int:
    if column.no_wrap:
        return max(_lines(column), default=1)
    parts = _FOLDS if column.overflow == "fold" else _WORDS
    cells = [column.header, *column.cells]
    return max((cell_len(part.strip()) for cell in cells for part in parts.findall(_shown(cell).plain)), default=1)


def _cell(column: Column, cell: RenderableType, width: int) -> Text:
    """Return a cell of a column of this width; where it folds, with line breaks."""
    shown = _shown(cell)
    if column.overflow != "fold" or cell_len(shown.plain) <= width:
        return shown
    lines = [""]
    for part in _FOLDS.findall(shown.plain):
        if cell_len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return Text("\n".join(line.rstrip() for line in lines if line), shown.style)


def _frame(table: Table, console: Console, options: ConsoleOptions) -> int:
    """Return how much of a table's width its lines and the padding of its cells take."""
    bare = copy(table)
    bare.columns = [replace(column, width=1, _cells=[]) for column in table.columns]
    return Measurement.get(console, options, bare).maximum - len(table.columns)


def _shared_out(room: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return the widths of columns: all that they can use where there is room, else the narrow ones first."""
    widths = list(least)
    room -= sum(widths)
    while room > 0 and (growing := [index for index, width in enumerate(widths) if width < most[index]]):
        narrowest = min(growing, key=lambda index: widths[index])
        widths[narrowest] += 1
        room -= 1
    return widths
