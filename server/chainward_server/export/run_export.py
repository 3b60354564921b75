"""The export of one model of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from torch import nn

from chainward_server.by_class import model_record
from chainward_server.export.card import CardFile, model_card
from chainward_server.export.configs import bundle_metadata, timm_config
from chainward_server.export.new_folder import check_target, new_folder
from chainward_server.export.onnx_model import OnnxCheck, OnnxInput, onnx_bytes, require_onnx
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared import __version__
from chainward_shared.errors import ExportError
from chainward_shared.familiarity import FAMILIAR_WITHIN
from chainward_shared.files import write_atomically
from chainward_shared.model_record import ModelRecord
from chainward_shared.models import Architecture, build_model, count_parameters, skeleton
from chainward_shared.pixels import preprocessing_metadata, scaling
from chainward_shared.preparation import Fit
from chainward_shared.privacy.audit import audit_statements
from chainward_shared.privacy.findings import Audit
from chainward_shared.privacy.record import PrivacyRecord, read_privacy_record
from chainward_shared.weights import check_state, load_file

ModelName = Literal["student", "chain"]

CARD, CONFIG, WEIGHTS, ONNX, SUMS = "README.md", "config.json", "model.safetensors", "model.onnx", "SHA256SUMS"
CODE = "preprocessing.py"
_FAR = f"squared distance from the training images, 1: mean of validation images; above {FAMILIAR_WITHIN:g}: of another kind"
EXPORT_FILES = (CARD, CONFIG, WEIGHTS, ONNX, CODE, SUMS, "configs")


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes
    ----------
    path : the folder, absolute
    files : bytes and SHA-256 of every file but SHA256SUMS
    onnx : how ONNX compares with PyTorch; None without ONNX
    warnings : what whoever passes the folder on must know, one line each
    """

    path: Path
    run: str
    model: ModelName
    files: tuple[CardFile, ...]
    onnx: OnnxCheck | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"schema": 1, **asdict(self), "path": str(self.path)}


def export_run(
    folder: RunFolder,
    target: Path,
    *,
    model: ModelName | None = None,
    onnx: bool = True,
    onnx_input: OnnxInput = "pixels",
    force: bool = False,
) -> Export:
    """Write a folder with a run's model: safetensors, timm's config.json, ONNX, a model card, and checksums.

    The folder is a MONAI bundle, too. Its `preprocessing.py` brings images to what the model sees, without Chainward.

    The weights are the run's file, byte for byte, checked against the digest that the run recorded.

    Parameters
    ----------
    model : "student" or "chain"; None: the student, or the chain's model of a run that trains no students
    onnx_input : what the ONNX file is given; see `OnnxInput`
    force : whether an earlier export at `target` is replaced

    Raises
    ------
    ExportError
        The run has no such model (yet), `target` must not be replaced or can't be written, or ONNX can't be made or
        contradicts PyTorch.
    ChainwardError
        A file of the run folder is damaged.
    """
    target = target.expanduser().resolve()
    check_target(target, EXPORT_FILES, force=force)
    if onnx:
        require_onnx()
    name = chosen_model(folder, model)
    sha256 = _recorded_digest(folder, name)
    results = folder.load_results()
    if results is None:
        raise ExportError(f"run {folder.state.run_id}: no metrics.json, so nothing is known of the model's data")
    privacy, audit = _privacy(folder)
    with new_folder(target, EXPORT_FILES, force=force) as staging:
        weights = staging / WEIGHTS
        write_atomically(weights, _checked_bytes(folder, name, sha256))
        classifier, architecture, metadata = _read_model(weights, sha256, results)
        record = ModelRecord.from_metadata(metadata) or model_record(  # runs of earlier builds wrote none
            folder.state.run_id, name, architecture, results.data, results.by_class.get(name)
        )
        check = None
        if onnx:
            facts = _onnx_metadata(folder, record, architecture, metadata, onnx_input, sha256)
            square, known = _square(record, onnx_input), record.familiarity
            contents, check = onnx_bytes(classifier, architecture, record.task, facts, onnx_input, square, known)
            write_atomically(staging / ONNX, contents)
        files = _write_texts(staging, classifier, architecture, record)
        card = model_card(
            folder,
            name,
            results,
            architecture=architecture,
            parameters=count_parameters(classifier),
            privacy=privacy,
            audit=audit,
            files=files,
            onnx=check,
            onnx_input=onnx_input,
            record=record,
        )
        write_atomically(staging / CARD, card.encode())
        files.insert(0, _described(staging, CARD))
        write_atomically(staging / SUMS, "".join(f"{file.sha256}  {file.name}\n" for file in files).encode())
    return Export(target, folder.state.run_id, name, tuple(files), check, _warnings(folder, name, results, audit))


def _write_texts(
    staging: Path, classifier: nn.Module, architecture: Architecture, record: ModelRecord
) -> list[CardFile]:
    """Write all that is text but the card, and return these files and those that are there already."""
    here = resources.files("chainward_server.export")
    texts = {
        CONFIG: timm_config(classifier, architecture, record),
        CODE: here.joinpath(CODE).read_text(encoding="utf-8"),
        "configs/metadata.json": bundle_metadata(record, architecture.name),
        "configs/inference.json": here.joinpath("inference.json").read_text(encoding="utf-8"),
    }
    for file, text in texts.items():
        (staging / file).parent.mkdir(exist_ok=True)
        write_atomically(staging / file, text.encode())
    return [_described(staging, file) for file in (WEIGHTS, ONNX, *texts) if (staging / file).exists()]


