"""Files that can't be used: each with its reason, all of them in one error, and the cases that are left without them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from chainward_shared.errors import DataError

_Decoded = TypeVar("_Decoded")
SHOWN = 3
"""Files that a message names of each kind of problem."""

NOT_FOUND = "{} not found"


class ImageProblem(Exception):
    """Why one file can't be used.

    Parameters
    ----------
    kind : what such files are counted as; "{}" stands for "image" or "images", "mask" or "masks"
    reason : what is wrong with this one
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def unreadable(reason: str) -> ImageProblem:
    return ImageProblem("unreadable {}", reason)


@dataclass(frozen=True)
class UnusableFile:
    """One file that can't be used.

    Attributes
    ----------
    position : among those that were asked for
    row : of the manifest, as a spreadsheet shows it
    shown : the row, the file's name where messages may name files, and the reason
    """

    position: int
    row: int
    shown: str


class UnusableFiles(DataError):
    """Files that can't be used; the message counts them and names the first few, `files` holds all.

    Parameters
    ----------
    message : one line
    files : all of them, in the order of their rows
    what : "image" or "mask"
    """

    def __init__(self, message: str, files: Sequence[UnusableFile], what: str = "image") -> None:
        super().__init__(message)
        self.what = what
        self.files = tuple(files)


def without_unusable(
    decode: Callable[[np.ndarray], _Decoded], indices: np.ndarray
) -> tuple[_Decoded, np.ndarray, tuple[UnusableFile, ...]]:
    """Return what `decode` makes of the rows at `indices` whose files can be used, which rows these are, and the other files.

    Raises
    ------
    UnusableFiles
        If no file can be used.
    """
    left_out: tuple[UnusableFile, ...] = ()
    while True:
        try:
            return decode(indices), indices, left_out
        except UnusableFiles as error:
            # an image's file first, then the mask's of those that are left
            left_out += error.files
            indices = np.delete(indices, [file.position for file in error.files])
            if not len(indices):
                raise


def counted(kind: str, kinds: str, problems: Sequence[str], most: int = 1) -> str:
    """Return ``"5 unreadable images; first: ..."`` for problems of one kind; `kinds` is its plural, `most` are named."""
    named = "; ".join(problems[:most])
    return f"{len(problems)} {kind if len(problems) == 1 else kinds}; first: {named}"


def attempt_all(
    what: str,
    location: Path,
    rows: Sequence[int],
    attempt: Callable[[int], _Decoded],
    names: Sequence[str | None] = (),
    hint: Callable[[str], str] = lambda _: "",
) -> list[_Decoded]:
    """Return `attempt(position)` for all positions, several at a time.

    Parameters
    ----------
    what : "image" or "mask"
    location : folder or zip, for messages
    rows : the manifest's row of each position
    attempt : returns what a file becomes, or raises an ImageProblem
    names : of the files, where messages may quote them
    hint : what to add where the first file that is not there is named

    Raises
    ------
    UnusableFiles
        With all files that raised; the message counts every kind of problem and names the first few of each.
    """

    def tried(position: int) -> _Decoded | ImageProblem:
        try:
            return attempt(position)
        except ImageProblem as problem:
            return problem

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(tried, range(len(rows))))
    good = [result for result in results if not isinstance(result, ImageProblem)]
    problems: dict[str, list[str]] = {}
    files: list[UnusableFile] = []
    for position in sorted(range(len(results)), key=lambda each: rows[each]):
        result = results[position]
        if not isinstance(result, ImageProblem):
            continue
        of_its_kind = problems.setdefault(result.kind, [])
        shown = f"row {rows[position]}: {result}"
        if names and (name := names[position]) is not None:
            hinted = hint(name) if result.kind == NOT_FOUND and not of_its_kind else ""
            shown = f"row {rows[position]}, '{name}': {result}{hinted}"
        of_its_kind.append(" ".join(shown.split()))  # names may hold line breaks
        files.append(UnusableFile(position, rows[position], of_its_kind[-1]))
    if problems:
        clauses = "; ".join(
            counted(kind.format(what), kind.format(what + "s"), found, SHOWN) for kind, found in problems.items()
        )
        raise UnusableFiles(f"{location.name}: {clauses}", files, what)
    return good
