"""Which site a node is: its own site.yaml, or what the message says, and never both."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from chainward_client.site import SITE_CONFIG_KEY, SiteConfig, load_site_config, open_site, own_config
from chainward_shared.errors import DataError, ProtocolError
from chainward_shared.protocol import SimulatedSite


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


@pytest.fixture
def simulated(small_consortium, tmp_path) -> SimulatedSite:
    return SimulatedSite(
        index=1, source=str(small_consortium), num_sites=0, label_skew=0.0, seed=0, state_dir=str(tmp_path / "state")
    )


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
        ("site: 5\ndata: d.yaml\n", "site: input should be a valid string"),
        ("site: ''\ndata: d.yaml\n", "site: string should have at least 1 character"),
    ],
)
def test_a_missing_or_wrong_value_is_named_and_no_other_key_suggested(tmp_path, text, expected):
    assert refusal_of(written(tmp_path, text)) == f"{tmp_path / 'site.yaml'}: {expected}"


def test_only_a_node_that_was_given_a_site_yaml_has_one(hospital):
    assert own_config({SITE_CONFIG_KEY: str(hospital)}).site == "oak"
    assert own_config({}) is None
    assert own_config({"partition-id": 3, SITE_CONFIG_KEY: ""}) is None


# --- opening ---


def test_a_deployed_node_opens_its_own_data_relative_to_its_site_yaml(hospital, tmp_path):
    site = open_site({SITE_CONFIG_KEY: str(hospital)}, None)
    assert site.data.site == "oak"
    assert site.data.classes == ("a", "b", "c")
    assert len(site.data.splits["train"]) > 0
    assert site.state_dir == tmp_path / "state"


def test_a_deployed_node_refuses_to_play_a_simulated_site(hospital, simulated):
    with pytest.raises(ProtocolError, match=r"site 'oak' knows who it is .* refuses to play simulated site 1"):
        open_site({SITE_CONFIG_KEY: str(hospital)}, simulated)


def test_a_deployed_node_with_a_bad_site_yaml_does_not_fall_back_to_playing(tmp_path, simulated):
    with pytest.raises(DataError, match="no key 'stat'"):
        open_site({SITE_CONFIG_KEY: str(written(tmp_path, "stat: x"))}, simulated)


def test_a_simulated_node_is_refused_when_nobody_says_who_to_be():
    with pytest.raises(ProtocolError, match=r"no 'site-config' .* was not told which simulated site to be"):
        open_site({"partition-id": 0}, None)


def test_a_simulated_node_is_the_site_that_the_message_names(simulated):
    site = open_site({"partition-id": 0}, simulated)
    assert site.data.site == "birch"
    assert site.state_dir == Path(simulated.state_dir) / "birch"


def test_two_simulated_sites_have_cases_and_state_of_their_own(simulated):
    one, other = (open_site({}, simulated.model_copy(update={"index": index})) for index in (1, 2))
    assert one.state_dir != other.state_dir
    first, second = (set(site.data.splits["train"].patients) for site in (one, other))
    assert not first & second


def test_a_simulated_site_is_the_same_when_asked_again(simulated):
    one, again = open_site({}, simulated).data, open_site({}, simulated).data
    assert torch.equal(one.splits["train"].images, again.splits["train"].images)
    assert np.array_equal(one.splits["train"].patients, again.splits["train"].patients)


def test_a_simulated_site_that_does_not_exist_is_refused(simulated):
    with pytest.raises(DataError, match="no site 9: this simulation has 4 sites"):
        open_site({}, simulated.model_copy(update={"index": 9}))