def chosen_model(folder: RunFolder, model: ModelName | None) -> ModelName:
    """Return `model`, or the one that is exported by default."""
    return model or ("student" if folder.config.student.rounds else "chain")


def _recorded_digest(folder: RunFolder, name: str) -> str:
    state = folder.state
    if name in state.models:
        return state.models[name]
    there = [other for other in ("chain", "student") if other in state.models]
    if name == "student" and not folder.config.student.rounds:
        advice = "it trains none (student.rounds = 0); export --model chain"
    elif there:
        advice = f"it has the model of the {there[0]}: --model {there[0]}"
    elif state.status in ("failed", "incomplete", "stopped"):
        advice = f"resume it with {folder.how_to_resume}" if folder.how_to_resume else "start anew"
    else:
        advice = "wait for it: `chainward watch`"
    raise ExportError(f"run {state.run_id} ({state.status}, phase {state.phase}) has no model '{name}'; {advice}")


def _checked_bytes(folder: RunFolder, name: str, sha256: str) -> bytes:
    path = folder.model_path(name)
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path}: can't be read ({error.strerror}); restore the run folder") from error
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise ExportError(
            f"{path}: its SHA-256 is not the one in run.json; the file is damaged, restore the run folder"
        )
    return contents


def _read_model(weights: Path, sha256: str, results: Results) -> tuple[nn.Module, Architecture, dict[str, str]]:
    """Return the model built anew from the copy that is exported, in evaluation mode."""
    state, metadata = load_file(weights, sha256)
    architecture = Architecture.from_metadata(metadata, weights.name)
    try:
        classes = json.loads(metadata.get("chainward.classes", "null"))
    except ValueError:
        classes = None
    if classes != results.data.classes or metadata.get("chainward.task", "single") != results.data.task:
        raise ExportError(
            f"the model is of the classes {classes}, metrics.json of {results.data.classes}: one is of another run"
        )
    check_state(state, skeleton(architecture).state_dict())
    model = build_model(architecture, seed=0).eval()
    model.load_state_dict(state)
    return model, architecture, metadata


def _onnx_metadata(
    folder: RunFolder,
    record: ModelRecord,
    architecture: Architecture,
    metadata: Mapping[str, str],
    takes: OnnxInput,
    sha256: str,
) -> dict[str, str]:
    mean, std = scaling(architecture.pixels)
    by_channel = "" if architecture.pixels is None else ", by channel"
    shape = f"[batch, {architecture.in_chans}, {architecture.image_size}, {architecture.image_size}]"
    given = {
        "pixels": f"pixels: uint8 {shape}, 0 to 255; the scaling is part of the graph",
        "scaled": f"images: float32 {shape}, (pixels / 255 - {mean}) / {std}{by_channel}",
        "image": f"image: uint8 [1, {architecture.in_chans}, height, width], 0 to 255; preprocessing is part of the graph",
    }[takes]
    activation = "sigmoid of each" if record.task == "multilabel" else "softmax"
    return {
        **{key: value for key, value in sorted(metadata.items()) if key.startswith(("chainward.", "timm."))},
        **preprocessing_metadata(architecture.pixels),
        **record.to_metadata(),
        "chainward.input": given,
        "chainward.outputs": f"logits, probabilities ({activation}): float32 [batch, {architecture.num_classes}]"
        + ("" if record.familiarity is None else f"; unfamiliarity: float32 [batch], {_FAR}"),
        "chainward.channels": str(architecture.in_chans),
        "chainward.image_size": str(architecture.image_size),
        "chainward.classes": json.dumps(record.classes),
        "chainward.task": record.task,
        "chainward.run": folder.state.run_id,
        "chainward.model": record.model,
        "chainward.safetensors_sha256": sha256,
        "chainward.export_version": __version__,
        "chainward.synthetic_data": str(record.synthetic).lower(),
        "chainward.use": "research only; not a medical device",
    }


def _privacy(folder: RunFolder) -> tuple[PrivacyRecord | None, Audit | None]:
    """Return what privacy.json says, None where there is none yet, and the audit of the statements in it, if any."""
    path = folder.path / "privacy.json"
    if not path.exists():
        return None, None
    record = read_privacy_record(path)
    if not record.statements:
        return record, None
    return record, audit_statements(folder.state.run_id, record.statements, record.trained)


def _square(record: ModelRecord, takes: OnnxInput) -> tuple[int, Fit] | None:
    """Return how a graph that takes whole images makes them square; None of others."""
    if takes != "image":
        return None
    fits = {one.fit for one in record.preparations.values()}
    if len(fits) != 1:
        found = "nothing says how" if not fits else f"they did so in different ways ({', '.join(sorted(fits))})"
        raise ExportError(
            f"--onnx-input image: the sites made their images square, and {found}; use --onnx-input pixels"
        )
    return record.size, fits.pop()


def _described(folder: Path, name: str) -> CardFile:
    contents = (folder / name).read_bytes()
    return CardFile(name, len(contents), hashlib.sha256(contents).hexdigest())


def _warnings(folder: RunFolder, name: str, results: Results, audit: Audit | None) -> tuple[str, ...]:
    found = []
    if folder.state.status != "finished":
        found.append(f"the run has not finished (it is {folder.state.status}): see the card for what is missing")
    if name not in results.final:
        found.append("the model has not been scored on the test images")
    if results.data.synthetic:
        found.append("trained on synthetic phantoms: it knows nothing about real images")
    if audit is not None and audit.exit_code:
        worst = next(finding for finding in audit.findings if finding.severity != "note")
        found.append(f"the privacy audit of the run is {audit.verdict}: {worst.where}: {worst.what}")
    return tuple(found)
