# SPDX-License-Identifier: Apache-2.0
"""Images of a user's own set, read as a scene is: the same types, bands, nodata and scale.

8-bit RGB, gray and palette images are read by :mod:`drseg_core.data.images`, which is quick and gives the same pixels.
Images that need GDAL (16-bit and float, more bands, colour interpretation, nodata) are read by
:class:`drseg_core.data.raster.RasterReader`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from drseg_core.config.reading import Reading, parse_reading, scale_text
from drseg_core.config.schema import ReadingConfig
from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import pixel_side
from drseg_core.data.images import (
    EXIF_ORIENTATION,
    MAX_PIXELS,
    TooLarge,
    check_pixels,
    image_size,
    needs_rasterio,
    opened,
    read_image,
    stored_bits,
)
from drseg_core.data.manifest import printable
from drseg_core.data.raster import RasterReader, open_raster
from drseg_core.data.values import STRETCH, extreme_value, limits_array, nodata_hint, stretched
from drseg_core.errors import DatasetError, RasterError
from drseg_core.extras import installed

MEASURED_IMAGES, MEASURED_PIXELS = 64, 20_000
"""How many images a scale is measured on, and how many pixels of each."""

_PLAIN_MODES = {"RGB", "L", "P", "1", "CMYK", "LAB", "YCbCr"}
_GDAL_METADATA, _GDAL_NODATA = 42112, 42113
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rgb:
    """``image`` (H, W, 3) uint8 and ``valid`` (H, W); None if all pixels are valid."""

    image: NDArray[np.uint8]
    valid: NDArray[np.bool_] | None = None


def through_gdal(path: Path, max_pixels: int) -> bool:
    """Whether an image needs GDAL. Reads the header.

    Raises:
        DatasetError: it is not an image.
    """
    if max_pixels > MAX_PIXELS:
        with contextlib.suppress(TooLarge):
            return through_gdal(path, MAX_PIXELS)
        return True
    if needs_rasterio(path) or path.with_name(f"{path.name}.msk").exists():
        return True
    with opened(path, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            return False
        tags = getattr(image, "tag_v2", {})
        odd = image.mode not in _PLAIN_MODES and image.format == "TIFF"
        told = _GDAL_METADATA in tags or _GDAL_NODATA in tags
        # a second page may be a mask, which Pillow cannot open
        several = bool(getattr(tags, "next", 0))
        return stored_bits(path, image) > 8 or odd or told or several


def own_size(path: Path, *, max_pixels: int, mask: bool = False) -> tuple[int, int]:
    """(height, width) by the header, also of files too large to be decoded at once, since GDAL reads parts.

    Raises:
        DatasetError: not an image, or too large for what opens it.
    """
    try:
        return image_size(path, max_pixels=max_pixels, mask=mask)
    except TooLarge:
        if max_pixels < MAX_PIXELS:
            raise
        if path.suffix.lower() not in (".tif", ".tiff"):
            return image_size(path, max_pixels=sys.maxsize, mask=mask)
        with open_raster(path, origin="read_image", driver="GTiff") as source:
            return int(source.height), int(source.width)


@contextlib.contextmanager
def open_reader(path: Path, reading: Reading, max_pixels: int) -> Iterator[RasterReader]:
    """An image of a set as a raster; messages are those of images."""
    try:
        # other drivers of GDAL read other files, or the network
        tiff = path.suffix.lower() in (".tif", ".tiff")
        driver = "GTiff" if tiff and (max_pixels > MAX_PIXELS or needs_rasterio(path)) else None
        if driver is None:
            with opened(path, max_pixels) as image:
                driver = {"TIFF": "GTiff", "PNG": "PNG"}.get(str(image.format), "JPEG")
        with open_raster(path, origin="read_image", driver=driver) as source:
            check_pixels(path, (source.width, source.height), max_pixels)
            yield RasterReader(source, path, reading, origin="read_image")
    except RasterError as error:
        raise DatasetError(str(error).replace("read_scene:", "read_image:")) from None


def readable_in_parts(path: Path) -> bool:
    """Whether a part of an image can be read without turning it: rasterio is there, and no EXIF rotation."""
    if not installed("rasterio"):
        return False
    if path.suffix.lower() in (".tif", ".tiff"):
        return True
    with opened(path, sys.maxsize) as image:
        return image.getexif().get(EXIF_ORIENTATION, 1) == 1


def read_part(
    image: Path, mask: Path, reading: Reading, box: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``box[0]`` to ``box[1]`` and columns ``box[2]`` to ``box[3]`` (exclusive) of a large pair.

    Returns:
        (3, n, m) uint8, and the ids (n, m) uint8 with 255 where the image has no data.

    Raises:
        DatasetError: it is damaged, or the mask is not one 8-bit band.
    """
    top, bottom, left, right = box
    unlimited = sys.maxsize
    with open_reader(image, reading, unlimited) as raster:
        pixels, valid = raster.window(*box)
    plain = Reading(bands=(1,))
    with open_reader(mask, plain, unlimited) as raster:
        if raster.source.count != 1 or raster.dtype != "uint8":
            got = f"{raster.source.count} bands of {raster.dtype}"
            raise DatasetError(f"read_mask: {printable(mask)} has {got}; expected one 8-bit band of class ids")
        ids = raster.stored(*box)
    return pixels, invalid_is_ignored(torch.from_numpy(ids), None if valid.all() else valid, IGNORE)


