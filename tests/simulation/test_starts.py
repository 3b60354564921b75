"""Whole runs from pretrained weights, trained in part: what travels, what is written down, and that it is the plain method."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from flwr.app import Message
from in_process_run import equal, run_in_process
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from whole_run import CHAIN_ONLY

from chainward_server.cli import app
from chainward_server.export import export_run
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, ConfigError
from chainward_shared.models import Architecture, build_model, count_parameters, skeleton
from chainward_shared.models.parts import batch_norms
from chainward_shared.models.start import travelling_names
from chainward_shared.preprocessing import scaled_for
from chainward_shared.pretrained.store import WeightsStore, default_store
from chainward_shared.protocol import BaseState, BaseTask, kind_of, pack, unpack
from chainward_simulations.runner import open_sites


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Put weights of a backbone into this user's store; return the settings of two hospitals that start from them."""
    monkeypatch.setenv("CHAINWARD_WEIGHTS", str(tmp_path / "weights"))
    store = WeightsStore(tmp_path / "weights")

    def add(backbone, trainable):
        torch.manual_seed(7)
        file = tmp_path / f"{backbone}.safetensors"
        save_file({name: t.clone() for name, t in timm.create_model(backbone).state_dict().items()}, file)
        store.add(file, backbone, licence="MIT", source="made here")
        start = {"chain.backbone": backbone, "chain.start-from": backbone, "chain.trainable": trainable}
        return start | {"federation.sites": "ash,birch"}

    return add


def bases_sent(grid):
    """Return the bytes of pieces in the messages that a grid saw."""
    pieces = [
        message.content.array_records["piece"]
        for message in grid.sent
        if kind_of(message.content) == BaseTask.KIND and "piece" in message.content.array_records
    ]
    return sum(len(piece["bytes"].data) for piece in pieces)


@pytest.mark.parametrize(
    ("backbone", "trainable", "changes"),
    [
        ("test_vit", "head", {"student.large-weight": 0.5, "data.augmentation": "none"}),
        ("test_vit", "last-2", {"chain.start": "fresh", "student.source": "start"}),
        (
            "test_convnext",
            "norms-and-biases",
            {"chain.layer-decay": 0.7, "chain.attention-weight": 10.0, "student.rounds": 0},
        ),
        ("test_efficientnet", "last-1", {"chain.strands": 2, "chain.merge": "average"}),
    ],
)
def test_a_run_from_a_start_over_flower_is_the_run_in_process(
    backbone, trainable, changes, settings, start, coordinated, loopback
):
    little = {"chain.epochs": 1, "student.rounds": 1, "federation.transfer": "half"}
    settings |= start(backbone, trainable) | little | changes
    grid = loopback(2)
    folder, results = coordinated(settings, grid)
    outcome = run_in_process(RunConfig.from_flat(settings), open_sites(RunConfig.from_flat(settings)))
    template = skeleton(outcome.architecture).state_dict()
    for key, state in outcome.links.items():
        assert equal(folder.load_model(key, template), state), f"{key} differs"
    assert equal(folder.load_model("chain", template), outcome.chain)
    if outcome.student is not None:
        small = skeleton(outcome.student_architecture).state_dict()
        assert equal(folder.load_model("student", small), outcome.student)
    assert results.start.name == backbone and results.start.part == trainable and results.start.licence == "MIT"


@pytest.mark.parametrize("trainable", ["head", "last-1", "all"])
def test_only_what_is_trained_travels_and_is_written_at_every_hop(trainable, settings, start, coordinated):
    settings |= start("test_vit", trainable) | CHAIN_ONLY
    folder, results = coordinated(settings)
    architecture = Architecture.from_metadata(_metadata(folder, "chain"))
    trained = travelling_names(architecture)
    numbers = sum(t.numel() for name, t in skeleton(architecture).state_dict().items() if name in trained)
    first, *later = results.links
    assert first.bytes_down == 0, "the first link starts from what the site has got"
    for link in results.links:
        assert 2 * numbers <= link.bytes_up < 4 * numbers + 2000
        assert set(load_file(folder.model_path(link.key))) == trained
    for link in later:
        assert link.bytes_down <= 4 * numbers + 2000
    assert results.start.trained == pytest.approx(numbers / count_parameters(skeleton(architecture)))
    chain = load_file(folder.model_path("chain"))
    assert set(chain) == set(skeleton(architecture).state_dict()), "the result is whole"
    frozen = set(chain) - trained
    base = load_file(folder.model_path("base"))
    assert frozen <= set(base) and all(torch.equal(chain[name], base[name]) for name in frozen)
    assert all(not torch.equal(chain[name], base[name]) for name in trained & set(base)) or trainable == "all"


