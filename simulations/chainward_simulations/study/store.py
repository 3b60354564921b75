"""The study folder: one file says what is finished, written so that a crash at any moment loses no finished arm."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import BaseFileLock, FileLock, Timeout
from pydantic import ValidationError

from chainward_client.data.description import load_description
from chainward_shared import __version__
from chainward_shared.config import ConfigScalar, RunConfig
from chainward_shared.errors import StudyError, WeightsError
from chainward_shared.files import write_atomically, written
from chainward_shared.models import Architecture
from chainward_shared.protocol import TrainingLog
from chainward_shared.weights import StateDict, load_file, save_file
from chainward_shared.words import first_problem
from chainward_simulations.study.records import ArmRecord, StudyState
from chainward_simulations.study.settings import NOT_A_SETTING, PHANTOM

DEFAULT_DIR = Path("~/.chainward/studies")
_FILE = "study.json"
FEATURES = "features"
"""Folder, within the study's, of the output of frozen trunks."""
_OUTPUT = ("results.json", "study.png", "examples.png", "tuning.log", "tuning.json")
_OWN = ("predictions", "chains", FEATURES, *_OUTPUT, _FILE)


def study_settings(config: RunConfig) -> dict[str, ConfigScalar]:
    """Return what must be the same for all arms and when a study goes on, by name.

    Versions, the device, the data file's content, and every key of the configuration that decides a result.
    """
    settings: dict[str, ConfigScalar] = {
        "chainward": __version__,
        "torch": torch.__version__,
        "timm": version("timm"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    if config.data.source != PHANTOM:
        settings |= _content_of(Path(config.data.source))
    settings |= {key: value for key, value in config.to_flat().items() if not key.startswith(NOT_A_SETTING)}
    return settings


def _content_of(file: Path) -> dict[str, ConfigScalar]:
    """Return digests of the data file and of the table of cases it names, and the size of a file of images."""
    description = load_description(file)
    content: dict[str, ConfigScalar] = {"sha256 of the data file": _sha256(file)}
    table, images = description.table_file, description.locations[0]
    if table.is_dir():  # whose files are named as the manifest would
        names = "\n".join(sorted(str(path.relative_to(table)) for path in table.rglob("*") if path.is_file()))
        return content | {"sha256 of the images' names": hashlib.sha256(names.encode()).hexdigest()}
    content[f"sha256 of the {'images' if table == images else 'manifest'}"] = _sha256(table)
    if images.is_file() and images != table:
        content["bytes of the images"] = images.stat().st_size
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_folder(settings: Mapping[str, ConfigScalar]) -> Path:
    """Return the folder of a study with these settings: the same settings, the same folder."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]
    return DEFAULT_DIR.expanduser() / f"{Path(str(settings['data.source'])).stem}-{digest}"


class StudyFolder:
    """One study's folder, held by this process alone. Make it with `open`."""

    def __init__(self, path: Path, state: StudyState, lock: BaseFileLock) -> None:
        self.path, self.state, self._lock = path, state, lock

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, ConfigScalar], *, resume: bool | None) -> StudyFolder:
        """Open a study's folder, and make it where there is none.

        Parameters
        ----------
        resume : True: the study must be there; False: what is there is deleted; None: go on if there is one

        Raises
        ------
        StudyError
            One line: the folder can't be written, is another process's, is damaged, or the study there has other
            settings.
        """
        try:
            for folder in (path / "predictions", path / "chains"):
                folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise StudyError(
                f"{path}: another process is running this study; wait for it, or name another --out"
            ) from None
        except OSError as error:
            raise StudyError(
                f"{path}: the study's folder can't be written ({error.strerror}); name another with --out"
            ) from error
        try:
            return cls(path, cls._load(path, settings, resume), lock)
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def _load(path: Path, settings: Mapping[str, ConfigScalar], resume: bool | None) -> StudyState:
        file = path / _FILE
        now = _now()
        new = StudyState(started=now, updated=now, settings=dict(settings))
        if resume is False:
            for name in _OWN:
                target = path / name
                if target.is_dir():
                    shutil.rmtree(target)
                    target.mkdir(mode=0o700)
                else:
                    target.unlink(missing_ok=True)
            return new
        if not file.exists():
            if resume:
                raise StudyError(f"{path}: there is no study to resume (no {_FILE}); leave --resume out to start one")
            return new
        state = read_study(path)
        if difference := _first_difference(state.settings, settings):
            raise StudyError(
                f"{path}: can't go on with other settings: {difference}; "
                "use the same, another folder with --out, or start anew with --fresh"
            )
        return state

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def record_of(self, arm: str, seed: int) -> ArmRecord | None:
        """Return the finished record of an arm and seed."""
        return next((record for record in self.state.records if (record.arm, record.seed) == (arm, seed)), None)

    def has(self, arm: str, seed: int, digest: str) -> bool:
        """Return whether an arm is finished for a seed.

        Raises
        ------
        StudyError
            It was trained as another definition of the same name says.
        """
        record = self.record_of(arm, seed)
        if record is not None and record.digest != digest:
            raise StudyError(
                f"{self.path}: arm '{arm}' is finished for seed {seed} with another definition "
                f"({record.about}); give this one another name, or start anew with --fresh"
            )
        return record is not None

    def add(self, record: ArmRecord) -> None:
        """Note that an arm is finished for a seed.

        Raises
        ------
        StudyError
            The disk is full or can't be written; what was finished before is still there.
        """
        others = [other for other in self.state.records if (other.arm, other.seed) != (record.arm, record.seed)]
        self.state.records = sorted([*others, record], key=lambda one: (one.seed, one.arm))
        self.save()

    def save(self) -> None:
        """Write study.json, whole or not at all.

        Raises
        ------
        StudyError
            The disk is full or can't be written.
        """
        self.state.updated = _now()
        with written(self.path / _FILE, StudyError, "finished arms before it are kept"):
            write_atomically(self.path / _FILE, self.state.model_dump_json(by_alias=True, indent=1).encode())


