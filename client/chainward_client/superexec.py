"""Flower's SuperExec, with client processes that come out of a prepared one.

Flower starts a process for every request. Each pays for importing PyTorch and timm, 5 to 12 seconds of CPU, beside work that may
take two. Here one process imports them once (`multiprocessing`'s fork server), does nothing else, and is copied for each request.
A request still has a process of its own: one that crashes, hangs or is killed takes nothing with it.

What a copy is told (which function, which request) reaches it as a pickle, through a socket in a folder that only this account
can open; nothing that came from elsewhere is unpickled.

The prepared process must stay as it is right after the imports: a process with threads, an open connection or a started GPU can't
be copied. So it only imports.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import NoReturn

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor

from chainward_client.supernode import exit_code, leave, say

logger = logging.getLogger("chainward.client")

PREPARED = [
    "chainward_client.app",
    "flwr.supernode.runtime.run_clientapp",
    *(f"chainward_shared.models.families.{family}" for family in ("convnext", "efficientnet", "resnetv2", "vit")),
    "sklearn.metrics",
    "torch._dynamo",  # of any optimizer of PyTorch, at its first step
]
"""What the prepared process imports: all that requests need, also what is only imported where it is first used."""

POLL_SECONDS = "0.25"
"""How often Flower's SuperExec asks for work, unless FLWR_SUPEREXEC_TASK_POLL_INTERVAL says otherwise; Flower's default is 1."""


class PreparedExecutor(SubprocessExecutor):
    """Starts a process for a request as a copy of a prepared one; as Flower does where that fails."""

    def __init__(self) -> None:
        super().__init__()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PREPARED)

    def prepare(self) -> None:
        """Wait until the prepared process is ready, so that no request waits for it: Flower gives up on one that is not begun."""
        try:
            first = self._context.Process(target=int)
            first.start()
            first.join()
        except (OSError, EOFError) as error:
            logger.warning("no process can be prepared (%s); each request starts a new one, which takes longer", error)

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process for one request. A prepared process that is gone is made anew."""
        if spec.task_type != TaskType.CLIENT_APP:
            return super().launch(spec)
        try:
            self._context.Process(target=run_client, args=(spec,)).start()
        except (OSError, EOFError) as error:
            logger.warning("the prepared process can't be copied (%s); this request starts a new one", error)
            return super().launch(spec)
        return LaunchResult.accepted()


def run_client(spec: ExecutionSpec) -> None:
    """Be `flwr-clientapp` for one request; runs in the copy."""
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    fresh()
    run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        certificates=validate_and_resolve_root_certificates(spec.root_certificates_path, spec.insecure),
        parent_pid=spec.parent_pid,
        runtime_dependency_install=spec.runtime_dependency_install,
    )


def fresh() -> None:
    """Make of a copy a process of its own: with a name, and with random numbers that no other copy begins with."""
    import numpy as np
    import torch

    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("chainward-work")  # as `ps` and `top` show it
    # Nothing of ours draws from these two without a seed; Python's own, the system's and OpenSSL's know of copies.
    np.random.seed()  # noqa: NPY002
    torch.default_generator.seed()


def main() -> NoReturn:
    """Run `flower-superexec`, with its own arguments."""
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", POLL_SECONDS)
    from flwr.supercore.cli import flower_superexec

    tempfile.tempdir = tempfile.mkdtemp(prefix="chainward-superexec-")
    code = 1
    try:
        executor = PreparedExecutor()
        executor.prepare()
        # the one place where Flower chooses how processes are started; `supernode.py` has looked whether it is there
        flowers = importlib.import_module("flwr.supercore.superexec.run_superexec")
        flowers.get_executor = lambda *_, **__: executor  # type: ignore[attr-defined]
        flower_superexec()
        code = 0
    except SystemExit as ended:
        code = exit_code(ended)
    except BaseException as error:
        say(f"no work can be started ({type(error).__name__}: {error})")
    finally:
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        leave(code)  # multiprocessing would wait for work that goes on


if __name__ == "__main__":
    from chainward_client import superexec  # not as __main__: a copy finds its work by the module's name

    superexec.main()
