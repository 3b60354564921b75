"""`flwr run` on ports and in a FLWR_HOME of its own, for tests and for the benchmark.

Left alone, `flwr run` starts one SuperLink per machine, always on the same port, and leaves it running. What must not meet
another run, or must end, runs inside `own_flower`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from chainward_shared.config import ConfigScalar


@contextmanager
def own_flower(home: Path) -> Iterator[dict[str, str]]:
    """Yield the environment for Flower commands with `home` as FLWR_HOME; at the end stop what they have started."""
    home.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    try:
        yield environment
    finally:
        stop_processes(home)


def run_command(app: Path, settings: Mapping[str, ConfigScalar], nodes: int | None = None) -> list[str]:
    """Return the command that runs a Flower app with its log, e.g. for `subprocess.run`.

    Parameters
    ----------
    settings : run configuration where it differs from the app's
    nodes : virtual SuperNodes; None leaves it to Flower
    """
    # Flower reads the pairs as TOML; JSON's numbers, strings and booleans are TOML too
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    command = ["flwr", "run", str(app), "--stream"]
    command += ["--run-config", pairs] if pairs else []
    return command + (["--federation-config", f"num-supernodes={nodes}"] if nodes else [])


def processes_of(home: Path) -> list[psutil.Process]:
    """Return the processes that have `home` as FLWR_HOME, and their descendants."""
    processes = list(psutil.process_iter(["ppid", "environ"]))
    found = {p.pid for p in processes if (p.info["environ"] or {}).get("FLWR_HOME") == str(home)}
    while more := {p.pid for p in processes if p.info["ppid"] in found} - found:
        found |= more
    return [p for p in processes if p.pid in found]


def stop_processes(home: Path, grace: float = 20.0) -> None:
    """Stop the SuperLink that `flwr run` left behind under `home`, then whatever of its runs is still there."""
    _stop([process for process in processes_of(home) if _is_superlink(process)], grace)
    _, remaining = psutil.wait_procs(processes_of(home), timeout=grace)
    _stop(remaining, grace)


def _is_superlink(process: psutil.Process) -> bool:
    try:
        return any(Path(part).name == "flower-superlink" for part in process.cmdline())
    except psutil.Error:
        return False


def _stop(processes: list[psutil.Process], grace: float) -> None:
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, stubborn = psutil.wait_procs(processes, timeout=grace)
    for process in stubborn:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
