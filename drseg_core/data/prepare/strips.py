# SPDX-License-Identifier: Apache-2.0
"""Images of any size, read some rows at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.images import first_bytes
from drseg_core.data.manifest import printable
from drseg_core.errors import DatasetError
from drseg_core.extras import require

# first bytes -> GDAL driver: other drivers read other files, or the network
_DRIVERS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "GTiff", b"MM\0*": "GTiff", b"II+\0": "GTiff"}


class Strips:
    """An open image of ``height`` x ``width`` pixels and ``bands`` bands of uint8; palette indices stay indices
    (``has_palette``)."""

    def __init__(self, raster: Any, path: Path) -> None:
        self._raster, self._path = raster, path
        self.height, self.width, self.bands = int(raster.height), int(raster.width), int(raster.count)
        self.has_palette = any(color.name == "palette" for color in raster.colorinterp)

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """Rows ``first`` to ``last`` (exclusive) as (bands, last - first, W).

        Raises:
            DatasetError: the file is damaged there.
        """
        import rasterio

        try:
            return self._raster.read(window=((first, last), (0, self.width)))
        except rasterio.errors.RasterioError as error:
            reason = " ".join(str(error).split())
            raise DatasetError(
                f"Strips: {printable(self._path)} is damaged in rows {first} to {last}: {reason}"
            ) from None


@contextlib.contextmanager
def open_strips(path: Path, *, max_pixels: int) -> Iterator[Strips]:
    """Open a PNG, TIFF or JPEG by its header; memory is that of the rows that are asked for.

    Raises:
        DatasetError: no image, not 8-bit, or more than ``max_pixels`` pixels.
    """
    require("open_strips", "rasterio")
    import rasterio

    # GDAL would fill with black what a JPEG lacks, and keep blocks in a twentieth of the memory (here in 64 MB)
    options = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_PAM_ENABLED": False, "GDAL_CACHEMAX": 64 * 2**20}
    with rasterio.Env(**options), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            opened = rasterio.open(path, driver=_driver(path))
        except rasterio.errors.RasterioError:
            raise _no_image(path) from None
        with opened as raster:
            if set(raster.dtypes) != {"uint8"}:
                kinds = ", ".join(sorted(set(raster.dtypes)))
                raise DatasetError(f"open_strips: {printable(path)} has bands of {kinds}; expected 8 bits")
            if raster.width * raster.height > max_pixels:
                raise DatasetError(
                    f"open_strips: {printable(path)} is too large; expected at most {max_pixels} pixels, "
                    f"got {raster.width} x {raster.height}"
                )
            yield Strips(raster, path)


def _driver(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError:
        raise _no_image(path) from None
    for mark, driver in _DRIVERS.items():
        if head.startswith(mark):
            return driver
    raise _no_image(path)


def _no_image(path: Path) -> DatasetError:
    return DatasetError(
        f"open_strips: {printable(path)} is not an image or is cut short; expected PNG, TIFF or JPEG, "
        f"got first bytes {first_bytes(path)}"
    )
