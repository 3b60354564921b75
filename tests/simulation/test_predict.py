"""From a run's model to new images: the answers that the run itself scored, whatever holds the model and the images."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dicom_pictures import as_dicom
from PIL import Image
from typer.testing import CliRunner

from chainward_client.data.images import open_image
from chainward_server.export import export_run
from chainward_server.run_folder import RunFolder
from chainward_shared.evaluation.operating import Calibration
from chainward_shared.model_record import ModelRecord
from chainward_shared.preparation import Preparation
from chainward_shared.weights import load_file
from chainward_simulations.cli import app
from chainward_simulations.predict.answers import Abstain, Predictions, answers
from chainward_simulations.predict.heatmaps import LINE, captioned
from chainward_simulations.predict.inputs import Decoder, Problem, open_inputs
from chainward_simulations.predict.models import Outputs, open_model
from chainward_simulations.predict.run import predict, preparation_of

CLASSES = ["a", "b", "c"]

pytestmark = pytest.mark.slow  # a run, its export and its files first


@pytest.fixture(scope="module")
def run(small_consortium, tmp_path_factory) -> RunFolder:
    from loopback_grid import LoopbackGrid

    from chainward_server.app import coordinate
    from chainward_shared.config import RunConfig

    config = RunConfig.from_flat(
        {
            "data.source": str(small_consortium),
            "output.dir": str(tmp_path_factory.mktemp("runs")),
            "chain.backbone": "test_convnext",
            "chain.epochs": 4,
            "chain.head": "statistics",
            "chain.compare-alone": False,
            "student.rounds": 1,
            "student.epochs": 1,
            "student.finetune-rounds": 0,
            "federation.deadline": 5.0,
            "federation.precision": "fp32",
        }
    )
    folder = RunFolder.create(config)
    coordinate(LoopbackGrid(2), folder)
    return RunFolder.open(folder.path)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("export") / "model", model="chain").path


@pytest.fixture(scope="module")
def test_images(small_consortium) -> dict[str, str]:
    """The consortium's test images, file name to class."""
    with (small_consortium.parent / "cases.csv").open() as file:
        return {f"{row['image']}.png": row["label"] for row in csv.DictReader(file) if row["split"] == "test"}


def opened(run: RunFolder, name="chain"):
    return open_model(run.path, Path, name)


def predicted(predictor, *places: Path, **more) -> Predictions:
    found = open_inputs(list(places), predictor.record, preparation_of(predictor.record), **more)
    return predict(predictor, found, abstain=Abstain(below=0.0))


def invoke(*words: object):
    return CliRunner().invoke(app, ["predict", *map(str, words)])


def balanced(done: Predictions, truth: dict[str, str]) -> float:
    hits: dict[str, list[bool]] = {name: [] for name in CLASSES}
    for one in done.answers:
        label = truth[Path(one.image).with_suffix(".png").name]
        hits[label].append(one.classes == (label,))
    return float(np.mean([np.mean(of_class) for of_class in hits.values()]))


@pytest.mark.parametrize("name", ["chain", "student"])
def test_a_data_files_test_split_scores_as_the_run_scored_it(run, small_consortium, name):
    done = predicted(opened(run, name), small_consortium, split="test")
    pooled = run.load_results().final[name].pooled
    assert done.scores.n == pooled.n
    assert done.scores.balanced_accuracy == pytest.approx(pooled.balanced_accuracy, abs=1e-12)
    assert done.scores.ece == pytest.approx(pooled.ece, abs=1e-6)


