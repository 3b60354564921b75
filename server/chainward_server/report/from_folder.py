"""The report of a run folder."""

from __future__ import annotations

import base64
from pathlib import Path

from chainward_server.report.page import render_report
from chainward_server.run_folder import RunFolder
from chainward_shared.errors import RunFolderError, StatementError
from chainward_shared.privacy.record import privacy_record, read_privacy_record
from chainward_shared.privacy.statements import Statements

EXAMPLES = "examples.png"
"""Picture of test images and where the models look in them: in a run folder only where the images are on this machine."""

_PNG = b"\x89PNG\r\n\x1a\n"


def write_report(folder: RunFolder) -> Path:
    """Render `report.html` from what the run folder holds, and return its path.

    Raises
    ------
    RunFolderError
        Nothing has been measured yet, a file is damaged, or the page can't be written.
    """
    results = folder.load_results()
    if results is None:
        raise RunFolderError(f"{folder.path}: nothing has been measured yet (no metrics.json)")
    privacy_file = folder.path / "privacy.json"
    try:
        privacy = (
            read_privacy_record(privacy_file)
            if privacy_file.exists()
            else privacy_record(Statements(), [site.site for site in results.data.sites])
        )
    except StatementError as error:
        raise RunFolderError(str(error)) from error
    examples = folder.path / EXAMPLES
    try:
        picture = examples.read_bytes() if examples.exists() else None
    except OSError as error:
        raise RunFolderError(f"{examples}: can't be read ({error.strerror})") from error
    if picture is not None and not picture.startswith(_PNG):
        raise RunFolderError(f"{examples}: damaged (not a PNG); remove it, or draw it anew with `chainward examples`")
    page = render_report(
        results,
        status=folder.state.status,
        reason=folder.state.reason,
        config={
            name: table if isinstance(table, dict) else {name: table} for name, table in folder.config.tables().items()
        },
        privacy=privacy,
        examples=None if picture is None else base64.b64encode(picture).decode(),
        started=folder.state.started,
        finished=folder.state.updated if folder.state.status != "running" else None,
    )
    return folder.write_text("report.html", page)
