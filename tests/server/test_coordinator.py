"""A whole run over a loopback grid: what the run folder holds, and what happens when a site misbehaves."""

from __future__ import annotations

import errno
import json
import shutil
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from flwr.app import Array, Error, Message
from in_process_run import equal
from safetensors import safe_open
from safetensors.torch import load_file

from chainward_client.evaluation import class_probabilities
from chainward_server.app import coordinate
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared import weights as weights_module
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, ConfigError, RunFolderError
from chainward_shared.evaluation.classification import evaluate
from chainward_shared.models import resolve_architecture, skeleton
from chainward_shared.protocol import (
    EvaluateResult,
    EvaluateTask,
    LinkResult,
    LinkTask,
    StudentTask,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.weights import byte_count, from_arrays, rounded
from chainward_simulations.simulated_sites import simulated_site


def link_site(message: Message) -> str | None:
    """Return which simulated site a link task is for; None for other messages."""
    if kind_of(message.content) != LinkTask.KIND:
        return None
    task, _ = unpack(message.content, LinkTask)
    return ("ash", "birch", "cedar", "dogwood")[task.simulated.index] if task.simulated else None


def tampering(site, change, times=99):
    """Answer for `site` with a result that `change` has altered, the first `times` times."""
    left = [times]

    def interfere(message, answer):
        reply = answer()
        if link_site(message) == site and left[0] > 0:
            left[0] -= 1
            change(reply)
        return reply

    return interfere


# -- what a run leaves behind


@pytest.mark.slow
def test_the_run_folder_holds_what_the_contract_says(finished_run):
    folder, results = finished_run.folder, finished_run.results
    names = {path.name for path in folder.path.iterdir()}
    assert {"run.json", "config.toml", "models", "metrics.json", "privacy.json", "report.html"} <= names
    models = {path.name for path in (folder.path / "models").iterdir()}
    links = {f"strand-0-lap-0-step-{step}.safetensors" for step in range(4)}
    assert links | {"chain.safetensors", "student.safetensors"} <= models
    state = json.loads((folder.path / "run.json").read_text())
    assert (state["status"], state["reason"]) == ("finished", None)
    metrics = json.loads((folder.path / "metrics.json").read_text())
    assert metrics["schema"] == 1
    assert [link["site"] for link in metrics["links"]] == ["ash", "birch", "cedar", "dogwood"]
    assert [link["predecessor"] for link in metrics["links"]] == [None, "ash", "birch", "cedar"]
    assert set(metrics["final"]["chain"]["sites"]) == {"ash", "birch", "cedar", "dogwood"}
    assert metrics["final"]["chain"]["pooled"]["n"] == sum(site.test for site in results.data.sites)
    assert json.loads((folder.path / "privacy.json").read_text())["mode"] == "off"
    assert tomllib.loads((folder.path / "config.toml").read_text())["chain"]["epochs"] == 2


@pytest.mark.slow
def test_the_student_loads_in_plain_timm_and_reproduces_the_metrics(finished_run, small_consortium):
    folder, results = finished_run.folder, finished_run.results
    path = folder.model_path("student")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model = timm.create_model(metadata["timm.model"], pretrained=False, **json.loads(metadata["timm.kwargs"]))
    model.load_state_dict(load_file(path))
    for index, site in enumerate(["ash", "birch", "cedar", "dogwood"]):
        data = simulated_site(str(small_consortium), index, num_sites=0, label_skew=0.0, seed=0)
        cases = data.splits["test"]
        pixels = json.loads(metadata["chainward.pixels"])
        inputs = (cases.images.float() / pixels["divide_by"] - pixels["mean"]) / pixels["std"]
        with torch.inference_mode():
            probabilities = model.eval()(inputs).double().softmax(1).numpy()
        scores = evaluate(probabilities, cases.labels.numpy())
        assert scores.model_dump() == pytest.approx(results.final["student"].sites[site].model_dump(), abs=1e-6)
        assert np.allclose(class_probabilities(model, cases, probabilities.shape[1], threads=2), probabilities)


@pytest.mark.slow
def test_the_auxiliary_teacher_is_sent_once_and_never_comes_back(finished_run):
    carried = [
        (unpack(message.content, StudentTask)[0].round, "auxiliary" in message.content.array_records)
        for message in finished_run.grid.sent
        if kind_of(message.content) == StudentTask.KIND
    ]
    assert {round_ for round_, auxiliary in carried if auxiliary} == {1}


def test_a_second_strand_runs_beside_the_first_and_the_better_one_goes_on(chain_only, coordinated):
    folder, results = coordinated(chain_only | {"chain.strands": 2})
    turns = [(link.strand, link.site) for link in results.links]
    assert turns[:4] == [(0, "ash"), (1, "birch"), (0, "birch"), (1, "cedar")]
    last = {link.strand: link for link in results.links}
    best = max(last.values(), key=lambda link: link.metrics.validation.balanced_accuracy)
    assert results.final["chain"] == best.metrics.test
    template = skeleton_of(folder, results)
    assert equal(folder.load_model("chain", template), folder.load_model(best.key, template))


def chain_of(folder):
    """Return the weights of the chain's model."""
    return load_file(folder.model_path("chain"))


def skeleton_of(folder, results):
    """Return the template of the chain's model."""
    data = results.data
    return skeleton(
        resolve_architecture(
            folder.config.chain.backbone,
            num_classes=len(data.classes),
            in_chans=data.channels,
            image_size=data.image_size,
        )
    ).state_dict()


# -- sites that misbehave


def _nan(reply):
    record = reply.content["model"]
    values = record["float16"].numpy().copy()
    values.flat[0] = np.nan
    record["float16"] = Array(values)


def _size(reply):
    record = reply.content["model"]
    record["float16"] = Array(record["float16"].numpy()[:-1].copy())


def _extra(reply):
    reply.content["model"]["tabular_teacher"] = Array(np.zeros(3, dtype=np.float32))


def _truncated(reply):
    array = reply.content["model"]["float16"]
    array.data = array.data[:-7]


def _other_weights(reply):
    record = reply.content["model"]
    record["float16"] = Array(record["float16"].numpy() + np.float16(1))


def _fewer_epochs(reply):
    body, arrays = unpack(reply.content, LinkResult)
    training = body.training.model_copy(update={"epochs": body.training.epochs + 1})
    reply.content = pack(body.model_copy(update={"training": training}), arrays)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_fewer_epochs, "it was trained for 2 epochs; 1 were asked for"),
        (_nan, "NaN"),
        (_size, "all such values of the model"),
        (_extra, "4 arrays arrived; expected at most 3"),
        (_truncated, "can't be read"),
        (_other_weights, "digest"),
    ],
)
def test_a_site_that_returns_a_bad_model_is_skipped_and_the_chain_goes_on(
    chain_only, coordinated, loopback, change, words
):
    three = chain_only | {"federation.sites": "ash,birch,cedar"}
    _, results = coordinated(three, loopback(2, tampering("birch", change)))
    assert [link.status for link in results.links] == ["done", "skipped", "done"]
    skipped = results.links[1]
    assert words in skipped.reason
    assert "birch" in skipped.reason
    assert skipped.attempts == 2
    assert results.links[2].predecessor == "ash", "the chain goes on from the last good model"


