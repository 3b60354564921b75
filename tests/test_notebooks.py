"""The example notebooks run from their first cell to their last, and show what they promise."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "docs/notebooks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "holds"),
    [("a_run_and_its_report", "text/html", "Not a medical device"), ("a_study_and_its_picture", "image/png", "")],
)
def test_a_notebook_runs_to_its_end_and_ends_with_its_picture(name, kind, holds, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    manager = AsyncKernelManager(transport="ipc", connection_file=str(tmp_path / "kernel.json"))
    NotebookClient(notebook, km=manager, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = notebook.cells[-1].outputs[-1]["data"]
    assert kind in shown
    assert holds.lower() in str(shown[kind]).lower()


def test_every_notebook_is_run_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {"a_run_and_its_report", "a_study_and_its_picture"}
