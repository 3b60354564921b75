"""What is written to files, and what is said where it can't be."""

from __future__ import annotations

import errno
import os

import pytest

from chainward_shared.errors import PrivacyError, StoreError
from chainward_shared.files import write_atomically, written


def test_what_the_system_says_of_a_full_disk_is_one_line_with_the_path_and_advice(tmp_path):
    with (
        pytest.raises(PrivacyError, match=r"^/somewhere: can't be written \(No space left on device\); make room$"),
        written("/somewhere", PrivacyError, "make room"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(StoreError, match=r"can't be written \(Not a directory\); free space or fix its rights$"),
        written(tmp_path),
    ):
        (tmp_path / "file").write_bytes(b"")
        write_atomically(tmp_path / "file" / "in-it", b"contents")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), written(tmp_path):
        raise KeyError("a defect is not the disk's")
