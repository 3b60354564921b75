"""The run folder: all that a run leaves behind, written so that a crash at any moment leaves something to resume from.

`run.json` is the truth: what it does not list has not happened. Models and `metrics.json` are written first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from pydantic import ValidationError

from chainward_server.completeness import Mending, mending
from chainward_server.results import Results
from chainward_server.resuming import as_setting, reconciled, without_retired
from chainward_server.run_process import RunProcess
from chainward_server.run_state import Phase, RunState, Status, iso
from chainward_shared.config import OutputConfig, RunConfig
from chainward_shared.errors import RunFolderError, WeightsError, nearest
from chainward_shared.files import write_atomically, written
from chainward_shared.privacy.record import PrivacyRecord
from chainward_shared.words import first_problem

if TYPE_CHECKING:  # PyTorch: for models, and whoever only reads a run's records need not wait for it
    from chainward_shared.models import Architecture
    from chainward_shared.pretrained.begin import Beginning
    from chainward_shared.weights import StateDict

logger = logging.getLogger("chainward")

CHAIN, BASE = "chain", "base"
_WEIGHTS_CARD = "chainward.weights_card"
"""In the metadata of the base's file."""


class RunFolder:
    """One run's folder. Make it with `create`, or with `resume`."""

    def __init__(self, path: Path, state: RunState, config: RunConfig) -> None:
        self.path, self.state, self.config = path, state, config
        self._base: StateDict | None = None
        self._retired: list[str] = []
        self.followed: Callable[[Results], None] = lambda results: None

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """Make a new run folder under ``output.dir``.

        Raises
        ------
        RunFolderError
            The folder can't be made or written.
        """
        now = datetime.now(UTC)
        run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        path = Path(config.output.dir).expanduser().absolute() / run_id
        folder = cls(path, RunState(run_id=run_id, started=iso(now), updated=iso(now)), config)
        with written(f"output.dir = {config.output.dir!r}", RunFolderError, "name a folder you may write to"):
            (path / "models").mkdir(parents=True)
        settings = tomli_w.dumps(config.tables()).encode()
        folder._write("config.toml", settings)
        folder.state.config = hashlib.sha256(settings).hexdigest()
        folder._write_state()
        return folder

    @classmethod
    def resume(cls, config: RunConfig) -> RunFolder:
        """Open the stopped run that ``output.resume`` names, with its own configuration.

        Keys that were given now must not contradict the stored ones, but for those of `output` and the deadlines.

        Raises
        ------
        RunFolderError
            There is no such run, it has finished, or a file of it is damaged.
        ConfigError
            A key was given with another value than the run was started with.
        """
        base = Path(config.output.dir).expanduser().absolute()
        path = base / config.output.resume
        if not (path / "run.json").is_file():
            known = [run.parent.name for run in base.glob("*/run.json")] if base.is_dir() else []
            raise RunFolderError(
                f"output.resume = {config.output.resume!r}: no run.json in {path}{nearest(path.name, known)}"
            )
        folder = cls.open(path)
        if folder.state.status == "finished":
            raise RunFolderError(
                f"run {folder.state.run_id} has finished; there is nothing to resume. See {path / 'report.html'}"
            )
        if folder._retired:
            raise RunFolderError(
                f"run {folder.state.run_id} was started with {', '.join(folder._retired)}, which there is no more; finish it "
                "with the version that began it, or start anew"
            )
        folder.config = reconciled(folder.config, config)
        folder._check_models()
        if folder.state.status == "running" and folder.state.process and folder.state.process.find():
            raise RunFolderError(
                f"run {folder.state.run_id} is at work, as process {folder.state.process.pid}; follow it with `chainward watch "
                f"{folder.state.run_id}`, or stop it first with `chainward stop {folder.state.run_id}`"
            )
        folder.state.status, folder.state.reason, folder.state.resumable = "running", None, None
        folder._mend()
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open a run folder to read it.

        Raises
        ------
        RunFolderError
            A file is missing or damaged.
        """
        try:
            state = RunState.model_validate_json((path / "run.json").read_bytes())
            settings = (path / "config.toml").read_bytes()
            tables = tomllib.loads(settings.decode())
            retired = without_retired(tables)
            config = RunConfig.model_validate(tables)
        except OSError as error:
            raise RunFolderError(f"{error.filename}: can't be read ({error.strerror})") from error
        except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            name = "run.json" if isinstance(error, ValidationError) and error.title == "RunState" else "config.toml"
            raise RunFolderError(f"{path / name}: damaged ({first_problem(error)})") from error
        if state.config not in (None, hashlib.sha256(settings).hexdigest()):
            raise RunFolderError(
                f"{path / 'config.toml'}: damaged (it is not what the run was started with); restore it"
            )
        folder = cls(path, state, config.with_threads(config.federation.threads or state.threads or 0))
        folder._retired = retired
        return folder

    def _mend(self) -> None:
        """Take out what is to be done again because a site was not reached."""
        results = self.load_results()
        again, make_up = Mending() if results is None else mending(results, private=self.config.privacy.mode != "off")
        if again:
            logger.info("tried again, since a site was not reached: %s", ", ".join(sorted(again)))
            for name in (*again, "student"):
                self.drop_model(name)
        self.state.finished = [key for key in self.state.finished if key not in again]
        self._write_state()
        if again or make_up:
            kept = self.load_results()
            assert kept is not None
            kept.make_up += [key for key in make_up if key not in kept.make_up]
            kept.final, kept.by_class, kept.models, kept.localization = {}, {}, {}, {}
            self.write_results(kept)

    def load_results(self) -> Results | None:
        """Return what was measured so far, without what `run.json` doesn't list; None before the first measurement.

        Raises
        ------
        RunFolderError
            metrics.json is damaged, or lacks something that `run.json` lists.
        """
        file = self.path / "metrics.json"
        if not file.exists():
            if self.state.finished:
                raise RunFolderError(
                    f"{file}: missing, though run.json lists {len(self.state.finished)} finished pieces of work"
                )
            return None
        try:
            results = Results.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise RunFolderError(f"{file}: damaged ({first_problem(error)})") from error
        done = set(self.state.finished)
        by_kind: tuple[list[Any], ...] = results.links, results.alone, results.student_rounds, results.heads
        for records in by_kind:
            records[:] = [record for record in records if record.key in done]
        if lost := sorted(done - {record.key for records in by_kind for record in records}):
            raise RunFolderError(f"{file}: damaged (it lacks '{lost[0]}', which run.json lists as finished)")
        return results

    @property
    def age(self) -> float:
        """Seconds since the run was first started."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.state.started)).total_seconds()

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.state.run_id

    def is_finished(self, key: str) -> bool:
        """Return whether the piece of work called `key` is done."""
        return key in self.state.finished

    def has_model(self, name: str) -> bool:
        """Return whether the model called `name` is kept."""
        return name in self.state.models

    def save_model(self, name: str, state: StateDict, architecture: Architecture, metadata: Mapping[str, str]) -> None:
        """Write a model file, with `metadata` in it; it counts once `commit` has been called.

        Of a model that starts from pretrained weights only what was trained, but for the chain's, which is the run's result.

        Raises
        ------
        RunFolderError
            The disk is full or can't be written.
        """
        from chainward_shared.models.start import travelling

        self._save(name, state if name == CHAIN else travelling(state, architecture), metadata)

    def _save(self, name: str, state: StateDict, metadata: Mapping[str, str]) -> None:
        from chainward_shared.weights import save_file

        path = self.model_path(name)
        with written(path, RunFolderError, f"free space, then resume run {self.state.run_id}"):
            self.state.models[name] = save_file(state, path, metadata)

    def save_base(self, begun: Beginning) -> None:
        """Write the pretrained weights that the run starts from, once.

        Raises
        ------
        RunFolderError
            The disk is full or can't be written.
        """
        assert begun.base is not None and begun.card is not None
        self._base = begun.base
        if BASE in self.state.models:
            return
        card = begun.card.model_dump_json(by_alias=True)
        self._save(BASE, begun.base, {**begun.architecture.to_metadata(), _WEIGHTS_CARD: card})
        self._write_state()

    def beginning(self) -> Beginning | None:
        """Return what a resumed run began with; None where that is not written down (yet), or there is nothing to.

        Raises
        ------
        WeightsError
            The file is damaged.
        """
        if BASE not in self.state.models:
            return None
        from chainward_shared.models import Architecture
        from chainward_shared.pretrained.begin import Beginning
        from chainward_shared.pretrained.card import WeightsCard
        from chainward_shared.weights import load_file

        base, metadata = load_file(self.model_path(BASE), self.state.models[BASE])
        card = WeightsCard.model_validate_json(metadata[_WEIGHTS_CARD])
        return Beginning(Architecture.from_metadata(metadata, self.model_path(BASE)), base, card)

    def load_model(self, name: str, template: StateDict) -> StateDict:
        """Return the weights of a model file, checked against its recorded digest and `template`.

        Raises
        ------
        WeightsError
            The file is missing, damaged, or of another architecture.
        """
        from chainward_shared.weights import check_state, load_file

        state, _ = load_file(self.model_path(name), self.state.models[name])
        if len(state) < len(template) and BASE in self.state.models:
            if self._base is None:
                self._base = load_file(self.model_path(BASE), self.state.models[BASE])[0]
            known = {**self._base, **state}
            state = {key: known[key] for key in template if key in known}
        check_state(state, template)
        return state

    def metadata_of(self, name: str) -> Mapping[str, str]:
        """Return what a model's file holds beside weights."""
        from chainward_shared.weights import load_file

        return load_file(self.model_path(name), self.state.models[name])[1]

    def drop_model(self, name: str) -> None:
        """Remove a model file that is not needed any more; first from `run.json`, which must not list what is gone."""
        if name in self.state.models:
            del self.state.models[name]
            self._write_state()
            self.model_path(name).unlink(missing_ok=True)

    def model_path(self, name: str) -> Path:
        """Return the path of the model called `name`."""
        return self.path / "models" / f"{name}.safetensors"

    def commit(self, results: Results, *finished: str) -> None:
        """Record the pieces of work `finished`, after writing what was measured in them."""
        self.write_results(results)
        self.state.finished += [key for key in finished if key not in self.state.finished]
        self._write_state()
        self.followed(results)

    def bind(self, keys: Mapping[str, str]) -> None:
        """Note the sites' public keys, each when the site is first met."""
        self.state.keys = {**keys, **self.state.keys}
        self._write_state()

    def await_approval(self, waiting: Mapping[str, float]) -> None:
        """Note the sites where a person has not approved the run yet, and since when (seconds since 1970)."""
        self.state.waiting = {site: iso(datetime.fromtimestamp(since, UTC)) for site, since in waiting.items()}
        self._write_state()

    def enter(self, phase: Phase) -> None:
        """Note that the run is in `phase`."""
        self.state.phase = phase
        self._write_state()

    def begin(self, process: RunProcess) -> None:
        """Note which process coordinates the run from now on."""
        self.state.process = process
        self._write_state()

    def end(self, status: Status, reason: str | None = None, *, resumable: bool = True) -> None:
        """Note how the run ended. `resumable`: whether resuming it may help."""
        self.state.status, self.state.reason, self.state.waiting = status, reason, {}
        self.state.resumable = status != "finished" and resumable
        self._write_state()

    def finish(self, missing: Sequence[str], report: Callable[[RunFolder], Path]) -> Path:
        """Note that the run came to its end: as finished, or as incomplete where something is `missing`; return its report.

        The report is written first: a run that has ended has one. It names the same end as `run.json`.
        """
        self.state.phase, self.state.status = "done", "incomplete" if missing else "finished"
        self.state.reason, self.state.waiting = "; ".join(missing) or None, {}
        self.state.updated = ended = iso(datetime.now(UTC))
        path = report(self)
        self.state.resumable = bool(missing)
        self._write_state(ended)
        return path

    @property
    def how_to_name(self) -> str:
        """The run as one names it behind `chainward watch`, in a shell: its id, or its path where it is not among the others."""
        return shlex.quote(self._usual_name)

    @property
    def how_to_resume(self) -> str | None:
        """The words that resume the run, as one types them behind the command that started it; None where that can't help."""
        if self.state.status == "finished" or self.state.resumable is False:
            return None
        return f"--run-config {shlex.quote(as_setting('output.resume', self._usual_name))}"

    @property
    def _usual_name(self) -> str:
        usual = self.path.parent == Path(OutputConfig().dir).expanduser().absolute()
        return self.path.name if usual else str(self.path)

    def write_results(self, results: Results) -> None:
        """Write metrics.json."""
        self._write("metrics.json", results.model_dump_json(by_alias=True, indent=1).encode())

    def write_privacy(self, record: PrivacyRecord) -> None:
        """Write privacy.json."""
        self._write("privacy.json", json.dumps(record.to_json(), indent=1).encode())

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run folder and return its path."""
        self._write(name, text.encode())
        return self.path / name

    def _write_state(self, at: str | None = None) -> None:
        self.state.updated = at or iso(datetime.now(UTC))
        self._write("run.json", self.state.model_dump_json(by_alias=True, indent=1).encode())

    def _write(self, name: str, contents: bytes) -> None:
        advice = f"free space or fix its rights, then resume run {self.state.run_id}"
        with written(self.path / name, RunFolderError, advice):
            write_atomically(self.path / name, contents)

    def _check_models(self) -> None:
        from chainward_shared.weights import load_file

        for name, sha256 in self.state.models.items():
            try:
                load_file(self.model_path(name), sha256)
            except WeightsError as error:
                raise RunFolderError(f"{error}; start anew, or restore the run folder") from error
