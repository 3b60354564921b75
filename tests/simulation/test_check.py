"""`chainward check DATA.yaml`: the doctor's look at data, without hospital, key or ledger."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from chainward_simulations.cli import app


def check(path: Path, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["check", str(path), *arguments])
    assert result.exit_code == code, result.output
    return result.output


def folders(tmp_path: Path) -> Path:
    for name in ("Grün", "rot"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(6):
            pixels = (np.arange(64, dtype=np.uint16).reshape(8, 8) + 50 * index) * 40
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{index}.png")
    path = tmp_path / "data.yaml"
    path.write_text("format: folders\nimages: set\nimage: {size: 8, channels: 1}\n")
    return path


def test_data_of_several_sites_are_looked_at_as_one(small_consortium: Path) -> None:
    found = json.loads(check(small_consortium, "--json"))
    named = {entry["name"]: entry for entry in found["checks"]}
    assert named["sites"]["found"].startswith("4, with images: ash ")
    assert named["cases: train"]["outcome"] == "ok"
    assert found["verdict"] == "fine"
    assert not list(small_consortium.parent.glob("*ledger*"))


def test_every_unusable_file_is_in_the_json_and_the_exit_code_is_1(tmp_path: Path) -> None:
    path = folders(tmp_path)
    for index in range(5):
        (tmp_path / "set" / "rot" / f"{index}.png").write_bytes(b"")
    found = json.loads(check(path, "--json", code=1))
    assert len(found["checks"][0]["items"]) == 5
    path.write_text(path.read_text() + "unusable: leave-out\n")
    found = json.loads(check(path, "--json"))
    assert [len(entry["items"]) for entry in found["checks"] if entry["name"] == "images: left out"] == [5]


def test_the_manifest_of_folders_is_written_and_says_the_same(tmp_path: Path) -> None:
    path = folders(tmp_path)
    target = tmp_path / "cases.csv"
    first = json.loads(CliRunner().invoke(app, ["check", str(path), "--json"]).stdout)
    result = CliRunner().invoke(app, ["check", str(path), "--write-manifest", str(target)])
    assert result.exit_code == 0
    with target.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "label"]
    assert len(rows) == 13
    block = yaml.safe_load(result.stderr.split("\n", 1)[1])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({**block, "image": {"size": 8, "channels": 1}}))
    again = json.loads(CliRunner().invoke(app, ["check", str(tmp_path / "again.yaml"), "--json"]).stdout)
    kept = ("cases: train", "cases: val", "cases: test", "images: grey scale")
    assert [entry for entry in again["checks"] if entry["name"] in kept] == [
        entry for entry in first["checks"] if entry["name"] in kept
    ]


def test_a_manifest_is_never_overwritten_nor_written_of_one(tmp_path: Path, small_consortium: Path) -> None:
    from chainward_shared.errors import DataError

    (tmp_path / "there.csv").write_text("mine")
    for path, target in ((folders(tmp_path), "there.csv"), (small_consortium, "new.csv")):
        result = CliRunner().invoke(app, ["check", str(path), "--write-manifest", str(tmp_path / target)])
        assert isinstance(result.exception, DataError)
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_terminal_shows_it_in_80_columns(tmp_path: Path, encoding: str) -> None:
    """In an encoding that lacks the bars of the histogram, or the letters of a class."""
    script = "import sys; from chainward_simulations.cli import main; sys.argv = ['chainward', *sys.argv[1:]]; main()"
    terminal = {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "80"}  # a pipe has no edge
    environment = {**os.environ, **terminal, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", script, "check", str(folders(tmp_path))],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    assert max(map(len, shown.splitlines())) <= 80
    assert "grey scale" in shown
    assert ("Grün 4" if encoding != "ascii" else "Grun 4") in shown
