"""One process at a time works on a task, and others can see whether one does.

A coordinator that hears nothing asks for the same again, and asks whether anyone is still at work on it. The lock is the
operating system's, on a file: it ends with the process that holds it, however that ends. Not `filelock`'s, as elsewhere: that
empties the file, which here says who holds it and until when.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chainward_shared.errors import StoreError
from chainward_shared.files import written

logger = logging.getLogger("chainward.client")

POLL_SECONDS = 0.5


class WorkLock:
    """The lock of one task.

    Parameters
    ----------
    path : its file, which is there while someone is at work
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def held(self) -> bool:
        """Whether a process is at work on the task, this one included."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    @contextmanager
    def hold(self, seconds: float) -> Iterator[None]:
        """Hold the lock; wait until whoever holds it has finished.

        Parameters
        ----------
        seconds : for so long somebody waits for the answer, and so long this waits for the lock. A process that still holds
            it when nobody waits for its answer any more is ended: it hangs, or is too slow, and its work goes on from the
            last epoch that it wrote down.

        Raises
        ------
        StoreError
            The file can't be written, or another process has kept the lock.
        """
        file = self._acquire(time.time() + seconds)
        try:
            yield
        finally:
            self.path.unlink(missing_ok=True)  # first: who waits for this file sees that it is another one then
            os.close(file)

    def _acquire(self, end: float) -> int:
        told = False
        while True:
            file = self._open()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is(file):
                    with suppress(OSError):  # a full disk: then nobody can tell whom to end
                        os.ftruncate(file, 0)
                        os.pwrite(file, json.dumps({"pid": os.getpid(), "until": end}).encode(), 0)
                    return file
            except BlockingIOError:
                holder = _read(file)
                if not told:
                    told = True
                    logger.info("another process is at work on the same; waiting for it")
                if time.time() > holder.get("until", end) and _end(holder, self.path):
                    logger.warning("ended a process that was at work on the same when nobody waited for it any more")
                if time.time() > end:
                    os.close(file)
                    raise StoreError(f"{self.path}: another process has kept it; end that process") from None
            os.close(file)
            time.sleep(POLL_SECONDS)

    def _open(self) -> int:
        with written(self.path, advice="fix its rights"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def _is(self, file: int) -> bool:
        """Whether the open file is still the one at the path: whoever held it before has removed it."""
        try:
            return os.path.samestat(os.fstat(file), self.path.stat())
        except FileNotFoundError:
            return False


def _read(file: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(file, 1000, 0))
    except ValueError:  # its holder is about to write it
        return {}
    return found if isinstance(found, dict) else {}


def _end(holder: dict[str, Any], path: Path) -> bool:
    """Kill the process that holds the lock at `path`; not where the number may be another process's: in another container,
    say."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid == os.getpid() or not _has_open(pid, path):
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True


def _has_open(pid: int, path: Path) -> bool:
    try:
        return any(file.samefile(path) for file in Path(f"/proc/{pid}/fd").iterdir() if file.exists())
    except OSError:
        return False