def read_rgb(path: Path, reading: Reading, *, max_pixels: int) -> Rgb:
    """Decode an image of a user's own set.

    Raises:
        DatasetError: not an image, damaged, too large, or of a kind that is refused.
    """
    if through_gdal(path, max_pixels):
        with open_reader(path, reading, max_pixels) as raster:
            pixels, inside = raster.rows(0, raster.height)
        return Rgb(np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0)), None if inside.all() else inside)
    image = read_image(path, max_pixels=max_pixels)
    valid = _opaque(path, max_pixels)
    if reading.plain:
        return Rgb(image, valid)
    return _applied(path, image, valid, reading)


def _opaque(path: Path, max_pixels: int) -> NDArray[np.bool_] | None:
    """Where a PNG is not wholly transparent; None if no pixel is transparent."""
    from PIL import ImageOps

    with opened(path, max_pixels) as image:
        if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
            return None
        alpha = np.array(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))
    return None if alpha.all() else alpha != 0


def _applied(path: Path, image: NDArray[np.uint8], valid: NDArray[np.bool_] | None, reading: Reading) -> Rgb:
    """Options on 8-bit pixels that are decoded already."""
    bands = reading.bands or (1, 2, 3)
    if max(bands) > 3:
        raise DatasetError(
            f"read_image: bands do not fit {printable(path)}; expected one or three numbers from 1 to 3, "
            f"got {list(bands)} (--bands chooses them; by default a run takes those of its training)"
        )
    value = image[:, :, [b - 1 for b in bands]].transpose(2, 0, 1)
    if reading.nodata is not None:
        present = ~(value == reading.nodata).all(0)
        valid = present if valid is None else valid & present
    limits: Any = None if reading.scale is None else limits_array(reading.scale)
    if reading.measure and limits is None:
        inside = value.reshape(len(value), -1) if valid is None else value[:, valid]
        limits = np.percentile(inside, STRETCH, axis=1).astype(np.float32)[:, :, None, None]
    if limits is not None:
        value = stretched(value, limits)
    if len(value) == 1:
        value = np.repeat(value, 3, axis=0)
    whole = valid is None or bool(valid.all())
    return Rgb(np.ascontiguousarray(value.transpose(1, 2, 0)), None if whole else valid)


