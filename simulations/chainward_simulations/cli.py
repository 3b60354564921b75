"""`chainward`: the coordinator's command, and what needs hospitals and coordinator in one program: `study`."""

from __future__ import annotations

from chainward_server.cli import app, main
from chainward_simulations.study.command import study

app.command()(study)

__all__ = ["app", "main"]