def test_run_export_weights_and_onnx_say_the_same_of_pictures_and_dicom_of_the_same_pixels(
    run, exported, small_consortium, test_images, tmp_path
):
    pictures, dicom = tmp_path / "pictures", tmp_path / "dicom"
    for folder in (pictures, dicom):
        folder.mkdir()
    for name in test_images:
        data = (small_consortium.parent / "images" / name).read_bytes()
        (pictures / name).write_bytes(data)
        as_dicom(np.asarray(open_image(data)), dicom / f"{Path(name).stem}.dcm")
    from_run = predicted(opened(run), pictures)
    pooled = run.load_results().final["chain"].pooled
    assert balanced(from_run, test_images) == pytest.approx(pooled.balanced_accuracy, abs=1e-12)
    given = np.array([one.probabilities for one in from_run.answers])
    for model in (exported, exported / "model.safetensors", exported / "model.onnx"):
        for images in (pictures, dicom):
            done = predicted(open_model(model, Path), images)
            assert np.allclose([one.probabilities for one in done.answers], given, atol=1e-5)
            assert [one.classes for one in done.answers] == [one.classes for one in from_run.answers]
            assert [one.found for one in done.answers] == [one.found for one in from_run.answers]
            far = np.array([one.unfamiliarity for one in done.answers])
            assert far == pytest.approx(np.array([one.unfamiliarity for one in from_run.answers]), rel=1e-3)
    assert opened(run).sha256 == open_model(exported, Path).sha256
    assert opened(run).record == open_model(exported / "model.onnx", Path).record


def test_a_model_with_statistics_of_embeddings_abstains_from_images_of_another_kind(
    run, test_images, small_consortium, tmp_path
):
    pydicom = pytest.importorskip("pydicom")
    (tmp_path / "in").mkdir()
    stripes = (np.indices((32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8)
    as_dicom(stripes, tmp_path / "in" / "stripes.dcm")
    for name in test_images:
        (tmp_path / "in" / name).write_bytes((small_consortium.parent / "images" / name).read_bytes())
    words = "--model", "chain", "--abstain-below", "0"
    out = invoke(run.path, tmp_path / "in", *words, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv")
    assert out.exit_code == 0, out.output
    found = {one["image"]: one for one in json.loads((tmp_path / "o.json").read_text())["images"]}
    assert "unlike the training images" in found["stripes.dcm"]["abstains"]
    assert found["stripes.dcm"]["unfamiliarity"] > 3
    kept = [found[name]["abstains"] is None for name in test_images]
    assert np.mean(kept) > 0.85
    rows = {row["image"]: row for row in csv.DictReader((tmp_path / "o.csv").open())}
    assert float(rows["stripes.dcm"]["unfamiliarity"]) > 3 and "unlike" in rows["stripes.dcm"]["abstains"]
    at_ease = invoke(run.path, tmp_path / "in", *words, "--abstain-beyond", "1e9")
    assert all(not row["abstains"] for row in csv.DictReader(io.StringIO(at_ease.stdout)))
    pytest.importorskip("highdicom")
    out = invoke(run.path, tmp_path / "in" / "stripes.dcm", *words, "--sr", tmp_path / "sr")
    assert out.exit_code == 0, out.output
    report = pydicom.dcmread(next((tmp_path / "sr").iterdir()))
    assert "unlike the training images" in str(report) and "as far as usual" in str(report)


def test_a_model_without_statistics_of_embeddings_says_that_only_its_probability_can_abstain(run, exported, tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "x.png")
    out = invoke(run.path, tmp_path / "x.png", "--model", "student")
    assert "carries no statistics of embeddings" in out.stderr
    assert "unfamiliarity" not in out.stdout
    assert "carries no statistics" not in invoke(exported, tmp_path / "x.png").stderr


def test_operating_points_give_on_test_images_what_the_run_counted_there(run, small_consortium):
    predictor = opened(run)
    done = predicted(predictor, small_consortium, split="test")
    found = open_inputs([small_consortium], predictor.record, None, split="test")
    truths = np.concatenate([batch.truths for batch in found.batches()])
    by_class = run.load_results().by_class["chain"]
    assert predictor.record.points == by_class.points
    for k, scores in enumerate(by_class.pooled):
        assert scores.at_point is not None
        called = np.array([one.found[k] for one in done.answers])
        assert scores.at_point.found == (called & (truths == k)).sum()
        assert scores.at_point.cleared == (~called & (truths != k)).sum()


def test_the_model_files_carry_the_whole_way_from_image_to_answer(run, small_consortium):
    for name in ("chain", "student"):
        record = ModelRecord.from_metadata(load_file(run.model_path(name))[1])
        assert (record.run, record.model) == (run.run_id, name)
        assert (record.size, record.channels, record.classes) == (32, 1, CLASSES)
        assert record.preparations == {site: Preparation() for site in ("ash", "birch", "cedar", "dogwood")}
        assert (record.mean, record.std) == ([0.5], [0.25])
        assert record.calibration.images == run.load_results().links[-1].metrics.validation.n
    assert "chainward.record" not in load_file(run.model_path(run.load_results().links[0].key))[1]


def test_bad_files_are_named_and_passed_over_and_the_exit_status_says_so(run, small_consortium, test_images, tmp_path):
    good = next(iter(test_images))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / good).write_bytes((small_consortium.parent / "images" / good).read_bytes())
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    (tmp_path / "in" / "cut.png").write_bytes((small_consortium.parent / "images" / good).read_bytes()[:60])
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "in" / "deep.png")
    (tmp_path / "in" / "notes.txt").write_text("not an image, and not meant to be one")
    out = invoke(run.path, tmp_path / "in", "--model", "chain", "--json", tmp_path / "out.json")
    assert out.exit_code == 1, out.output
    content = json.loads((tmp_path / "out.json").read_text())
    assert [one["image"] for one in content["images"]] == [good]
    assert sorted(one["image"] for one in content["unusable"]) == ["cut.png", "deep.png", "empty.png"]
    assert content["model"]["sha256"] == run.state.models["chain"]
    assert "the file is empty" in out.output
    assert "--scale LOW HIGH" in out.output
    whole = invoke(run.path, tmp_path / "in" / "deep.png", "--scale", "0", "65535")
    assert whole.exit_code == 0, whole.output


def test_a_list_names_its_files_and_what_is_missing(run, small_consortium, test_images, tmp_path):
    names = [Path(name).stem for name in list(test_images)[:3]]
    (tmp_path / "list.csv").write_text(
        "case,file\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)) + "3,nowhere\n"
    )
    out = invoke(run.path, tmp_path / "list.csv", "--images", small_consortium.parent / "images")
    assert out.exit_code == 1
    rows = list(csv.DictReader(io.StringIO(out.stdout)))
    assert [row["image"] for row in rows] == names
    assert {row["model"] for row in rows} == {run.state.models["student"]}
    assert "nowhere: no file of this name" in out.stderr
    (tmp_path / "list.csv").write_text("case,where\n1,x\n")
    assert "name one with --column" in str(invoke(run.path, tmp_path / "list.csv").exception)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_pictures_of_any_shape_come_out_as_training_would_have_decoded_them(tmp_path, fit):
    from chainward_client.data.sources import read_table

    generator = np.random.default_rng(0)
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "b").mkdir()
    for number, shape in enumerate([(50, 90, 3), (91, 40, 3), (32, 32, 3)]):
        pixels = generator.integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "ab"[number % 2] / f"{number}.png")
    description = {"format": "folders", "images": "images", "image": {"size": 32, "channels": 3, "fit": fit}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(description))
    table = read_table(tmp_path / "data.yaml")
    expected = table.cases(np.arange(3)).images.numpy()
    decode = Decoder(record(size=32, channels=3), Preparation(fit=fit))
    for row, name in enumerate(table.images):
        assert np.array_equal(decode(tmp_path / "images" / str(name)), expected[row])


