"""A run's model as a folder for others: the same answers in timm and in ONNX, a card that says what it is, whole or nothing."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from ledgers import statement_of_spending
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from chainward_client.data.images import fit_image
from chainward_server.cli import app
from chainward_server.context import model_metadata
from chainward_server.export import export_run
from chainward_server.export import onnx_model as onnx_module
from chainward_server.export.card import plain
from chainward_server.export.onnx_model import Answering, compare, onnx_bytes
from chainward_server.results import (
    AloneRecord,
    DataSummary,
    LinkMetrics,
    LinkRecord,
    Results,
    SiteScores,
    SiteSummary,
)
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.errors import ExportError, WeightsError
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import build_model, compact_architecture, resolve_architecture
from chainward_shared.preparation import Preparation
from chainward_shared.preprocessing import to_float
from chainward_shared.privacy.record import privacy_record
from chainward_shared.privacy.statements import Statements

CLASSES = ["clear", "mass", "fluid"]
FILES = {"README.md", "config.json", "model.safetensors", "model.onnx", "preprocessing.py", "configs", "SHA256SUMS"}
LISTED = FILES - {"SHA256SUMS", "configs"} | {"configs/metadata.json", "configs/inference.json"}


def scores(value: float | None, n: int = 40) -> Scores:
    return Scores(n=n, accuracy=value, balanced_accuracy=value, macro_auc=value, ece=value and value / 10)


def everywhere(value: float, sites=("ash", "birch")) -> SiteScores:
    return SiteScores(sites={site: scores(value, 20) for site in sites}, pooled=scores(value))


def results_of(folder: RunFolder, *, task="single", synthetic=False, sites=("ash", "birch"), encoders=None) -> Results:
    """What a run of two sites measured; nothing was trained for it."""
    data = DataSummary(
        source="data.yaml",
        synthetic=synthetic,
        task=task,
        classes=CLASSES,
        image_size=32,
        channels=1,
        sites=[
            SiteSummary(
                site=site,
                train=90,
                val=20,
                test=20,
                class_counts={"train": [50, 30, 10], "test": [10, 6, 4]},
                encoder=(encoders or {}).get(site),
            )
            for site in sites
        ],
    )
    results = Results(run_id=folder.state.run_id, seed=3, data=data)
    metrics = LinkMetrics(test=everywhere(0.6), validation=scores(0.61))
    for step, site in enumerate(sites):
        results.links.append(
            LinkRecord(
                strand=0,
                lap=0,
                step=step,
                site=site,
                predecessor=sites[step - 1] if step else None,
                status="done",
                attempts=1,
                seconds=2.0,
                bytes_down=0,
                bytes_up=1,
                metrics=metrics,
            )
        )
        results.alone.append(AloneRecord(site=site, status="done", seconds=2.0, metrics=metrics))
    results.final = {"chain": everywhere(0.7), "student": everywhere(0.65)}
    return results


def runs_in(place: Path):
    """Make the folder of a run in `place` whose models have the weights with which they were built."""

    def make(
        backbone="test_convnext",
        *,
        task="single",
        models=("chain", "student"),
        status="finished",
        settings=None,
        **more,
    ):
        flat = {"output.dir": str(place / "runs"), "seed": 3, **(settings or {})}
        folder = RunFolder.create(RunConfig.from_flat(flat))
        large = resolve_architecture(
            backbone, num_classes=3, in_chans=1, image_size=32, patch_size=8 if "vit" in backbone else 0
        )
        for name, architecture in (("chain", large), ("student", compact_architecture(large))):
            if name in models:
                state = build_model(architecture, seed=1).state_dict()
                folder.save_model(name, state, architecture, model_metadata(architecture, CLASSES, task))
        results = results_of(folder, task=task, **more)
        folder.commit(results, *(piece.key for piece in [*results.links, *results.alone]))
        if status == "finished":
            folder.enter("done")
        folder.end(status, None if status == "finished" else "the disk is full")
        return RunFolder.open(folder.path)

    return make


@pytest.fixture
def make_run(tmp_path):
    return runs_in(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run and the export of its student, ONNX and all, for tests that only read them."""
    place = tmp_path_factory.mktemp("exported")
    folder = runs_in(place)()
    return folder, export_run(folder, place / "out")


@pytest.fixture(scope="module")
def graph():
    """A model, its ONNX file, and what came of comparing the two."""
    architecture = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
    model = build_model(architecture, seed=1).eval()
    return architecture, model, *onnx_bytes(model, architecture, "single", {})


