"""A study with and without privileged teachers shows where its chains look."""

from __future__ import annotations

from io import StringIO

import pytest

from chainward_shared.console import PlainConsole
from chainward_simulations.study.study import StudyRequest, run_study


@pytest.fixture
def study(tmp_path):
    def run(arms: str, **settings):
        base = {
            "federation.num-sites": 2,
            "federation.threads": 1,
            "chain.backbone": "test_convnext",
            "chain.epochs": 1,
            "chain.label-fraction": 0.1,
            "privileged.epochs": 2,
        }
        run_study(
            StudyRequest(base | settings, arms.split(","), (), (0,), folder=tmp_path / "study", jobs=1),
            PlainConsole(file=StringIO()),
        )
        return tmp_path / "study" / "examples.png"

    return run


@pytest.mark.slow
def test_arms_without_and_with_privileged_teachers_are_drawn_side_by_side(study):
    assert not study("chain").exists(), "there is nothing to compare with yet"
    assert study("chain,chain-privileged").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_images_without_regions_are_not_drawn(study, small_consortium):
    flags = {"data.source": str(small_consortium), "federation.num-sites": 4}
    picture = study("chain,chain-privileged", **flags)
    assert not picture.exists()
    assert (picture.parent / "study.png").exists()
