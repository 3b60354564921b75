"""Weights on the wire and at rest: state dicts to Flower arrays and safetensors files and back, checked on arrival."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from chainward_shared.errors import WeightsError, nearest
from chainward_shared.files import write_atomically
from chainward_shared.settings import Transfer
from chainward_shared.words import first_line

StateDict = dict[str, Tensor]
Template = Mapping[str, Tensor]

HALF_PRECISION = 2.0**-11
"""Largest relative error of float16, from its smallest normal number, 2^-14, on: it has 11 significant bits."""

BESIDE_THE_LARGEST = 2.0**-8
"""Rows and scales that are smaller than this fraction of the largest may be off by as much as one of this size."""

HALVED = "halved"
"""Name of the array that says which tensors travel as float16."""

HEADER_BYTES = 1024
"""Allowed for the header that precedes an array's values; numpy writes 128 bytes."""


def rounded(state: Mapping[str, Tensor], transfer: Transfer = "half") -> StateDict:
    """Return `state` as it is after it has travelled: who makes a model stores, scores and sends this, not the original.

    "half": float32 tensors are rounded to float16, and stay float32 here, unless a value would be off by more than 2^-11

    * of the largest of its row, or of 1/256 of the largest of all, in matrices and filters: a row is what is summed into one
      output channel. Pretrained networks have channels that training has switched off, whose values are too small for
      float16; what they are off by, 2^-25 at most beside values of 2^-6 and more, no batch norm makes visible;
    * of the largest, in biases and running means, which are added to sums;
    * of itself or of 1/256 of the largest, in other vectors (norms, layer scales), each of which scales its own channel;
    * of itself, in variances (`running_var`), each of which divides its own channel.

    Such a tensor (too small or too large for float16 somewhere, or not finite) is left as it is, as are all that are not
    float32. Rounding what was rounded changes nothing. "full": nothing is rounded.
    """
    if transfer == "full":
        return dict(state)
    return {name: _rounded(name, tensor.detach()) for name, tensor in state.items()}


