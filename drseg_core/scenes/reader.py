# SPDX-License-Identifier: Apache-2.0
"""Scenes as they are read: any GDAL raster file, in bands of rows, as 8-bit RGB."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.data.images import first_bytes
from drseg_core.errors import ConfigError, RasterError
from drseg_core.extras import require

STRETCH = (2.0, 98.0)
"""Percentiles that become 0 and 255 where a scene is not 8-bit."""

_SAMPLED_SIDE = 1024


class SceneReader:
    """An open raster.

    8-bit values are taken as they are. Other types are stretched linearly, each band between its 2nd and 98th
    percentile, measured once per scene on valid pixels of a reduced copy (at most 1024 pixels a side). A single band
    is repeated three times, or looked up in its colour table. Pixels are used as the file stores them; an EXIF
    rotation is not applied, so that the map lies on the file's own grid.

    A pixel is invalid where the file says so in all its bands (nodata value, alpha 0, mask band), or where a band that
    is used is not finite.
    """

    def __init__(self, source: Any, path: Path, bands: Sequence[int] | None) -> None:
        self.source, self.path = source, path
        self.height, self.width = int(source.height), int(source.width)
        self.bands = self._choose(bands)
        self._colors: NDArray[np.uint8] | None = None
        self._low = self._high = np.empty(0, np.float32)
        kinds = [source.dtypes[b - 1] for b in self.bands]
        if any(k.startswith("complex") for k in kinds):
            raise RasterError(f"read_scene: {path} has complex bands; expected real numbers, got {', '.join(kinds)}")
        self.is_byte = all(k == "uint8" for k in kinds)
        if self.is_byte and source.count == 1:
            with contextlib.suppress(ValueError):
                table = source.colormap(1)
                self._colors = np.array([table.get(i, (0, 0, 0, 0))[:3] for i in range(256)], np.uint8)
        if not self.is_byte:
            self._measure()

    def _choose(self, bands: Sequence[int] | None) -> tuple[int, ...]:
        count = self.source.count
        if bands is None:
            if not count:
                raise RasterError(f"read_scene: {self.path} has no band; expected an image")
            if count == 2 and self.source.colorinterp[1].name != "alpha":
                raise ConfigError(f"read_scene: bands are not given; expected one or three of {self.path}'s 2 bands")
            return (1, 2, 3) if count >= 3 else (1,)
        if len(bands) not in (1, 3) or any(not 1 <= b <= count for b in bands):
            raise ConfigError(
                f"read_scene: bands are not usable; expected one or three numbers from 1 to {count}, got {list(bands)}"
            )
        return tuple(bands)

    def _measure(self) -> None:
        scale = max(1.0, max(self.height, self.width) / _SAMPLED_SIDE)
        shape = (max(1, round(self.height / scale)), max(1, round(self.width / scale)))
        with _explained(self.path, "a reduced copy"):
            value = self.source.read(list(self.bands), out_shape=(len(self.bands), *shape)).astype(np.float32)
            valid = self.source.dataset_mask(out_shape=shape) != 0
        valid &= np.isfinite(value).all(0)
        limits = np.percentile(value[:, valid], STRETCH, axis=1) if valid.any() else np.zeros((2, len(self.bands)))
        self._low, self._high = limits.astype(np.float32)[:, :, None, None]

    def rows(self, first: int, last: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """Rows ``first`` to ``last`` (exclusive): (3, n, W) uint8 RGB, and (n, W) which pixels are valid.

        Raises:
            RasterError: they cannot be decoded; nothing is ever filled in.
        """
        from rasterio.windows import Window

        window = Window(0, first, self.width, last - first)
        with _explained(self.path, f"rows {first} to {last}"):
            value = self.source.read(list(self.bands), window=window)
            valid = self.source.dataset_mask(window=window) != 0
        if self._colors is not None:
            value = self._colors[value[0]].transpose(2, 0, 1)
        elif not self.is_byte:
            wide = value.astype(np.float32)
            finite = np.isfinite(wide)
            valid &= finite.all(0)
            share = (np.where(finite, wide, self._low) - self._low) / np.maximum(self._high - self._low, 1e-12)
            value = (np.clip(share, 0, 1) * 255).round().astype(np.uint8)
        if len(value) == 1:
            value = np.repeat(value, 3, axis=0)
        return torch.from_numpy(np.ascontiguousarray(value)), valid


@contextlib.contextmanager
def _explained(path: Path, part: str) -> Iterator[None]:
    import rasterio

    try:
        yield
    except (rasterio.errors.RasterioError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        raise RasterError(f"read_scene: {path} is damaged or incomplete; expected to decode {part}: {reason}") from None


@contextlib.contextmanager
def open_scene(path: str | Path, *, bands: Sequence[int] | None = None) -> Iterator[SceneReader]:
    """Open a scene for reading.

    Args:
        path: a raster file that GDAL reads, such as GeoTIFF, PNG, JPEG or VRT.
        bands: one or three band numbers from 1, as red, green and blue; by default the first three, or the only one.

    Raises:
        RasterError: no such file, not an image, or no usable band.
        ConfigError: ``bands`` are not in the file.
    """
    require("open_scene", "rasterio")
    import rasterio

    path = Path(path)
    try:
        is_file = path.is_file()
    except OSError as error:
        raise RasterError(f"read_scene: {path} cannot be opened: {error.strerror}") from None
    if not is_file:
        raise RasterError(f"read_scene: {path} is not a file; expected an image")
    # libjpeg only warns of a file that is cut short, and GDAL would hand out gray
    with rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING="YES"), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            # an absolute path is never taken for the address of something remote
            source = rasterio.open(path.absolute())
        except (rasterio.errors.RasterioError, OSError) as error:
            raise RasterError(
                f"read_scene: {path} is not an image that GDAL reads; expected for example GeoTIFF, PNG or JPEG, "
                f"got first bytes {first_bytes(path)}: {' '.join(str(error).split())}"
            ) from None
        with source:
            yield SceneReader(source, path, bands)
