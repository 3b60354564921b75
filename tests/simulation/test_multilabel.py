"""Several findings in one image, through the whole path: data file, chain, students, scores, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import yaml
from flwr.app import Message
from in_process_run import equal, run_in_process
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from whole_run import whole_run

from chainward_client.evaluation import class_probabilities
from chainward_server.rendezvous import meet
from chainward_server.report import tables
from chainward_server.report.page import render_report
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError
from chainward_shared.models import build_model, skeleton
from chainward_shared.privacy.record import PrivacyRecord
from chainward_shared.protocol import Hello, HelloRequest, SiteCard, kind_of, pack
from chainward_simulations.runner import open_sites, score

FINDINGS = ["square", "disc", "bar"]
HOSPITALS = {"ash": (0.6, 0.2, 0.3), "birch": (0.2, 0.6, 0.4), "cedar": (0.4, 0.4, 0.0)}
"""How often each finding occurs at each hospital; cedar has never seen a bar."""


def drawing(findings: list[int], generator: np.random.Generator) -> Image.Image:
    """A noisy 32 px image with a bright square, a dark disc and a bright bar, each there or not, anywhere."""
    pixels = generator.normal(100, 12, (32, 32))
    rows, columns = np.mgrid[:32, :32]
    square, disc, bar = findings
    row, column = generator.integers(3, 21, 2)
    if square:
        pixels[row : row + 8, column : column + 8] += 70
    row, column = generator.integers(6, 26, 2)
    if disc:
        pixels[(rows - row) ** 2 + (columns - column) ** 2 < 25] -= 70
    if bar:
        pixels[:, generator.integers(2, 28) :][:, :3] += 50
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a data file: three hospitals, 48 training images each, with none to three findings."""
    folder = tmp_path_factory.mktemp("drawings")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    lines = ["image,findings,split,hospital"]
    for hospital, rates in HOSPITALS.items():
        for split, count in (("train", 48), ("val", 24), ("test", 24)):
            for index in range(count):
                findings = [int(found) for found in generator.random(3) < rates]
                name = f"{hospital}-{split}-{index}.png"
                drawing(findings, generator).save(folder / "images" / name)
                words = "|".join(f for f, found in zip(FINDINGS, findings, strict=True) if found) or "No Finding"
                lines.append(f"{name},{words},{split},{hospital}")
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    description = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": "images",
        "task": "multilabel",
        "classes": FINDINGS,
        "no_finding": "No Finding",
        "columns": {"image": "image", "label": "findings", "split": "split", "site": "hospital"},
        "image": {"size": 32, "channels": 1},
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(description))
    return path


