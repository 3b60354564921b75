"""Pictures of where a simulated run's models look, in its report and nowhere else."""

from __future__ import annotations

import base64

import pytest
from typer.testing import CliRunner
from whole_run import CHAIN_ONLY

from chainward_server.report.page import write_report
from chainward_shared.errors import ConfigError, RunFolderError
from chainward_simulations.cli import app
from chainward_simulations.run_examples import draw_examples


@pytest.fixture(scope="module")
def phantom_settings(tmp_path_factory):
    return {
        "output.dir": str(tmp_path_factory.mktemp("runs")),
        "federation.num-sites": 2,
        "chain.backbone": "test_convnext",
        "chain.epochs": 1,
        "chain.compare-alone": False,
        "chain.label-fraction": 0.2,
        "student.rounds": 1,
        "student.epochs": 1,
        "student.finetune-rounds": 0,
        "federation.deadline": 5.0,
        "federation.threads": 1,
    }


def test_a_simulated_run_can_show_where_its_models_look(phantom_settings, coordinated):
    folder, _ = coordinated(phantom_settings)
    write_report(folder)
    before = (folder.path / "report.html").read_text()
    assert "data:image/png" not in before, "the coordinator alone has no images to show"

    draw_examples(folder, count=2)
    write_report(folder)
    page = (folder.path / "report.html").read_text()
    picture = (folder.path / "examples.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert base64.b64encode(picture).decode() in page
    assert "img-src data:" in page, "the page's own policy would hide the picture"
    assert "these images lie on this machine" in " ".join(page.split())

    with_teachers, _ = coordinated(phantom_settings | {"privileged.mode": "all", "privileged.epochs": 2})
    out = CliRunner().invoke(
        app,
        ["examples", str(with_teachers.path), "--without", str(folder.path), "--count", "2"],
    )
    assert out.exit_code == 0, out.output
    assert (with_teachers.path / "examples.png").read_bytes() != picture

    with pytest.raises(ConfigError, match="has privileged teachers too"):
        draw_examples(folder, without=with_teachers)

    (folder.path / "examples.png").write_bytes(b"not a picture")
    with pytest.raises(RunFolderError, match=r"examples\.png: damaged"):
        write_report(folder)


@pytest.mark.slow
def test_images_without_regions_are_shown_too_and_the_picture_says_that_none_is_marked(settings, coordinated):
    folder, _ = coordinated(settings | CHAIN_ONLY)
    draw_examples(folder, count=3)
    write_report(folder)
    page = (folder.path / "report.html").read_text()
    assert base64.b64encode((folder.path / "examples.png").read_bytes()).decode() in page
    assert 'id="looks"' not in page and 'id="examples"' in page


def test_runs_on_other_data_are_not_compared(settings, coordinated, finished_chain):
    one = finished_chain.folder
    other, _ = coordinated(settings | CHAIN_ONLY | {"seed": 1})
    with pytest.raises(ConfigError, match="seed is 1 there and 0 in"):
        draw_examples(one, without=other)