def test_a_site_whose_scores_contradict_what_it_counted_is_left_out_of_them(chain_only, coordinated, loopback, caplog):
    def boasting(message, answer):
        reply = answer()
        if kind_of(message.content) == EvaluateTask.KIND and "birch" in str(reply.content.config_records):
            body, arrays = unpack(reply.content, EvaluateResult)
            better = {split: scores.model_copy(update={"accuracy": 1.0}) for split, scores in body.scores.items()}
            reply.content = pack(body.model_copy(update={"scores": better}), arrays)
        return reply

    _, results = coordinated(chain_only, loopback(2, boasting))
    assert set(results.links[0].metrics.validation_sites) == {"ash", "cedar", "dogwood"}
    assert "site 'birch' sent scores that can't be used: its accuracy is 1.0" in caplog.text


def test_a_site_that_fails_once_is_retried_and_its_link_is_that_of_an_undisturbed_run(
    chain_only, coordinated, loopback, finished_chain
):
    disturbed, results = coordinated(chain_only, loopback(2, tampering("cedar", _nan, times=1)))
    assert [link.status for link in results.links] == ["done", "done", "retried", "done"]
    assert equal(chain_of(disturbed), chain_of(finished_chain.folder))


def test_a_crash_at_a_site_is_reported_with_its_words(chain_only, coordinated, loopback):
    def crash(message, answer):
        if link_site(message) == "dogwood":
            return Message(Error(code=2, reason="RuntimeError: out of memory"), reply_to=message)
        return answer()

    _, results = coordinated(chain_only, loopback(2, crash))
    assert results.links[-1].status == "skipped"
    assert "out of memory" in results.links[-1].reason


