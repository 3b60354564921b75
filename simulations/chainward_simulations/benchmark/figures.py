"""What benchmarks report: repeated measurements, aims, and tables for a terminal or for Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Measured:
    """Repeated measurements of one quantity, in the order in which they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.values)

    def ratio_to(self, other: Measured) -> Measured:
        """Return the ratios to the measurements of `other` taken in the same repeats."""
        return Measured(tuple(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)))

    def text(self, digits: int) -> str:
        """Return the median with the smallest and the largest repeat, e.g. ``1.02 (0.98 to 1.05)``."""
        low, high = min(self.values), max(self.values)
        spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(self.values) > 1 else ""
        return f"{self.median:.{digits}f}{spread}"


@dataclass(frozen=True)
class Aim:
    """What a figure should reach."""

    relation: Literal["at least", "at most"]
    limit: float
    unit: str = ""

    def text(self, value: float) -> str:
        """Return the aim and whether `value` reaches it."""
        met = value >= self.limit if self.relation == "at least" else value <= self.limit
        return f"{self.relation} {self.limit:g}{self.unit}: {'met' if met else 'missed'}"


@dataclass
class Table:
    """A table of text cells. `notes` say how the figures were taken."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        """Print the table to a terminal."""
        table = RichTable(title=self.title, title_justify="left", caption_justify="left")
        for index, name in enumerate(self.columns):
            table.add_column(name, justify="right" if self._is_figure(index) else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note)
        console.print()

    def markdown(self) -> str:
        """Return the table as Markdown, to paste into the documentation."""
        rules = ["---:" if self._is_figure(index) else "---" for index in range(len(self.columns))]
        rows = [_row(self.columns), _row(rules), *map(_row, self.rows)]
        return "\n\n".join([f"### {self.title}", "\n".join(rows), *self.notes]) + "\n"

    def _is_figure(self, column: int) -> bool:
        return all(row[column][:1].isdigit() or row[column] in ("", "-") for row in self.rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
