"""``chainward-site init``: everything a hospital has to fill in, or nothing at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from chainward_client import cli
from chainward_client.data.description import load_description
from chainward_client.init import initialise, site_yaml_text, suggested_site
from chainward_client.site_config import SiteConfig, load_site_config
from chainward_client.site_ledger import open_site_ledger
from chainward_shared.errors import ChainwardError, DataError, StoreError

REPOSITORY = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def typed(*words: object, typed_in: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["init", *map(str, words)], input=typed_in)
    return result.exit_code, result.output + str(result.exception or "")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "archive" / "cases.csv"
    path.parent.mkdir()
    path.write_text("image_id,dx,patient_id,age,split\nscan-1,a,mrs-miller,50,train\n")
    return path


def test_the_packages_site_yaml_is_the_example_of_the_documentation():
    packaged = REPOSITORY / "client/chainward_client/templates/site.yaml"
    assert packaged.read_bytes() == (REPOSITORY / "client/site.example.yaml").read_bytes()


def test_a_hospitals_folder_is_a_site_whose_ledger_opens(tmp_path):
    made = initialise(tmp_path / "oak", "oak")
    config = load_site_config(made.site_yaml)
    assert (config.site, config.data, config.privacy is not None) == ("oak", "data.yaml", True)
    ledger, _ = open_site_ledger(config.state_dir(made.site_yaml), "oak")
    assert ledger.head.sequence == 1
    assert {path.name for path in (tmp_path / "oak").iterdir()} == {"site.yaml", "data.yaml", "CHECKLIST.md", "state"}
    assert oct((tmp_path / "oak/state").stat().st_mode & 0o777) == "0o700"


def test_only_id_data_and_the_commented_path_differ_from_the_example():
    example = (REPOSITORY / "client/site.example.yaml").read_text().splitlines()
    written = site_yaml_text("oak", "data.yaml", Path("/etc/chainward/site.yaml")).splitlines()
    assert [line for line in written if line not in example] == [
        line.replace("hospital-a", "oak") for line in example if line.startswith("site:")
    ]
    elsewhere = site_yaml_text("oak", "data.yaml", Path("/srv/site.yaml"))
    assert 'site-config="/srv/site.yaml"' in elsewhere


@pytest.mark.parametrize("site", ["1234", "null", "0x1F", "a.b_c-d", "yes"])
def test_an_id_that_yaml_would_take_for_something_else_stays_a_text(tmp_path, site):
    assert load_site_config(initialise(tmp_path / "x", site).site_yaml).site == site


@pytest.mark.parametrize("site", ["", "a b", "ä", "-x", "a/b", "x" * 65, "a\nb: c"])
def test_an_id_that_can_not_be_used_is_refused(tmp_path, site):
    with pytest.raises(DataError, match="--site"):
        initialise(tmp_path / "x", site)
    assert not (tmp_path / "x").exists()


def test_a_manifest_fills_in_the_columns_that_are_called_as_usual(tmp_path, manifest):
    made = initialise(tmp_path / "oak", "oak", manifest)
    written = yaml.safe_load(made.data.read_text())
    assert written["columns"] == {"image": "image_id", "label": "dx", "patient": "patient_id", "split": "split"}
    assert written["manifest"] == str(manifest)
    assert "image_id, dx, patient_id, age, split" in made.data.read_text()
    assert "mrs-miller" not in "".join(path.read_text() for path in made.written if path.is_file())
    made.data.write_text(made.data.read_text().replace("<benign>", "a").replace("<malignant>", "b"))
    assert load_description(made.data).classes == ("a", "b"), "once the marks are filled in, it is a data file"


def test_a_column_name_that_could_be_two_roles_is_left_to_the_person(tmp_path, manifest):
    manifest.write_text("image,file,label\n")
    columns = yaml.safe_load(initialise(tmp_path / "oak", "oak", manifest).data.read_text())["columns"]
    assert columns == {"image": "<image>", "label": "label", "patient": "<patient>"}


def test_an_npz_file_and_a_folder_of_images_are_named_in_the_data_file(tmp_path):
    (tmp_path / "set.npz").touch()
    (tmp_path / "scans").mkdir()
    of_npz = yaml.safe_load(initialise(tmp_path / "a", "a", tmp_path / "set.npz").data.read_text())
    assert (of_npz["format"], of_npz["images"]) == ("npz", str(tmp_path / "set.npz"))
    of_folder = yaml.safe_load(initialise(tmp_path / "b", "b", tmp_path / "scans").data.read_text())
    assert of_folder["images"] == str(tmp_path / "scans")


def test_a_finished_data_file_is_referred_to_and_none_is_written(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("format: csv\n")
    made = initialise(tmp_path / "oak", "oak", own)
    assert load_site_config(made.site_yaml).data == str(own)
    assert not (tmp_path / "oak/data.yaml").exists()
    assert own.read_text() == "format: csv\n"


def test_the_checklist_says_of_every_value_where_it_comes_from(tmp_path):
    made = initialise(tmp_path / "oak", "oak")
    text = (tmp_path / "oak/CHECKLIST.md").read_text()
    assert made.fingerprint in text
    for key in SiteConfig.model_fields:
        assert f"`{key}" in text, f"{key} of site.yaml has no row"
    for word in ("coordinator", "Data protection", "IT", "--superlink", "dry-run", "backup", "ssh-keygen"):
        assert word in text


# --- what is there stays ---


@pytest.mark.parametrize("name", ["site.yaml", "data.yaml", "CHECKLIST.md", "state"])
def test_nothing_is_overwritten_and_the_file_is_named(tmp_path, name):
    folder = tmp_path / "oak"
    folder.mkdir()
    (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(DataError, match="is not overwritten") as caught:
        initialise(folder, "oak")
    assert str(folder / name) in str(caught.value)
    assert contents(folder) == before


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    initialise(tmp_path, "oak")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("there", [True, False])
def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch, there):
    folder = tmp_path / "oak"
    if there:
        folder.mkdir()
    rename = Path.rename

    def disk_full(self: Path, target: Path) -> Path:
        if Path(target).name == "site.yaml":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", disk_full)
    with pytest.raises(StoreError, match="No space left on device"):
        initialise(folder, "oak")
    assert folder.exists() == there
    assert not there or list(folder.iterdir()) == []


def test_data_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        initialise(tmp_path / "oak", "oak", tmp_path / "absent.csv")
    assert not (tmp_path / "oak").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "oak").touch()
    with pytest.raises(DataError, match="expected a folder"):
        initialise(tmp_path / "oak", "oak")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="can't be written"):
        initialise(tmp_path / "oak", "oak")


# --- the command ---


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path):
    code, out = typed(tmp_path / "oak", "--site", "oak", "--non-interactive")
    assert code == 0
    assert "fingerprint  SHA256:" in out and "CHECKLIST.md" in out and "chainward-site check" in out


def test_without_a_terminal_nothing_is_asked_and_the_id_must_be_given(tmp_path):
    result = CliRunner().invoke(cli.app, ["init", str(tmp_path / "oak")])
    assert isinstance(result.exception, ChainwardError)
    assert "--site is missing" in str(result.exception)
    assert not (tmp_path / "oak").exists()


def test_on_a_terminal_it_asks_and_offers_the_folders_name(tmp_path, monkeypatch):
    monkeypatch.setattr("chainward_client.cli._on_a_terminal", lambda: True)
    code, out = typed(tmp_path / "St. Mary", typed_in="\n\n")
    assert code == 0, out
    assert load_site_config(tmp_path / "St. Mary/site.yaml").site == "st-mary"


def test_a_suggested_id_can_be_used():
    for folder in ("St. Mary's Hospital", "...", "x" * 99, "Klinik Süd"):
        SiteConfig(site=suggested_site(Path(folder)), data="d")
