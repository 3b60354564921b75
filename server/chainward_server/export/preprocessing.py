"""How images become what this model sees, and how its answers are written; needs Pillow, NumPy and PyTorch, not Chainward.

    import timm, preprocessing
    model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()
    logits = model(preprocessing.prepare("image.png")[None])

Everything that decides it is read from `config.json` beside this file.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional

FOLDER = Path(__file__).resolve().parent
RECORD: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())["chainward"]


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
    pixels = torch.from_numpy(array[None] if grey else array.transpose(2, 0, 1).copy())[None]
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
