"""A hospital's secret: made once, for its owner alone, and never made anew in silence over a damaged one."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from chainward_client.site_key import site_key, site_key_path, site_key_to_look_with
from chainward_shared.errors import StoreError


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_it_is_made_once_for_its_owner_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        key = site_key(tmp_path / "state")
    finally:
        os.umask(before)
    path = site_key_path(tmp_path / "state")
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert site_key(tmp_path / "state") == key
    assert [file.name for file in path.parent.iterdir()] == ["site.key"]


def test_two_hospitals_have_two(tmp_path):
    assert site_key(tmp_path / "one") != site_key(tmp_path / "other")


def test_processes_that_make_it_at_the_same_time_agree(tmp_path):
    for turn in range(20):
        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(site_key, [tmp_path / str(turn)] * 8))
        assert len(keys) == 1


@pytest.mark.parametrize("content", [b"", b"abcd\n", b"z" * 64, b"\xff" * 64, b"0" * 66])
def test_a_damaged_one_is_refused_and_kept(tmp_path, content):
    site_key(tmp_path)
    site_key_path(tmp_path).write_bytes(content)
    with pytest.raises(StoreError, match="restore it from a backup"):
        site_key(tmp_path)
    assert site_key_path(tmp_path).read_bytes() == content


def test_one_that_others_may_read_is_refused(tmp_path):
    site_key(tmp_path)
    site_key_path(tmp_path).chmod(0o640)
    with pytest.raises(StoreError, match="mode 0640"):
        site_key(tmp_path)


def test_looking_makes_none(tmp_path):
    assert len(site_key_to_look_with(tmp_path / "state")) == 32
    assert not (tmp_path / "state").exists()
    key = site_key(tmp_path / "state")
    assert site_key_to_look_with(tmp_path / "state") == key
