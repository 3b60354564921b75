"""A deployed site decodes its images once: the store gives what a direct decode gives, and only what changed is decoded again."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import chainward_client.data.decoded_store as decoded_store
import chainward_client.data.decoding as decoding
import chainward_client.data.images as images_module
from chainward_client.data import dicom_headers
from chainward_client.data.decoded_store import INDEX, DecodedStore
from chainward_client.data.decoding import IMAGES, JOURNAL
from chainward_client.data.description import load_description
from chainward_client.data.site_data import SPLITS, SiteData
from chainward_client.data.sources import local_site
from chainward_client.site import open_site
from chainward_shared.errors import DataError

KEY = b"k" * 32
ROWS = [
    f"i{index},{'ab'[index % 2]},p{index},{('train', 'train', 'val', 'test')[index % 4]},words of {index},{index / 7},"
    f"{f'm{index}' if index % 3 else ''}"
    for index in range(12)
]


def picture(path: Path, value: int, mode: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, np.iinfo(mode).max, (9, 7), dtype=mode)
    Image.fromarray(pixels).save(path)


def described(folder: Path, **block: Any) -> Path:
    (folder / "data.yaml").write_text(yaml.safe_dump({"image": {"size": 8, "channels": 1}, **block}))
    return folder / "data.yaml"


def csv(folder: Path, mode: type = np.uint8, **changes: Any) -> Path:
    """Twelve images with masks, reports and a table, in a folder."""
    (folder / "cases.csv").write_text("\n".join(["image,dx,who,split,report,age,mask", *ROWS]) + "\n")
    for index in range(12):
        picture(folder / f"pictures/i{index}.png", index, mode)
        picture(folder / f"masks/m{index}.png", 100 + index)
    columns = {"image": "image", "label": "dx", "patient": "who", "split": "split", "text": "report", "mask": "mask"}
    block = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": "pictures",
        "masks": "masks",
        "classes": ["a", "b"],
        "columns": {**columns, "tabular": {"age": {"kind": "number", "min": 0, "max": 100}}},
    }
    return described(folder, **block | changes)


def zipped(folder: Path) -> Path:
    path = csv(folder, images="set.zip")
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for file in sorted((folder / "pictures").iterdir()):
            archive.write(file, file.name)
    return path


def boxes(folder: Path) -> Path:
    path = csv(folder)
    rows = [
        f"i{index},{'ab'[index % 2]},{'train' if index else 'test'},{index % 3},0,5,{4 + index % 4}"
        for index in range(12)
    ]
    (folder / "cases.csv").write_text("\n".join(["image,dx,split,x0,y0,x1,y1", *rows]) + "\n")
    block = yaml.safe_load(path.read_text())
    del block["masks"]
    block["columns"] = {"image": "image", "label": "dx", "split": "split", "box": ["x0", "y0", "x1", "y1"]}
    return described(folder, **block)


def left_out(folder: Path) -> Path:
    path = csv(folder, unusable="leave-out")
    (folder / "pictures/i1.png").write_bytes(b"no picture")
    (folder / "pictures/i3.png").unlink()
    (folder / "masks/m5.png").write_bytes(b"")
    return path


def folders(folder: Path) -> Path:
    for index in range(16):
        picture(folder / f"pictures/{'ab'[index % 2]}/{index}.png", index)
    return described(folder, format="folders", images="pictures")


def npz(folder: Path, multilabel: bool = False) -> Path:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{name}_images"] = rng.integers(0, 60_000, (count, 8, 9), dtype=np.uint16)
        labels = rng.integers(0, 2, (count, 3)) if multilabel else np.arange(count)[:, None] % 2
        arrays[f"{name}_labels"] = labels.astype(np.uint8)
    np.savez(folder / "set.npz", **arrays)
    return described(folder, format="npz", images="set.npz", **({"task": "multilabel"} if multilabel else {}))


SETS: dict[str, Callable[[Path], Path]] = {
    "csv folder": csv,
    "csv folder of 16 bits": lambda folder: csv(folder, np.uint16),
    "csv with colour": lambda folder: csv(folder, image={"size": 12, "channels": 3, "fit": "crop"}),
    "zip": zipped,
    "boxes": boxes,
    "leave-out": left_out,
    "folders": folders,
    "npz": npz,
    "npz of findings": lambda folder: npz(folder, multilabel=True),
}


def store(folder: Path) -> DecodedStore:
    return DecodedStore(folder / "state", "north", KEY)


def direct_decode(path: Path) -> SiteData:
    return local_site(load_description(path), "north", KEY)


def assert_same(one: SiteData, other: SiteData) -> None:
    """All that a site's data hold is the same, pixel for pixel."""
    for name in ("site", "classes", "task", "notes", "privileged", "has_patient_ids", "left_out", "key", "preparation"):
        assert getattr(one, name) == getattr(other, name), name
    assert (one.scale is None) == (other.scale is None)
    if one.scale is not None and other.scale is not None:
        assert (one.scale.low, one.scale.high, one.scale.images) == (
            other.scale.low,
            other.scale.high,
            other.scale.images,
        )
        assert np.array_equal(one.scale.values, other.scale.values)  # type: ignore[arg-type]
    for split in SPLITS:
        a, b = one.splits[split], other.splits[split]
        assert torch.equal(a.images, b.images) and a.images.dtype == b.images.dtype == torch.uint8
        assert torch.equal(a.labels, b.labels) and a.labels.dtype == b.labels.dtype
        assert a.patients.tolist() == b.patients.tolist()
        assert (a.privileged.texts, a.privileged.table) == (b.privileged.texts, b.privileged.table)
        assert (a.privileged.masks is None) == (b.privileged.masks is None)
        if a.privileged.masks is not None and b.privileged.masks is not None:
            assert torch.equal(a.privileged.masks, b.privileged.masks)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an entry for every image file that is decoded."""
    counted: list[int] = []
    decode = images_module.fit_image
    monkeypatch.setattr(images_module, "fit_image", lambda *a, **k: counted.append(1) or decode(*a, **k))
    return counted


@pytest.mark.parametrize("name", SETS)
def test_the_store_gives_what_a_direct_decode_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_BLOCK_ROWS", 5)
    path = SETS[name](tmp_path)
    direct = direct_decode(path)
    assert_same(store(tmp_path).open(path), direct)
    monkeypatch.setattr(decoded_store, "local_site", None)  # the second time nothing is read anew
    assert_same(store(tmp_path).open(path), direct)


@pytest.mark.parametrize("first", ["images", "masks", "boxes"])
def test_data_that_a_direct_decode_refuses_are_refused_in_the_same_words(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_BLOCK_ROWS", 2)
    if first == "boxes":
        path = boxes(tmp_path)
        table = tmp_path / "cases.csv"
        table.write_text(table.read_text().replace(",0,5,", ",0,50,"))
    else:
        path = left_out(tmp_path)
        path.write_text(path.read_text().replace("leave-out", "refuse"))
        if first == "masks":
            for name in ("pictures/i1.png", "pictures/i3.png"):
                picture(tmp_path / name, 1)
            (tmp_path / "masks/m8.png").unlink()
    with pytest.raises(DataError) as direct:
        direct_decode(path)
    with pytest.raises(DataError) as caught:
        store(tmp_path).open(path)
    assert str(caught.value) == str(direct.value)
    assert not list((tmp_path / "state/images").glob(f"*/{IMAGES}"))


def test_only_new_and_changed_files_are_decoded(tmp_path: Path, decoded: list[int]) -> None:
    path = csv(tmp_path)
    store(tmp_path).open(path)
    assert len(decoded) == 12
    picture(tmp_path / "pictures/i4.png", 77)
    picture(tmp_path / "masks/m7.png", 78)
    picture(tmp_path / "pictures/new.png", 79)
    with (tmp_path / "cases.csv").open("a") as file:
        file.write("new,a,p99,train,words,3,\n")
    decoded.clear()
    again = store(tmp_path).open(path)
    assert len(decoded) == 3
    assert_same(again, direct_decode(path))
    assert len(list((tmp_path / "state/images").glob(f"*/{INDEX}"))) == 1


def test_a_repacked_zip_of_the_same_images_is_not_decoded_again(tmp_path: Path, decoded: list[int]) -> None:
    path = zipped(tmp_path)
    store(tmp_path).open(path)
    with zipfile.ZipFile(tmp_path / "set.zip", "a") as archive:
        archive.writestr("readme.txt", "hello")
    decoded.clear()
    assert_same(store(tmp_path).open(path), decoded_uncounted(path, decoded))
    assert not decoded


def decoded_uncounted(path: Path, decoded: list[int]) -> SiteData:
    before = len(decoded)
    direct = direct_decode(path)
    del decoded[before:]
    return direct


def test_another_scale_of_grey_decodes_deep_images_again(tmp_path: Path, decoded: list[int]) -> None:
    path = csv(tmp_path, np.uint16)
    store(tmp_path).open(path)
    dark = np.zeros((9, 7), dtype=np.uint16)
    for index in range(6):
        Image.fromarray(dark + index).save(tmp_path / f"pictures/i{index}.png")
    decoded.clear()
    again = store(tmp_path).open(path)
    assert len(decoded) == 12
    assert_same(again, direct_decode(path))


def test_a_set_without_deep_images_any_more_has_no_scale(tmp_path: Path) -> None:
    path = csv(tmp_path, np.uint16)
    store(tmp_path).open(path)
    csv(tmp_path)
    again = store(tmp_path).open(path)
    assert again.scale is None
    assert_same(again, direct_decode(path))


def test_a_manifest_that_changes_while_its_images_are_decoded_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = csv(tmp_path)
    run = decoding.Decoding.run

    def changed_meanwhile(self: decoding.Decoding) -> Any:
        (tmp_path / "cases.csv").write_text((tmp_path / "cases.csv").read_text().replace("i1,b", "i1,a"))
        return run(self)

    with monkeypatch.context() as patch:
        patch.setattr(decoding.Decoding, "run", changed_meanwhile)
        store(tmp_path).open(path)
    assert_same(store(tmp_path).open(path), direct_decode(path))


@pytest.mark.parametrize("setting", [{"size": 16}, {"fit": "stretch"}, {"channels": 3}])
def test_other_image_settings_are_another_store(setting: dict[str, Any], tmp_path: Path) -> None:
    store(tmp_path).open(csv(tmp_path))
    path = csv(tmp_path, image={"size": 8, "channels": 1} | setting)
    assert_same(store(tmp_path).open(path), direct_decode(path))


class Killed(BaseException):
    pass


def test_a_killed_decode_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]) -> None:
    monkeypatch.setattr(decoding, "_BLOCK_ROWS", 4)
    path = csv(tmp_path)
    write = decoding.RowWriter.write
    calls: list[int] = []

    def killed_in_the_third(self: Any, rows: Any, scale: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        write(self, rows, scale)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(decoding.RowWriter, "write", killed_in_the_third)
        store(tmp_path).open(path)
    decoded.clear()
    again = store(tmp_path).open(path)
    assert len(decoded) == 4
    assert_same(again, direct_decode(path))


def kept(folder: Path, name: str) -> Path:
    (found,) = (folder / "state/images").glob(f"*/{name}")
    return found


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *((name, harm) for name in (IMAGES, JOURNAL, INDEX) for harm in ("flipped", "cut", "emptied", "gone")),
        (IMAGES, "flipped, with its old time"),
        (INDEX, "flipped, with its old time"),
    ],
)
def test_a_damaged_store_is_noticed_and_made_anew(name: str, harm: str, tmp_path: Path) -> None:
    path = csv(tmp_path)
    store(tmp_path).open(path)
    file = kept(tmp_path, name)
    before = file.stat()
    if harm == "gone":
        file.unlink()
    elif harm == "emptied":
        file.write_bytes(b"")
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        flip(file, before.st_size // 2)
    if harm.endswith("old time"):
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_same(store(tmp_path).open(path), direct_decode(path))
    assert_same(store(tmp_path).open(path), direct_decode(path))


def test_a_store_of_another_site_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = csv(tmp_path)
    DecodedStore(tmp_path / "state", "north", b"o" * 32).open(path)
    with kept(tmp_path, IMAGES).open("r+b") as file:
        file.write(b"\0" * 64)
    with caplog.at_level(logging.WARNING, logger="chainward.client"):
        assert_same(store(tmp_path).open(path), direct_decode(path))
    assert "not this site's" in caplog.text


def test_it_is_for_the_site_s_own_user_only(tmp_path: Path) -> None:
    store(tmp_path).open(csv(tmp_path))
    for path in [tmp_path / "state/images", *(tmp_path / "state/images").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_full_disk_means_decoding_in_memory_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = csv(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=decoding.LEFT_FREE + 100))
    with caplog.at_level(logging.WARNING, logger="chainward.client"):
        assert_same(store(tmp_path).open(path), direct_decode(path))
    (line,) = caplog.messages
    assert "1.0 GB free" in line and "decoded in memory" in line
    assert not list((tmp_path / "state/images").glob("*/*"))


def test_a_state_folder_that_cannot_be_written_means_decoding_in_memory(tmp_path: Path) -> None:
    path = csv(tmp_path)
    (tmp_path / "state").write_text("a file where a folder belongs")
    assert_same(store(tmp_path).open(path), direct_decode(path))


def test_pixels_stay_in_the_file(tmp_path: Path) -> None:
    path = csv(tmp_path)
    store(tmp_path).open(path)
    images = store(tmp_path).open(path).splits["train"].images
    assert str(kept(tmp_path, IMAGES)) in Path("/proc/self/maps").read_text()
    images[0] = 255 - images[0]
    assert_same(store(tmp_path).open(path), direct_decode(path))


def test_dicom_files_come_out_of_the_store_as_out_of_a_direct_decode(
    dicom: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_BLOCK_ROWS", 3)
    lines = ["image,dx,who"]
    for index in range(8):
        pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * (index + 1)
        uid = "1.2.3" if index in (0, 7) else f"1.2.{index + 10}"  # a picture twice
        (tmp_path / f"i{index}").write_bytes(
            dicom(
                pixels, bits=12, PatientID="P1" if index < 2 else f"P{index}", PatientName="Meier", SOPInstanceUID=uid
            )
        )
        lines.append(f"i{index},{'ab'[index % 2]},w{index}")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    columns = {"image": "image", "label": "dx", "patient": "who"}
    path = described(tmp_path, format="dicom", manifest="cases.csv", images=".", classes=["a", "b"], columns=columns)
    direct = direct_decode(path)
    assert any("share their PatientID" in note for note in direct.notes)
    assert_same(store(tmp_path).open(path), direct)
    assert_same(store(tmp_path).open(path), direct)
    monkeypatch.setattr(dicom_headers, "_KEY", b"another process")
    (tmp_path / "i5").write_bytes(dicom(pixels + 1, bits=12, PatientID="P1", PatientName="", SOPInstanceUID="1.2.99"))
    assert_same(store(tmp_path).open(path), direct_decode(path))
    for file in (tmp_path / "state/images").rglob("*"):
        assert not file.is_file() or b"Meier" not in file.read_bytes()


def test_a_deployed_site_opens_it(tmp_path: Path) -> None:
    path = csv(tmp_path)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"site": "north", "data": path.name, "state": "state"}))
    data = open_site(tmp_path / "site.yaml").data
    assert len(data.splits["train"]) == 6
    assert kept(tmp_path, INDEX).exists()
