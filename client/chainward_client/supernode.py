"""`chainward-supernode`: Flower's SuperNode, with its own arguments, as a service that works fast and dies visibly.

* Client processes come out of a prepared one (`superexec.py`): a request costs no new start of PyTorch.
* In Flower 1.41 a TLS handshake that times out, as where a VPN is down for a while, ends the SuperNode's connection loop, but not
  its process: a thread that serves the machine itself keeps it alive. It looks well, takes no work any more, and systemd sees
  nothing to restart. Here the process ends with the loop, and with the process that starts the work; whoever supervises it starts
  it again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from typing import NoReturn

GRACE = 5.0
"""Seconds in which the SuperNode may end by itself once the process that starts the work has ended; three times as long it may
take to take its leave of the SuperLink, which otherwise lets it in again no sooner than after a minute."""

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
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        words = " ".join(str(error).split()) or type(error).__name__
        _end(f"the connection to the SuperLink is lost ({words}); start it again")
    finally:
        _leave(1 if _lost.is_set() else code)


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


def _end_with(superexec: subprocess.Popen[bytes]) -> None:
    """End this process when the one that starts the work has ended: without it a SuperNode takes requests and answers none."""
    code = superexec.wait()
    time.sleep(GRACE)
    _end(f"the process that starts the work has ended (exit code {code}); start it again")
    _lost.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3 * GRACE)
    _leave(1)


def _end(words: str) -> None:
    """Say why this process ends."""
    sys.stderr.write(f"chainward-supernode: {words}\n")


def _leave(code: int) -> NoReturn:
    """End this process, whatever threads there are."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
