"""What `flwr run server/app` sends to a hospital: configuration, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from chainward_shared import __version__
from chainward_shared.config import RunConfig

APP = Path(__file__).resolve().parents[2] / "server" / "app"


@pytest.fixture(scope="module")
def app():
    return tomllib.loads((APP / "pyproject.toml").read_text(encoding="utf-8"))


def build(folder: Path) -> Path:
    """Return the bundle that Flower's own command builds in `folder`."""
    folder.mkdir()
    environment = os.environ | {"FLWR_HOME": str(folder / "flwr"), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    flwr = Path(sys.executable).with_name("flwr")
    subprocess.run(
        [flwr, "build", "--app", APP], cwd=folder, env=environment, check=True, capture_output=True, timeout=60
    )
    (bundle,) = folder.glob("*.fab")
    return bundle


def test_the_app_holds_every_key_at_its_default(app):
    held, expected = app["tool"]["flwr"]["app"]["config"], RunConfig().tables()
    assert held == expected
    types = {name: {key: type(v) for key, v in table.items()} for name, table in expected.items() if name != "seed"}
    assert {name: {key: type(v) for key, v in held[name].items()} for name in types} == types  # 0 == 0.0 == False


def test_the_app_runs_installed_modules_and_installs_nothing(app):
    assert app["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "chainward_server.app:app",
        "clientapp": "chainward_client.app:app",
    }
    assert app["project"]["dependencies"] == []
    assert app["project"]["version"] == __version__


@pytest.mark.slow
def test_nothing_but_configuration_travels_and_all_build_the_same_bundle(tmp_path):
    bundle = build(tmp_path / "coordinator")
    with zipfile.ZipFile(bundle) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]
    # a hospital that builds the bundle out of its own checkout can compare it with the coordinator's, byte for byte
    assert build(tmp_path / "hospital").read_bytes() == bundle.read_bytes()
    assert build(tmp_path / "again").name == bundle.name