def test_a_silent_site_is_given_up_at_the_deadline(chain_only, coordinated, loopback):
    def silent(message, answer):
        return None if link_site(message) == "birch" else answer()

    chain_only |= {"federation.hop-deadline": 0.5, "chain.retries": 0}
    _, results = coordinated(chain_only, loopback(2, silent))
    assert results.links[1].status == "skipped"
    assert "did not answer within 0.5 s" in results.links[1].reason


def test_the_run_stops_at_the_failed_hop_where_the_configuration_says_so(chain_only, coordinated, loopback):
    with pytest.raises(ChainwardError, match="hop 2 of 4"):
        coordinated(chain_only | {"chain.on-failure": "stop"}, loopback(2, tampering("birch", _nan)))


def test_a_chain_without_a_single_good_link_fails_and_says_why(chain_only, coordinated, loopback):
    def all_bad(message, answer):
        reply = answer()
        if link_site(message):
            _nan(reply)
        return reply

    with pytest.raises(ChainwardError, match=r"no link of the chain succeeded.*NaN"):
        coordinated(chain_only, loopback(2, all_bad))


def test_students_are_averaged_without_a_site_that_failed(settings, coordinated, loopback):
    def crash(message, answer):
        if kind_of(message.content) == StudentTask.KIND:
            task, _ = unpack(message.content, StudentTask)
            if task.simulated.index == 1:
                return Message(Error(code=2, reason="RuntimeError: disk quota"), reply_to=message)
        return answer()

    settings |= {"chain.epochs": 1, "chain.compare-alone": False, "student.rounds": 1}
    _, results = coordinated(settings, loopback(2, crash))
    assert len(results.student_rounds) == 2, "of both stages"
    assert all(round_.sites == ["ash", "cedar", "dogwood"] for round_ in results.student_rounds)
    assert all("disk quota" in round_.failed["birch"] for round_ in results.student_rounds)
    assert results.final["student"].pooled.n > 0


# -- how models travel


@pytest.fixture
def overheard(loopback):
    """A grid, and all array records that crossed it."""
    crossed = []

    def listen(message, answer):
        reply = answer()
        crossed.extend(
            record for content in (message.content, reply.content) for record in content.array_records.values()
        )
        return reply

    return loopback(2, listen), crossed


def sizes_by_dtype(records):
    """How many values of each floating dtype models have."""
    sizes = Counter()
    for record in records:
        sizes.update({name: array.numpy().size for name, array in record.items() if "float" in name})
    return sizes


def test_models_travel_in_half_precision_and_what_is_stored_and_released_is_what_travelled(
    settings, coordinated, overheard
):
    grid, crossed = overheard
    settings |= {"chain.strands": 2, "chain.merge": "average", "student.large-weight": 0.5, "chain.epochs": 1}
    settings |= {"chain.compare-alone": False, "student.rounds": 1, "federation.sites": "ash,birch"}
    folder, results = coordinated(settings, grid)
    models = [record for record in crossed if "confusion" not in record]
    sizes = sizes_by_dtype(models)
    assert sizes["float16"] > 100 * sizes["float32"]
    files = list((folder.path / "models").glob("*.safetensors"))
    assert {"chain.safetensors", "student.safetensors"} <= {file.name for file in files}
    for file in files:
        state = load_file(file)
        assert {str(tensor.dtype) for tensor in state.values()} == {"torch.float32"}
        assert equal(rounded(state), state), f"{file.name} is not what travelled"
    assert {link.bytes_up for link in results.links} <= {byte_count(record) for record in models}
    assert {link.bytes_down for link in results.links[2:]} <= {link.bytes_up for link in results.links}


def test_models_travel_as_they_are_where_the_run_says_so(settings, coordinated, overheard, finished_run):
    grid, crossed = overheard
    little = {"chain.compare-alone": False, "chain.epochs": 1, "student.rounds": 1, "student.finetune-rounds": 0}
    folder, full = coordinated(settings | little | {"federation.transfer": "full"}, grid)
    sizes = sizes_by_dtype(record for record in crossed if "confusion" not in record)
    assert sizes["float32"] > 100 * sizes["float16"], "what float16 holds exactly goes as such"
    student = load_file(folder.path / "models" / "student.safetensors")
    assert not equal(rounded(student), student)
    for of_full, of_half in zip(full.links, finished_run.results.links, strict=True):
        assert of_half.bytes_up <= 0.51 * of_full.bytes_up


