"""The files of a folder or a zip, found by the names that a manifest gives them."""

from __future__ import annotations

import os
import re
import unicodedata
import zipfile
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from PIL import Image

from chainward_client.data.unusable import ImageProblem
from chainward_shared.errors import DataError, nearest

_DRIVE = re.compile(r"[A-Za-z]:")
NOT_FOUND = "{} not found"


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
            members = list(_files_below(location))
        else:
            try:
                self._zip = zipfile.ZipFile(location)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{location} is neither a folder nor a whole zip ({error})") from None
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._zip is not None:
            self._zip.close()

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

    def read(self, member: str) -> bytes:
        """Return the bytes of a file that `find` named."""
        if self._zip is not None:
            return self._zip.read(member)
        return (self.location / member).read_bytes()


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _files_below(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it; linked folders are followed, each once on a way down."""
    waiting = [(folder, frozenset({folder.resolve()}))]
    while waiting:
        current, above = waiting.pop()
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:  # a folder that nobody may read: its files are not found
            continue
        for entry in entries:
            if not entry.is_dir():
                yield Path(entry.path).relative_to(folder).as_posix()
                continue
            real = Path(entry.path).resolve()
            if real not in above:  # else a link to where we come from
                waiting.append((Path(entry.path), above | {real}))
