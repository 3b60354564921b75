"""A process without a network: every attempt to use it is refused and noted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_attempts: list[str] | None = None
"""Attempts to use the network while it is guarded; None while it isn't."""


_NETWORK_EVENTS = (
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.sendmsg",
    "socket.getaddrinfo",
    "socket.gethostbyname",
)


class NetworkUsed(OSError):
    """Something tried to use the network during a dry run."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _attempts is None or not event.startswith("socket."):
        return
    if event == "socket.__new__":
        family = arguments[1]
        if family in (2, 10, 30):  # AF_INET; AF_INET6 on Linux and on macOS
            _attempts.append("a socket was opened")
            raise NetworkUsed("a dry run has no network")
    elif event in _NETWORK_EVENTS:
        address = arguments[0] if event.startswith("socket.get") else arguments[1]
        if isinstance(address, str | bytes) and not event.startswith("socket.get"):
            return  # a socket of this machine's file system
        _attempts.append(f"{event} {address!r}")
        raise NetworkUsed("a dry run has no network")


@cache
def _hook() -> None:
    sys.addaudithook(_watch)  # for good: a hook can't be removed


@contextmanager
def no_network() -> Iterator[list[str]]:
    """Refuse every socket of this process to another machine, and hand out the list of attempts."""
    global _attempts
    _hook()
    attempts: list[str] = []
    _attempts = attempts
    try:
        yield attempts
    finally:
        _attempts = None
