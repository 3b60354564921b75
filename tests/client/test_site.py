"""A hospital's own site.yaml, and the site that it describes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from chainward_client.site import open_site
from chainward_client.site_config import SiteConfig, load_site_config
from chainward_shared.errors import DataError


def refusal_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_site_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message, "a refusal is one line"
    return message


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "site.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def hospital(small_consortium, tmp_path) -> Path:
    """Path of the site.yaml of a deployed hospital, its data beside it."""
    folder = tmp_path / "hospital"
    shutil.copytree(small_consortium.parent, folder)
    description = yaml.safe_load((folder / "data.yaml").read_text())
    del description["columns"]["site"]
    (folder / "data.yaml").write_text(yaml.safe_dump(description))
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"site": "oak", "data": "data.yaml", "state": str(tmp_path / "state")}))
    return path


# --- site.yaml ---


def test_a_site_yaml_is_read(tmp_path):
    path = written(tmp_path, "site: oak\ndata: data.yaml\n")
    assert load_site_config(path) == SiteConfig(site="oak", data="data.yaml", state="~/.chainward/site")


def test_a_missing_file_is_refused(tmp_path):
    assert "can't be read (No such file" in refusal_of(tmp_path / "site.yaml")


@pytest.mark.parametrize("text", ["site: [oak", "site: oak\n\tdata: x", b"site: \xff\xfe\n"])
def test_what_is_no_yaml_is_refused(tmp_path, text):
    assert "not a YAML file" in refusal_of(written(tmp_path, text))


@pytest.mark.parametrize(("text", "found"), [("", "NoneType"), ("oak", "str"), ("- oak", "list")])
def test_yaml_without_keys_is_refused(tmp_path, text, found):
    assert f"expected keys and values (site, data, state), found {found}" in refusal_of(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "key", "close"),
    [
        ("site: oak\ndata: d.yaml\nstat: /s\n", "stat", "state"),
        ("site: oak\ndta: d.yaml\n", "dta", "data"),
        ("Site: oak\ndata: d.yaml\n", "Site", "site"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest(tmp_path, text, key, close):
    message = refusal_of(written(tmp_path, text))
    assert f"there is no key '{key}' (did you mean '{close}'?); keys are site, data, state" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: d.yaml\n", "site: field required"),
        ("site: oak\n", "data: field required"),
        ("site: 5\ndata: d.yaml\n", "site: input should be a valid string, found 5"),
        ("site: ''\ndata: d.yaml\n", "site: string should have at least 1 character, found ''"),
    ],
)
def test_a_missing_or_wrong_value_is_named_and_no_other_key_suggested(tmp_path, text, expected):
    assert refusal_of(written(tmp_path, text)) == f"{tmp_path / 'site.yaml'}: {expected}"


# --- opening ---


def test_a_hospital_opens_its_own_data_relative_to_its_site_yaml(hospital, tmp_path):
    site = open_site(hospital)
    assert site.data.site == "oak"
    assert site.data.classes == ("a", "b", "c")
    assert len(site.data.splits["train"]) > 0
    assert site.state_dir == tmp_path / "state"
