"""What a benchmark is asked for, and what it reports: repeated measurements, aims, and tables for a terminal or for Markdown."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table as RichTable

from chainward_shared.config import ConfigScalar

K = TypeVar("K", bound=str)
T = TypeVar("T")


class BenchmarkError(Exception):
    """What was to be measured failed."""


@dataclass(frozen=True)
class Backbone:
    """A timm model, and its patch size in pixels where it is a ViT; 0: the backbone's own."""

    name: str
    patch_size: int = 0

    @classmethod
    def parse(cls, text: str) -> Backbone:
        """Return the backbone that ``NAME`` or ``NAME:PATCH`` names.

        Raises
        ------
        ValueError
            The patch size isn't a number.
        """
        name, _, patch_size = text.partition(":")
        return cls(name, int(patch_size or 0))

    def __str__(self) -> str:
        return f"{self.name}, patch {self.patch_size}" if self.patch_size else self.name


@dataclass(frozen=True)
class Options:
    """What is asked of a benchmark; None and empty: its own default.

    Attributes
    ----------
    say : takes a line of progress
    quick : a tiny version that exercises everything; its figures say nothing
    repeats, epochs : of each measured training
    threads : CPU threads of a training
    app, settings, runs : the Flower app to run, settings in which the run differs from the app's, and how often
    timeout : seconds that one whole run may take
    """

    say: Callable[[str], None] = lambda line: None
    quick: bool = False
    backbones: tuple[Backbone, ...] = ()
    repeats: int | None = None
    epochs: int | None = None
    threads: int = 2
    images: int | None = None
    app: Path = Path()
    settings: Mapping[str, ConfigScalar] = field(default_factory=dict)
    runs: int = 1
    timeout: float = 3600.0


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

    def text(self, digits: int, unit: float = 1.0) -> str:
        """Return the median with the smallest and the largest repeat, e.g. ``1.02 (0.98 to 1.05)``, in multiples of `unit`."""
        low, middle, high = (one / unit for one in (min(self.values), self.median, max(self.values)))
        return f"{middle:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(self.values) > 1 else "")


def in_turn(
    kinds: Sequence[K], repeats: int, once: Callable[[K], float], say: Callable[[str], None]
) -> dict[K, Measured]:
    """Return what `once` gives for each kind, `repeats` times; the time before that isn't counted.

    In each repeat every kind has its turn; the order rotates from repeat to repeat, so that a machine that slows down or warms up
    does so for all of them.
    """
    seen: dict[K, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(-1, repeats):
        turn = repeat % len(kinds)
        for kind in [*kinds[turn:], *kinds[:turn]]:
            value = once(kind)
            if repeat >= 0:
                seen[kind].append(value)
        say(f"{repeat + 1} of {repeats}")
    return {kind: Measured(tuple(values)) for kind, values in seen.items()}


def in_fresh_process(work: Callable[..., T], *arguments: Any) -> T:
    """Return what a function returns in a new process of its own, whose memory nothing else has filled."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(work, *arguments).result()


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
        rows = [f"| {' | '.join(cells)} |" for cells in (self.columns, rules, *self.rows)]
        return "\n\n".join([f"### {self.title}", "\n".join(rows), *self.notes]) + "\n"

    def _is_figure(self, column: int) -> bool:
        return all(row[column][:1].isdigit() or row[column] in ("", "-") for row in self.rows)


Report = tuple[list[Table], Any]
"""What a benchmark found: its tables, and every single measurement as plain JSON values."""
