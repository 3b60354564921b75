"""A SuperLink of one's own, on ports and in a FLWR_HOME that nobody else uses: for `chainward run`, tests and the benchmark.

Left alone, `flwr run` starts one SuperLink per machine, always on the same port, and leaves it running: whoever started it
lends everybody else's simulations home, account and installed version. What must not meet another run, or must end, runs
inside `own_flower`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from chainward_server.resuming import as_setting
from chainward_server.stop import end_processes
from chainward_shared.config import ConfigScalar

LOOPBACK = ("127.0.0.1", "localhost")


def own_environment(home: Path) -> dict[str, str]:
    """Return the environment for Flower's commands with `home` as FLWR_HOME, on two free ports."""
    return without_proxy(
        os.environ
        | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
    )


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which this machine is not looked for behind a proxy: Flower asks its SuperLink by HTTP."""
    named = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [host.strip() for host in named.split(",") if host.strip()]
    hosts += [host for host in LOOPBACK if host not in hosts]
    return {**environment, "NO_PROXY": ",".join(hosts), "no_proxy": ",".join(hosts)}


@contextmanager
def own_flower(home: Path) -> Iterator[dict[str, str]]:
    """Yield the environment for Flower commands with `home` as FLWR_HOME; at the end stop what they have started."""
    home.mkdir(parents=True, exist_ok=True)
    try:
        yield own_environment(home)
    finally:
        stop_processes(home)


def run_command(app: Path, settings: Mapping[str, ConfigScalar], nodes: int | None = None) -> list[str]:
    """Return the command that runs a Flower app with its log, e.g. for `subprocess.run`.

    Parameters
    ----------
    settings : run configuration where it differs from the app's
    nodes : virtual SuperNodes; None leaves it to Flower
    """
    pairs = " ".join(as_setting(key, value) for key, value in settings.items())
    command = ["flwr", "run", str(app), "--stream"]
    command += ["--run-config", pairs] if pairs else []
    return command + (["--federation-config", f"num-supernodes={nodes}"] if nodes else [])


def processes_of(home: Path) -> list[psutil.Process]:
    """Return the processes that have `home` as FLWR_HOME, and their descendants, but for this process."""
    processes = list(psutil.process_iter(["ppid", "environ"]))
    found = {p.pid for p in processes if (p.info["environ"] or {}).get("FLWR_HOME") == str(home)}
    while more := {p.pid for p in processes if p.info["ppid"] in found} - found:
        found |= more
    return [p for p in processes if p.pid in found and p.pid != os.getpid()]


def stop_processes(home: Path, grace: float = 20.0) -> int:
    """Stop the SuperLink under `home`, then whatever of its runs is still there; return how many processes there were."""
    found = processes_of(home)
    end_processes([process for process in found if is_program(process, "flower-superlink")], grace)
    _, remaining = psutil.wait_procs(processes_of(home), timeout=grace)
    end_processes(remaining, grace)
    return len(found)


def is_program(process: psutil.Process, name: str) -> bool:
    """Return whether a process runs the program called `name`."""
    try:
        return any(Path(part).name == name for part in process.cmdline()[:3])
    except psutil.Error:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
