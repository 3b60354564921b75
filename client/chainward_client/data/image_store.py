"""The files of a folder or a zip, found by the names that a manifest gives them."""

from __future__ import annotations

import os
import re
import unicodedata
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Self

from PIL import Image

from chainward_client.data.unusable import NOT_FOUND, ImageProblem, unreadable
from chainward_shared.errors import DataError, nearest

_DRIVE = re.compile(r"[A-Za-z]:")

MOST_FILES = 2_000_000
"""In a zip. Each costs some hundred bytes of memory before a single one is read."""

MOST_BYTES = 2 * 2**30
"""Of one file in a zip, unpacked: a whole-slide image or a long cine loop is smaller."""

MOST_RATIO = 200
BLANK_BYTES = 64 * 2**20
"""A file that unpacks to more than `BLANK_BYTES`, and `MOST_RATIO` times its size in the zip, is a bomb and no picture. A blank
mask is smaller."""


class ImageStore:
    """The files of a folder (with its sub-folders) or of a zip, found by name.

    Parameters
    ----------
    location : folder or zip
    extensions : endings beside those of images that a name may leave out, ".dcm" say

    Raises
    ------
    DataError
        If `location` is neither a folder nor a zip.
    """

    def __init__(self, location: Path, extensions: Collection[str] = ()) -> None:
        self.location = location
        self._zip: zipfile.ZipFile | None = None
        if location.is_dir():
            members = [name for name, _ in files_below(location)]
        else:
            try:
                self._zip = zipfile.ZipFile(location)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{location} is neither a folder nor a whole zip ({error})") from None
            count = len(self._zip.infolist())
            if count > MOST_FILES:
                raise DataError(
                    f"{location} holds {count:,} files; expected at most {MOST_FILES:,}: unpack it into a folder"
                )
            members = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        self._members = set(members)
        self._by_name: dict[str, list[str]] = {}
        endings = {*Image.registered_extensions(), *extensions}
        for member in sorted(self._members):
            path = PurePosixPath(member)
            for start in range(len(path.parts)):
                ending = PurePosixPath(*path.parts[start:])
                self._by_name.setdefault(str(ending), []).append(member)
                if path.suffix.lower() in endings:
                    self._by_name.setdefault(str(ending.with_suffix("")), []).append(member)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the zip, if it is one."""
        if self._zip is not None:
            self._zip.close()

    def stamp(self, member: str) -> tuple[int, int]:
        """Return what changes when a file does: its size, and time of modification in ns; in a zip size and CRC.

        Raises
        ------
        OSError
            The file is not there any more, or nobody may look at it.
        """
        if self._zip is not None:
            info = self._zip.getinfo(member)
            return info.file_size, info.CRC
        return stamp(self.location / member)

    @property
    def members(self) -> tuple[str, ...]:
        """Return the paths of all files inside the store, sorted."""
        return tuple(sorted(self._members))

    def find(self, name: str) -> str:
        """Return the path inside the store of the file called `name`; extension and folders may be left out.

        An absolute path is found by the end of it that is a file here. Where nothing is called just so, another case and another
        form of the same accented letters (Unicode's NFC and NFD) will do.

        Raises
        ------
        ImageProblem
            If there is no such file, or more than one.
        """
        path = PurePosixPath(name.replace("\\", "/"))
        if str(path) in self._members:
            return str(path)
        ends = [str(path)]
        if path.is_absolute() or _DRIVE.match(name):
            ends = [str(PurePosixPath(*path.parts[start:])) for start in range(1, len(path.parts))]
        for known, wanted in ((self._by_name, ends), (self._by_plain_name, [_plain(end) for end in ends])):
            for end in wanted:
                found = known.get(end, [])
                if len(found) > 1:
                    reason = f"could be {' or '.join(found[:3])}; name it in full"
                    raise ImageProblem("{} with an ambiguous name", reason)
                if found:
                    return found[0]
        raise ImageProblem(NOT_FOUND, "no such file")

    @cached_property
    def _by_plain_name(self) -> dict[str, list[str]]:
        plain: dict[str, set[str]] = {}
        for name, members in self._by_name.items():
            plain.setdefault(_plain(name), set()).update(members)
        return {name: sorted(members) for name, members in plain.items()}

    def suggestion(self, name: str) -> str:
        """Return ``" (did you mean 'X'?)"`` for the nearest file name, or an empty string."""
        return nearest(name, self._by_name)

    def read(self, member: str, *, quoted: bool = True) -> bytes:
        """Return the bytes of a file that `find` named.

        Parameters
        ----------
        quoted : whether the problem may quote an error's text, which may name the file

        Raises
        ------
        ImageProblem
            It can't be read; or of a zip: it unpacks to more than a picture would. No more is ever unpacked than the zip's
            directory says.
        """
        try:
            if self._zip is None:
                return (self.location / member).read_bytes()
            info = self._zip.getinfo(member)
            bomb = info.file_size > BLANK_BYTES and info.file_size > MOST_RATIO * max(info.compress_size, 1)
            if not bomb and info.file_size <= MOST_BYTES:
                return self._zip.read(member)
        except Exception as error:  # a bad checksum, an encrypted member, no permission
            reason = getattr(error, "strerror", None) or (str(error) if quoted else type(error).__name__)
            raise unreadable(reason) from None
        raise ImageProblem(
            "{} too large to be unpacked",
            f"{info.compress_size:,} bytes in the zip become {info.file_size:,}; take it out of the zip",
        )


def stamp(path: Path) -> tuple[int, int]:
    """Return size and time of modification (ns) of a file.

    Raises
    ------
    OSError
        It is not there, or nobody may look at it.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def files_below(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all files below a folder by their paths relative to it; linked folders are followed, each once on a way down.

    Pipes, devices and links to nothing are no files: reading them would wait for ever, or never end.
    """
    waiting = [(str(folder), "", frozenset({folder.resolve()}))]
    while waiting:
        current, before, above = waiting.pop()
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:  # a folder that nobody may read: its files are not found
            continue
        for entry in entries:
            name = f"{before}{entry.name}"
            if not entry.is_dir():
                if entry.is_file():
                    yield name, entry
                continue
            real = Path(entry.path).resolve()
            if real not in above:  # else a link to where we come from
                waiting.append((entry.path, f"{name}/", above | {real}))


_KEPT: dict[tuple[Path, frozenset[str]], ImageStore] | None = None


@contextmanager
def opened(location: Path, extensions: Collection[str] = ()) -> Iterator[ImageStore]:
    """Open a folder or zip; within `keep_open`, each is listed once only.

    Raises
    ------
    DataError
        If `location` is neither a folder nor a zip.
    """
    if _KEPT is None:
        with ImageStore(location, extensions) as store:
            yield store
        return
    key = (location, frozenset(extensions))
    if key not in _KEPT:
        _KEPT[key] = ImageStore(location, extensions)
    yield _KEPT[key]


@contextmanager
def keep_open() -> Iterator[None]:
    """Let `opened` give the same store again as long as this lasts: listing 50,000 files takes a second or two."""
    global _KEPT
    _KEPT = {}
    try:
        yield
    finally:
        kept, _KEPT = _KEPT, None
        for store in kept.values():
            store.close()
