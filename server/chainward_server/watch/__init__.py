"""How far a run is, from the files of its folder: it needs no connection to the run, and the run knows nothing of it."""

from chainward_server.watch.watching import find_run, watch

__all__ = ["find_run", "watch"]
