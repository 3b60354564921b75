"""A Flower SuperLink of one's own on this machine, for tests and for the benchmark.

`flwr run` starts one SuperLink per machine, always on the same port, and leaves it running. What must not meet another
run, or must end, starts its own here: on free loopback ports, with a FLWR_HOME of its own, stopped by its process id.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 60.0
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink. `connection`: its name in `config.toml` of `home`; `environment`: for commands that use it."""

    home: Path
    connection: str
    environment: dict[str, str]
    pid: int

    def run(
        self, app: Path, settings: Mapping[str, bool | int | float | str], *, nodes: int = 2, timeout: float = 600.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `flwr run APP --stream` and return what it printed. It may exit with 0 though the run failed.

        Parameters
        ----------
        nodes : virtual SuperNodes
        timeout : seconds, after which the command is ended
        """
        words = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
        command = [_script("flwr"), "run", str(app), self.connection, "--stream"]
        command += ["--federation-config", f"num-supernodes={nodes}"]
        if words:
            command += ["--run-config", words]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )


@contextmanager
def own_superlink(home: Path) -> Iterator[SuperLink]:
    """Start a SuperLink for simulations with `home` as FLWR_HOME; stop it, and all it started, at the end.

    Raises
    ------
    RuntimeError
        It did not come up; the message names its log.
    """
    home.mkdir(parents=True, exist_ok=True)
    http, control = _free_port(), _free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{http}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    log = home / "superlink.log"
    command = [_script("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--control-api-address", f"127.0.0.1:{control}", "--host", "127.0.0.1", "--port", str(http)]
    command += ["--database", str(home / "state.db")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=home, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_ready(process, http, log)
        yield SuperLink(home, "own", environment, process.pid)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"flower-superlink ended with {process.returncode}; see {log}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError(f"flower-superlink did not answer within {START_SECONDS:.0f} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and the processes of its session, politely first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _script(name: str) -> str:
    """Return the path of a command installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def _toml(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
