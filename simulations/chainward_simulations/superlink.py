"""The SuperLink of one `chainward run`: it begins and ends with the run, also where nobody follows the run any more."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil

from chainward_server.run_process import RunProcess
from chainward_server.surroundings import FOLLOWED
from chainward_shared.errors import ChainwardError
from chainward_shared.files import written
from chainward_simulations.flower import is_program, own_environment, processes_of, stop_processes

SUPERLINKS = Path("~/.chainward/superlinks").expanduser()
START_SECONDS = 120.0
"""In which a SuperLink must answer; a few on an idle machine. Flower's own command gives up after 15."""
KEEPER = "chainward_simulations.superlink"


class SuperLink:
    """A SuperLink and its SuperExec in a folder of their own.

    Parameters
    ----------
    home : a new folder below `SUPERLINKS` unless told; it becomes FLWR_HOME, and is removed when the SuperLink is stopped
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or SUPERLINKS / secrets.token_hex(4)
        self.environment = own_environment(self.home) | {FOLLOWED: "1"}

    @property
    def log(self) -> Path:
        """What the SuperLink says of itself."""
        return self.home / "superlink.log"

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises
        ------
        ChainwardError
            The folder can't be written, or it ended or did not answer within `START_SECONDS`.
        """
        with written(self.home, ChainwardError, "FLWR_HOME of the SuperLink"):
            self.home.mkdir(parents=True)
            self.own(os.getpid())
            log = self.log.open("wb")
        port = self.environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
        control = self.environment["FLWR_LOCAL_CONTROL_API_PORT"]
        with log:
            # Flower would let its own SuperExec build an environment for each run; there is nothing to install in it
            link = self._popen(
                *("flower-superlink", "--insecure", "--simulation", "--isolation", "process", "--host", "127.0.0.1"),
                *("--port", port, "--control-api-address", f"127.0.0.1:{control}"),
                log=log,
            )
            self._wait(link, port)
            self._popen(
                *("flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"),
                *("--parent-pid", str(link.pid)),
                log=log,
            )

    def own(self, pid: int) -> None:
        """Note which process looks after it."""
        owner = RunProcess.current().model_copy(update={"pid": pid, "created": psutil.Process(pid).create_time()})
        (self.home / "owner.json").write_text(owner.model_dump_json(), encoding="utf-8")

    def at_work(self) -> bool:
        """Return whether a simulation runs in it."""
        return any(is_program(process, "flwr-simulation") for process in processes_of(self.home))

    def stop(self) -> int:
        """Stop it and what runs in it, remove its folder, and return how many processes there were."""
        ended = stop_processes(self.home)
        shutil.rmtree(self.home, ignore_errors=True)
        return ended

    def leave_to_keeper(self) -> None:
        """Start a process that stops it when its run has ended."""
        with self.log.open("ab") as log:
            keeper = self._popen(sys.executable, "-P", "-m", KEEPER, str(self.home), log=log)
        self.own(keeper.pid)

    def _popen(self, *command: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        # a session of its own: Ctrl-C in the terminal is not for it
        return subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def _wait(self, process: subprocess.Popen[bytes], port: str) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if process.poll() is not None:
                words = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise ChainwardError(
                    f"Flower's SuperLink ended with code {process.returncode}: {words[-1] if words else 'it said nothing'}"
                )
            if _answers(port):
                return
            time.sleep(0.1)
        raise ChainwardError(
            f"Flower's SuperLink does not answer on port {port} after {START_SECONDS:.0f} s; see {self.log}"
        )


def _answers(port: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=1.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def abandoned(superlinks: Path = SUPERLINKS) -> list[SuperLink]:
    """Return the SuperLinks of `chainward run` that nobody looks after any more: its process, and the keeper's, was killed."""
    found = []
    for home in sorted(superlinks.glob("*/owner.json")):
        try:
            owner = RunProcess.model_validate(json.loads(home.read_bytes()))
        except (OSError, ValueError):
            continue
        if owner.gone:
            found.append(SuperLink(home.parent))
    return found


def keep(home: Path, pause: float = 2.0) -> None:
    """Stop the SuperLink under `home` when no simulation runs in it any more."""
    link = SuperLink(home)
    while link.at_work():
        time.sleep(pause)
    link.stop()


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
