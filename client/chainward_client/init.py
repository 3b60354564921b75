"""``chainward-site init``: a hospital's folder, with everything that has to be filled in and where each value comes from."""

from __future__ import annotations

import csv
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

from chainward_client.site_config import load_site_config
from chainward_client.site_key import site_key
from chainward_client.site_ledger import create_site_ledger
from chainward_shared import __version__
from chainward_shared.errors import DataError, StoreError
from chainward_shared.files import sync
from chainward_shared.privacy.signing import fingerprint

STATE = "state"

_USUAL = {
    "image": ("image", "image_id", "image_file", "file", "filename", "file_name", "path", "sopinstanceuid"),
    "label": ("label", "class", "diagnosis", "dx", "finding", "findings", "target"),
    "patient": ("patient", "patient_id", "patientid", "pseudonym", "subject", "subject_id", "lesion_id", "case_id"),
    "split": ("split", "subset", "fold", "partition"),
}
"""How the columns of a manifest are usually called."""


@dataclass(frozen=True)
class Initialised:
    """What was written: the files, `site.yaml` first, and the fingerprint of the ledger's key."""

    site_yaml: Path
    data: Path
    written: tuple[Path, ...]
    fingerprint: str


def initialise(folder: Path, site: str, data: Path | None = None) -> Initialised:
    """Write a hospital's site.yaml, data file, checklist, key and ledger into `folder`: all of them, or nothing.

    Parameters
    ----------
    folder : made where it isn't there
    site : id under which the coordinator knows the hospital
    data : a finished data file (.yaml), of which site.yaml then speaks; or what a new data file shall speak of: a manifest
        (.csv), an .npz file, or a folder or zip of images. Default: nothing, to be filled in

    Raises
    ------
    DataError
        A file that would be written is there already, the id can't be used, or `data` isn't there.
    StoreError
        The folder can't be written.
    """
    folder = folder.expanduser().absolute()
    _check_id(site)
    if data is not None:
        data = data.expanduser().absolute()
        if not data.exists():
            raise DataError(f"--data {data}: there is no such file or folder")
    own_data = data is not None and data.suffix.lower() in (".yaml", ".yml")
    names = ["data.yaml"] * (not own_data) + ["CHECKLIST.md", STATE, "site.yaml"]  # site.yaml last: it makes it a site
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file; expected a folder, or a name that is free")
    for name in names:
        if (folder / name).exists() or (folder / name).is_symlink():
            raise DataError(
                f"{folder / name}: is there already and is not overwritten; give another folder, or move it away"
            )
    data_path = data if own_data and data is not None else folder / "data.yaml"
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".chainward-init-") as staged:
            shown = _stage(Path(staged), folder, site, data_path, None if own_data else data)
            _move(Path(staged), folder, names)
    except BaseException as error:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise StoreError(f"{folder}: can't be written ({error.strerror}); nothing was left there") from error
        raise
    written = tuple(folder / name for name in reversed(names))
    return Initialised(folder / "site.yaml", data_path, written, shown)


def suggested_site(folder: Path) -> str:
    """Return an id made of the folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", folder.expanduser().absolute().name.lower()).strip("-")[:64] or "hospital-a"


def site_yaml_text(site: str, data: str, site_yaml: Path) -> str:
    """Return the commented site.yaml, which is `client/site.example.yaml` with this site's values."""
    text = _template("site.yaml")
    text = re.sub(r"(?m)^site: \S+", lambda _: f"site: {_quoted(site)}", text, count=1)
    text = re.sub(r"(?m)^data: \S+", lambda _: f"data: {_quoted(data)}", text, count=1)
    return text.replace("/etc/chainward/site.yaml", str(site_yaml))


def _check_id(site: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", site):
        raise DataError(
            f"--site {site!r}: expected 1 to 64 letters, digits, points, dashes or underscores; ask the coordinator which id"
        )


def _stage(staged: Path, folder: Path, site: str, data: Path, describes: Path | None) -> str:
    """Write all files into the folder `staged`, and return the fingerprint of the ledger's key."""
    shown = str(data.relative_to(folder)) if data.is_relative_to(folder) else str(data)
    text = site_yaml_text(site, shown, folder / "site.yaml")
    (staged / "site.yaml").write_text(text, encoding="utf-8")
    config = load_site_config(staged / "site.yaml")
    assert config.privacy is not None and config.state == STATE
    if not data.exists():
        (staged / "data.yaml").write_text(_data_yaml(describes, folder / "site.yaml"), encoding="utf-8")
    (staged / STATE).mkdir(mode=0o700)
    ledger = create_site_ledger(staged / STATE, site)
    site_key(staged / STATE)
    shown_key = fingerprint(ledger.public_key)
    checklist = _rendered(
        "CHECKLIST.md.jinja",
        site=site,
        version=__version__,
        data=data,
        state=folder / STATE,
        site_yaml=folder / "site.yaml",
        folder=folder,
        fingerprint=shown_key,
        policy=config.privacy,
    )
    (staged / "CHECKLIST.md").write_text(checklist, encoding="utf-8")
    return shown_key


def _move(staged: Path, folder: Path, names: Sequence[str]) -> None:
    """Move everything to where it belongs; take back what was moved if one can't be."""
    moved: list[Path] = []
    try:
        for name in names:
            target = folder / name
            if target.exists():
                raise DataError(f"{target}: appeared just now and is not overwritten; is somebody else at work here?")
            (staged / name).rename(target)
            moved.append(target)
        sync(folder)
    except BaseException:
        for target in moved:
            if target.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)
        raise


def _data_yaml(describes: Path | None, site_yaml: Path) -> str:
    columns = {"image": "<image>", "label": "<label>", "patient": "<patient>", "split": ""}
    manifest, images, kind, header = "<cases.csv>", "<images>", "csv", ""
    if describes is not None and describes.suffix.lower() == ".npz":
        kind, images = "npz", _quoted(str(describes))
    elif describes is not None and describes.suffix.lower() in (".csv", ".txt"):
        manifest = _quoted(str(describes))
        names = _header(describes)
        header = ", ".join(" ".join(name.split()) for name in names)
        for role, usual in _USUAL.items():
            fitting = [name for name in names if name.strip().lower() in usual]
            if len(fitting) == 1:
                columns[role] = _quoted(fitting[0])
        images = _quoted(str(describes.parent))
    elif describes is not None:
        images = _quoted(str(describes))
    return _rendered(
        "data.yaml.jinja",
        kind=kind,
        manifest=manifest,
        images=images,
        header=header,
        columns=columns,
        site_yaml=site_yaml,
    )


def _header(manifest: Path) -> list[str]:
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--data {manifest}: can't be read as a CSV file in UTF-8 ({error})") from error


def _quoted(text: str) -> str:
    """Return `text` as YAML: in quotes where it needs them."""
    return yaml.safe_dump(text, allow_unicode=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _template(name: str) -> str:
    return (files("chainward_client") / "templates" / name).read_text(encoding="utf-8")


def _rendered(name: str, **values: object) -> str:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    return environment.from_string(_template(name)).render(**values)
