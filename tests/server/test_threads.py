"""The number of threads that a run takes where its configuration leaves it open."""

from __future__ import annotations

import pytest

from chainward_server import threads
from chainward_server.run_folder import RunFolder
from chainward_server.threads import multiplications, settle_threads
from chainward_shared.config import RunConfig
from chainward_shared.errors import ConfigError
from chainward_shared.models import resolve_architecture
from chainward_shared.settings import USUAL_THREADS


def architecture(name="convnext_atto", size=64):
    return resolve_architecture(name, num_classes=5, in_chans=1, image_size=size)


def begun(tmp_path, **more) -> RunFolder:
    folder = RunFolder.create(RunConfig.from_flat({"output.dir": str(tmp_path), **more}))
    settle_threads(folder, architecture())
    folder.enter("chain")
    return folder


@pytest.mark.parametrize(("name", "size", "expected"), [("test_convnext", 64, 1), ("convnext_atto", 64, 2)])
def test_only_the_smallest_models_take_one_thread(tmp_path, name, size, expected):
    folder = RunFolder.create(RunConfig.from_flat({"output.dir": str(tmp_path)}))
    config = settle_threads(folder, architecture(name, size))
    assert config.federation.threads == config.link_recipe().threads == expected
    assert config.student_recipe("distil").threads == expected


def test_the_work_of_a_model_grows_with_its_image():
    assert multiplications(architecture(size=128)) == pytest.approx(
        4 * multiplications(architecture(size=64)), rel=0.01
    )


def test_the_number_is_in_run_json_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
    run = begun(tmp_path)
    assert RunFolder.open(run.path).state.threads == 2
    monkeypatch.setattr(threads, "SMALL", float("inf"))  # a version that would choose otherwise
    resumed = RunFolder.resume(RunConfig.from_flat({"output.dir": str(tmp_path), "output.resume": run.run_id}))
    assert settle_threads(resumed, architecture()).federation.threads == 2


def test_a_resumed_run_is_not_given_another_number(tmp_path):
    run = begun(tmp_path)
    again = {"output.dir": str(tmp_path), "output.resume": run.run_id, "federation.threads": 3}
    with pytest.raises(ConfigError, match=r"federation\.threads = 3, but the run was started with 2"):
        RunFolder.resume(RunConfig.from_flat(again))


def test_a_number_that_was_asked_for_is_taken(tmp_path):
    run = begun(tmp_path, **{"federation.threads": 7})
    assert run.config.link_recipe().threads == 7
    assert run.state.threads is None


def test_a_recipe_always_names_a_number():
    assert RunConfig().link_recipe().threads == RunConfig().student_recipe("distil").threads == USUAL_THREADS