def pixels(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, 1, 32, 32), dtype=np.uint8)


def loaded_by_timm(path: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def expected_logits(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model((torch.from_numpy(images).double().float() / 255 - 0.5) / 0.25).numpy()


# --- what others compute with it ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone"),
    [("chain", "test_vit"), ("chain", "resnetv2_18"), ("student", "test_vit"), ("student", "test_convnext")],
)
def test_timm_and_onnx_answer_alike_for_any_batch(make_run, tmp_path, backbone, name):
    done = export_run(make_run(backbone), tmp_path / "out", model=name)
    model = loaded_by_timm(done.path)
    session = onnxruntime.InferenceSession(done.path / "model.onnx")
    for batch in (1, 3, 5):
        logits, probabilities = session.run(None, {"pixels": pixels(batch)})
        expected = expected_logits(model, pixels(batch))
        assert logits.shape == (batch, 3)
        assert np.abs(logits - expected).max() < 1e-5
        powers = np.exp(expected - expected.max(axis=1, keepdims=True))
        assert np.abs(probabilities - powers / powers.sum(axis=1, keepdims=True)).max() < 1e-6


def test_a_student_that_timm_has_no_name_for_has_all_files_and_is_rebuilt_by_the_lines_of_its_card(
    make_run, tmp_path, monkeypatch
):
    folder = with_fits(make_run("test_efficientnet"), "crop", "crop")
    done = export_run(folder, tmp_path / "out", model="student", onnx=False)
    assert {file.name for file in done.path.iterdir()} == FILES - {"model.onnx"}
    lines = (done.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "preprocessing", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    photograph(50, 90).save("image.png")
    made: dict = {}
    exec(lines.replace("PATH/OF/THIS/FOLDER", str(done.path)), made)
    expected = build_model(
        compact_architecture(resolve_architecture("test_efficientnet", num_classes=3, in_chans=1, image_size=32)),
        seed=1,
    ).eval()
    image = by_the_sites_own_code(photograph(50, 90), "crop")
    with torch.inference_mode():
        assert torch.equal(made["probabilities"], expected(image).softmax(dim=1))
    with pytest.raises(RuntimeError, match=r"use network\(\) in preprocessing"):
        loaded_by_timm(done.path)


def test_the_weights_are_the_runs_own_file_and_timm_loads_them(make_run, tmp_path):
    folder = make_run()
    done = export_run(folder, tmp_path / "out", model="chain", onnx=False)
    exported = done.path / "model.safetensors"
    assert exported.read_bytes() == folder.model_path("chain").read_bytes()
    template = loaded_by_timm(done.path).state_dict()
    state = folder.load_model("chain", template)
    assert all(torch.equal(tensor, state[name]) for name, tensor in template.items())


@pytest.mark.slow
def test_several_findings_are_sigmoids(make_run, tmp_path):
    done = export_run(make_run(task="multilabel"), tmp_path / "out")
    session = onnxruntime.InferenceSession(done.path / "model.onnx")
    logits, probabilities = session.run(None, {"pixels": pixels(3)})
    assert np.abs(probabilities - 1 / (1 + np.exp(-logits))).max() < 1e-6
    assert session.get_modelmeta().custom_metadata_map["chainward.task"] == "multilabel"
    card = (done.path / "README.md").read_text()
    assert "a sigmoid for each finding" in card
    assert "multi-label" in yaml.safe_load(card.split("---")[1])["tags"]


@pytest.mark.slow
def test_onnx_can_be_given_images_that_are_scaled_already(make_run, tmp_path):
    done = export_run(make_run(), tmp_path / "out", onnx_input="scaled")
    session = onnxruntime.InferenceSession(done.path / "model.onnx")
    images = (pixels(3).astype(np.float32) / 255 - 0.5) / 0.25
    logits, _ = session.run(None, {"images": images})
    assert np.abs(logits - expected_logits(loaded_by_timm(done.path), pixels(3))).max() < 1e-5


@pytest.mark.slow
def test_the_onnx_file_says_what_it_is_and_nothing_about_this_machine(exported):
    folder, done = exported
    proto = onnx.load(done.path / "model.onnx")
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(said["chainward.classes"]) == CLASSES
    assert json.loads(said["chainward.pixels"]) == {"divide_by": 255, "mean": 0.5, "std": 0.25}
    assert (said["chainward.image_size"], said["chainward.channels"]) == ("32", "1")
    assert said["chainward.run"] == folder.state.run_id
    assert said["chainward.safetensors_sha256"] == folder.state.models["student"]
    for file in (one for one in done.path.rglob("*") if one.is_file()):
        contents = file.read_bytes()
        for machine in (str(done.path.parent), str(Path.home()), timm.__file__, "site-packages", "chainward_server"):
            assert machine.encode() not in contents, f"{file.name} names {machine}"


@pytest.mark.slow
def test_an_onnx_graph_that_computes_something_else_is_refused(graph):
    architecture, model, contents, check = graph
    other = build_model(architecture, seed=1)
    with torch.no_grad():
        other.get_classifier().bias[2] += 1e-3
    assert check.logits < 1e-5
    assert set(check.batches) >= {1, 3}
    with pytest.raises(ExportError, match=r"ONNX contradicts PyTorch on a batch of 1: logits differ by up to 0\.001"):
        compare(contents, Answering(other.eval(), "single", "pixels"), architecture, opset=check.opset)
    with pytest.raises(ExportError, match="probabilities"):
        compare(contents, Answering(model.eval(), "multilabel", "pixels"), architecture, opset=check.opset)


@pytest.mark.slow
def test_a_graph_whose_batch_is_fixed_is_refused(graph):
    architecture, model, contents, check = graph
    proto = onnx.load_from_string(contents)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(ExportError, match="onnxruntime can't run the ONNX file"):
        compare(proto.SerializeToString(), Answering(model, "single", "pixels"), architecture, opset=check.opset)


# --- from an image of any shape ---


def with_fits(folder: RunFolder, *fits: str) -> RunFolder:
    """The same run, whose sites made their images square so."""
    results = folder.load_results()
    for site, fit in zip(results.data.sites, fits, strict=True):
        site.preparation = Preparation(fit=fit)
    folder.write_results(results)
    return RunFolder.open(folder.path)


def photograph(height: int, width: int) -> Image.Image:
    """Smooth grey, as a photograph is, with an edge."""
    row, column = np.mgrid[:height, :width]
    pixels = 128 + 90 * np.sin(row / 7) * np.cos(column / 11)
    pixels[height // 3 : height // 2] = 250
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def module_of(folder: Path):
    """The export's own preprocessing.py, imported from where it lies."""
    spec = importlib.util.spec_from_file_location(f"preprocessing_{folder.parent.name}", folder / "preprocessing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_the_sites_own_code(image: Image.Image, fit: str) -> torch.Tensor:
    square = fit_image(image, 32, fit, resample=Image.Resampling.BICUBIC)
    return to_float(torch.from_numpy(np.asarray(square))[None, None])


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_whole_images_become_what_the_sites_trained_on_in_every_exported_file(make_run, tmp_path, fit):
    folder = with_fits(make_run(models=("chain",)), fit, fit)
    done = export_run(folder, tmp_path / fit, model="chain", onnx_input="image")
    session = onnxruntime.InferenceSession(done.path / "model.onnx")
    model, own = loaded_by_timm(done.path), module_of(done.path)
    transform = None if fit == "pad" else timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for shape in ((50, 90), (91, 40), (32, 32), (20, 25)):
        image = photograph(*shape)
        expected = by_the_sites_own_code(image, fit)
        assert torch.equal(own.prepare(image)[None], expected)
        with torch.inference_mode():
            logits = model(expected).numpy()
        answer, _ = session.run(None, {"image": np.asarray(image)[None, None]})
        assert np.abs(answer - logits).max() < 0.02 * np.abs(logits).max()
        if transform is not None:  # half a pixel off where timm's centre is a whole one
            assert (transform(image)[None] - expected).abs().mean() < (1e-6 if fit == "stretch" else 0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fits", "words"), [(("pad", "pad"), "black bars"), (("pad", "crop"), "different ways"), ((), "nothing says")]
)
def test_timms_own_transform_is_refused_where_it_would_prepare_images_otherwise(make_run, tmp_path, fits, words):
    folder = make_run(models=("chain",))
    done = export_run(with_fits(folder, *fits) if fits else folder, tmp_path / "out", model="chain", onnx=False)
    config = timm.data.resolve_model_data_config(loaded_by_timm(done.path))
    with pytest.raises(KeyError, match=f"{words}.*use preprocessing.py"):
        timm.data.create_transform(**config)
    if fits != ("pad", "pad"):
        with pytest.raises(ExportError, match="use --onnx-input pixels"):
            export_run(RunFolder.open(folder.path), tmp_path / "image", model="chain", onnx_input="image")


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "name"), [("test_convnext", "chain"), ("test_efficientnet", "student")])
def test_monai_runs_the_exported_folder(make_run, tmp_path, monkeypatch, backbone, name):
    bundle = pytest.importorskip("monai.bundle")
    folder = make_run(backbone, models=(name,))
    done = export_run(with_fits(folder, "pad", "pad"), tmp_path / "out", model=name, onnx=False)
    (tmp_path / "images").mkdir()
    for number, shape in enumerate([(50, 90), (91, 40)]):
        photograph(*shape).save(tmp_path / "images" / f"{number}.png")
    monkeypatch.chdir(done.path)
    monkeypatch.syspath_prepend(done.path)
    monkeypatch.delitem(sys.modules, "preprocessing", raising=False)
    bundle.run(
        config_file="configs/inference.json",
        meta_file="configs/metadata.json",
        dataset_dir=str(tmp_path / "images"),
        output=str(tmp_path / "answers.csv"),
    )
    rows = list(csv.DictReader((tmp_path / "answers.csv").open()))
    model = loaded_by_timm(done.path) if name == "chain" else module_of(done.path).network()
    for number, row in enumerate(rows):
        image = by_the_sites_own_code(Image.open(tmp_path / "images" / f"{number}.png"), "pad")
        with torch.inference_mode():
            expected = model(image).softmax(dim=1)[0]
        assert [float(row[f"probability:{name}"]) for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(rows) == 2


# --- whole or nothing ---


@pytest.mark.slow
def test_the_checksums_are_those_of_the_files(exported):
    _, done = exported
    assert {file.name for file in done.path.iterdir()} == FILES
    sums = dict(reversed(line.split("  ")) for line in (done.path / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == LISTED
    for name, sha256 in sums.items():
        assert hashlib.sha256((done.path / name).read_bytes()).hexdigest() == sha256
    card = (done.path / "README.md").read_text()
    assert all(sha256 in card for name, sha256 in sums.items() if name != "README.md")


def test_a_damaged_weight_file_is_refused_and_nothing_is_left(make_run, tmp_path):
    folder = make_run()
    contents = bytearray(folder.model_path("student").read_bytes())
    contents[-1] ^= 1
    folder.model_path("student").write_bytes(contents)
    with pytest.raises(ExportError, match=r"its SHA-256 is not the one in run\.json"):
        export_run(folder, tmp_path / "place" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_pickle_in_place_of_the_weights_is_not_opened(make_run, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = make_run()
    contents = pickle.dumps(Trap())
    folder.model_path("student").write_bytes(contents)
    folder.state.models["student"] = hashlib.sha256(contents).hexdigest()
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        export_run(folder, tmp_path / "out", onnx=False)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_failure_half_way_leaves_nothing_and_what_was_there_stays(make_run, tmp_path, monkeypatch):
    folder = make_run()
    first = export_run(folder, tmp_path / "out", onnx=False)
    before = {file.name: file.read_bytes() for file in first.path.iterdir() if file.is_file()}

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chainward_server.export.run_export.model_card", broken)
    with pytest.raises(ExportError, match="No space left on device"):
        export_run(folder, tmp_path / "out", onnx=False, force=True)
    assert {file.name: file.read_bytes() for file in first.path.iterdir() if file.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}


@pytest.mark.slow
def test_an_earlier_export_is_replaced_with_force_only(exported, tmp_path):
    folder, done = exported
    shutil.copytree(done.path, tmp_path / "out")
    with pytest.raises(ExportError, match="not empty"):
        export_run(folder, tmp_path / "out")
    export_run(folder, tmp_path / "out", onnx=False, force=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES - {"model.onnx"}


def test_force_does_not_replace_a_folder_that_is_no_export(make_run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "README.md").write_text("mine")
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(ExportError, match=r"'chapter\.tex', which no export writes"):
        export_run(make_run(), tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "README.md").read_text() == "mine"


def test_an_empty_folder_and_one_whose_parents_are_missing_are_taken(make_run, tmp_path):
    folder = make_run()
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b"):
        export_run(folder, target, onnx=False)
        assert (target / "SHA256SUMS").is_file()


# --- runs that lack something ---


def test_a_run_without_the_model_is_refused_with_what_it_has(make_run, tmp_path):
    half = make_run(models=("chain",), status="failed")
    with pytest.raises(ExportError, match=r"\(failed, .*\) has no model 'student'; it has the model of the chain"):
        export_run(half, tmp_path / "out")
    none = make_run(models=(), status="failed")
    with pytest.raises(ExportError, match="has no model 'chain'; resume it"):
        export_run(none, tmp_path / "out", model="chain")
    assert not (tmp_path / "out").exists()


def test_the_model_of_a_failed_run_is_exported_and_its_card_says_so(make_run, tmp_path):
    half = make_run(models=("chain",), status="failed")
    done = export_run(half, tmp_path / "out", model="chain", onnx=False)
    card = (done.path / "README.md").read_text()
    assert "**The run has not finished** (failed" in card
    assert "the disk is full" in card
    assert "**Not recorded.** The run has left no privacy.json" in card
    assert any("has not finished" in warning for warning in done.warnings)


def test_without_the_extra_the_export_says_what_to_install(make_run, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        onnx_module.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(ExportError, match=r"ONNX needs onnxscript, not installed: .*chainward\[onnx\].*--no-onnx"):
        export_run(make_run(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the card ---


def card_of(folder: RunFolder, target: Path, **more) -> str:
    return (export_run(folder, target, onnx=False, **more).path / "README.md").read_text()


def test_the_card_has_every_score_with_its_number_of_images(make_run, tmp_path):
    card = card_of(make_run(), tmp_path / "out")
    assert "| ash | 20 | 0.650 | 0.650 | 0.650 | 0.065 |" in card
    assert "| **All sites, pooled** | 40 | 0.650 | 0.650 | 0.650 | 0.065 |" in card
    assert "| The chain's model | 0.700 | 0.700 |" in card
    assert "| A site alone, mean of 2 | 0.600 | 0.600 |" in card
    assert "| 2 | birch | ash | done | 1 | 2.0 s | 0.610 |" in card
    front = yaml.safe_load(card.split("---")[1])
    values = {entry["type"]: entry["value"] for entry in front["model-index"][0]["results"][0]["metrics"]}
    assert values == {"balanced_accuracy": 0.65, "roc_auc": 0.65, "accuracy": 0.65, "ece": 0.065}
    assert front["pipeline_tag"] == "image-classification"


def test_the_uncertainty_is_that_of_the_mean_of_the_classes_recalls(make_run, tmp_path):
    card = card_of(make_run(), tmp_path / "out")
    by_hand = 1.96 * (sum(0.65 * 0.35 / n for n in (20, 12, 8)) ** 0.5) / 3
    assert f"uncertain by about ±{by_hand:.3f}" in card
    assert "Guessing would reach a balanced accuracy of 0.333" in card


def test_synthetic_data_is_said_first(make_run, tmp_path):
    card = card_of(make_run(synthetic=True), tmp_path / "out")
    assert card.index("**Synthetic data.**") < card.index("## Intended use")
    assert "synthetic-data" in yaml.safe_load(card.split("---")[1])["tags"]
    assert "Synthetic" not in card_of(make_run(), tmp_path / "real")


def test_the_card_names_the_language_encoders_that_read_reports_by_their_digest(make_run, tmp_path):
    encoders = {"ash": "ab" * 32}
    card = card_of(make_run(settings={"privileged.mode": "text"}, encoders=encoders), tmp_path / "out")
    assert f"Reports of ash are read by a frozen language encoder, SHA-256 of its files `{'ab' * 32}`" in card
    assert "Reports of birch" not in card
    blind = card_of(make_run(settings={"privileged.mode": "table"}, encoders=encoders), tmp_path / "blind")
    assert "ab" * 32 not in blind, "nobody has read a report in that run"


def test_a_card_without_privacy_says_that_nothing_is_guaranteed(make_run, tmp_path):
    folder = make_run()
    (folder.path / "privacy.json").write_text(
        json.dumps({"schema": 1, "mode": "off", "statement": "Nothing bounds it.", "sites": {}})
    )
    card = card_of(folder, tmp_path / "out")
    assert "**Differential privacy: off.** Nothing bounds it." in card
    assert "Outside of the guarantee" not in card


def test_scores_that_sites_withhold_are_dashes(make_run, tmp_path):
    folder = make_run()
    results = folder.load_results()
    results.final["student"] = SiteScores(sites={"ash": scores(0.65, 20)}, pooled=scores(0.65, 20))
    results.data.sites[1].class_counts = {}
    folder.write_results(results)
    card = card_of(folder, tmp_path / "out")
    assert "| birch | – | – | – | – | – |" in card
    assert "Without birch: no scores came from there" in card
    assert "uncertain by about" not in card  # the interval would be of other images
    results.final["student"] = SiteScores(sites={}, pooled=scores(None, 0))
    folder.write_results(results)
    card = card_of(folder, tmp_path / "none")
    assert "No site let its scores out" in card
    assert "model-index" not in card


def test_names_from_sites_can_neither_break_a_table_nor_bring_html(make_run, tmp_path):
    card = card_of(make_run(sites=("ash_oak & elm", "birch")), tmp_path / "out")
    assert "ash\\_oak &amp; elm" in card
    assert plain("ash|oak <img src=x onerror=alert(1)>") == "ash\\|oak &lt;img src=x onerror=alert(1)&gt;"
    assert plain("a\n\n# b <i>|`c`[d](e)") == "a \\# b &lt;i&gt;\\|\\`c\\`\\[d\\](e)"


def test_the_card_holds_settings_but_no_path_of_the_coordinator(make_run, tmp_path):
    card = card_of(make_run(), tmp_path / "out")
    assert 'class-balance = "site-prior"' in card
    assert "all classes are equally frequent" in card
    assert str(tmp_path) not in card


def privately(folder: RunFolder, place: Path, **changes) -> None:
    """Write the privacy.json of a run in which ash trained privately and birch did not; `changes` are not signed."""
    statement = statement_of_spending(place, folder.state.run_id)
    record = privacy_record(Statements([statement]), ["ash", "birch"]).to_json()
    record["statements"][0] |= changes
    (folder.path / "privacy.json").write_text(json.dumps(record))


def test_a_private_sites_epsilon_and_what_no_guarantee_covers_are_on_the_card(make_run, tmp_path):
    folder = make_run()
    privately(folder, tmp_path)
    done = export_run(folder, tmp_path / "out", onnx=False)
    card = (done.path / "README.md").read_text()
    record = json.loads((folder.path / "privacy.json").read_text())
    epsilon = record["sites"]["ash"]["epsilon"]
    assert f"| ash | one patient | {epsilon:.3f} | {epsilon:.3f} | 1e-05 | 4 | withhold |" in card
    assert "| birch | nothing: no differential privacy |" in card
    assert "The audit of the run: **fine**" in card
    assert "* Everything of birch." in card.partition("Outside of the guarantee")[2]
    assert done.warnings == ()


def test_a_privacy_statement_that_was_changed_is_said_on_the_card_and_to_the_exporter(make_run, tmp_path):
    folder = make_run()
    privately(folder, tmp_path, epsilon_run=0.1)
    done = export_run(folder, tmp_path / "out", onnx=False)
    assert any("the privacy audit of the run is" in warning for warning in done.warnings)
    card = (done.path / "README.md").read_text()
    assert "The audit of the run: **fine**" not in card
    assert "does not match its signature" in card


# --- as it is typed ---


def typed(*words: str):
    return CliRunner().invoke(app, list(words))


@pytest.mark.slow
def test_the_command_prints_the_folder_or_json(make_run, tmp_path):
    folder = make_run()
    run, base = folder.state.run_id, str(folder.path.parent)
    printed = typed("export", run, "--dir", base, "--to", str(tmp_path / "one"), "--no-onnx")
    assert (printed.exit_code, printed.stdout) == (0, f"{tmp_path / 'one'}\n")
    printed = typed("export", run, "--dir", base, "--to", str(tmp_path / "two"), "--model", "chain", "--json")
    told = json.loads(printed.stdout)
    assert (told["model"], told["path"]) == ("chain", str(tmp_path / "two"))
    assert told["onnx"]["logits"] < 1e-5
    assert {file["name"] for file in told["files"]} == LISTED


@pytest.mark.slow
def test_a_real_run_is_exported(finished_run, tmp_path):
    folder, results = finished_run.folder, finished_run.results
    done = export_run(folder, tmp_path / "out", onnx=False)
    with safe_open(done.path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["chainward.classes"]) == ["a", "b", "c"]
    card = (done.path / "README.md").read_text()
    pooled = results.final["student"].pooled
    assert f"| **All sites, pooled** | {pooled.n} | {pooled.balanced_accuracy:.3f} |" in card
    assert "simulated on one machine" in card
    assert "**Differential privacy: off.**" in card
