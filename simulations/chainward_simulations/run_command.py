"""`chainward run`: a simulation from its settings to its report, with a SuperLink of its own and a true exit status."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chainward_server.cli import parse_settings
from chainward_server.run_folder import RunFolder
from chainward_server.stop import stop_run
from chainward_server.watch.display import outcome
from chainward_server.watch.snapshot import Snapshot, look
from chainward_server.watch.watching import FAILED, exit_code
from chainward_shared.config import ConfigScalar, RunConfig
from chainward_shared.errors import ChainwardError, ConfigError, RunFolderError
from chainward_simulations.flower import run_command
from chainward_simulations.superlink import SuperLink

SIX_SITES = Path("simulations/six_sites")
SERVER_APP = "chainward_simulations.app:app"
INTERRUPTED = 130
REPORT_SECONDS = 120.0
"""In which a run whose log has ended must have written how it ended."""


class Interrupted(Exception):
    """Someone wants to stop following. `ask`: there is a person who can be asked whether the run shall end, too."""

    def __init__(self, ask: bool) -> None:
        super().__init__()
        self.ask = ask


def app_and_settings(words: Sequence[str], run_configs: Sequence[str] = ()) -> tuple[Path, dict[str, ConfigScalar]]:
    """Return the app's folder and the settings in the command's words: ``[APP] [KEY=VALUE ...]``.

    A value is read as TOML; what is no TOML is text, so that a shell's user need not quote twice. A word that ends in `.toml`
    is a file of settings. `run_configs`: what stands behind ``--run-config``, read as Flower reads it.

    Raises
    ------
    ConfigError
        The folder is no app of a simulation, a file can't be read, or a setting is unknown, out of range or contradicts another.
    """
    first = words[0] if words else ""
    named = bool(first) and "=" not in first and not first.endswith(".toml")
    app = Path(first) if named else _default_app()
    given: dict[str, ConfigScalar] = {}
    for word in words[1:] if named else words:
        given.update(_settings(word))
    for text in run_configs:
        given.update(parse_settings([text]))
    defaults = _app_config(app)
    RunConfig.from_flat({**defaults, **given})
    return app, given


def run(app: Path, settings: Mapping[str, ConfigScalar], say: Callable[[str], None], ask: Callable[[str], bool]) -> int:
    """Run a simulation, show its log, and return the exit code: 0 finished, 3 incomplete, 1 failed, 130 left to itself.

    Parameters
    ----------
    say : takes each line
    ask : asks a person a question; without one it is not called
    """
    directory = Path(RunConfig.from_flat({**_app_config(app), **settings}).output.dir).expanduser().absolute()
    link = SuperLink()
    follower: subprocess.Popen[str] | None = None
    kept = False
    try:
        with _interruptible():
            link.start()
            follower = subprocess.Popen(
                run_command(app.absolute(), settings),
                env=link.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            assert follower.stdout is not None
            for line in follower.stdout:
                say(line.rstrip("\n"))
            follower.wait()
            return _ended(_folder_of(link, directory), link, say)
    except Interrupted as interrupted:
        folder = _folder_of(link, directory)
        if folder is None:
            say("stopped before the run began")
            return INTERRUPTED
        kept = _left_to_itself(folder, link, interrupted.ask, say, ask)
        return INTERRUPTED
    finally:
        if follower is not None and follower.poll() is None:
            follower.terminate()
        if not kept:
            link.stop()


def _left_to_itself(
    folder: Path, link: SuperLink, may_ask: bool, say: Callable[[str], None], ask: Callable[[str], bool]
) -> bool:
    """Say what goes on, and return whether it shall; stop it where a person says so."""
    name = RunFolder.open(folder).how_to_name
    say("")
    say(f"run {folder.name} goes on without this log")
    if may_ask and ask("Stop it?"):
        stopped = stop_run(folder)
        say(f"run {stopped.run} is stopped")
        if how := RunFolder.open(folder).how_to_resume:
            say(f"to go on from the last finished piece of work: the same command with {how}")
        return False
    link.leave_to_keeper()
    say(f"to follow it:  chainward watch {name}")
    say(f"to stop it:    chainward stop {name}")
    return True


def _ended(folder: Path | None, link: SuperLink, say: Callable[[str], None]) -> int:
    """Say how the run ended, its report last, and return the exit code."""
    if folder is None:
        raise ChainwardError(f"the run did not begin; Flower's words are above, and in {link.log} until now")
    end = time.monotonic() + REPORT_SECONDS
    shot = look(folder)
    while not shot.ended and time.monotonic() < end:
        time.sleep(0.5)
        shot = look(folder)
    for line in _last_words(shot):
        say(line)
    return exit_code(shot.status) if shot.ended else FAILED


def _last_words(shot: Snapshot) -> list[str]:
    report = shot.path / "report.html"
    lines = [line for line in outcome(shot) if not line.startswith("report: ")]
    return [*lines, *([str(report)] if report.is_file() else [])]


def _folder_of(link: SuperLink, directory: Path) -> Path | None:
    """Return the folder of the run that works in this SuperLink; None before it has one."""
    for file in sorted(directory.glob("*/run.json"), reverse=True):
        try:
            process = RunFolder.open(file.parent).state.process
        except RunFolderError:
            continue
        if process is not None and process.flower_home == str(link.home):
            return file.parent
    return None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn Ctrl-C, and the end of the terminal, into `Interrupted`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(ask=number == signal.SIGINT and sys.stdin.isatty())

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _default_app() -> Path:
    """Return the six sites of the checkout one stands in, or of the one that is installed."""
    places = [SIX_SITES, Path(__file__).resolve().parent.parent / "six_sites"]
    found = next((place for place in places if (place / "pyproject.toml").is_file()), None)
    if found is None:
        raise ConfigError("APP is missing: the folder of a simulation's app, as simulations/six_sites of a checkout")
    return found


def _app_config(app: Path) -> dict[str, Any]:
    """Return the run configuration of an app, flat."""
    file = app / "pyproject.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
        server, config = table["components"]["serverapp"], table.get("config", {})
    except OSError as error:
        raise ConfigError(
            f"{file}: can't be read ({error.strerror}); expected the folder of a simulation's app"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: is not a Flower app ({error!s}); expected a folder as simulations/six_sites"
        ) from error
    if server != SERVER_APP:
        raise ConfigError(
            f"{app}: its serverapp is {server!r}, and a simulation's is {SERVER_APP!r}; start a deployed consortium's run with "
            f"`flwr run {app} NAME`"
        )
    return _flat(config)


def _flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(_flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value})
    return flat


def _settings(word: str) -> dict[str, Any]:
    if word.endswith(".toml") and "=" not in word:
        try:
            return _flat(tomllib.loads(Path(word).read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{word}: can't be read as settings ({error}); expected TOML") from error
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{word!r} is no setting; expected KEY=VALUE, as chain.laps=2, or a .toml file")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return _flat({key.strip(): value})
