"""A model to predict with: of a run, of an export, of a file of weights, or of an ONNX file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from chainward_client.training.passes import passes
from chainward_server.by_class import model_record
from chainward_server.export import chosen_model
from chainward_server.run_folder import RunFolder
from chainward_shared.errors import DataError, ModelError
from chainward_shared.evaluation.operating import Calibration, OperatingPoint
from chainward_shared.model_record import ModelRecord
from chainward_shared.models import Architecture, build_model, skeleton
from chainward_shared.models.taps import Taps, embedding_size
from chainward_shared.pixels import Pixels, scaling
from chainward_shared.preprocessing import resized, to_float
from chainward_shared.weights import check_state, load_file
from chainward_shared.words import first_line

WEIGHTS, SUMS = "model.safetensors", "SHA256SUMS"
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Outputs:
    """What a model gives of n images.

    Attributes
    ----------
    logits : float64 (n, classes)
    unfamiliarity : as of `Familiarity.distances`, (n,); None of a model that carries no such statistics
    """

    logits: np.ndarray
    unfamiliarity: np.ndarray | None = None


@dataclass(frozen=True)
class Predictor:
    """A model, and all that is needed to go from an image to its answer.

    Attributes
    ----------
    record : what the file says of the model
    sha256 : of the file
    outputs : of uint8 images (n, channels, size, size)
    network : the network itself, on the CPU; None of an ONNX file
    """

    record: ModelRecord
    sha256: str
    outputs: Callable[[torch.Tensor], Outputs]
    network: nn.Module | None


def open_model(place: Path, find_run: Callable[[str], Path], name: str | None = None) -> Predictor:
    """Return the model at a place.

    Parameters
    ----------
    place : a run folder (or a run's id), an exported folder, a .safetensors or an .onnx file
    find_run : returns the folder of a run's id
    name : "chain" or "student" of a run; None: the one that is exported by default

    Raises
    ------
    ChainwardError
        There is no model at that place, or it is damaged.
    """
    if place.is_file() or place.suffix in (".safetensors", ".onnx"):
        return _of_onnx(place) if place.suffix == ".onnx" else _of_weights(place)
    if (place / WEIGHTS).is_file():
        return _of_weights(place / WEIGHTS, _listed_digest(place))
    return _of_run(RunFolder.open(find_run(str(place))), name)


def _of_run(folder: RunFolder, name: str | None) -> Predictor:
    chosen = chosen_model(folder, name)  # type: ignore[arg-type]  # the command has checked the word
    if chosen not in folder.state.models:
        there = [other for other in ("chain", "student") if other in folder.state.models]
        advice = (
            f"it has the model of the {there[0]}: --model {there[0]}" if there else "wait for it: `chainward watch`"
        )
        raise ModelError(f"run {folder.state.run_id} ({folder.state.status}) has no model '{chosen}'; {advice}")
    sha256 = folder.state.models[chosen]
    _, metadata = load_file(folder.model_path(chosen), sha256)
    architecture = Architecture.from_metadata(metadata, folder.model_path(chosen))
    state = folder.load_model(chosen, skeleton(architecture).state_dict())
    record = ModelRecord.from_metadata(metadata)
    results = folder.load_results()
    if record is None and results is not None:
        record = model_record(folder.state.run_id, chosen, architecture, results.data, results.by_class.get(chosen))
    return _predictor(architecture, state, record or _old_record(metadata, architecture), sha256)


def _of_weights(path: Path, sha256: str | None = None) -> Predictor:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; name a run, an exported folder, a .safetensors or an .onnx file")
    state, metadata = load_file(path, sha256)
    architecture = Architecture.from_metadata(metadata, path)
    check_state(state, skeleton(architecture).state_dict())
    record = ModelRecord.from_metadata(metadata) or _old_record(metadata, architecture)
    return _predictor(architecture, state, record, sha256 or hashlib.sha256(path.read_bytes()).hexdigest())


def _predictor(
    architecture: Architecture, state: Mapping[str, torch.Tensor], record: ModelRecord, sha256: str
) -> Predictor:
    network = build_model(architecture, seed=0).eval()
    network.load_state_dict(dict(state))

    known = record.familiarity
    if known is not None and known.size != embedding_size(network):
        raise ModelError(
            f"the file's statistics are of embeddings of {known.size} numbers, not of this model's: damaged"
        )

    def outputs(images: torch.Tensor) -> Outputs:
        threads, logits, far = torch.get_num_threads(), [], []
        with nullcontext() if known is None else Taps(network, embedding=True) as taps:
            for part in passes(network, images, threads, architecture.image_size):
                logits.append(part.double().cpu())
                if known is not None and taps is not None:
                    far.append(known.distances(taps.embedding.cpu().numpy()))
        found = torch.cat(logits).nan_to_num(nan=0.0, posinf=_LARGEST, neginf=-_LARGEST).numpy()
        return Outputs(found, np.concatenate(far) if far else None)

    return Predictor(record, sha256, outputs, network)


def _of_onnx(path: Path) -> Predictor:
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(f"{path.name} needs onnxruntime, not installed: `pip install 'chainward[onnx]'`") from None
    try:
        contents = path.read_bytes()
        session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        given = session.get_inputs()[0].name
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror})") from error
    except Exception as error:  # onnxruntime has exceptions of its own for every status, without a common base
        raise ModelError(f"{path}: not an ONNX file that onnxruntime can run ({first_line(error)})") from error
    record = ModelRecord.from_metadata(metadata)
    if record is None:
        raise ModelError(f"{path}: says nothing of its classes and preprocessing; export it anew: `chainward export`")
    pixels = Pixels(
        mean=tuple(record.mean * (record.channels // len(record.mean))),
        std=tuple(record.std * (record.channels // len(record.std))),
    )

    names = [name for name in ("logits", "unfamiliarity") if name in {one.name for one in session.get_outputs()}]

    def outputs(images: torch.Tensor) -> Outputs:
        if given == "image":  # it takes one at a time, of any shape, and a square stays as it is
            batches = [image[None] for image in images]
        else:
            images = resized(images, record.network_size)
            batches = [images if given == "pixels" else to_float(images, pixels)]
        found = [session.run(names, {given: batch.numpy()}) for batch in batches]
        return Outputs(*(np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True)))

    return Predictor(record, hashlib.sha256(contents).hexdigest(), outputs, None)


def _listed_digest(folder: Path) -> str | None:
    """Return the SHA-256 that an export lists for its weights; None where there is no list."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / SUMS}: can't be read ({error}); export anew") from error
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return digests.get(WEIGHTS)


def _old_record(metadata: Mapping[str, str], architecture: Architecture) -> ModelRecord:
    """Return what can be said of a file that no record was written into."""
    try:
        classes = json.loads(metadata["chainward.classes"])
    except (KeyError, ValueError) as error:
        raise ModelError("the file's metadata name no classes: it was not written by a run of Chainward") from error
    why = "the model's file was written by a run that chose none"
    mean, std = scaling(architecture.pixels)
    return ModelRecord(
        run="unknown",
        model="unknown",
        task="multilabel" if metadata.get("chainward.task") == "multilabel" else "single",
        classes=classes,
        size=architecture.image_size,
        network_size=architecture.image_size,
        channels=architecture.in_chans,
        mean=mean if isinstance(mean, list) else [mean],
        std=std if isinstance(std, list) else [std],
        synthetic=False,
        calibration=Calibration(missing=why),
        points=[OperatingPoint(missing=why)] * len(classes),
    )
