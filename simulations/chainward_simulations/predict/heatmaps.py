"""Where a model looks, over the image as it sees it: a PNG, or of a DICOM file a secondary capture.

The digest of the model and what it says stand below the picture and in the file's metadata: a picture travels without its table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from chainward_shared.errors import DataError, ModelError
from chainward_shared.evaluation.attention_maps import attention_maps, check_mappable
from chainward_shared.outside import visible
from chainward_shared.preprocessing import resized, scaled_for
from chainward_simulations.predict.answers import USE, Answer
from chainward_simulations.predict.dicom_headers import MANUFACTURER, header_of, require_highdicom
from chainward_simulations.predict.inputs import Batch, Problem
from chainward_simulations.predict.models import Predictor

if TYPE_CHECKING:
    from pydicom import Dataset

STRONGEST = 0.6
"""Opacity of the map where attention is strongest."""
SIDE, LETTERS, LINE = 512, 15, 20
"""Pixels: the least side of a picture, the size of the letters below it, and the height of a line of them."""


class HeatMaps:
    """Writes where a model looks, a file for each image.

    Attributes
    ----------
    problems : images of which none could be written, and why

    Raises
    ------
    DataError
        The model is an ONNX file, or of a kind whose attention can't be read.
    """

    def __init__(self, predictor: Predictor, folder: Path) -> None:
        if predictor.network is None:
            raise DataError(
                "--heatmap needs a model's weights; an ONNX file has answers only: name the export's folder"
            )
        try:
            check_mappable(predictor.network)
        except ModelError as error:
            raise DataError(f"--heatmap: {error}") from error
        self._network, self._predictor, self._folder, self._number = predictor.network, predictor, folder, 0
        self.problems: list[Problem] = []

    def write(self, batch: Batch, found: list[Answer], logits: np.ndarray) -> None:
        """Write those of a batch, each of the class with the largest logit."""
        size = self._predictor.record.network_size
        seen = scaled_for(self._network, resized(batch.images, size))
        classes = torch.from_numpy(logits.argmax(axis=1))
        side = max(SIDE, batch.images.shape[-1])
        maps = attention_maps(self._network, seen, classes=classes, size=(side, side)).nan_to_num(0.0, 0.0, 0.0)
        for i, answer in enumerate(found):
            self._number += 1
            name = self._predictor.record.classes[int(classes[i])]
            picture = captioned(overlay(batch.images[i], maps[i].numpy()), self._lines(answer, name))
            try:
                header = header_of(batch.files[i])
                self._save(picture, answer, header)
            except DataError as error:
                self.problems.append(Problem(answer.image, f"no heat map: {error}"))
            except Exception as error:  # headers that can't be taken over raise nearly anything, which may quote them
                reason = f"the header can't be taken over ({type(error).__name__})"
                self.problems.append(Problem(answer.image, f"no heat map: {reason}"))

    def _lines(self, answer: Answer, name: str) -> list[str]:
        best = max(answer.probabilities)
        lines = [f"bright: where the model looks for {visible(name)}, probability {best:.2f}"]
        lines += [f"don't use it: {answer.abstains}"] if answer.abstains else []
        return [*lines, f"model {self._predictor.sha256[:16]}; {USE}"]

    def _save(self, picture: Image.Image, answer: Answer, header: Dataset | None) -> None:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(answer.image).stem)[:60].strip("._") or "image"
        if header is not None:
            save_capture(
                picture, header, self._folder / f"{self._number:05d}.dcm", self._predictor.sha256, self._number
            )
            return
        words = PngImagePlugin.PngInfo()
        words.add_text("chainward:model", self._predictor.sha256)
        words.add_text("chainward:use", USE)
        picture.save(self._folder / f"{self._number:05d}-{stem}.png", pnginfo=words)


def overlay(image: torch.Tensor, map_: np.ndarray) -> Image.Image:
    """Return an image, uint8 (channels, h, w), at the size of a map, float (H, W) in [0, 1], with the map over it."""
    pixels = image.permute(1, 2, 0).numpy()
    shown = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    shown = shown.resize((map_.shape[1], map_.shape[0]), Image.Resampling.BILINEAR)
    colours = matplotlib.colormaps["inferno"](map_)[:, :, :3] * 255
    opacity = (STRONGEST * map_)[:, :, None]
    blended = np.asarray(shown) * (1 - opacity) + colours * opacity
    return Image.fromarray(np.rint(blended).astype(np.uint8))


def captioned(picture: Image.Image, lines: list[str]) -> Image.Image:
    """Return a picture with lines of text below it, those that are too wide broken at their words."""
    font = ImageFont.load_default(size=LETTERS)
    rows = [row for line in lines for row in _broken(line, font, picture.width - 8)]
    whole = Image.new("RGB", (picture.width, picture.height + LINE * len(rows) + 6))
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for number, row in enumerate(rows):
        draw.text((4, picture.height + 2 + LINE * number), row, fill=(240, 240, 240), font=font)
    return whole


def _broken(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Return a line as rows that are no wider than `width` pixels, but for single words that are."""
    rows: list[str] = []
    for word in line.split():
        longer = f"{rows[-1]} {word}" if rows else word
        if rows and font.getlength(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    return rows


def save_capture(picture: Image.Image, header: Dataset, path: Path, sha256: str, number: int) -> None:
    """Write a picture as a secondary capture of the study that a DICOM file belongs to."""
    require_highdicom()
    from highdicom import UID
    from highdicom.sc import SCImage

    capture = SCImage.from_ref_dataset(
        ref_dataset=header,
        pixel_array=np.asarray(picture),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        series_instance_uid=UID(),
        series_number=98,
        sop_instance_uid=UID(),
        instance_number=number,
        manufacturer=MANUFACTURER,
        patient_orientation=("L", "F"),
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        series_description=f"Chainward model {sha256[:8]}, {USE}",
    )
    capture.DerivationDescription = f"Where model {sha256} looks; {USE}"
    capture.save_as(path, enforce_file_format=True)