@pytest.fixture(scope="module")
def findings_settings(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that uses every loss: few labels, the other images through the predecessor, attention."""
    return whole_run(drawings, tmp_path_factory.mktemp("runs")) | {
        "chain.label-fraction": 0.5,
        "chain.unlabelled-weight": 0.5,
        "chain.attention-weight": 0.5,
    }


@pytest.fixture(scope="module")
def finished(findings_settings, coordinated) -> tuple[RunFolder, Results]:
    with pictures.drawn():
        return coordinated(findings_settings)


@pytest.mark.slow
def test_a_whole_run_is_the_plain_runners_bit_for_bit_and_its_scores_are_scikit_learns(finished, findings_settings):
    folder, results = finished
    config = RunConfig.from_flat(findings_settings)
    sites = open_sites(config)
    outcome = run_in_process(config, sites)
    large = skeleton(outcome.architecture).state_dict()
    small = skeleton(outcome.student_architecture).state_dict()
    assert [site.task for site in sites.values()] == ["multilabel"] * 3
    assert [link.status for link in results.links] == ["done"] * 3
    for key, state in outcome.links.items():
        assert equal(folder.load_model(key, large), state), f"{key} differs"
    assert equal(folder.load_model("chain", large), outcome.chain)
    assert equal(folder.load_model("student", small), outcome.student)

    model = build_model(outcome.architecture, seed=0)
    model.load_state_dict(outcome.chain)
    threads = config.federation.cpu_threads
    tests = [site.splits["test"] for site in sites.values()]
    decided = np.concatenate([class_probabilities(model, cases, 3, threads) for cases in tests]) >= 0.5
    truth = np.concatenate([cases.labels.numpy() for cases in tests])
    pooled = results.final["chain"].pooled
    assert pooled.n == 72
    assert pooled.accuracy == pytest.approx(accuracy_score(truth.reshape(-1), decided.reshape(-1)))
    balanced = np.mean([balanced_accuracy_score(truth[:, k], decided[:, k]) for k in range(3)])
    assert pooled.balanced_accuracy == pytest.approx(balanced)
    assert score(outcome.chain, outcome.architecture, sites, config)[1] == pooled


def test_the_run_says_that_its_classes_are_findings(finished):
    folder, results = finished
    assert results.data.task == "multilabel"
    cedar = next(site for site in results.data.sites if site.site == "cedar")
    assert cedar.class_counts["train"][2] == 0
    assert sum(cedar.class_counts["train"]) != cedar.train == 48
    page = (folder.path / "report.html").read_text()
    assert "one classifier of 3 findings: mean balanced accuracy of the findings" in page
    assert "Guessing would reach 0.500." in page
    assert "dotted: guessing (0.500)" in page
    assert "3 findings, of which an image may have several or none" in page
    assert "Images with each finding" in page
    assert "finding &#39;bar&#39;: 0 training cases" in page
    assert "disease class" not in page
    with safe_open(folder.model_path("student"), "pt") as file:
        assert file.metadata()["chainward.task"] == "multilabel"
        assert json.loads(file.metadata()["chainward.classes"]) == FINDINGS


@pytest.mark.slow
def test_the_chain_learns_findings_that_its_last_hospital_has_never_seen(findings_settings, drawings):
    """Bars are learnt at ash and birch, and must survive cedar, which has none."""
    config = RunConfig.from_flat(
        findings_settings
        | {
            "chain.label-fraction": 1.0,
            "chain.unlabelled-weight": 0.0,
            "chain.attention-weight": 0.0,
            "chain.epochs": 25,
            "chain.compare-alone": False,
            "student.rounds": 0,
        }
    )
    sites = open_sites(config)
    outcome = run_in_process(config, sites)
    _, pooled = score(outcome.chain, outcome.architecture, sites, config)
    assert pooled.macro_auc > 0.7
    model = build_model(outcome.architecture, seed=0)
    model.load_state_dict(outcome.chain)
    test = sites["ash"].splits["test"]
    bars = class_probabilities(model, test, 3, config.federation.cpu_threads)[:, 2]
    truth = test.labels[:, 2].numpy() > 0.5
    assert bars[truth].mean() > bars[~truth].mean() + 0.1


# --- sites that don't agree ---


def test_a_site_with_another_task_is_refused_before_anything_is_trained(loopback, tmp_path):
    def interfere(message, answer):
        name = ("north", "south")[message.metadata.dst_node_id - 101]
        if kind_of(message.content) == HelloRequest.KIND:
            return Message(pack(Hello(site=name)), reply_to=message)
        card = SiteCard(
            site=name,
            task="multilabel" if name == "south" else "single",
            classes=["a", "b"],
            image_size=32,
            channels=1,
            train=10,
            val=2,
            test=3,
            class_counts={"train": [5, 5]},
            synthetic=False,
            notes=[],
        )
        return Message(pack(card), reply_to=message)

    config = RunConfig.from_flat({"federation.deadline": 1.0, "federation.sites": "north,south"})
    with pytest.raises(
        ChainwardError, match=r"^site 'south' has task multilabel, site 'north' has single; agree on one"
    ):
        meet(loopback(2, interfere), config, tmp_path)


# --- figures of the report ---


def results_of(**data: Any) -> Results:
    sites = [
        {"site": "ash", "train": 10, "val": 0, "test": 40, "class_counts": {"test": [10, 0, 40]}},
        {"site": "birch", "train": 10, "val": 0, "test": 60, "class_counts": {"test": [10, 0, 60]}},
    ]
    block = {"source": "x", "synthetic": False, "classes": FINDINGS, "image_size": 32, "channels": 1, "sites": sites}
    return Results.model_validate({"run_id": "r", "seed": 0, "data": block | data})


def test_metrics_of_before_are_read_as_single_label():
    results = results_of()
    assert results.data.task == "single"
    assert tables.test_counts(results) == [20, 100]
    assert tables.chance(results) == 0.5


def test_behind_balanced_accuracy_stand_the_images_with_and_without_each_finding_that_can_be_judged():
    results = results_of(task="multilabel")
    assert tables.test_counts(results) == [20, 80]  # the second finding never occurs, the third always
    assert tables.chance(results) == 0.5
    assert tables.class_mixes(results)[0].images == [40, 60, 100]


def test_guessing_is_worth_half_however_many_findings_there_are():
    sites = [{"site": "ash", "train": 0, "val": 0, "test": 40, "class_counts": {"test": [4, 5, 6, 7]}}]
    assert tables.chance(results_of(task="multilabel", sites=sites)) == 0.5
    assert tables.chance(results_of(task="single", sites=sites)) == 0.25
    assert tables.chance(results_of(task="multilabel", sites=[])) is None


def test_a_bar_is_the_share_of_images_with_the_finding():
    page = render_report(
        results_of(task="multilabel"),
        status="running",
        reason=None,
        config={},
        privacy=PrivacyRecord(mode="off"),
        started="",
        finished=None,
    )
    assert '<td>10<span class="bar"><i style="width: 25.0%">' in page
    assert '<td>20<span class="bar"><i style="width: 20.0%">' in page
