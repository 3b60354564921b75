"""Images of more than 8 bits: one scale for a whole data set, whatever the format, and never one for each image."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from chainward_client.data.scale import MOST_IMAGES, PERCENTILES, Scale, ScaleOfSet, measure
from chainward_client.data.site_data import SiteData
from chainward_client.data.sources import local_site
from chainward_shared.errors import DataError

KEY = b"k" * 32
TISSUE = 1200
"""Stored value of the same tissue in every image."""


def detector(index: int) -> np.ndarray:
    """Return 12 x 12 pixels of a 14-bit detector; the brightest of odd images is below 4096, that of even ones above."""
    pixels = np.full((12, 12), TISSUE, np.uint16)
    pixels[:3] = 40
    pixels[3:5] = 4000 if index % 2 else 9000 + index
    return pixels


def site(folder: Path, kind: str, dicom: Any = None, *, count: int = 8, **image: Any) -> SiteData:
    """Return eight such images as a hospital has them in one of four formats."""
    folder.mkdir()
    block: dict[str, Any] = {"image": {"size": 12, "channels": 1, **image}}
    split = ["train"] * (count - 4) + ["val", "val", "test", "test"]
    if kind == "npz":
        arrays = {}
        for name in ("train", "val", "test"):
            chosen = [index for index in range(count) if split[index] == name]
            arrays[f"{name}_images"] = np.stack([detector(index) for index in chosen])
            arrays[f"{name}_labels"] = np.array([index % 2 for index in chosen])
        np.savez(folder / "set.npz", **arrays)
        block |= {"format": "npz", "images": "set.npz"}
    else:
        rows = ["image,dx,split,who"]
        for index in range(count):
            name = f"i{index}.{'dcm' if kind == 'dicom' else kind}"
            if kind == "dicom":
                (folder / name).write_bytes(dicom(detector(index), bits=14, PatientID=f"P{index}"))
            else:
                Image.fromarray(detector(index)).save(folder / name)
            rows.append(f"{name},{'ab'[index % 2]},{split[index]},p{index}")
        (folder / "cases.csv").write_text("\n".join(rows) + "\n")
        columns = {"image": "image", "label": "dx", "split": "split", "patient": "who"}
        block |= {"format": "dicom" if kind == "dicom" else "csv", "manifest": "cases.csv"}
        block |= {"classes": ["a", "b"], "columns": columns}
    (folder / "data.yaml").write_text(yaml.safe_dump(block))
    return local_site(folder / "data.yaml", "north", KEY)


def tissue(data: SiteData) -> set[int]:
    """Return what the tissue's value became, in all images."""
    return {int(value) for cases in data.splits.values() for value in cases.images[:, 0, 8, 6]}


@pytest.mark.parametrize("kind", ["png", "tif", "npz", "dicom"])
def test_the_same_tissue_is_as_bright_in_every_image_of_every_format(tmp_path: Path, dicom: Any, kind: str) -> None:
    data = site(tmp_path / "set", kind, dicom)
    assert len(tissue(data)) == 1
    assert data.scale is not None
    assert (data.scale.low, data.scale.images) == (40, 8)
    assert 4000 < data.scale.high <= 9007
    assert any(note == data.scale.note for note in data.notes)


def test_all_formats_have_the_same_rule(tmp_path: Path, dicom: Any) -> None:
    scales = [site(tmp_path / kind, kind, dicom).scale for kind in ("png", "tif", "npz", "dicom")]
    assert len({(scale.low, scale.high) for scale in scales if scale is not None}) == 1
    assert None not in scales


@pytest.mark.parametrize("kind", ["png", "tif", "npz", "dicom"])
def test_a_declared_scale_is_taken_and_nothing_is_measured(tmp_path: Path, dicom: Any, kind: str) -> None:
    data = site(tmp_path / "set", kind, dicom, scale=[0, 2400])
    assert tissue(data) == {128}
    assert data.scale is None
    assert not any("more than 8 bits: " in note for note in data.notes)


@pytest.mark.parametrize("scale", [[5, 5], [6, 5], [1], ["a", 2]])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, scale: list[Any]) -> None:
    with pytest.raises(DataError, match=r"image\.scale|image"):
        site(tmp_path / "set", "png", scale=scale)


def test_a_data_set_of_8_bits_needs_no_scale(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(3):
        Image.new("L", (8, 8), 50 * index).save(folder / f"i{index}.png")
    lines = ["image,dx,split", "i0.png,a,train", "i1.png,b,val", "i2.png,a,test"]
    (folder / "cases.csv").write_text("\n".join(lines))
    columns = {"image": "image", "label": "dx", "split": "split"}
    block = {"format": "csv", "manifest": "cases.csv", "classes": ["a", "b"], "columns": columns}
    (folder / "data.yaml").write_text(yaml.safe_dump({**block, "image": {"size": 8}}))
    assert local_site(folder / "data.yaml", "north", KEY).scale is None


def test_the_scale_is_the_percentiles_of_all_images_together_each_counting_alike() -> None:
    """Against all values of images of one size, put together."""
    generator = np.random.default_rng(0)
    images = [generator.normal(1000 * (index + 1), 200, (32, 32)) for index in range(5)]
    low, high = np.percentile(np.concatenate([image.ravel() for image in images]), PERCENTILES)
    scale = measure(len(images), images.__getitem__)
    assert abs(scale.low - low) < 1e-9
    assert abs(scale.high - high) < 1e-9
    larger = [np.repeat(np.repeat(image, 4, 0), 4, 1) if index == 4 else image for index, image in enumerate(images)]
    assert abs(measure(len(larger), larger.__getitem__).high - high) < 20


def test_what_needs_no_scale_plays_no_role_and_few_images_are_enough() -> None:
    asked: list[int] = []

    def values(index: int) -> np.ndarray | None:
        asked.append(index)
        return None if index % 2 else np.full((4, 4), index)

    scale = measure(4 * MOST_IMAGES, values)
    assert scale.images == MOST_IMAGES
    assert len(asked) < 3 * MOST_IMAGES
    assert not (scale.values % 2).any()
    assert (measure(3, values).low, measure(3, values).images) == (0.01 * 1, 2) or measure(3, values).images == 2


def test_the_same_images_give_the_same_scale_in_whatever_order_they_are_asked_for() -> None:
    images = np.random.default_rng(0).integers(0, 5000, (600, 6, 6))
    found = [measure(len(images), lambda index: images[index]) for _ in range(2)]
    assert (found[0].low, found[0].high) == (found[1].low, found[1].high)


@pytest.mark.parametrize("images", [[], [np.full((3, 3), 7)], [np.empty((0,))]])
def test_images_of_one_value_or_none_have_a_scale_that_can_be_used(images: list[np.ndarray]) -> None:
    scale = measure(len(images), images.__getitem__)
    assert scale.low < scale.high
    assert scale.eight_bits(np.array([[scale.low]])).tolist() == [[0]]


def test_several_threads_that_ask_for_it_measure_once() -> None:
    calls: list[int] = []

    def slowly() -> Scale:
        calls.append(1)
        return Scale(0, 10, 3)

    scale = ScaleOfSet(None, slowly)
    threads = [threading.Thread(target=scale) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert scale.measured == Scale(0, 10, 3)


def test_the_histogram_is_a_line_of_bars_between_the_smallest_and_the_largest() -> None:
    scale = measure(1, lambda _: np.array([[0] * 90 + [50] * 9 + [100]]))
    shown = scale.histogram(3)
    assert shown.startswith("0 |█")
    assert shown.endswith("| 100")
    assert shown[4] in "▁▂▃▄"
    assert Scale(0, 5).histogram() == ""
