"""TensorBoard: event files in a folder of this machine, one folder for each run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from chainward_server.run_folder import RunFolder
from chainward_server.tracking.tracking import Figure


class TensorBoard:
    """One run in TensorBoard; it keeps texts and numbers, no files.

    Parameters
    ----------
    folder : of the run
    local : where to write
    """

    def __init__(self, folder: RunFolder, local: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = local / "tensorboard" / folder.state.run_id
        self.known = any(path.glob("events.*"))
        self._writer = SummaryWriter(str(path))

    def parameters(self, values: Mapping[str, str]) -> None:
        """Note the settings of the run, as a table."""
        self._text("settings", "setting", values)

    def log(self, found: list[Figure]) -> None:
        for figure in found:
            self._writer.add_scalar(figure.name, figure.value, figure.step)
        self._writer.flush()

    def artefacts(self, files: list[Path], digests: Mapping[str, str]) -> None:
        """Note where the files are, and the SHA-256 of each model file."""
        self._text("files", "file", {path.name: str(path) for path in files})
        self._text("models", "model", dict(digests))

    def end(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()

    def _text(self, name: str, what: str, values: Mapping[str, str]) -> None:
        rows = [f"| {key} | `{value.replace('|', chr(92) + '|')}` |" for key, value in values.items()]
        self._writer.add_text(name, "\n".join([f"| {what} | value |", "| --- | --- |", *rows]))
