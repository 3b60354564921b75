"""A model as an ONNX file that answers as PyTorch does; what it answers is compared before the file is used."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from chainward_shared.errors import ExportError
from chainward_shared.familiarity import Familiarity
from chainward_shared.models import Architecture
from chainward_shared.models.taps import Taps
from chainward_shared.preparation import Fit
from chainward_shared.preprocessing import scaled_for
from chainward_shared.task import Task
from chainward_shared.words import first_line

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

OnnxInput = Literal["pixels", "scaled", "image"]
"""What the graph is given. pixels: uint8, 0 to 255, squares as images are stored; the scaling is part of the graph. scaled:
float32, already scaled as the metadata say. image: one image of any shape, uint8; that it becomes a square is part of the graph,
too."""

BATCHES = (1, 3, 3, 8)
"""Batches on which ONNX and PyTorch are compared; the first of 3 is black, white and a ramp, the others are noise."""

TOLERANCE = 1e-4
"""Largest difference that is taken: of a logit relative to the largest logit of the batch (at least 1), and of a probability.
Both sides compute in float32 but add in another order; a wrong graph is off by far more."""

FAR_TOLERANCE = 1e-2
"""Largest relative difference of distances: squares of what is left when nearly all of an embedding is explained."""

MAX_BYTES = 2_000_000_000
"""A single ONNX file is one protobuf message, which can't be larger than 2 GiB."""

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class OnnxCheck:
    """How ONNX compares with PyTorch on the same images.

    Attributes
    ----------
    images : how many were compared, over all batches
    batches : sizes of the batches
    logits, probabilities : largest absolute difference
    opset : version of ONNX's operators in the file
    runtime : version of onnxruntime that answered
    """

    images: int
    batches: tuple[int, ...]
    logits: float
    probabilities: float
    opset: int
    runtime: str


class Answering(nn.Module):
    """A classifier from images (n, c, h, w) to what `answer_names` say.

    Logits and probabilities (n, classes), softmax or multi-label sigmoid, and where statistics of embeddings are known, how far
    each image is from the training images (n,), as `Familiarity.distances` has it.
    """

    mean: Tensor
    axes: Tensor
    along: Tensor
    beside: Tensor

    def __init__(self, model: nn.Module, task: Task, takes: OnnxInput, familiarity: Familiarity | None = None) -> None:
        super().__init__()
        self.model, self.task, self.takes = model, task, takes
        arrays = {} if familiarity is None else familiarity.arrays
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array).float())
        self.usual = None if familiarity is None else familiarity.usual

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the answers."""
        given = scaled_for(self.model, images) if self.takes == "pixels" else images
        if self.usual is None:
            return self._decided(self.model(given))
        with Taps(self.model, embedding=True) as taps:
            logits = self.model(given)
            away = taps.embedding - self.mean
        places = away @ self.axes.T
        left = away - places @ self.axes
        squared = places.square() @ (1 / self.along) + left.square() @ (1 / self.beside)
        return *self._decided(logits), squared / self.usual

    def _decided(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits, torch.sigmoid(logits) if self.task == "multilabel" else torch.softmax(logits, dim=1)


def answer_names(familiarity: Familiarity | None) -> list[str]:
    """Return what the outputs of a graph are called."""
    return ["logits", "probabilities"] + ([] if familiarity is None else ["unfamiliarity"])


def require_onnx() -> None:
    """Check that the packages of the extra "onnx" are there, without importing them.

    Raises
    ------
    ExportError
        One is missing.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"ONNX needs {', '.join(missing)}, not installed: `pip install 'chainward[onnx]'`, or export with --no-onnx"
        )


def onnx_bytes(
    model: nn.Module,
    architecture: Architecture,
    task: Task,
    metadata: Mapping[str, str],
    takes: OnnxInput = "pixels",
    square: tuple[int, Fit] | None = None,
    familiarity: Familiarity | None = None,
) -> tuple[bytes, OnnxCheck]:
    """Return the ONNX file of a model, and how its answers compare with the model's.

    One input, ``pixels`` or ``images`` as `takes` says, of shape (batch, channels, size, size), any batch size, or ``image``,
    (1, channels, height, width); two outputs, ``logits`` and ``probabilities``, of shape (batch, classes), and with `familiarity`
    a third, ``unfamiliarity``, (batch,). The file holds no file names or stack traces of this machine.

    Parameters
    ----------
    model : on the CPU, with its weights; its training mode is left as it is found
    metadata : written into the file as ``metadata_props``
    square : of an ``image``: the side of the square that it becomes first, and how
    familiarity : what is known of the embeddings of training images; None: nothing

    Raises
    ------
    ExportError
        The extra "onnx" is not installed, PyTorch can't export this backbone, it is too large for one file, or the answers
        differ by more than `TOLERANCE`.
    """
    require_onnx()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > MAX_BYTES:
        raise ExportError(
            f"{architecture.name}: {size / 1e9:.1f} GB of weights, an ONNX file holds 2 GB; use --no-onnx"
        )
    training = model.training
    model.eval()
    try:
        inner: OnnxInput = "pixels" if takes == "image" else takes
        answering = Answering(model, task, inner, familiarity).eval()
        proto = _traced(answering, architecture, answer_names(familiarity))
        check = compare(proto.SerializeToString(), answering, architecture, opset=_opset(proto))
        if takes == "image":
            assert square is not None
            proto = _with_square(proto, architecture, square)
        for key, value in metadata.items():
            proto.metadata_props.add(key=key, value=value)
        contents = proto.SerializeToString(deterministic=True)
    finally:
        model.train(training)
    return contents, check


