"""This folder's model, how images become what it sees, and how its answers are written.

    import preprocessing
    model = preprocessing.network()
    logits = model(preprocessing.prepare("image.png")[None])

It needs timm, safetensors, Pillow, NumPy and PyTorch, not Chainward. Everything that decides it is read from `config.json` and
`model.safetensors` beside this file.
"""

from __future__ import annotations

import csv
import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional

FOLDER = Path(__file__).resolve().parent
RECORD: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())["chainward"]


def network() -> torch.nn.Module:
    """Return the model with its weights, in evaluation mode: by timm's name, or of a size that timm has no name for."""
    import timm
    from safetensors import safe_open

    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        built, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    place = built.get("timm.function", "timm:create_model").replace(":", ".").split(".")
    if place[0] != "timm":
        raise ValueError(f"model.safetensors names a function outside timm ({place[0]}): not a file of Chainward")
    make: Any = reduce(getattr, place[1:], timm)
    named = [built["timm.model"]] if "timm.model" in built else []
    model: torch.nn.Module = make(*named, **json.loads(built["timm.kwargs"]))
    model.load_state_dict(weights)
    return model.eval()


def prepare(image: str | Path | Image.Image, fit: str | None = None) -> torch.Tensor:
    """Return an image as the model sees it, float32 (channels, size, size).

    Parameters
    ----------
    image : a file, or an image of 8 bits
    fit : "pad", "crop" or "stretch"; default: that of the sites that trained the model
    """
    opened = image if isinstance(image, Image.Image) else Image.open(image)
    if opened.mode == "F" or opened.mode.startswith("I"):
        raise ValueError("grey of more than 8 bits: bring it to 8 bits as the sites did, or use `chainward predict`")
    upright = ImageOps.exif_transpose(opened)
    if upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    grey = RECORD["channels"] == 1
    if upright.mode == "P":
        upright = upright.convert("RGB")
    array = np.asarray(square(upright.convert("L" if grey else "RGB"), RECORD["size"], fit or _fit()))
    pixels = torch.from_numpy(np.array(array[None] if grey else array.transpose(2, 0, 1)))[None]
    size = RECORD["network_size"]
    if size != RECORD["size"]:
        larger = functional.interpolate(
            pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        pixels = larger.round().clamp(0, 255)
    mean, std = (torch.tensor(RECORD[name])[:, None, None] for name in ("mean", "std"))
    return (pixels[0].float() / 255 - mean) / std


def square(image: Image.Image, size: int, fit: str) -> Image.Image:
    """Return an image as a square of `size` pixels."""
    width, height = image.size
    if fit == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    scale = size / max(width, height)
    new = max(1, round(width * scale)), max(1, round(height * scale))
    whole = Image.new(image.mode, (size, size))
    whole.paste(image.resize(new, Image.Resampling.BICUBIC), ((size - new[0]) // 2, (size - new[1]) // 2))
    return whole


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of logits (n, classes)."""
    return logits.sigmoid() if RECORD["task"] == "multilabel" else logits.softmax(dim=1)


def write_answers(network: torch.nn.Module, batches: Any, path: str | Path) -> None:
    """Write a CSV file with a row for each image of `batches`, which have "name" and "image"."""
    network.eval()
    with Path(path).open("w", newline="") as file, torch.inference_mode():
        writer = csv.writer(file)
        writer.writerow(["image", *(f"probability:{name}" for name in RECORD["classes"])])
        for batch in batches:
            for name, row in zip(batch["name"], probabilities(network(torch.as_tensor(batch["image"]))), strict=True):
                writer.writerow([name, *(f"{value:.6f}" for value in row.tolist())])


def _fit() -> str:
    found = {one["fit"] for one in RECORD["preparations"].values()}
    if len(found) != 1:
        raise ValueError("the sites that trained the model made images square in different ways: say fit=")
    return str(found.pop())
