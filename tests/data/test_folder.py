# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drseg_core.data import open_dataset
from drseg_core.data.folder import FolderDataset, read_class_names
from drseg_core.data.images import image_size, read_image, read_mask
from drseg_core.errors import DatasetError

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, size=(20, 30, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path) -> Path:
    """Three good pairs of two classes."""
    folder = tmp_path / "set"
    for part in ("images", "masks"):
        (folder / "train" / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("# ids from 0\nfield\n\n  wide road \n")
    for i in range(3):
        Image.fromarray(PIXELS + np.uint8(i)).save(folder / "train/images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 2, size=(20, 30), dtype=np.uint8)).save(folder / "train/masks" / f"{i}.png")
    return folder


def refused(root: Path, message: str, *, read: int | None = None, **options) -> None:
    """The set is refused with one line; a good set beside it is not."""
    with pytest.raises(DatasetError, match=message) as caught:
        dataset = FolderDataset(root, **options)
        if read is not None:
            dataset[read]
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


def test_good_set(root):
    dataset = open_dataset(f"folder:{root}")
    assert len(dataset) == 3 and dataset.class_names == ("field", "wide road")
    sample = dataset[1]
    assert sample.image.shape == (3, 20, 30) and sample.mask.shape == (20, 30)
    assert sample.image.dtype == sample.mask.dtype == torch.uint8
    assert torch.equal(sample.image, torch.from_numpy(PIXELS + np.uint8(1)).permute(2, 0, 1))
    assert sample.name.endswith("train/images/1.png") and dataset.sample_name(1) == sample.name


def test_root_missing_empty_no_pairs(root, tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not a folder; expected train/images")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "classes.txt does not exist")
    refused(root, "test.images is not a folder", split="test")
    refused(root, "split '../train' is not a folder name", split="../train")
    for file in (root / "train").rglob("*.png"):
        file.unlink()
    refused(root, r"train has no image; expected train/images/\* and train/masks/\* of .png")
    with pytest.raises(DatasetError, match="is not a folder"):
        open_dataset("folder:")


@pytest.mark.promise("C49")
def test_partners_missing_lists_ten(root):
    for i in range(12):
        Image.fromarray(PIXELS).save(root / "train/images" / f"lonely{i:02d}.png")
    refused(root, "12 files have no partner.*lonely00.png has no mask.*lonely09.png has no mask, and 2 more$")
    for i in range(12):
        (root / "train/images" / f"lonely{i:02d}.png").unlink()
    Image.fromarray(PIXELS[..., 0]).save(root / "train/masks/extra.png")
    refused(root, "1 files have no partner.*extra.png has no image")


@pytest.mark.promise("C49")
def test_sizes_differ(root):
    Image.fromarray(PIXELS[:10]).save(root / "train/images/1.png")
    refused(root, "1 masks differ.*images/1.png 10 x 30, its mask 20 x 30")


@pytest.mark.promise("C49")
def test_ids_outside_the_list(root):
    mask = np.zeros((20, 30), np.uint8)
    mask[0, :4] = [2, 9, 254, 255]
    Image.fromarray(mask).save(root / "train/masks/1.png")
    refused(root, "masks/1.png holds ids that are no class; expected 0 to 1 or 255, got 2; 9; 254", read=1)
    assert len(FolderDataset(root)[0].mask)


@pytest.mark.promise("C49")
def test_mask_modes(root):
    path = root / "train/masks/0.png"
    Image.fromarray(PIXELS).save(path)
    refused(root, "masks/0.png has 3 bands .RGB.; expected one 8-bit band", read=0)
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(path)
    refused(root, "masks/0.png is (16|32)-bit", read=0)
    path.unlink()
    Image.fromarray(np.zeros((20, 30), np.float32)).save(path.with_suffix(".tif"))
    refused(root, "masks/0.tif is floating point", read=0)
    path.with_suffix(".tif").unlink()
    palette = Image.fromarray(np.ones((20, 30), np.uint8), mode=None).convert("P")
    palette.putpalette([10, 20, 30] * 256)
    palette.save(path)
    assert (FolderDataset(root)[0].mask == 1).all()


def test_all_ignore_mask(root):
    Image.fromarray(np.full((20, 30), 255, np.uint8)).save(root / "train/masks/0.png")
    assert (FolderDataset(root)[0].mask == 255).all()


@pytest.mark.promise("C35")
@pytest.mark.parametrize("options", [("png", {}), ("jpg", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})])
def test_truncated(tmp_path, options):
    suffix, save = options
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(rng.integers(0, 256, size=(200, 300, 3), dtype=np.uint8)).save(path, **save)
    assert read_image(path).shape == (200, 300, 3)
    data = path.read_bytes()
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DatasetError, match=rf"image.{suffix} is (damaged|not an image or is cut short)"):
            read_image(path)
    path.write_bytes(data)
    assert read_image(path).shape == (200, 300, 3)


@pytest.mark.promise("C35")
def test_not_an_image(root):
    path = root / "train/images/1.png"
    path.write_bytes(b"")
    refused(root, r"images/1.png is not an image.*first bytes none \(empty file\)")
    path.write_bytes(b"<!DOCTYPE html><html>no such file</html>")
    refused(root, "images/1.png is not an image.*first bytes b'<!DOCTYPE html><")
    path.rename(path.with_suffix(".tif"))
    refused(root, "images/1.tif is not an image.*DOCTYPE")
    path.with_suffix(".tif").unlink()
    path.mkdir()
    refused(root, "images/1.png is not a file")
    path.rmdir()
    # the name says PNG, the content is a good JPEG: what is in it counts
    Image.fromarray(PIXELS).save(path, format="JPEG")
    assert FolderDataset(root)[1].image.shape == (3, 20, 30)


def test_too_large(root, tmp_path):
    refused(root, "images/0.png is too large; expected at most 599 pixels, got 30 x 20", max_pixels=599)
    assert len(FolderDataset(root, max_pixels=600)) == 3
    bomb = tmp_path / "bomb.png"
    _write_header_only_png(bomb, 60_000, 60_000)
    with pytest.raises(DatasetError, match="bomb.png is too large"):
        image_size(bomb)


def _write_header_only_png(path: Path, width: int, height: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def test_image_modes(tmp_path):
    rgb = Image.fromarray(PIXELS)
    path = tmp_path / "image.png"
    for mode in ("L", "1", "P", "RGBA", "LA"):
        rgb.convert(mode).save(path)
        value = read_image(path)
        assert value.shape == (20, 30, 3) and value.dtype == np.uint8, mode
    rgb.convert("L").save(path)
    assert (read_image(path) == np.array(rgb.convert("L"))[..., None]).all()
    see_through = rgb.convert("RGBA")
    see_through.putalpha(7)
    see_through.save(path)
    assert np.array_equal(read_image(path), PIXELS)
    for mode, name, said in (
        ("CMYK", "cmyk.jpg", "has inks"), ("F", "float.tif", "is floating"), ("LAB", "lab.tif", "is Lab"),
    ):  # fmt: skip
        Image.new(mode, (30, 20)).save(tmp_path / name)
        with pytest.raises(DatasetError, match=f"{name} {said}.*; expected 8-bit RGB"):
            read_image(tmp_path / name)
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(path)
    with pytest.raises(DatasetError, match="is (16|32)-bit"):
        read_image(path)


def test_exif_rotation(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(path, exif=exif, quality=95)
    assert image_size(path) == (30, 20)
    upright = read_image(path).astype(int)
    assert upright.shape == (30, 20, 3)
    Image.fromarray(PIXELS).save(path, quality=95)
    assert np.array_equal(upright, np.rot90(read_image(path), -1))


def test_tiff_that_pillow_cannot_read(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "five.tif"
    data = rng.integers(0, 256, size=(5, 20, 30), dtype=np.uint8)
    profile = {"driver": "GTiff", "height": 20, "width": 30, "crs": "EPSG:32632", "interleave": "band"}
    profile["transform"] = rasterio.transform.from_origin(0, 0, 1, 1)
    with rasterio.open(path, "w", count=5, dtype="uint8", **profile) as file:
        file.write(data)
    assert image_size(path) == (20, 30)
    assert np.array_equal(read_image(path), data[:3].transpose(1, 2, 0))
    with pytest.raises(DatasetError, match="five.tif has 5 bands"):
        read_mask(path)
    with rasterio.open(path, "w", count=5, dtype="uint16", **profile) as file:
        file.write(data.astype(np.uint16))
    with pytest.raises(DatasetError, match="five.tif has 5 bands of uint16"):
        read_image(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DatasetError, match="five.tif"):
        read_image(path)


@pytest.mark.promise("C35")
def test_vanished_or_changed(root):
    dataset = FolderDataset(root)
    path = root / "train/images/1.png"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(DatasetError, match="images/1.png vanished"):
        dataset[1]
    path.write_bytes(data + b"more")
    with pytest.raises(DatasetError, match="images/1.png changed after it was listed"):
        dataset[1]
    path.write_bytes(data)
    assert dataset[1].image.shape == (3, 20, 30)


def test_odd_names(root):
    for name in ("with space", "Köln", "a" * 200, "new\nline"):
        Image.fromarray(PIXELS).save(root / "train/images" / f"{name}.png")
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(root / "train/masks" / f"{name}.png")
    raw = os.fsencode(root / "train") + b"/%s/\xff\xfe.png"
    for part in ("images", "masks"):
        os.rename(root / "train" / part / "with space.png", raw % part.encode())
    dataset = FolderDataset(root)
    assert len(dataset) == 7
    for i in range(7):
        assert "\n" not in dataset[i].name
        dataset[i].name.encode()
    assert len(dataset.fingerprint()) == 64
    (root / "train/masks/new\nline.png").unlink()
    refused(root, r"new\\nline.png has no mask")


def test_links(root, tmp_path):
    outside = tmp_path / "outside.png"
    Image.fromarray(PIXELS).save(outside)
    path = root / "train/images/1.png"
    path.unlink()
    path.symlink_to(outside)
    refused(root, "images/1.png is a link out of")
    path.unlink()
    path.symlink_to(root / "train/images/0.png")
    assert len(FolderDataset(root)) == 3
    path.unlink()
    path.symlink_to(path)
    refused(root, "images/1.png is a broken link")
    path.unlink()
    (root / "train/images/1.png").write_bytes((root / "train/images/0.png").read_bytes())
    (tmp_path / "alias").symlink_to(root)
    assert len(FolderDataset(tmp_path / "alias")) == 3


def test_two_images_of_one_name(root):
    Image.fromarray(PIXELS).save(root / "train/images/1.jpg")
    refused(root, "1.png and .*1.jpg share a name")


def test_class_names(tmp_path):
    path = tmp_path / "classes.txt"

    def refused_names(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=message) as caught:
            read_class_names(path)
        assert "\n" not in str(caught.value)

    refused_names(b"", "expected 1 to 255 names, got 0")
    refused_names(b"# only\n\n", "got 0")
    refused_names("\n".join(map(str, range(256))).encode(), "got 256")
    refused_names(b"road\nfield\n road \n", "'road' repeats.*ids 0 and 2")
    refused_names(b"\xff\xfe\x00", "cannot be read as UTF-8")
    for odd in ("\x1b[2J", "\x00", "\x7f", "\x9b"):
        refused_names(f"road\nfi{odd}eld\n".encode(), "class name 1 has a control character; expected text, got 'fi")
    path.write_bytes("\ufeffStraße\r\nfield # 2\r\n".encode())
    assert read_class_names(path) == ("Straße", "field # 2")


@pytest.mark.promise("C39")
def test_fingerprint(root):
    first = FolderDataset(root).fingerprint()
    assert first == FolderDataset(root).fingerprint() and len(first) == 64
    path = root / "train/masks/0.png"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = FolderDataset(root).fingerprint()
    data[-1] ^= 1
    path.write_bytes(data)
    assert FolderDataset(root).fingerprint() == first != second
    (root / "classes.txt").write_text("wide road\nfield\n")
    assert FolderDataset(root).fingerprint() != first


def test_jpeg_with_png_mask(root):
    Image.fromarray(PIXELS).save(root / "train/images/1.JPG", format="JPEG")
    (root / "train/images/1.png").unlink()
    assert FolderDataset(root)[1].name.endswith("1.JPG")