def compare(contents: bytes, answering: Answering, architecture: Architecture, *, opset: int) -> OnnxCheck:
    """Return how an ONNX file's answers compare with the model's, on the batches of `BATCHES`.

    Raises
    ------
    ExportError
        They differ by more than `TOLERANCE`, or onnxruntime can't run the file.
    """
    import onnxruntime

    logits_off = probabilities_off = 0.0
    try:
        session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
        (name,) = (given.name for given in session.get_inputs())
        for pixels in check_images(architecture, BATCHES):
            given = pixels if answering.takes == "pixels" else scaled_for(answering.model, pixels)
            logits, probabilities, *far = (torch.from_numpy(out) for out in session.run(None, {name: given.numpy()}))
            with torch.no_grad():
                expected, likely, *expected_far = answering(given)
            if logits.shape != expected.shape or probabilities.shape != expected.shape:
                raise ExportError(
                    f"ONNX answers {tuple(logits.shape)} for {len(pixels)} images, PyTorch {tuple(expected.shape)}"
                )
            off = float((logits - expected).abs().max())
            apart = float((probabilities - likely).abs().max())
            allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
            if not (off <= allowed and apart <= TOLERANCE):  # so written, NaN fails
                raise ExportError(
                    f"ONNX contradicts PyTorch on a batch of {len(pixels)}: logits differ by up to {off:.2g} (at most "
                    f"{allowed:.2g}), probabilities by {apart:.2g} (at most {TOLERANCE:g}); nothing was exported"
                )
            for one, other in zip(far, expected_far, strict=True):
                if not torch.allclose(one, other, rtol=FAR_TOLERANCE, atol=FAR_TOLERANCE):
                    raise ExportError(
                        "ONNX contradicts PyTorch in how far images are from those of training; nothing was exported"
                    )
            logits_off, probabilities_off = max(logits_off, off), max(probabilities_off, apart)
    except ExportError:
        raise
    except Exception as error:  # onnxruntime has exceptions of its own for every status, without a common base
        raise ExportError(
            f"{architecture.name}: onnxruntime can't run the ONNX file ({first_line(error)}); use --no-onnx"
        ) from error
    return OnnxCheck(sum(BATCHES), BATCHES, logits_off, probabilities_off, opset, version("onnxruntime"))


def check_images(architecture: Architecture, batches: Sequence[int]) -> Iterator[Tensor]:
    """Yield uint8 batches (n, c, h, w): one of 3 first shows black, white and a ramp, all others are noise."""
    shape = (architecture.in_chans, architecture.image_size, architecture.image_size)
    generator = torch.Generator().manual_seed(0)
    extremes = True
    for batch in batches:
        images = torch.randint(0, 256, (batch, *shape), generator=generator, dtype=torch.uint8)
        if batch == 3 and extremes:
            extremes = False
            images[0], images[1] = 0, 255
            images[2] = torch.linspace(0, 255, shape[-1]).to(torch.uint8)
        yield images


def _traced(answering: Answering, architecture: Architecture, names: list[str]) -> ModelProto:
    import onnx

    example = next(check_images(architecture, [2]))
    whole = answering.takes == "pixels"
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                answering,
                (example if whole else scaled_for(answering.model, example),),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["pixels" if whole else "images"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
        proto: ModelProto = program.model_proto
        _forget_machine(proto.graph)
        for function in proto.functions:
            _clear(function)
            for node in function.node:
                _clear(node)
        proto.graph.name, proto.doc_string = "chainward", ""
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the exporter answers with whatever its passes raise
        raise ExportError(
            f"PyTorch {torch.__version__} can't export '{architecture.name}' to ONNX ({first_line(error)}); use --no-onnx"
        ) from error
    return proto


def _with_square(proto: ModelProto, architecture: Architecture, square: tuple[int, Fit]) -> ModelProto:
    import onnx

    from chainward_server.export.onnx_image import with_preparation

    size, fit = square
    channels, network_size = architecture.in_chans, architecture.image_size
    try:
        whole = with_preparation(proto, channels=channels, size=size, network_size=network_size, fit=fit)
        onnx.checker.check_model(whole, full_check=True)
    except Exception as error:  # onnx has several errors of its own
        raise ExportError(
            f"the graph can't be given whole images ({first_line(error)}); use --onnx-input pixels"
        ) from error
    return whole


def _forget_machine(graph: GraphProto) -> None:
    """Remove what the exporter notes for debugging: stack traces with the file names of this machine."""
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in values:
            _clear(value)
    _clear(graph)
    for node in graph.node:
        _clear(node)
        for attribute in node.attribute:
            for part in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                _forget_machine(part)


def _clear(part: Any) -> None:
    part.doc_string = ""
    del part.metadata_props[:]


def _opset(proto: ModelProto) -> int:
    return int(next(used.version for used in proto.opset_import if used.domain == ""))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from talking about its own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