def test_the_average_of_students_in_half_precision_is_that_of_float64(settings, coordinated, loopback):
    """Summed in float16 it would be off by a thousandth."""
    sent = {}

    def listen(message, answer):
        reply = answer()
        if kind_of(message.content) == StudentTask.KIND:
            task, _ = unpack(message.content, StudentTask)
            template = skeleton(task.architecture).state_dict()
            state = from_arrays(reply.content["student"], template)
            arrays = {name: tensor.numpy().astype(np.float64) for name, tensor in state.items()}
            sent[task.simulated.index] = arrays
        return reply

    settings |= {"student.rounds": 1, "student.finetune-rounds": 0, "chain.epochs": 1, "chain.compare-alone": False}
    folder, results = coordinated(settings, loopback(2, listen))
    declared = [site.train for site in results.data.sites]
    assert len(sent) == len(declared) == 4
    assert len(set(declared)) > 1
    for name, tensor in load_file(folder.path / "models" / "student.safetensors").items():
        exact = sum(train * sent[index][name] for index, train in enumerate(declared)) / sum(declared)
        size = np.abs(exact).reshape(len(exact) if exact.ndim > 1 else 1, -1).max(axis=1)
        allowed = np.broadcast_to(size.reshape(-1, *[1] * max(0, exact.ndim - 1)), exact.shape) * (2**-11 + 2**-20)
        assert (np.abs(tensor.numpy() - exact) <= allowed).all(), "once rounded, and no more"


# -- bad input


def test_a_missing_data_file_stops_the_run_before_any_training(settings, coordinated, tmp_path):
    with pytest.raises(ChainwardError, match=r"absent\.yaml"):
        coordinated(settings | {"data.source": str(tmp_path / "absent.yaml")})


def test_a_misspelt_site_is_refused_with_the_nearest(settings, coordinated):
    with pytest.raises(ChainwardError, match=r"'birhc' \(did you mean 'birch'\?\)"):
        coordinated(settings | {"federation.sites": "ash,birhc"})


def test_an_unknown_backbone_is_refused_with_the_nearest(settings, coordinated):
    with pytest.raises(ChainwardError, match="convnext_atto"):
        coordinated(settings | {"chain.backbone": "convnext_ato"})


def test_a_backbone_from_which_no_student_can_be_selected_is_refused_before_training(settings, coordinated, loopback):
    grid = loopback(2)
    with pytest.raises(ChainwardError, match="resnet18"):
        coordinated(settings | {"chain.backbone": "resnet18"}, grid)
    assert LinkTask.KIND not in {kind_of(message.content) for message in grid.sent}


def test_an_output_folder_that_cannot_be_written_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"output\.dir"):
        RunFolder.create(RunConfig.from_flat(settings | {"output.dir": str(tmp_path / "file" / "runs")}))


def test_some_of_the_sites_in_another_order(chain_only, coordinated):
    _, results = coordinated(chain_only | {"federation.sites": "dogwood, ash"})
    assert [link.site for link in results.links] == ["dogwood", "ash"]


# -- resuming


class Killed(BaseException):
    """Ends the coordinator at once."""


def kill(folder, grid_type, after, kind=LinkTask.KIND):
    """Run `folder` until message number `after` + 1 of a kind is sent, and leave its files as SIGKILL would at that moment.

    What the coordinator still writes while the exception passes through it is undone.
    """
    snapshot = folder.path.with_name("snapshot")
    sent = [0]

    def interfere(message, answer):
        if kind_of(message.content) == kind:
            sent[0] += 1
            if sent[0] > after:
                shutil.copytree(folder.path, snapshot)
                raise Killed
        return answer()

    with pytest.raises(Killed):
        coordinate(grid_type(2, interfere), folder)
    shutil.rmtree(folder.path)
    snapshot.rename(folder.path)
    assert RunFolder.open(folder.path).state.status == "running"