def record(**changes) -> ModelRecord:
    from chainward_shared.evaluation.operating import OperatingPoint

    content = {
        "run": "r",
        "model": "chain",
        "task": "single",
        "classes": CLASSES,
        "size": 32,
        "network_size": 32,
        "channels": 1,
        "mean": [0.5],
        "std": [0.25],
        "synthetic": False,
        "calibration": Calibration(temperature=2.0, images=50),
        "points": [OperatingPoint(log_odds=0.0), OperatingPoint(log_odds=-3.0), OperatingPoint(missing="few")],
    }
    return ModelRecord(**(content | changes))


def test_an_answer_has_probabilities_before_and_after_calibration_and_abstains_below_a_bound():
    logits = np.array([[2.0, 0.0, -1.0], [0.1, 0.0, 0.0]])
    sure, unsure = answers(["x", "y"], Outputs(logits), record(), Abstain())
    assert sum(sure.probabilities) == pytest.approx(1)
    log_odds = np.log(sure.probabilities[0] / (1 - sure.probabilities[0]))
    assert sure.calibrated[0] == pytest.approx(1 / (1 + np.exp(-log_odds / 2)))
    assert sure.found == (True, True, None)
    assert (sure.classes, sure.abstains) == (("a",), None)
    assert unsure.classes == ("a",) and "below 0.5" in unsure.abstains
    plain = answers(["x"], Outputs(logits[:1]), record(calibration=Calibration(missing="few")), Abstain(below=0.95))
    assert plain[0].calibrated is None and "0.84 is below 0.95" in plain[0].abstains


