"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chainward_shared.errors import ChainwardError, StoreError

ADVICE = "free space or fix its rights"


def write_atomically(path: Path, contents: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and never a part.

    Parameters
    ----------
    mode : rights of the file, from which the umask takes away. Default: those of any new file

    Raises
    ------
    OSError
        The disk is full or can't be written; what was at `path` is there as before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            write_all(descriptor, contents)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)  # noqa: PTH105, beside the other system calls
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def written(path: Path | str, kind: type[ChainwardError] = StoreError, advice: str = ADVICE) -> Iterator[None]:
    """Turn what the system says of a full or locked disk, within the block, into one line.

    Parameters
    ----------
    path : what is written, as the line names it, a file or the setting that names one
    kind : of the error that is raised
    advice : what to do, the end of the line

    Raises
    ------
    ChainwardError
        Of `kind`, in the place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{path}: can't be written ({error.strerror or error}); {advice}") from error


def write_all(descriptor: int, contents: bytes) -> None:
    """Write all of `contents`, in as many calls as the system needs."""
    view = memoryview(contents)
    while view:
        view = view[os.write(descriptor, view) :]


def sync(path: Path) -> None:
    """Have the disk keep a file as it is, or a folder's list of files, so that a power failure does not undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
