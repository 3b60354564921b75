"""`chainward-supernode`: Flower's SuperNode, with its own arguments, as a service that works fast and dies visibly.

* Client processes come out of a prepared one (`superexec.py`): a request costs no new start of PyTorch.
* In Flower 1.41 and 1.42 a TLS handshake that times out, as where a VPN is down for a while, ends the SuperNode's connection
  loop, but not its process: a thread that serves the machine itself keeps it alive. It looks well, takes no work any more, and
  systemd sees nothing to restart. Here the process ends with the loop, and with the process that starts the work; whoever
  supervises it starts it again.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from typing import NoReturn

TRIED = ("1.41", "1.42")
"""Flower's versions whose SuperExec can be given our way of starting processes: `superexec.py` replaces a function inside it."""

GRACE = 5.0
"""Seconds in which the SuperNode may end by itself once the process that starts the work has ended; it may need three times
as long to sign off from the SuperLink, which otherwise lets it in again no sooner than after a minute."""

_lost = threading.Event()


def main() -> NoReturn:
    """Run `flower-supernode`; end the process when that ends, however it does. Exit code: Flower's, or 1 after an error."""
    from flwr.supernode.cli import flower_supernode

    code = 1
    try:
        start_superexec(sys.argv)
        flower_supernode()
        code = 0
    except SystemExit as ended:
        code = exit_code(ended)
    except BaseException as error:
        words = " ".join(str(error).split()) or type(error).__name__
        say(f"the connection to the SuperLink is lost ({words}); start it again")
    finally:
        leave(1 if _lost.is_set() else code)


def start_superexec(arguments: list[str]) -> None:
    """Start our SuperExec beside the SuperNode that `arguments` describe, and tell the SuperNode, in `arguments`, to start none.

    Nothing is done where someone else starts the work (`--isolation`), where there will be no SuperNode (`--help`), and on other
    systems than Linux, where a process with PyTorch in it can't safely be copied: Flower starts its own SuperExec then.
    """
    from flwr.supercore.constant import SUPERNODE_UVICORN_DEFAULT_PORT, UVICORN_DEFAULT_HOST

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-h", "--help", "-V", "--version", "--isolation", dest="not_ours", nargs="?", const=True)
    parser.add_argument("--host", default=UVICORN_DEFAULT_HOST)
    parser.add_argument("--port", default=str(SUPERNODE_UVICORN_DEFAULT_PORT))
    parser.add_argument("--ssl-certfile")
    parser.add_argument("--ssl-ca-certfile")
    parser.add_argument("--allow-runtime-dependency-installation", action="store_true", dest="install")
    try:
        own, _ = parser.parse_known_args(arguments[1:])
    except argparse.ArgumentError:
        return  # Flower says what is wrong with them
    if own.not_ours is not None or sys.platform != "linux":
        return
    if problem := prepared_problem():
        say(f"{problem}; Flower starts the work itself, which takes seconds longer for each request")
        return
    host = f"[{own.host}]" if ":" in own.host else own.host
    superexec = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "chainward_client.superexec"),  # -P: no code from the working folder
            *("--runtime-api-address", f"{host}:{own.port}", "--parent-pid", str(os.getpid())),
            *(["--insecure"] if own.ssl_certfile is None else ["--root-certificates", str(own.ssl_ca_certfile)]),
            *(["--allow-runtime-dependency-installation"] if own.install else []),
        ]
    )
    threading.Thread(target=_end_with, args=[superexec], daemon=True).start()
    arguments += ["--isolation", "process"]


def prepared_problem() -> str | None:
    """Return in words why the installed Flower can't be given prepared processes; None if it can."""
    installed = version("flwr")
    if ".".join(installed.split(".")[:2]) not in TRIED:
        return f"prepared processes were tried with Flower {' and '.join(TRIED)}, and this is {installed}"
    try:
        superexec = importlib.import_module("flwr.supercore.superexec.run_superexec")
        executors = importlib.import_module("flwr.supercore.superexec.executor")
        client = importlib.import_module("flwr.supernode.runtime.run_clientapp")
        found = (
            "get_executor" in superexec.run_superexec.__code__.co_names
            and superexec.run_superexec.__globals__["get_executor"] is superexec.get_executor
            and {"ExecutionSpec", "LaunchResult", "SubprocessExecutor"} <= set(dir(executors))
            and {"runtime_api_address", "token", "parent_pid"}
            <= set(inspect.signature(client.run_clientapp).parameters)
        )
    except (ImportError, AttributeError, KeyError):
        found = False
    return None if found else f"Flower {installed} has no place for prepared processes where one was expected"


def _end_with(superexec: subprocess.Popen[bytes]) -> None:
    """End this process when the one that starts the work has ended: without it a SuperNode takes requests and answers none."""
    code = superexec.wait()
    time.sleep(GRACE)
    say(f"the process that starts the work has ended (exit code {code}); start it again")
    _lost.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3 * GRACE)
    leave(1)


def exit_code(ended: SystemExit) -> int:
    """Return the exit code of a program that ends itself so: with a number, or with words, which are an error."""
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def say(words: str) -> None:
    """Say something in the service's own log."""
    sys.stderr.write(f"chainward-supernode: {words}\n")


def leave(code: int) -> NoReturn:
    """End this process, whatever threads there are."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
