"""Size and speed of a model on this machine."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from chainward_server.results import ModelSummary
from chainward_shared.models import Architecture, build_model, count_parameters
from chainward_shared.weights import StateDict

WARM_UP, REPEATS = 3, 21
_SIZES = (
    "dims",
    "depths",
    "embed_dim",
    "depth",
    "num_heads",
    "patch_size",
    "stem_chs",
    "channels",
    "layers",
    "norm_layer",
)


def summarize_model(architecture: Architecture, state: StateDict, path: Path) -> ModelSummary:
    """Return parameters, file size, and the median latency of one image on one CPU thread, in milliseconds."""
    model = build_model(architecture, seed=0).eval()
    model.load_state_dict(state)
    image = torch.zeros(1, architecture.in_chans, architecture.image_size, architecture.image_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            seconds = [_timed_call(model, image) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    finally:
        torch.set_num_threads(threads)
    return ModelSummary(
        architecture=described(architecture),
        parameters=count_parameters(model),
        file_bytes=path.stat().st_size,
        latency_ms=1000 * statistics.median(seconds),
    )


def described(architecture: Architecture) -> str:
    """Return the timm name, the sizes that differ from it and the images, e.g.
    ``"convnext_atto, dims 24-40-80-160, 64 px"``."""
    words = [architecture.name]
    for name, value in architecture.options.items():
        if name in _SIZES:
            words.append(f"{name} {'-'.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    return ", ".join([*words, f"{architecture.image_size} px"])


def _timed_call(model: torch.nn.Module, image: torch.Tensor) -> float:
    started = time.perf_counter()
    model(image)
    return time.perf_counter() - started