def test_several_findings_or_none_are_answered_each_for_itself():
    logits = np.array([[3.0, 2.0, -9.0], [-3.0, -4.0, -5.0]])
    both, none = answers(
        ["x", "y"], Outputs(logits), record(task="multilabel", calibration=Calibration(missing="few")), Abstain()
    )
    assert both.classes == ("a", "b") and none.classes == ()
    assert both.probabilities[0] == pytest.approx(1 / (1 + np.exp(-3)))


def test_where_sites_prepared_images_differently_somebody_must_choose(tmp_path):
    both = record(preparations={"ash": Preparation(), "birch": Preparation(fit="crop")})
    Image.new("L", (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(Exception, match=r"ash: fit pad; birch: fit crop.*--site"):
        open_inputs([tmp_path / "x.png"], both, preparation_of(both))
    assert preparation_of(both, site="birch").fit == "crop"
    assert preparation_of(both, fit="stretch").fit == "stretch"
    with pytest.raises(Exception, match="--site elm: not one of"):
        preparation_of(both, site="elm")


def test_a_data_file_that_prepares_images_otherwise_than_the_model_is_refused(run, small_consortium, tmp_path):
    content = yaml.safe_load(small_consortium.read_text())
    content |= {key: str(small_consortium.parent / content[key]) for key in ("manifest", "images")}
    for change, words in (({"fit": "crop"}, "fit crop.*fit pad"), ({"size": 64}, "64 pixels.*32")):
        path = tmp_path / "other.yaml"
        path.write_text(yaml.safe_dump(content | {"image": content["image"] | change}))
        with pytest.raises(Exception, match=words):
            predicted(opened(run), path)


def test_what_is_no_model_or_no_image_is_refused_in_one_line(run, exported, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    (tmp_path / "broken.safetensors").write_bytes(b"not a model")
    Image.new("L", (9, 9)).save(tmp_path / "x.png")
    for model, words in (
        (tmp_path / "broken.onnx", "not an ONNX file"),
        (tmp_path / "broken.safetensors", "broken.safetensors"),
        (tmp_path / "nothing.onnx", "can't be read"),
        (tmp_path / "nothing", "nothing"),
    ):
        error = invoke(model, tmp_path / "x.png").exception
        assert words in str(error) and "\n" not in str(error)
    assert "no such file or folder" in str(invoke(run.path, tmp_path / "gone").exception)
    (tmp_path / "empty").mkdir()
    assert "no image in it" in str(invoke(run.path, tmp_path / "empty").exception)
    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    assert "model.safetensors" in str(invoke(changed, tmp_path / "x.png").exception)


def test_a_cell_from_outside_is_no_formula_of_a_spreadsheet():
    done = Predictions(None, answers(["=cmd()|x"], Outputs(np.zeros((1, 3))), record(), Abstain()), [Problem("y", "z")])
    done.predictor = type("P", (), {"record": record(), "sha256": "ab"})()
    assert "'=cmd()|x" in done.csv()


def test_a_structured_report_is_read_back_by_highdicom_and_pydicom(run, tmp_path):
    highdicom = pytest.importorskip("highdicom")
    pydicom = pytest.importorskip("pydicom")
    generator = np.random.default_rng(3)
    for number in range(3):
        pixels = generator.integers(0, 256, (40, 30)).astype(np.uint8)
        as_dicom(pixels, tmp_path / f"{number}.dcm", series="1.2.3" if number else "1.2.4")
    Image.new("L", (9, 9)).save(tmp_path / "x.png")
    out = invoke(run.path, tmp_path, "--model", "chain", "--sr", tmp_path / "sr", "--csv", tmp_path / "out.csv")
    assert out.exit_code == 1 and "x.png: no Structured Report: not a DICOM file" in out.output
    rows = {row["image"]: row for row in csv.DictReader((tmp_path / "out.csv").open())}
    files = sorted((tmp_path / "sr").iterdir())
    assert len(files) == 2, "a report for each series"
    groups = {}
    for file in files:
        report = highdicom.sr.srread(file)
        assert (report.CompletionFlag, report.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
        assert "not a medical device" in report.SeriesDescription
        assert run.state.models["chain"].encode() in file.read_bytes()
        for group in report.content.get_image_measurement_groups():
            groups[group.source_images[0].referenced_sop_instance_uid] = group
    for number in range(3):
        group = groups[pydicom.dcmread(tmp_path / f"{number}.dcm").SOPInstanceUID]
        row = rows[f"{number}.dcm"]
        said = {measurement.name.meaning: measurement.value for measurement in group.get_measurements()}
        for name in CLASSES:
            assert said[f"Probability: {name}"] == pytest.approx(float(row[f"probability:{name}"]), abs=6e-4)
        words = {one.name.meaning: one.value.meaning for one in group.get_qualitative_evaluations()}
        assert words["Predicted"] == row["predicted"]
        assert ("The model abstains" in words) == bool(row["abstains"])


def test_heat_maps_are_pictures_or_secondary_captures_that_name_the_model(run, exported, tmp_path):
    pytest.importorskip("highdicom")
    import pydicom

    pixels = np.random.default_rng(3).integers(0, 256, (40, 30)).astype(np.uint8)
    (tmp_path / "in").mkdir()
    as_dicom(pixels, tmp_path / "in" / "a.dcm")
    Image.fromarray(pixels).save(tmp_path / "in" / "b.png")
    out = invoke(run.path, tmp_path / "in", "--model", "chain", "--heatmap", tmp_path / "maps")
    assert out.exit_code == 0, out.output
    capture = pydicom.dcmread(tmp_path / "maps" / "00001.dcm")
    assert capture.SOPClassUID.name == "Secondary Capture Image Storage"
    assert capture.StudyInstanceUID == pydicom.dcmread(tmp_path / "in" / "a.dcm").StudyInstanceUID
    assert run.state.models["chain"] in capture.DerivationDescription
    picture = Image.open(tmp_path / "maps" / "00002-b.png")
    assert picture.text["chainward:model"] == run.state.models["chain"]
    assert np.array_equal(np.asarray(picture), capture.pixel_array), "of the same pixels the same map"
    colourful = np.ptp(np.asarray(picture).astype(int)[:512], axis=2).max()
    assert colourful > 40, "a map lies over the grey image"
    refused = invoke(exported / "model.onnx", tmp_path / "in", "--heatmap", tmp_path / "maps").exception
    assert "needs a model's weights" in str(refused)


def test_what_stands_below_a_heat_map_is_never_cut_off():
    lines = [
        "bright: where the model looks for a class with a long name",
        "don't use it: " + "; ".join(["unlike the training images"] * 6),
    ]
    picture = captioned(Image.new("RGB", (512, 512)), lines)
    below = np.asarray(picture)[512:].max(axis=2) > 100
    assert below.any() and not below[:, -4:].any() and not below[-3:].any(), "no letter at the edges"
    assert picture.height > 512 + 3 * LINE, "a line that is too long goes on in the next"
    assert picture.width == 512


def test_models_of_earlier_runs_predict_once_somebody_says_how_images_became_square(run, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(run.model_path("chain"), "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    del metadata["chainward.record"]
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    Image.new("L", (9, 20)).save(tmp_path / "x.png")
    assert "--fit pad, crop or stretch" in str(invoke(tmp_path / "old.safetensors", tmp_path / "x.png").exception)
    out = invoke(tmp_path / "old.safetensors", tmp_path / "x.png", "--fit", "pad")
    assert out.exit_code == 0, out.output
    assert "calibrated:" not in out.stdout
    assert torch.get_num_threads() >= 1
