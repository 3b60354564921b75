"""Images are found by name, decoded whole and brought to one shape; masks and boxes follow their images."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chainward_client.data import image_store
from chainward_client.data.description import Fit, ImageShape
from chainward_client.data.image_store import ImageStore
from chainward_client.data.images import load_images, open_image, placement, to_channels
from chainward_client.data.regions import box_masks, load_masks
from chainward_client.data.scale import Scale
from chainward_client.data.unusable import ImageProblem
from chainward_shared.errors import DataError

FULL = Scale(0, 65535)
GREY8 = ImageShape(size=8, channels=1)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def plain(value: int = 100, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, value)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def load(location: Path, *names: str, shape: ImageShape = GREY8) -> torch.Tensor:
    return load_images(location, names, range(2, 2 + len(names)), shape, lambda: FULL)[0]


def refusal(location: Path, *names: str) -> str:
    with pytest.raises(DataError) as caught:
        load(location, *names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# finding files


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_found_without_extension_and_in_any_sub_folder(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "images"
    save(root / "a.png", plain(10))
    save(root / "deep" / "er" / "b.png", plain(20))
    location = root
    if packed:
        location = tmp_path / "images.zip"
        with zipfile.ZipFile(location, "w") as archive:
            for path in root.rglob("*.png"):
                archive.write(path, path.relative_to(root))
    names = ["a.png", "a", "./a.png", "b", "b.png", "er/b", "deep\\er\\b.png"]
    values = load(location, *names)[:, 0, 0, 0].tolist()
    assert values == [10, 10, 10, 20, 20, 20, 20]


def test_a_name_that_fits_two_files_is_refused_with_both(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", plain())
    save(tmp_path / "y" / "a.png", plain())
    message = refusal(tmp_path, "a.png")
    assert "1 image with an ambiguous name; first: row 2, 'a.png': could be x/a.png or y/a.png" in message


def test_a_full_path_settles_which_of_two_files_is_meant(tmp_path: Path) -> None:
    save(tmp_path / "a.png", plain(1))
    save(tmp_path / "y" / "a.png", plain(2))
    assert load(tmp_path, "a.png", "y/a.png")[:, 0, 0, 0].tolist() == [1, 2]


def test_a_note_beside_an_image_does_not_make_its_name_ambiguous(tmp_path: Path) -> None:
    save(tmp_path / "a.png", plain(7))
    (tmp_path / "a.txt").write_text("seen twice")
    assert load(tmp_path, "a").shape == (1, 1, 8, 8)


def test_the_shadow_files_of_a_macos_zip_are_not_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.writestr("a.png", png(plain(5)))
        archive.writestr("__MACOSX/._a.png", b"resource fork")
    assert load(tmp_path / "i.zip", "a")[0, 0, 0, 0] == 5


def test_no_name_reaches_outside_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "secret.png", plain())
    (tmp_path / "images").mkdir()
    assert "image not found" in refusal(tmp_path / "images", "../secret.png")


def test_a_bomb_in_a_zip_is_counted_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "BLANK_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "i.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, size in (("small.png", 2**20), ("bomb.png", 2**20 + 1)):
            archive.writestr(name, bytes(size))
        archive.writestr("noise.png", np.random.default_rng(0).bytes(2**20 + 1))
    with ImageStore(tmp_path / "i.zip") as store:
        assert len(store.read("small.png")) == 2**20, "a blank picture"
        assert len(store.read("noise.png")) == 2**20 + 1, "large, and no larger than in the zip"
        monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
        with pytest.raises(ImageProblem, match="bytes in the zip become 1,048,577"):
            store.read("bomb.png")
        monkeypatch.setattr(image_store, "MOST_BYTES", 2**20 - 1)
        with pytest.raises(ImageProblem, match="take it out of the zip"):
            store.read("small.png")
    assert "2 images too large to be unpacked" in refusal(tmp_path / "i.zip", "bomb", "small")


def test_a_zip_of_more_files_than_a_data_set_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "MOST_FILES", 2)
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", b"")
    with pytest.raises(DataError, match="holds 3 files; expected at most 2"):
        ImageStore(tmp_path / "i.zip")


def test_a_location_that_is_no_folder_and_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="neither a folder nor a whole zip"):
        ImageStore(tmp_path / "images.zip")


# unusable files


def test_all_unusable_images_are_counted_by_kind_with_the_first_of_each(tmp_path: Path) -> None:
    save(tmp_path / "good.png", plain())
    save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8)))
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "JPEG")
    for name in ("cut1.jpg", "cut2.jpg"):
        (tmp_path / name).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    message = refusal(tmp_path, "good.png", "cut1.jpg", "goood.png", "cmyk.jpg", "cut2.jpg")
    assert "2 unreadable images; first: row 3, 'cut1.jpg': " in message
    assert "truncated" in message
    assert "1 image not found; first: row 4, 'goood.png': no such file (did you mean 'good" in message
    assert "1 image of a wrong mode; first: row 5, 'cmyk.jpg': mode CMYK" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"GIF? no", "not an image file of a known kind"),
        (png(Image.fromarray(noise(32, 32)))[:-400], "truncated"),
    ],
)
def test_a_file_that_is_no_whole_image_is_unreadable(content: bytes, reason: str) -> None:
    with pytest.raises(ImageProblem, match=reason):
        open_image(content)


def test_a_damaged_pixel_stream_is_noticed() -> None:
    data = bytearray(png(Image.fromarray(noise(32, 32))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageProblem):
        open_image(bytes(data))


def test_a_zip_member_with_a_bad_checksum_is_unreadable(tmp_path: Path) -> None:
    data = png(plain(5))
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.writestr("a.png", data)
    packed = (tmp_path / "i.zip").read_bytes()
    start = packed.index(data)
    (tmp_path / "i.zip").write_bytes(packed[: start + 60] + b"\x00" + packed[start + 61 :])
    assert "1 unreadable image; first: row 2, 'a.png': Bad CRC" in refusal(tmp_path / "i.zip", "a.png")


def test_several_images_in_one_file_are_refused(tmp_path: Path) -> None:
    plain().save(tmp_path / "stack.tif", save_all=True, append_images=[plain(), plain()])
    assert "3 images in one file; expected one" in refusal(tmp_path, "stack.tif")


# channels


@pytest.mark.parametrize(
    ("image", "grey", "rgb"),
    [
        (Image.new("1", (1, 1), 1), 255, (255, 255, 255)),
        (Image.new("L", (1, 1), 90), 90, (90, 90, 90)),
        (Image.new("LA", (1, 1), (90, 255)), 90, (90, 90, 90)),
        (Image.new("RGB", (1, 1), (200, 0, 0)), 60, (200, 0, 0)),
        (Image.new("RGBA", (1, 1), (200, 0, 0, 255)), 60, (200, 0, 0)),
        (Image.new("RGBA", (1, 1), (200, 0, 0, 0)), 0, (0, 0, 0)),
        (Image.new("RGB", (1, 1), (200, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE), 60, (200, 0, 0)),
        (Image.fromarray(np.array([[65535]], dtype=np.uint16)), 255, (255, 255, 255)),
    ],
)
def test_every_usual_mode_becomes_grey_or_rgb(image: Image.Image, grey: int, rgb: tuple[int, int, int]) -> None:
    assert to_channels(image, 1, lambda: FULL).getpixel((0, 0)) == grey
    assert to_channels(image, 3, lambda: FULL).getpixel((0, 0)) == rgb


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_sixteen_bit_grey_keeps_its_contrast_at_any_bit_depth(top: int) -> None:
    stored = np.array([[0, top // 2, top]], dtype=np.uint16)
    decoded = open_image(png(Image.fromarray(stored)))
    assert np.asarray(to_channels(decoded, 1, lambda: Scale(0, top))).tolist() == [[0, 127, 255]]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_modes_are_refused_by_name(mode: str) -> None:
    with pytest.raises(ImageProblem, match=f"mode {mode}; expected grey"):
        to_channels(Image.new(mode, (2, 2)), 3, lambda: FULL)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_the_scale_reaches_below_0_beyond_16_bits_and_into_fractions(kind: type) -> None:
    image = Image.fromarray(np.array([[-100000, -50000, 0, 75000, 200000]], dtype=kind))
    assert np.asarray(to_channels(image, 1, lambda: Scale(-50000, 100000))).tolist() == [[0, 0, 85, 213, 255]]


def test_pixels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ImageProblem, match="not finite numbers"):
        to_channels(Image.fromarray(np.array([[np.nan, 1]], dtype=np.float32)), 1, lambda: FULL)


def test_an_image_is_turned_upright_as_its_exif_orientation_says(tmp_path: Path) -> None:
    image = plain(0, (8, 16))
    image.paste(255, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 8  # turn by 90 degrees, anticlockwise: what was above comes to the left
    image.save(tmp_path / "a.png", exif=exif)
    images, sizes = load_images(tmp_path, ["a"], [2], ImageShape(size=8, channels=1, fit="stretch"), lambda: FULL)
    assert sizes == [(16, 8)]
    assert images[0, 0, :, 0].min() > 250
    assert images[0, 0, :, -1].max() < 5


# shape


def test_images_of_the_wanted_size_are_not_resampled(tmp_path: Path) -> None:
    stored = noise(16, 16)
    save(tmp_path / "a.png", Image.fromarray(stored))
    for fit in ("pad", "crop", "stretch"):
        images = load(tmp_path, "a", shape=ImageShape(size=16, channels=3, fit=fit))
        assert images.dtype == torch.uint8
        assert np.array_equal(images[0].permute(1, 2, 0).numpy(), stored)


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """A 40x20 image: left quarter 50, the middle 150, right quarter 250."""
    image = plain(150, (40, 20))
    image.paste(50, (0, 0, 10, 20))
    image.paste(250, (30, 0, 40, 20))
    save(tmp_path / "a.png", image)
    return tmp_path


def middle_line(location: Path, fit: Fit) -> tuple[torch.Tensor, list[int]]:
    image = load(location, "a", shape=ImageShape(size=8, channels=1, fit=fit))[0, 0]
    return image, image[4].tolist()


def test_pad_keeps_the_whole_image_between_black_bars(stripes: Path) -> None:
    image, line = middle_line(stripes, "pad")
    assert image[:2].max() == 0
    assert image[6:].max() == 0
    assert image[2:6].min() > 0
    assert abs(line[0] - 50) < 15
    assert abs(line[-1] - 250) < 15


def test_crop_keeps_the_centre(stripes: Path) -> None:
    image, _ = middle_line(stripes, "crop")
    assert (image.int() - 150).abs().max() < 10


def test_stretch_fills_the_square_with_the_whole_image(stripes: Path) -> None:
    image, line = middle_line(stripes, "stretch")
    assert image.min() > 0
    assert abs(line[0] - 50) < 15
    assert abs(line[-1] - 250) < 15


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1)])
def test_an_extreme_shape_is_no_problem(tmp_path: Path, size: tuple[int, int]) -> None:
    save(tmp_path / "a.png", plain(100, size))
    for fit in ("pad", "crop", "stretch"):
        assert load(tmp_path, "a", shape=ImageShape(size=8, channels=1, fit=fit)).max() == 100


# masks and boxes


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (50, 50), (37, 91)])
def test_masks_and_boxes_lie_where_the_same_region_of_the_image_lies(
    tmp_path: Path, fit: Fit, size: tuple[int, int]
) -> None:
    box = (8, 11, 30, 35)
    image = plain(0, size)
    image.paste(255, box)
    save(tmp_path / "a.png", image)
    shape = ImageShape(size=32, channels=1, fit=fit)
    images, sizes = load_images(tmp_path, ["a"], [2], shape, lambda: FULL)
    mask = load_masks(tmp_path, ["a"], [2], sizes, shape)
    from_box = box_masks(np.array([box], dtype=float), [2], sizes, shape)
    bright = (images[0, 0] > 127).to(torch.uint8)
    perimeter = 4 * 32
    assert mask.sum() > 50
    assert mask.max() == 1
    assert (mask[0] != bright).sum() < perimeter / 2  # at most half a pixel along the border
    assert (mask != from_box).sum() == 0


def test_a_box_over_the_whole_image_covers_exactly_what_is_not_bar() -> None:
    mask = box_masks(np.array([[0, 0, 40, 20]], dtype=float), [2], [(40, 20)], GREY8)[0]
    left, top, right, bottom = placement(40, 20, 8, "pad")[1]
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[top:bottom, left:right] = 1
    assert torch.equal(mask, expected)


def test_a_tiny_box_keeps_one_pixel_and_a_box_that_is_cropped_away_none() -> None:
    tiny = box_masks(np.array([[20.0, 5.0, 20.5, 5.5]]), [2], [(400, 400)], GREY8)
    cropped = box_masks(np.array([[0.0, 0.0, 5.0, 5.0]]), [2], [(40, 20)], ImageShape(size=8, fit="crop"))
    assert tiny.sum() == 1
    assert cropped.sum() == 0


def test_boxes_that_do_not_fit_their_image_are_counted() -> None:
    boxes = np.array([[0, 0, 9, 9], [5, 5, 5, 9], [0, 0, 30, 9], [0, 0, 9, 31], [np.nan] * 4], dtype=float)
    with pytest.raises(DataError) as caught:
        box_masks(boxes, [2, 3, 4, 5, 6], [(20, 20)] * 5, GREY8)
    assert "1 box without area; first: row 3: 5, 5, 5, 9" in str(caught.value)
    assert "2 boxes beyond their images; first: row 4: 0, 0, 30, 9, the image is 20x20" in str(caught.value)


@pytest.mark.parametrize("inside", [1, 255])
def test_a_mask_may_mark_the_inside_by_1_or_255_and_have_a_lower_resolution(tmp_path: Path, inside: int) -> None:
    mask = plain(0, (10, 5))
    mask.paste(inside, (0, 0, 5, 5))
    save(tmp_path / "m.png", mask)
    loaded = load_masks(tmp_path, ["m"], [2], [(40, 20)], ImageShape(size=8, fit="stretch"))
    assert torch.equal(loaded[0], torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]] * 8, dtype=torch.uint8))


def test_a_case_without_mask_has_an_empty_one(tmp_path: Path) -> None:
    save(tmp_path / "m.png", plain(255))
    masks = load_masks(tmp_path, [None, "m"], [2, 3], [(8, 8)] * 2, GREY8)
    assert masks.sum(dim=(1, 2)).tolist() == [0, 64]


def test_a_mask_of_other_proportions_than_its_image_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m.png", plain(255, (20, 20)))
    with pytest.raises(DataError, match="1 mask of other proportions than the image; first: row 2, 'm': 20x20"):
        load_masks(tmp_path, ["m"], [2], [(40, 20)], GREY8)


def test_a_missing_mask_is_called_a_mask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 mask not found"):
        load_masks(tmp_path, ["m"], [2], [(40, 20)], GREY8)