def test_the_weights_are_sent_once_and_a_second_run_of_the_sites_sends_none(settings, start, coordinated, loopback):
    settings |= start("test_vit", "head") | CHAIN_ONLY
    first, second = loopback(2), loopback(2)
    folder, results = coordinated(settings, first)
    sent = results.start.bytes_sent
    assert sum(size > 0 for size in sent.values()) == 1, "simulated sites share a folder: one is sent the weights"
    assert bases_sent(first) == sum(sent.values()) > 100_000

    def with_bases_of(folder):
        """Let the sites of the next run have what those of this one had."""

        def interfere(message: Message, answer):
            content = message.content
            if kind_of(content) == BaseTask.KIND:
                task, arrays = unpack(content, BaseTask)
                there = task.simulated.model_copy(update={"state_dir": str(folder / "simulated-sites")})
                message.content = pack(task.model_copy(update={"simulated": there}), arrays)
            return answer()

        return interfere

    second.interference = with_bases_of(folder.path)
    settings |= {"seed": 5, "chain.retries": 0, "federation.sites": "ash"}
    with pytest.raises(ChainwardError):  # the links look in their own folder, which has none
        coordinated(settings, second)
    assert bases_sent(second) == 0


def test_a_piece_that_is_lost_is_sent_again(settings, start, coordinated, loopback):
    settings |= start("test_vit", "head") | CHAIN_ONLY
    lost = []

    def interfere(message: Message, answer):
        if kind_of(message.content) == BaseTask.KIND and "piece" in message.content.array_records and not lost:
            lost.append(message)
            return Message(pack(BaseState(site="x", complete=False, received=0)), reply_to=message)
        return answer()

    _, results = coordinated(settings, loopback(2, interfere))
    assert lost and [link.status for link in results.links] == ["done"] * 2


def test_a_site_without_the_weights_fails_in_words_and_the_chain_goes_on(settings, start, coordinated, loopback):
    settings |= start("test_vit", "head") | CHAIN_ONLY
    settings |= {"chain.retries": 0}

    def interfere(message: Message, answer):
        if kind_of(message.content) == BaseTask.KIND:
            return Message(pack(BaseState(site="x", complete=True, received=0)), reply_to=message)
        return answer()

    with pytest.raises(ChainwardError, match="has not got the weights that the model starts from"):
        coordinated(settings, loopback(2, interfere))


@pytest.mark.parametrize("trainable", [pytest.param("head", marks=pytest.mark.slow), "last-2"])
def test_a_lost_answer_and_a_resumed_run_lead_to_the_models_of_an_undisturbed_one(
    trainable, settings, start, coordinated, loopback
):
    """The resumed run has its own copy of the weights: the store has lost them."""
    settings |= start("test_vit", trainable) | {"chain.epochs": 1, "student.rounds": 1, "chain.compare-alone": False}
    settings |= {"federation.sites": "ash,birch,cedar", "chain.head": "statistics", "student.head": "statistics"}
    whole = run_in_process(RunConfig.from_flat(settings), open_sites(RunConfig.from_flat(settings)))
    links, lost = [], BaseState(site="x", complete=False, received=0)

    def interfere(message: Message, answer):
        if message.metadata.message_type != "train.link":
            return answer()
        links.append(message)
        if len(links) == 4:
            raise KeyboardInterrupt
        found = answer()
        return found if len(links) != 2 else Message(pack(lost), reply_to=message)

    with pytest.raises(KeyboardInterrupt):
        coordinated(settings, loopback(2, interfere))
    output = Path(settings["output.dir"])
    (stopped,) = (path.parent for path in output.glob("*/run.json"))
    default_store().remove("test_vit")
    resumed, results = coordinated(settings | {"output.resume": stopped.name})
    assert resumed.path == stopped and [link.status for link in results.links] == ["done", "retried", "done"]
    template = skeleton(whole.architecture).state_dict()
    for name, state in (whole.links | {"chain": whole.chain}).items():
        assert equal(resumed.load_model(name, template), state), name
    assert equal(load_file(resumed.model_path("student")), whole.student)


