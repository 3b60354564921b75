"""Reading a file of weights that came from elsewhere: safetensors, or PyTorch's own format as far as it holds nothing but
tensors. This is the only place that calls `torch.load`, and never without ``weights_only=True``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chainward_shared.errors import WeightsError
from chainward_shared.words import first_line, listed

SAFETENSORS = ".safetensors"
PYTORCH = (".pth", ".pt", ".bin")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training scripts put the weights inside a file of PyTorch, the better ones first, as timm looks for them."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 3


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises
    ------
    WeightsError
        It can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, in the file's own precision.

    Raises
    ------
    WeightsError
        One line: another format, a file that is cut off or damaged, one that needs more than tensors to be unpickled, a
        tensor that holds no plain numbers, or a number that is not finite.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    if suffix == SAFETENSORS:
        weights = _read_safetensors(path)
    elif suffix in PYTORCH:
        weights = _read_pytorch(path)
    else:
        raise WeightsError(
            f"{path}: weights come as {SAFETENSORS} or, converted once, as {', '.join(PYTORCH)}; found '{suffix or 'no suffix'}'"
        )
    if not weights:
        raise WeightsError(f"{path}: holds no tensors")
    _check_numbers(weights, path)
    return weights


def _check_numbers(weights: Mapping[str, Tensor], where: Path) -> None:
    """Check that all tensors hold plain, finite numbers."""
    odd = [f"'{name}' ({_dtype(t)})" for name, t in weights.items() if t.dtype not in (*_FLOATS, torch.int64)]
    if odd:
        raise WeightsError(
            f"{where}: {listed(odd, _SHOWN)}; expected float32, or half precision, which is read as float32"
        )
    bad = [
        f"'{name}' ({int((~t.isfinite()).sum())} of {t.numel()} values)"
        for name, t in weights.items()
        if t.dtype in _FLOATS and not bool(t.isfinite().all())
    ]
    if bad:
        raise WeightsError(f"{where}: NaN or infinite in {listed(bad, _SHOWN)}; get the file anew")


def precision_of(weights: Mapping[str, Tensor]) -> str:
    """Return the precision of the floating-point tensors, e.g. ``"float16"``, or several with a comma."""
    return ", ".join(sorted({_dtype(tensor) for tensor in weights.values() if tensor.is_floating_point()}))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: not a whole safetensors file ({first_line(error)[:200]}); was it cut off? Compare its size and SHA-256 "
            "with the source"
        ) from error


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch answers a damaged archive with whatever its readers raise
        if type(error).__name__ == "UnpicklingError":
            raise WeightsError(
                f"{path}: needs more than tensors to be unpickled, which could run any program; refused. Get it as safetensors"
            ) from error
        raise WeightsError(
            f"{path}: not a whole file of PyTorch's ({first_line(error)[:200]}); was it cut off?"
        ) from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds one {type(content).__name__}; expected tensors by name")
    others = [
        f"'{str(name)[:80]}' ({type(value).__name__})"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided)
    ]
    if others:
        raise WeightsError(f"{path}: beside tensors there is {listed(others, _SHOWN)}; expected tensors by name")
    return {name: tensor.detach().contiguous() for name, tensor in content.items()}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
