"""Small files in a site's state folder: one process at a time changes one, and it is there whole or not at all.

What a site writes is for its own account alone, whatever the umask that it was started with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from pydantic import BaseModel, ValidationError

from chainward_shared.errors import StoreError
from chainward_shared.files import write_atomically, written
from chainward_shared.words import first_problem

LONGEST_WAIT = 60.0
"""Seconds that a process waits for another one that changes the same file."""

M = TypeVar("M", bound=BaseModel)


@contextmanager
def for_the_owner_alone() -> Iterator[None]:
    """Give files mode 0600 and folders 0700 as long as this lasts; in all threads, and in processes started meanwhile."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Let no other process work on a file meanwhile.

    Raises
    ------
    StoreError
        Its folder can't be written, or another process keeps the file.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(file.with_suffix(".lock"), timeout=LONGEST_WAIT, mode=0o600)
        lock.acquire()
    except OSError as error:
        raise StoreError(f"{file}: can't be used ({error}); free space or fix its rights") from error
    try:
        yield
    finally:
        lock.release()


def read_kept(file: Path, model: type[M], advice: str = "restore it from a backup") -> M | None:
    """Return what was kept in a file; None where there is none.

    Raises
    ------
    StoreError
        It can't be read, or is damaged; `advice`: what to do then.
    """
    try:
        return model.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{file}: can't be read ({error.strerror}); fix its rights") from error
    except ValidationError as error:
        raise StoreError(f"{file}: damaged ({first_problem(error)}); {advice}") from error


def write_kept(file: Path, model: BaseModel) -> None:
    """Keep something in a file, for its owner alone.

    Raises
    ------
    StoreError
        It can't be written.
    """
    with written(file):
        write_atomically(file, model.model_dump_json(by_alias=True).encode(), mode=0o600)
