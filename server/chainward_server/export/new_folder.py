"""A folder that appears whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from chainward_shared.errors import ExportError
from chainward_shared.files import sync


def check_target(target: Path, own_files: Collection[str], *, force: bool) -> None:
    """Check that `target` may become the new folder.

    Parameters
    ----------
    own_files : names that such a folder consists of; `force` replaces one that holds nothing else
    force : whether a folder that is not empty may be replaced

    Raises
    ------
    ExportError
        It is a file, or a folder that must not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"{target}: is a file, expected a folder; name another with --to")
    found = sorted(entry.name for entry in target.iterdir())
    if found and not force:
        raise ExportError(f"{target}: not empty (it has '{found[0]}'); name another folder with --to, or --force")
    if foreign := [name for name in found if name not in own_files]:
        raise ExportError(
            f"{target}: has '{foreign[0]}', which no export writes, so --force does not replace it; name another folder"
        )


@contextmanager
def new_folder(target: Path, own_files: Collection[str], *, force: bool) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes `target` when the block ends without an error.

    After an error, or Ctrl-C, nothing of it is left and what was at `target` is there as before.

    Raises
    ------
    ExportError
        `target` must not be replaced, or the disk is full or can't be written.
    """
    check_target(target, own_files, force=force)
    # on the same file system as the target, whose parents may not exist yet
    existing = next(parent for parent in target.parents if parent.is_dir())
    staging = existing / f".{target.name}.{secrets.token_hex(4)}.part"
    try:
        staging.mkdir()
        yield staging
        sync(staging)
        check_target(target, own_files, force=force)
        _move_into_place(staging, target)
    except OSError as error:
        raise ExportError(f"{target}: can't be written ({error.strerror or error}); nothing was exported") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        staging.rename(target)
        return
    before = staging.with_name(f"{staging.name}.before")
    target.rename(before)
    try:
        staging.rename(target)
    except BaseException:
        before.rename(target)
        raise
    shutil.rmtree(before, ignore_errors=True)
