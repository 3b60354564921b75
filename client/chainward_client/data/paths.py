"""Paths in a data file: relative to the file they stand in, and checked to be there."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo


def beside_data_file(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path())
    path = folder / path
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise ValueError(f"there is no {path}; give the path relative to the data file") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    return path


def _file(path: Path) -> Path:
    if not path.is_file():  # a pipe is none either: reading one may wait for ever
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path} is {what}; expected a file")
    return path


def folder_or_zip(path: Path) -> Path:
    if not path.is_dir() and not (path.is_file() and zipfile.is_zipfile(path)):
        raise ValueError(f"{path} is neither a folder nor a whole zip")
    return path


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected a folder")
    return path


FilePath = Annotated[Path, AfterValidator(beside_data_file), AfterValidator(_file)]
Folder = Annotated[Path, AfterValidator(beside_data_file), AfterValidator(_folder)]
FolderOrZip = Annotated[Path, AfterValidator(beside_data_file), AfterValidator(folder_or_zip)]