def _rounded(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or not tensor.numel():
        return tensor
    nearest_half = tensor.half().float()
    size = tensor.abs()
    if name.endswith("running_var"):
        matters = size
    elif tensor.ndim < 2 and name.endswith(("bias", "running_mean")):
        matters = size.max()
    else:
        own = size if tensor.ndim < 2 else size.flatten(1).amax(1).view(-1, *[1] * (tensor.ndim - 1))
        matters = own.clamp(min=float(size.max()) * BESIDE_THE_LARGEST)
    safe = (nearest_half - tensor).abs() <= matters * HALF_PRECISION
    return nearest_half if bool(safe.all()) else tensor


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return `state` as Flower arrays, one per dtype, of which `from_arrays` makes the same tensors bit for bit.

    A float32 tensor of which float16 holds every value, as `rounded` leaves most, goes as float16: half the bytes. Array
    `float16`, say, has the values of all tensors that go as such, in the order of their names; `halved`, uint8, has a 1 for each
    float32 tensor that does. To Flower each array is two objects, and each object costs a request and a handful of database
    queries on its way in and on its way out: with an array per tensor that was most of the time of a message.
    """
    halved = np.zeros(len(state), np.uint8)
    values: dict[str, list[np.ndarray]] = {}
    for place, name in enumerate(sorted(state)):
        tensor = state[name].detach().cpu()
        sent = shortest(tensor)
        halved[place] = sent.dtype != tensor.dtype
        values.setdefault(_dtype(sent), []).append(sent.numpy().reshape(-1))
    return ArrayRecord(
        {HALVED: Array(halved)} | {dtype: Array(np.concatenate(parts)) for dtype, parts in sorted(values.items())}
    )


def shortest(tensor: Tensor) -> Tensor:
    """Return a float32 tensor of which float16 holds every value as such, any other as it is."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.float32:
        half = tensor.half()
        if torch.equal(half.float(), tensor):
            return half
    return tensor


def from_arrays(arrays: ArrayRecord, template: Template) -> StateDict:
    """Return the state dict that `to_arrays` packed, after checking it against `template`, in its order and dtypes.

    Parameters
    ----------
    template : a state dict with the names, shapes and dtypes that are expected; its values don't matter

    Raises
    ------
    WeightsError
        An array is missing or unexpected, has more or fewer values than the model's tensors or another dtype, bytes are too
        many, missing or damaged, a value isn't finite. What has too many arrays or bytes is refused before it is read.
    """
    sent = as_sent(arrays, template)
    state = {name: torch.from_numpy(sent[name]).to(expected.dtype) for name, expected in template.items()}
    check_state(state, template)
    return state


def as_sent(arrays: ArrayRecord, template: Template) -> dict[str, np.ndarray]:
    """Return the tensors of `to_arrays` in the dtypes in which they travelled, by name, checked but for their values.

    Raises
    ------
    WeightsError
        As `from_arrays`.
    """
    names = sorted(template)
    most = 2 + len({tensor.dtype for tensor in template.values()})
    if len(arrays) > most:
        raise WeightsError(f"{len(arrays)} arrays arrived; expected at most {most}, for the tensors of the model")
    halved = _halved(arrays, template, names)
    dtypes = ["float16" if half else _dtype(template[name]) for name, half in zip(names, halved, strict=True)]
    sizes: dict[str, int] = {}
    for name, dtype in zip(names, dtypes, strict=True):
        sizes[dtype] = sizes.get(dtype, 0) + template[name].numel()
    _check_names(set(arrays), {HALVED, *sizes})
    for dtype, size in sizes.items():
        _check_size(dtype, arrays[dtype], np.dtype(dtype), (size,))
    flat = {dtype: _flat(dtype, arrays[dtype], np.dtype(dtype), size) for dtype, size in sizes.items()}
    sent, begins = {}, dict.fromkeys(sizes, 0)
    for name, dtype in zip(names, dtypes, strict=True):
        shape, begin = tuple(template[name].shape), begins[dtype]
        begins[dtype] = end = begin + template[name].numel()
        sent[name] = flat[dtype][begin:end].reshape(shape).copy()
    return sent


def _halved(arrays: ArrayRecord, template: Template, names: Sequence[str]) -> np.ndarray:
    """Return which of the tensors `names` travelled as float16: (n,), 0 or 1."""
    if HALVED not in arrays:
        raise WeightsError(f"array '{HALVED}' is missing; expected one array per dtype and '{HALVED}'")
    _check_size(HALVED, arrays[HALVED], np.dtype(np.uint8), (len(names),))
    halved = _flat(HALVED, arrays[HALVED], np.dtype(np.uint8), len(names))
    for name, half in zip(names, halved, strict=True):
        if half not in (0, 1):
            raise WeightsError(f"array '{HALVED}': {half}; expected 0 or 1 for each of the {len(names)} tensors")
        if half and template[name].dtype != torch.float32:
            raise WeightsError(f"array '{HALVED}': '{name}' as float16; expected {_dtype(template[name])}")
    return halved


def _flat(name: str, array: Array, dtype: np.dtype, size: int) -> np.ndarray:
    values = _values(name, array)
    if (values.dtype, values.shape) != (dtype, (size,)):
        raise WeightsError(
            f"array '{name}': {values.dtype} {values.shape}; expected {dtype} ({size},), all such values of the model"
        )
    return values


def from_full_arrays(arrays: ArrayRecord, template: Template) -> StateDict:
    """Return the state dict in arrays that are one per tensor, checked against `template`, in its order.

    Raises
    ------
    WeightsError
        A name is missing or unexpected, a shape or dtype differs, bytes are too many, missing or damaged, a value isn't
        finite. What has too many arrays or bytes is refused before any of it is read.
    """
    if len(arrays) > 2 * len(template):
        raise WeightsError(f"{len(arrays)} arrays arrived; expected the {len(template)} of the model")
    _check_names(set(arrays), set(template))
    for name, expected in template.items():
        _check_size(name, arrays[name], np.dtype(_dtype(expected)), tuple(expected.shape))
    state = {name: _to_tensor(name, arrays[name]) for name in template}
    check_state(state, template)
    return state


def _check_size(name: str, array: Array, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    largest = math.prod(shape) * dtype.itemsize + HEADER_BYTES
    if len(array.data) > largest:
        raise WeightsError(f"array '{name}': {len(array.data)} bytes; expected at most {largest}, for {dtype} {shape}")


def _to_tensor(name: str, array: Array) -> Tensor:
    values = _values(name, array)
    try:
        return torch.from_numpy(np.array(values, order="C"))
    except TypeError as error:
        raise WeightsError(f"array '{name}': dtype {values.dtype} is not one of a model") from error


def _values(name: str, array: Array) -> np.ndarray:
    if array.stype != "numpy.ndarray":
        raise WeightsError(f"array '{name}': serialised as {_short(repr(array.stype))}; expected 'numpy.ndarray'")
    try:
        values = array.numpy()  # np.load without pickle
    except Exception as error:
        raise WeightsError(f"array '{name}': its bytes can't be read ({first_line(error)}); sent again?") from error
    if not isinstance(values, np.ndarray):  # np.load also opens archives
        raise WeightsError(f"array '{name}': its bytes are an archive of arrays; expected one array")
    if tuple(array.shape) != values.shape or array.dtype != str(values.dtype):
        raise WeightsError(
            f"array '{name}': announced as {_short(f'{array.dtype} {tuple(array.shape)}')}, "
            f"holds {values.dtype} {values.shape}"
        )
    return values


def check_state(state: Mapping[str, Tensor], template: Template) -> None:
    """Check names, shapes, dtypes and finiteness of `state` against `template`.

    Raises
    ------
    WeightsError
        One line that names the first offending array and how many there are.
    """
    _check_names(set(state), set(template))
    problems = []
    for name, expected in template.items():
        tensor = state[name]
        if tensor.shape != expected.shape:
            problems.append(f"array '{name}': shape {tuple(tensor.shape)}; expected {tuple(expected.shape)}")
        elif tensor.dtype != expected.dtype:
            problems.append(f"array '{name}': {_dtype(tensor)}; expected {_dtype(expected)}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            problems.append(f"array '{name}': {bad} of {tensor.numel()} values are NaN or infinite")
    if problems:
        raise WeightsError(problems[0] + (f" (and {len(problems) - 1} more arrays)" if len(problems) > 1 else ""))


def _check_names(found: set[str], expected: set[str]) -> None:
    if extra := sorted(found - expected):
        raise WeightsError(
            f"{len(extra)} unexpected array(s), first '{_short(extra[0])}'{nearest(extra[0][:200], expected)}; "
            f"expected the {len(expected)} of the model"
        )
    if missing := sorted(expected - found):
        raise WeightsError(f"{len(missing)} of {len(expected)} arrays are missing, first '{missing[0]}'")


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of `state`, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}|{_dtype(tensor)}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def byte_count(arrays: ArrayRecord) -> int:
    """Return how many bytes the arrays take on the wire, without Flower's envelope."""
    return sum(len(array.data) for array in arrays.values())


def save_file(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> str:
    """Write `state` to a safetensors file, whole or not at all, and return the SHA-256 of the file.

    Raises
    ------
    OSError
        The disk is full or can't be written; nothing is left behind.
    """
    contents = safetensors_bytes({name: t.detach().cpu().contiguous() for name, t in state.items()}, dict(metadata))
    write_atomically(path, contents)
    return hashlib.sha256(contents).hexdigest()


def load_file(path: Path, expected_sha256: str | None = None) -> tuple[StateDict, dict[str, str]]:
    """Return the state dict and the metadata of a safetensors file.

    Raises
    ------
    WeightsError
        The file is missing, damaged, or not the one with `expected_sha256`.
    """
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from error
    if expected_sha256 and hashlib.sha256(contents).hexdigest() != expected_sha256:
        raise WeightsError(f"{path}: its SHA-256 is not the one recorded when it was written; the file is damaged")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _short(text: str) -> str:
    """Return words that came over the wire as part of a line."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:197]}..."


def weighted_average(states: Sequence[StateDict], weights: Sequence[float]) -> StateDict:
    """Return the average of state dicts, summed in the order given, in the tensors' own precision.

    Parameters
    ----------
    states : state dicts of one architecture, at least one
    weights : one number above 0 for each; only their ratios count

    Integer buffers (how many batches a batch norm has seen) are those of the first.
    """
    total = sum(weights)
    average = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            average[name] = first.clone()
            continue
        average[name] = first * (weights[0] / total)
        for state, weight in zip(states[1:], weights[1:], strict=True):
            average[name] += state[name] * (weight / total)
    return average