@pytest.mark.parametrize(
    ("kind", "after", "left_to_train"),
    [(LinkTask.KIND, 2, 2 + 3), (LinkTask.KIND, 4, 3), (StudentTask.KIND, 6, 0), (StudentTask.KIND, 10, 0)],
    ids=[
        "killed in the chain",
        "killed while sites train alone",
        "killed in the second student round",
        "killed in the third student round",
    ],
)
def test_a_resumed_run_ends_with_the_same_models_as_an_uninterrupted_one(
    settings, coordinated, loopback, finished_run, kind, after, left_to_train
):
    folder = RunFolder.create(RunConfig.from_flat(settings))
    kill(folder, loopback, after, kind)
    grid = loopback(2)
    resumed, results = coordinated({"output.dir": settings["output.dir"], "output.resume": folder.state.run_id}, grid)
    links_sent = sum(kind_of(message.content) == LinkTask.KIND for message in grid.sent)
    assert links_sent == left_to_train, "finished links are not trained again"
    undisturbed = finished_run.folder
    assert equal(chain_of(resumed), chain_of(undisturbed))
    assert equal(load_file(resumed.model_path("student")), load_file(undisturbed.model_path("student")))
    assert results.final == finished_run.results.final


@pytest.fixture(scope="module")
def stopped_once(finished_chain, loopback, tmp_path_factory):
    """A run that was killed after two links."""
    flat = finished_chain.folder.config.to_flat() | {"output.dir": str(tmp_path_factory.mktemp("stopped"))}
    folder = RunFolder.create(RunConfig.from_flat(flat))
    kill(folder, loopback, after=2)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The same, for one test to damage."""
    return RunFolder.open(Path(shutil.copytree(stopped_once.path, tmp_path / "runs" / stopped_once.path.name)))


def resume(folder, **changes):
    """Open a stopped run as a resumed one."""
    flat = {"output.dir": str(folder.path.parent), "output.resume": folder.state.run_id} | changes
    return RunFolder.resume(RunConfig.from_flat(flat))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run.json", "damaged"),
        ("metrics.json", "damaged"),
        ("config.toml", "damaged"),
        ("models/strand-0-lap-0-step-1.safetensors", "SHA-256"),
    ],
)
def test_a_damaged_run_folder_is_refused_by_the_name_of_the_file(stopped, name, words):
    path = stopped.path / name
    contents = path.read_bytes()
    path.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(RunFolderError, match=words) as caught:
        resume(stopped).load_results()
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_was_lost_is_noticed_before_anything_is_trained(stopped):
    stopped.model_path("strand-0-lap-0-step-0").unlink()
    with pytest.raises(RunFolderError, match="step-0"):
        resume(stopped)


def test_a_resumed_run_keeps_its_configuration(stopped):
    with pytest.raises(ConfigError, match=r"chain\.epochs = 9"):
        resume(stopped, **{"chain.epochs": 9})
    assert resume(stopped, **{"chain.retries": 5}).config.chain.retries == 5


def test_a_run_that_is_not_there_is_refused_with_the_nearest(stopped):
    with pytest.raises(RunFolderError, match="did you mean"):
        RunFolder.resume(
            RunConfig.from_flat(
                {"output.dir": str(stopped.path.parent), "output.resume": stopped.state.run_id[:-1] + "z"}
            )
        )


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_resume(finished_chain):
    with pytest.raises(RunFolderError, match="has finished"):
        resume(finished_chain.folder)


def test_a_full_disk_while_checkpointing_leaves_nothing_half_written_and_the_run_can_go_on(
    chain_only, coordinated, loopback, finished_chain, monkeypatch
):
    real = weights_module.save_file
    calls = [0]

    def full(state, path, metadata):
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(state, path, metadata)

    monkeypatch.setattr(weights_module, "save_file", full)
    folder = RunFolder.create(RunConfig.from_flat(chain_only))
    with pytest.raises(RunFolderError, match=r"No space left on device.*resume run"):
        coordinate(loopback(2), folder)
    state = RunFolder.open(folder.path).state
    assert (state.status, len(state.finished)) == ("failed", 2)
    assert not list((folder.path / "models").glob("*step-2*"))
    assert not list(folder.path.rglob("*.part"))
    resumed, results = coordinated({"output.dir": chain_only["output.dir"], "output.resume": folder.state.run_id})
    assert [link.status for link in results.links] == ["done"] * 4
    assert equal(chain_of(resumed), chain_of(finished_chain.folder))


@pytest.mark.slow
def test_metrics_json_round_trips(finished_run):
    written = (finished_run.folder.path / "metrics.json").read_bytes()
    assert Results.model_validate_json(written) == finished_run.results
