# SPDX-License-Identifier: Apache-2.0
"""What files store is what is read, or they are refused."""

from __future__ import annotations

import builtins
import errno
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drseg_core.data import open_dataset
from drseg_core.data.folder import FolderDataset
from drseg_core.data.images import image_size, read_image, read_mask
from drseg_core.errors import DatasetError

GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n"
# in whatever language the system speaks
TOO_LONG = re.escape(os.strerror(errno.ENAMETOOLONG))


def write_png(path: Path, value: np.ndarray, depth: int, color: int = GRAY) -> None:
    """A PNG of exactly these stored numbers, (H, W) or (H, W, channels)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    height, width = value.shape[:2]
    bits = (value.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, color, 0, 0, 0])
    table = chunk(b"PLTE", bytes(range(3 * 2**depth))) if color == PALETTE else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + table + pixels + chunk(b"IEND", b""))


@pytest.fixture
def root(tmp_path) -> Path:
    """One good pair of two classes."""
    folder = tmp_path / "set"
    for part in ("images", "masks"):
        (folder / "train" / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("field\nroad\n")
    Image.new("RGB", (30, 20)).save(folder / "train/images/0.png")
    Image.new("L", (30, 20)).save(folder / "train/masks/0.png")
    return folder


@pytest.mark.parametrize("color", [GRAY, PALETTE])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mask_of_few_bits_keeps_ids(tmp_path, depth, color):
    ids = np.arange(7 * 9).reshape(7, 9) % 2**depth
    write_png(tmp_path / "mask.png", ids, depth, color)
    mask = read_mask(tmp_path / "mask.png")
    assert mask.dtype == np.uint8 and np.array_equal(mask, ids)


def test_mask_of_8_bits_keeps_ids(tmp_path):
    ids = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_png(tmp_path / "mask.png", ids, 8)
    assert np.array_equal(read_mask(tmp_path / "mask.png"), ids)
    Image.fromarray(ids).save(tmp_path / "mask.tif", compression="tiff_lzw")
    assert np.array_equal(read_mask(tmp_path / "mask.tif"), ids)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_tiff_mask_of_few_bits_keeps_ids(tmp_path, bits):
    rasterio = pytest.importorskip("rasterio")
    path, ids = tmp_path / "mask.tif", (np.arange(7 * 9, dtype=np.uint8).reshape(7, 9) % 2**bits).astype(np.uint8)
    for options in ({}, {"photometric": "MINISWHITE"}):
        profile = {"driver": "GTiff", "count": 1, "height": 7, "width": 9, "dtype": "uint8", "nbits": bits}
        with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
            with rasterio.open(path, "w", **profile, **options) as file:
                file.write(ids, 1)
        if options:
            with pytest.raises(DatasetError, match="mask.tif stores white as zero"):
                read_mask(path)
        else:
            assert np.array_equal(read_mask(path), ids)


@pytest.mark.promise("C49")
@pytest.mark.parametrize("name, options", [("0.jpg", {}), ("0.png", {}), ("0.tif", {"compression": "jpeg"})])
def test_jpeg_mask_is_refused(root, name, options):
    path = root / "train/masks" / name
    (root / "train/masks/0.png").unlink()
    Image.new("L", (30, 20)).save(path, **options or {"format": "JPEG"})
    for read in (FolderDataset, lambda _: read_mask(path)):
        with pytest.raises(DatasetError, match=f"masks/{name} is .*JPEG.*; expected lossless PNG or TIFF|jpeg comp"):
            read(root)


@pytest.mark.parametrize("color, channels", [(GRAY, 1), (RGB, 3), (GRAY_ALPHA, 2), (RGB_ALPHA, 4)])
def test_image_of_16_bits_is_refused(tmp_path, color, channels):
    path = tmp_path / "deep.png"
    value = np.full((5, 6, channels), 0x1234)
    write_png(path, value, 16, color)
    with pytest.raises(DatasetError, match="deep.png (is 16-bit|has 16 bits per channel); expected 8"):
        read_image(path)
    write_png(path, value & 0xFF, 8, color)
    assert (read_image(path) == 0x34).all()


def test_tiff_of_16_bits_is_refused(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "deep.tif"
    profile = {"driver": "GTiff", "count": 3, "height": 5, "width": 6, "dtype": "uint16", "photometric": "RGB"}
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        with rasterio.open(path, "w", **profile) as file:
            file.write(np.full((3, 5, 6), 0x1234, np.uint16))
    with pytest.raises(DatasetError, match="deep.tif has (16 bits per channel|3 bands of uint16)"):
        read_image(path)


def test_gray_image_of_few_bits_is_spread(tmp_path):
    write_png(tmp_path / "image.png", np.full((5, 6), 3), 2)
    assert (read_image(tmp_path / "image.png") == 255).all()


@pytest.mark.parametrize("kind", ["bmp", "eps", "gif"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_other_formats_are_no_images(tmp_path, kind, suffix):
    path = tmp_path / f"image.{suffix}"
    if kind == "eps":
        path.write_bytes(EPS)
    else:
        Image.new("RGB", (30, 20)).save(path, format=kind)
    for read in (image_size, read_image, read_mask):
        with pytest.raises(DatasetError, match=f"image.{suffix} is not an image"):
            read(path)


def test_png_without_header_first(tmp_path):
    path = tmp_path / "odd.png"
    write_png(path, np.zeros((5, 6), int), 8)
    data = path.read_bytes()
    text = b"tEXta\0b"
    path.write_bytes(data[:8] + b"\0\0\0\3" + text + zlib.crc32(text).to_bytes(4, "big") + data[8:])
    with pytest.raises(DatasetError, match="odd.png is (damaged|not an image)"):
        read_mask(path)


@pytest.mark.parametrize("path", ["a" * 5000, "a/" * 2500])
def test_long_path(path):
    with pytest.raises(DatasetError, match=f"cannot be opened: {TOO_LONG}") as caught:
        open_dataset(f"folder:{path}")
    assert caught.value.exit_code == 3
    for read in (image_size, read_image, read_mask):
        with pytest.raises(DatasetError, match=f"cannot be read: {TOO_LONG}"):
            read(Path(path))


@pytest.mark.parametrize("part", ["train/images/0.png", "train/masks/0.png", "train/images/0.tif", "classes.txt"])
def test_no_permission(root, monkeypatch, part):
    """Tests may run as root, to whom nothing is forbidden: so opening is replaced."""
    if part.endswith(".tif"):
        (root / "train/images/0.png").unlink()
        Image.new("RGB", (30, 20)).save(root / part)
    good = FolderDataset(root)
    original, target = builtins.open, root / part

    def refuse(file, *args, **options):
        if isinstance(file, str | Path) and Path(file) == target:
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *args, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(DatasetError, match=f"{part} cannot be read.*Permission denied"):
        FolderDataset(root)
    if part != "classes.txt":
        for use in (lambda: good[0], good.fingerprint):
            with pytest.raises(DatasetError, match=f"{part} cannot be read: Permission denied"):
                use()


@pytest.mark.parametrize("method", ["is_dir", "resolve", "stat"])
def test_folder_without_permission(root, monkeypatch, method):
    original = getattr(Path, method)

    def refuse(path, *args, **options):
        if path.name in ("images", "0.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(DatasetError, match="cannot be (opened|read): Permission denied"):
        FolderDataset(root)
