"""Ray's workers, which play the hospitals of a simulation: one that dies is replaced.

Flower keeps a pool of workers, and puts one that has died (killed for want of memory, say) back into it: every later request is
given to the dead one, and fails within milliseconds. Here a new worker takes the place of a dead one, and the run asks again for
what was lost (`chainward_server.exchange`).

This changes a method inside Flower, so it looks first whether the method is the one it knows.
"""

from __future__ import annotations

import inspect
import logging
import re
from importlib.metadata import version
from typing import Any

from chainward_server.request import WORKER_DIED

logger = logging.getLogger("chainward")


class WorkerDiedError(Exception):
    """A worker has died; in place of Ray's own words, which quote the command lines of whatever else runs on the machine."""


_OF_A_DEATH = re.compile(
    r"Worker exit type|ray\.exceptions\.|WorkerDiedError|out of memory|memory pressure|OOM|Memory on the node", re.I
)
"""In Ray's words about a worker that died: they quote the command lines of the programs that use most memory."""


def quiet_deaths() -> None:
    """Leave Ray's words, and Flower's, about a worker that died out of the log; the run says it in a line of its own."""
    logging.getLogger("flwr").addFilter(_is_no_death)
    try:
        from ray._private import worker
    except ImportError:
        return
    printing = getattr(worker, "print_worker_logs", None)
    if printing is None or getattr(printing, "quiet_deaths", False):
        return

    def print_worker_logs(data: dict[str, Any], *arguments: Any, **more: Any) -> None:
        """Print what workers print, and not what Ray says of one that died."""
        if data.get("pid") == "raylet" and _OF_A_DEATH.search("\n".join(map(str, data.get("lines", ())))):
            return
        printing(data, *arguments, **more)

    print_worker_logs.quiet_deaths = True  # type: ignore[attr-defined]
    setattr(worker, "print_worker_logs", print_worker_logs)  # noqa: B010  a function of Ray


def _is_no_death(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if text.startswith("An exception was raised when processing a message by "):
        return False  # the exception follows
    return not (_OF_A_DEATH.search(text) and WORKER_DIED not in text.splitlines()[0])


def replace_dead_workers() -> bool:
    """Let Flower's pool replace workers that have died, from now on; return whether this Flower can be given that.

    May be called while the pool is at work, and again.
    """
    try:
        from flwr.simulation.ray_transport.ray_actor import BasicActorPool
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        return _not_replaced(str(error))
    fetch = getattr(BasicActorPool, "fetch_result_and_return_actor_to_pool", None)
    if getattr(fetch, "replaces_dead_workers", False):
        return True
    if fetch is None or not _known(BasicActorPool, fetch):
        return _not_replaced("its pool of workers is built otherwise")

    def fetch_or_replace(self: Any, future: Any) -> Any:
        """Return a worker's answer; where it died, put a new one in its place before Flower puts it back."""
        try:
            return fetch(self, future)
        except RayTaskError:
            raise  # the work raised an exception; the worker lives
        except RayError as error:
            self._future_to_actor[future] = self.create_actor_fn()
            raise WorkerDiedError(f"{WORKER_DIED} ({type(error).__name__}); a new one takes its place") from None

    fetch_or_replace.replaces_dead_workers = True  # type: ignore[attr-defined]
    setattr(BasicActorPool, "fetch_result_and_return_actor_to_pool", fetch_or_replace)  # noqa: B010  a method of Flower
    return True


def _known(pool: Any, fetch: Any) -> bool:
    """Return whether the pool has what is used of it, and puts back the worker that the future's entry names."""
    try:
        return (
            list(inspect.signature(fetch).parameters) == ["self", "future"]
            and "_future_to_actor.pop(future)" in inspect.getsource(pool.add_actor_back_to_pool)
            and "self.create_actor_fn =" in inspect.getsource(pool.__init__)
        )
    except (AttributeError, TypeError, ValueError, OSError):
        return False


def _not_replaced(why: str) -> bool:
    logger.warning(
        "a worker that dies can't be replaced with Flower %s (%s): the run then ends as incomplete, and is to be resumed",
        version("flwr"),
        why,
    )
    return False
