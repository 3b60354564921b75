"""Ending a run, and what a run that was killed has left behind; nothing but that, whoever else uses Flower or Ray here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from chainward_server.run_folder import RunFolder
from chainward_server.run_process import RunProcess, user_name
from chainward_shared.errors import RunFolderError

GRACE = 20.0
"""Seconds that a process gets to end by itself before it is killed."""

_RAY_SESSION = re.compile(r"/session_[0-9-]+_[0-9-]+_[0-9]+_([0-9]+)(?:/|$)")
"""Folder of a Ray session; it ends with the id of the process that started Ray, which in a simulation coordinates the run."""


@dataclass(frozen=True)
class Stopped:
    """What came of stopping a run. `was_running`: its process was there; `ended`: processes that were ended."""

    path: Path
    run: str
    was_running: bool
    ended: int


def stop_run(path: Path, *, grace: float = GRACE) -> Stopped:
    """End a run's processes and note in its folder that it was stopped.

    Raises
    ------
    RunFolderError
        The run has ended and left nothing behind, runs on another machine or as another user, or was started by a version
        that did not write down its process.
    """
    folder = RunFolder.open(path)
    run, process = folder.state.run_id, folder.state.process
    if process is None:
        raise RunFolderError(f"run {run}: it is not written down which process it is; stop it with `flwr stop`")
    if not process.here:
        raise RunFolderError(f"run {run} was started on {process.host!r}; stop it there")
    main = process.find()
    found = {p.pid: p for p in ([main, *_descendants(main)] if main else [])}
    found.update((p.pid, p) for p in left_behind(process))
    if not found and folder.state.status != "running":
        raise RunFolderError(f"run {run} has ended ({folder.state.status}) and left no process behind")
    if process.user != user_name() and os.geteuid() != 0:
        raise RunFolderError(f"run {run} runs as user {process.user!r}; stop it as that user")
    ended = end_processes([main] if main else [], grace) + end_processes(found.values(), grace)
    folder = RunFolder.open(path)
    if folder.state.status == "running":
        folder.end("stopped", "stopped by `chainward stop`" if main else "its process was gone; what it left was ended")
    return Stopped(path, run, main is not None, ended)


def stop_leftovers(directory: Path) -> list[Stopped]:
    """End what is left of runs whose process, or whose SuperLink, was killed; runs at work are left alone."""
    stopped = []
    for file in sorted(directory.expanduser().glob("*/run.json")):
        try:
            process = RunFolder.open(file.parent).state.process
        except RunFolderError:
            continue
        if process is None or not process.here or process.user != user_name():
            continue
        main = process.find()
        if (main and is_orphan(main)) or (main is None and left_behind(process)):
            stopped.append(stop_run(file.parent))
    return stopped


def is_orphan(process: psutil.Process) -> bool:
    """Return whether a process that Flower has started has outlived the SuperLink that did."""
    try:
        if not any(Path(part).name in ("flwr-simulation", "flwr-serverapp") for part in process.cmdline()[:3]):
            return False
        above = [Path(part).name for parent in process.parents() for part in parent.cmdline()[:3]]
    except psutil.Error:
        return False
    return "flower-superexec" not in above


def left_behind(process: RunProcess) -> list[psutil.Process]:
    """Return the processes of the Ray session that `process` started, and their descendants."""
    found: dict[int, psutil.Process] = {}
    for candidate in psutil.process_iter():
        if _is_of_session(candidate, process):
            found.update((p.pid, p) for p in [candidate, *_descendants(candidate)])
    return list(found.values())


def end_processes(processes: Iterable[psutil.Process], grace: float = GRACE) -> int:
    """Ask processes to end, kill those that don't within `grace` seconds, and return how many there were."""
    asked = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
            asked.append(process)
    _, stubborn = psutil.wait_procs(asked, timeout=grace)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=grace)
    return len(asked)


def _is_of_session(candidate: psutil.Process, process: RunProcess) -> bool:
    """Return whether a process belongs to the Ray session that `process` started: its arguments, or the log it writes, say so."""
    try:
        if candidate.username() != process.user or candidate.create_time() < process.created:
            return False
        arguments = candidate.cmdline()
        named = [match for part in arguments for match in _RAY_SESSION.findall(part)]
        if not named and arguments and arguments[0].startswith("ray::"):  # which have no arguments of their own
            named = [match for file in candidate.open_files() for match in _RAY_SESSION.findall(file.path)]
        return str(process.pid) in named
    except psutil.Error:
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []
