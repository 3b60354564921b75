"""Watching a run until it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.live import Live

from chainward_server.report.formats import duration
from chainward_server.watch.display import QUIET, as_json, news, outcome, picture, silence
from chainward_server.watch.snapshot import Snapshot, look
from chainward_shared.errors import RunFolderError, nearest

RECENT = 60.0
"""Seconds for which a run's last sign of life makes it the one that a script has just started."""

FINISHED, FAILED, INCOMPLETE = 0, 1, 3

Output = Literal["live", "lines", "json"]


def find_run(run: str | None, directory: Path, *, wait: float = 0.0, interval: float = 0.5) -> Path:
    """Return the folder of a run.

    Parameters
    ----------
    run : its id or the path of its folder; None: the run that was last at work
    directory : folder of the run folders
    wait : seconds to wait until it is there. Without `run`, a run is waited for that appears, or that was at work within the
        last `RECENT` seconds: an older one is not what was just started

    Raises
    ------
    RunFolderError
        It is not there.
    """
    base = directory.expanduser().absolute()
    until = time.monotonic() + wait
    known = set(_run_files(base))
    while True:
        if run is not None:
            found = next((path for path in (base / run, Path(run).expanduser()) if (path / "run.json").is_file()), None)
            if found:
                return found.absolute()
        else:
            files = [file for file in _run_files(base) if not wait or file not in known or _age(file) < RECENT]
            if files:
                return max(files, key=lambda file: -_age(file)).parent
        if time.monotonic() >= until:
            break
        time.sleep(min(interval, max(0.0, until - time.monotonic())))
    waited = f" after {duration(wait)}" if wait else ""
    if run is None:
        which = f"no run has appeared in {base}" if wait and known else f"no run in {base}"
        raise RunFolderError(f"{which}{waited}; name its folder with --dir")
    names = [file.parent.name for file in _run_files(base)]
    raise RunFolderError(
        f"run {run!r}: no run.json in {base / run}{waited}{nearest(run, names)}; `chainward runs` lists"
    )


def watch(
    path: Path,
    console: Console,
    output: Output,
    *,
    interval: float = 2.0,
    timeout: float = 0.0,
    write: Callable[[str], None] = print,
) -> int:
    """Show a run until it ends and return 0 if it finished, 3 if it ended incomplete, 1 if it failed, was stopped, is gone or
    gave no sign of life for `timeout`.

    Parameters
    ----------
    console : the terminal; used by "live" only
    output : "live": a picture that is kept up to date; "lines" or "json": one line for all that happens
    interval : seconds between two looks at the folder
    timeout : seconds without a sign of life after which to give up; 0: never
    write : takes each line of the other two outputs, and the last lines of "live"

    Raises
    ------
    RunFolderError
        The folder is gone, or a file of it is damaged.
    """
    old: Snapshot | None = None
    mentioned = 0.0
    live = Live(console=console, refresh_per_second=4, transient=False) if output == "live" else None
    with live or nullcontext():
        while True:
            run = _look(path)
            if live:
                live.update(picture(run, console.height))
            elif output == "lines":
                for line in news(old, run):
                    write(f"{run.time.astimezone():%H:%M:%S}  {line}")
            elif not run.ended and (old is None or _progress(old) != _progress(run)):
                write(json.dumps(as_json(run, "progress")))
            if run.ended:
                break
            mentioned = min(mentioned, run.silent)  # it has spoken again
            if not live and (warning := silence(run)) and run.silent >= max(QUIET, 2 * mentioned):
                mentioned = run.silent
                write(json.dumps(as_json(run, "silence")) if output == "json" else warning)
            if timeout and run.silent >= timeout:
                break
            old = run
            time.sleep(interval)
    return _close(run, output, timeout, write)


def exit_code(status: str) -> int:
    """Return the exit code of a command that ends with a run: 0 finished, 3 incomplete, 1 anything else."""
    return {"finished": FINISHED, "incomplete": INCOMPLETE}.get(status, FAILED)


def _close(run: Snapshot, output: Output, timeout: float, write: Callable[[str], None]) -> int:
    """Say how the watching ended and return the exit code."""
    code = exit_code(run.status) if run.ended else FAILED
    if output == "json":
        write(json.dumps({**as_json(run, "end" if run.ended else "timeout"), "exit": code}))
        return code
    if run.ended:
        for line in outcome(run):
            write(line)
    else:
        write(
            f"run {run.run}: no sign of life for {duration(run.silent)} (--timeout {timeout:g}); it may have died. "
            f"Its phase: {run.phase}; to go on from the last finished piece of work: the same command with {run.how_to_resume}"
        )
    return code


def _look(path: Path) -> Snapshot:
    """Look at the folder, a second time if the first fails: a network drive may show half of an exchange of files."""
    try:
        return look(path)
    except RunFolderError:
        time.sleep(0.5)
        return look(path)


def _progress(run: Snapshot) -> tuple[object, ...]:
    return run.status, run.phase, len(run.links), len(run.alone), len(run.rounds), tuple(run.waiting)


def _run_files(base: Path) -> list[Path]:
    return list(base.glob("*/run.json"))


def _age(file: Path) -> float:
    """Return the seconds since a file was written; infinite if it is gone."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return float("inf")