def test_statistics_of_batch_norm_stay_those_of_the_start(settings, start, coordinated):
    settings |= start("test_efficientnet", "all") | {
        "chain.epochs": 1,
        "student.rounds": 0,
        "chain.compare-alone": False,
    }
    folder, _ = coordinated(settings)
    chain, base = load_file(folder.model_path("chain")), load_file(folder.model_path("base"))
    architecture = Architecture.from_metadata(_metadata(folder, "chain"))
    assert any(True for _ in batch_norms(skeleton(architecture)))
    buffers = [name for name in chain if "running" in name or "num_batches" in name]
    assert buffers and all(torch.equal(chain[name], base[name]) for name in buffers)
    assert any(not torch.equal(chain[name], base[name]) for name in set(base) - set(buffers))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chain.start-from": "nothing"}, r"chain.start-from = 'nothing': the weights store .* has no 'nothing'"),
        ({"chain.backbone": "test_convnext"}, r"are of the backbone 'test_vit'.*set chain.backbone = 'test_vit'"),
        ({"chain.trainable": "last-9"}, "the last 9 blocks .* are to be trained, it has 6"),
    ],
)
def test_a_start_that_does_not_fit_stops_the_run_before_anything_is_trained(
    changes, words, settings, start, coordinated, loopback
):
    grid = loopback(2)
    with pytest.raises(ChainwardError, match=words):
        coordinated(settings | start("test_vit", "head") | changes, grid)
    assert not [message for message in grid.sent if message.metadata.message_type.startswith("train")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chain.trainable": "head"}, "contradicts chain.start-from = ''"),
        ({"student.source": "start"}, "there is no start to select weights out of"),
        ({"chain.start-from": "some/where.safetensors"}, "is a relative path"),
    ],
)
def test_settings_that_need_a_start_or_another_one_are_refused(changes, words, settings):
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_flat(settings | changes)


def test_attention_transfer_is_refused_where_nothing_but_the_head_is_trained(settings):
    attentive = settings | {"chain.start-from": "test_vit", "chain.attention-weight": 1.0}
    with pytest.raises(ConfigError, match=r"attention-weight = 1.0 contradicts chain.trainable = 'head'"):
        RunConfig.from_flat(attentive | {"chain.trainable": "head"})
    for part in ("last-1", "norms-and-biases", "all"):
        RunConfig.from_flat(attentive | {"chain.trainable": part})


def test_a_file_is_taken_into_the_store_by_its_path(settings, start, coordinated, tmp_path):
    settings |= start("test_vit", "head") | CHAIN_ONLY
    settings["federation.sites"] = "ash"
    by_name, _ = coordinated(settings)
    by_path, _ = coordinated(settings | {"chain.start-from": str(tmp_path / "test_vit.safetensors")})
    assert equal(load_file(by_path.model_path("chain")), load_file(by_name.model_path("chain")))
    assert default_store().find("test_vit").licence == "MIT", "what is known of the file stays"
    default_store().remove("test_vit")
    again, _ = coordinated(settings | {"chain.start-from": str(tmp_path / "test_vit.safetensors")})
    assert equal(load_file(again.model_path("chain")), load_file(by_name.model_path("chain")))


def test_report_card_and_export_name_the_start_and_scale_pixels_as_it_does(settings, start, coordinated, tmp_path):
    settings |= start("test_convnext", "last-1") | {
        "chain.epochs": 1,
        "chain.compare-alone": False,
        "student.rounds": 1,
    }
    folder, results = coordinated(settings | {"student.finetune-rounds": 0})
    said = [results.start.name, results.start.sha256, "MIT", "made here", "last-1"]
    page = (folder.path / "report.html").read_text()
    assert all(word in page for word in said)
    for name in ("chain", "student"):
        export = export_run(folder, tmp_path / name, model=name, onnx=name == "chain")
        card = (export.path / "README.md").read_text()
        assert all(word in card for word in said)
        config = json.loads((export.path / "config.json").read_text())["pretrained_cfg"]
        known = timm.get_pretrained_cfg("test_convnext")
        assert config["mean"] == pytest.approx([sum(known.mean) / 3]) and config["std"] == pytest.approx(
            [sum(known.std) / 3]
        )
        code = re.search(r"logits = model\((.*pixels.*)\)\n", card)[1]
        pixels = torch.arange(32 * 32, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(1, 1, 32, 32)
        model = timm.create_model(f"local-dir:{export.path}", pretrained=True).eval()
        mine = build_model(Architecture.from_metadata(_metadata(folder, name)), seed=0).eval()
        mine.load_state_dict(load_file(folder.model_path(name)))
        with torch.no_grad():
            theirs = model(eval(code, {"torch": torch, "pixels": pixels}))
            torch.testing.assert_close(theirs, mine(scaled_for(mine, pixels)))


def test_the_audit_names_the_start(settings, start, coordinated):
    settings |= start("test_vit", "head") | CHAIN_ONLY
    folder, results = coordinated(settings | {"federation.sites": "ash"})
    said = CliRunner().invoke(app, ["audit", str(folder.path)])
    assert results.start.sha256 in said.output and "MIT" in said.output
    assert (
        json.loads(CliRunner().invoke(app, ["audit", str(folder.path), "--json"]).output)["start"]["name"] == "test_vit"
    )


def _metadata(folder: RunFolder, name: str) -> dict[str, str]:
    with safe_open(folder.model_path(name), framework="pt") as file:
        return dict(file.metadata())
