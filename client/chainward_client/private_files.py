"""What a site writes is for its own account alone, whatever the umask that it was started with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def for_the_owner_alone() -> Iterator[None]:
    """Give files mode 0600 and folders 0700 as long as this lasts; in all threads, and in processes started meanwhile."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