def read_study(path: Path) -> StudyState:
    """Return what a study folder's study.json says.

    Raises
    ------
    StudyError
        It can't be read, or is damaged.
    """
    file = path / _FILE
    try:
        return StudyState.model_validate_json(file.read_bytes())
    except OSError as error:
        raise StudyError(f"{file}: can't be read ({error.strerror})") from error
    except ValidationError as error:
        raise StudyError(
            f"{file}: damaged ({first_problem(error)}); start anew with --fresh or name another --out"
        ) from error


def _first_difference(before: Mapping[str, ConfigScalar], now: Mapping[str, ConfigScalar]) -> str | None:
    for key in [*now, *before]:
        if before.get(key) != now.get(key) or (key in before) != (key in now):
            had = repr(before[key]) if key in before else "nothing"
            has = repr(now[key]) if key in now else "nothing"
            return f"{key} was {had} and is {has}"
    return None


def write_output(path: Path, contents: bytes) -> None:
    """Write a file of results, whole or not at all.

    Raises
    ------
    StudyError
        One line, if it can't be written.
    """
    with written(path, StudyError, "free space, or name another --out"):
        write_atomically(path, contents)


@dataclass(frozen=True)
class Chain:
    """What students need of a chain: its model, the strands' last ones, and how its trainings went, by hop."""

    architecture: Architecture
    model: StateDict
    strands: list[StateDict]
    logs: dict[str, TrainingLog]


def save_chain(chain: Chain, path: Path) -> None:
    """Write a chain.

    Raises
    ------
    OSError
        The disk is full or can't be written.
    """
    arrays = {f"chain/{name}": tensor for name, tensor in chain.model.items()}
    if len(chain.strands) > 1:
        for index, strand in enumerate(chain.strands):
            arrays |= {f"strand-{index}/{name}": tensor.clone() for name, tensor in strand.items()}
    metadata = {
        "architecture": chain.architecture.model_dump_json(),
        "strands": str(len(chain.strands)),
        "logs": json.dumps({key: log.model_dump() for key, log in chain.logs.items()}),
    }
    save_file(arrays, path, metadata)


def load_chain(path: Path) -> Chain | None:
    """Return the chain that `save_chain` wrote; None where there is none that can be read, and it is trained again."""
    if not path.exists():
        return None
    try:
        arrays, metadata = load_file(path)
        architecture = Architecture.model_validate_json(metadata["architecture"])
        logs = {key: TrainingLog.model_validate(log) for key, log in json.loads(metadata["logs"]).items()}
        strands = int(metadata["strands"])
    except (WeightsError, ValueError, KeyError):
        return None

    def part(prefix: str) -> StateDict:
        return {name.removeprefix(prefix): tensor for name, tensor in arrays.items() if name.startswith(prefix)}

    model = part("chain/")
    parts = [model] if strands == 1 else [part(f"strand-{index}/") for index in range(strands)]
    return Chain(architecture, model, parts, logs)


def chain_file(folder: Path, digest: str, seed: int) -> Path:
    """Return where the chain with this digest is kept."""
    return folder / "chains" / f"{digest}-seed-{seed}.safetensors"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