def settle(config: ReadingConfig, paths: Sequence[Path], *, max_pixels: int, name: str) -> ReadingConfig:
    """Options for a whole set: if a scale has to be measured, this is done once, over all of its images.

    Log lines say what was chosen, and warn of a value that looks like nodata and of bands that may not be red, green
    and blue.

    Args:
        config: the options.
        paths: the images.
        max_pixels: bound on the pixels of a file.
        name: name of the set, for log lines.

    Raises:
        DatasetError: some images are 8-bit and others are not, or one cannot be read.
    """
    config = replace(config, gsd=config.gsd or _pixel_side(paths))
    reading = parse_reading(config)
    deep = [path for path in paths if through_gdal(path, max_pixels)]
    if not deep and not reading.measure:
        _warn_of_nodata(paths, reading, max_pixels)
        return _fitting(config, reading, "uint8", name)
    kinds: dict[str, Path] = {"uint8": next(iter(set(paths) - set(deep)))} if len(deep) < len(paths) else {}
    chosen = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, min(len(paths), MEASURED_IMAGES))]
    values = []
    for place, path in enumerate(chosen):
        with open_reader(path, replace(reading, measure=False, scale=((0, 1),)), max_pixels) as raster:
            kinds.setdefault(raster.dtype, path)
            value, valid = raster.sample()
            inside = value[:, valid]
            values.append(inside[:, :: max(1, inside.shape[1] // MEASURED_PIXELS)])
            if not place:
                order = ", ".join(map(str, raster.bands))
                _log.info("%s: bands %s of %d (%s)", name, order, raster.source.count, raster.band_source)
                hint = nodata_hint(path.name, raster.extreme_value())
                for message in (raster.band_warning(), raster.nodata_warning(), hint):
                    if message is not None:
                        _log.warning("%s", message)
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise DatasetError(
            f"{name}: images are of several types; expected one, got {one} in {printable(first)} and {other} in "
            f"{printable(second)}"
        )
    depth = next(iter(kinds))
    config = _fitting(config, reading, depth, name)
    reading = parse_reading(config)
    if reading.scale is None and (depth != "uint8" or reading.measure):
        inside = np.concatenate(values, axis=1).astype(np.float64)
        if not inside.shape[1]:
            raise DatasetError(f"{name}: no pixel is valid; expected some to measure a scale on (--scale LOW,HIGH)")
        low, high = np.percentile(inside, STRETCH, axis=1).astype(np.float32)
        text = scale_text([(float(a), float(b)) for a, b in zip(low, high, strict=True)])
        _log.info("%s: %s scaled by %s (measured, 2 and 98 %% of %d images)", name, depth, text, len(chosen))
        config = replace(config, scale=text)
    return config


def _pixel_side(paths: Sequence[Path]) -> float | None:
    """Side of a pixel in metres, the median of the first images with a georeference; None without any."""
    sides = []
    if installed("rasterio"):
        for path in [path for path in paths if path.suffix.lower() in (".tif", ".tiff")][:8]:
            with contextlib.suppress(DatasetError), open_raster(path, origin="read_image", driver="GTiff") as source:
                sides.append(pixel_side(source.crs, source.transform, source.height, source.width))
    known = sorted(side for side in sides if side is not None)
    return float(f"{known[len(known) // 2]:.4g}") if known else None


def _warn_of_nodata(paths: Sequence[Path], reading: Reading, max_pixels: int) -> None:
    """Warn if the first 8-bit images have a value that looks like nodata."""
    for path in paths[:4]:
        try:
            found = read_rgb(path, replace(reading, scale=None), max_pixels=max_pixels)
        except DatasetError:
            # said when it is used
            return
        valid = np.ones(found.image.shape[:2], bool) if found.valid is None else found.valid
        value = found.image.transpose(2, 0, 1)
        hint = nodata_hint(path.name, extreme_value(value, valid) if set(np.unique(value)) - {0, 255} else None)
        if hint is not None:
            _log.warning("%s", hint)
            return


def _fitting(config: ReadingConfig, reading: Reading, depth: str, name: str) -> ReadingConfig:
    """The options without a scale that is for values of another type."""
    if reading.scale is not None and not reading.fits(depth):
        _log.warning("%s: the scale of the run is for %s, the images are %s", name, config.depth, depth)
        config = replace(config, scale=None)
    # 8-bit values that stay what they are need no mark
    return replace(config, depth=None if depth == "uint8" and config.scale is None else depth)


def invalid_is_ignored(mask: torch.Tensor, valid: NDArray[np.bool_] | None, ignore: int) -> torch.Tensor:
    """The mask with ``ignore`` where the image has no data."""
    return mask if valid is None else mask.masked_fill(torch.from_numpy(~valid), ignore)
