# SPDX-License-Identifier: Apache-2.0
"""The one reader of raster files: any GDAL raster, in windows, as 8-bit RGB with the pixels that are valid."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.config.reading import Reading
from drseg_core.data.images import first_bytes
from drseg_core.data.values import STRETCH, extreme_value, highest_values, holds, limits_array, spread, stretched
from drseg_core.errors import ConfigError, RasterError
from drseg_core.extras import require

CACHE_MB = 64
"""GDAL's cache of blocks; its own default is a twentieth of the memory."""

WHOLE_MB = 128
"""A file that can only be decoded as a whole gets a warning from this size on."""

_SAMPLED_SIDE = 1024
_COLORS = ("red", "green", "blue")
# Sentinel-2 and Landsat 8 and 9 number these three alike
_DESCRIBED = tuple(
    re.compile(rf"(?<![a-z0-9])({word}|b0?{number})(?![a-z0-9])", re.IGNORECASE)
    for word, number in zip(_COLORS, (4, 3, 2), strict=True)
)
_EDGE = re.compile(r"red.?edge", re.IGNORECASE)


# files that only say where the pixels or shapes are
_POINTS = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<(VRTDataset|OGRVRTDataSource|GDAL_WMS|GDAL_WMTS|WMT_MS_Capabilities)")
_REMOTE = re.compile(rb"://|/vsi(curl|s3|gs|az|adls|oss|swift|webhdfs)")


class RasterReader:
    """An open raster.

    8-bit values are taken as they are, those of fewer bits fill 0 to 255, others are stretched linearly. This is done
    by the given scale, or for each band between its 2nd and 98th percentile. Percentiles are measured once per file, on
    valid pixels of a reduced copy (at most 1024 pixels a side). A single band is repeated three times, or looked up in
    its colour table. Pixels are used as the file stores them. An EXIF rotation is not applied, so that a map lies on
    the file's own grid.

    Red, green and blue are the bands whose colour interpretation says so, else those whose descriptions do (``B04``,
    ``red``), else 1, 2, 3. ``band_source`` says which.

    A pixel is invalid if the file says so in all its bands (nodata value, alpha 0, mask band). It is also invalid if
    all used bands have the value ``reading.nodata``, or if one of them is not finite.
    """

    def __init__(self, source: Any, path: Path, reading: Reading, *, origin: str = "read_scene") -> None:
        self.source, self.path, self.reading, self._origin = source, path, reading, origin
        self.height, self.width = int(source.height), int(source.width)
        self.bands, self.band_source = self._choose(reading.bands)
        self._colors: NDArray[np.uint8] | None = None
        kinds = [source.dtypes[b - 1] for b in self.bands]
        if any(k.startswith("complex") for k in kinds):
            raise RasterError(f"{origin}: {path} has complex bands; expected real numbers, got {', '.join(kinds)}")
        # GDAL makes red, green and blue of these if they are 8-bit, without their profile
        space = source.tags(ns="IMAGE_STRUCTURE").get("SOURCE_COLOR_SPACE")
        if space in ("CMYK", "YCbCrK") or any(color.name == "cyan" for color in source.colorinterp):
            raise RasterError(f"{origin}: {path} has inks (CMYK); expected red, green and blue")
        if space == "CIELAB":
            raise RasterError(f"{origin}: {path} is Lab; expected red, green and blue")
        self.dtype = kinds[0] if len(set(kinds)) == 1 else ", ".join(kinds)
        self.is_byte = all(k == "uint8" for k in kinds)
        if source.count == 1:
            with contextlib.suppress(ValueError):
                table = source.colormap(1)
                if not self.is_byte:
                    raise RasterError(f"{origin}: {path} has a colour table for {kinds[0]}; expected one for uint8")
                colors = np.array([table.get(i, (0, 0, 0, 255)) for i in range(256)], np.uint8)
                self._colors, self._shown = colors[:, :3], colors[:, 3] > 0
        self._highest = highest_values(source, self.bands) if self.is_byte and self._colors is None else None
        self._sample: tuple[NDArray[Any], NDArray[np.bool_]] | None = None
        self._given = reading.scale if reading.fits(self.dtype) else None
        if self._given is not None and len(self._given) not in (1, len(self.bands)):
            raise ConfigError(
                f"{origin}: scale does not fit; expected 1 or {len(self.bands)} pairs LOW,HIGH, got {len(self._given)}"
            )

    @property
    def has_color_table(self) -> bool:
        """Whether its one band holds places in a table of colours."""
        return self._colors is not None

    @property
    def crs(self) -> Any:
        return self.source.crs

    @property
    def transform(self) -> Any:
        return self.source.transform

    @property
    def gcps(self) -> Any:
        """Ground control points, and their CRS."""
        return self.source.gcps

    @property
    def rpcs(self) -> Any:
        return self.source.rpcs

    def _choose(self, bands: Sequence[int] | None) -> tuple[tuple[int, ...], str]:
        count = self.source.count
        if bands is not None:
            if len(bands) not in (1, 3) or any(not 1 <= b <= count for b in bands):
                raise ConfigError(
                    f"{self._origin}: bands do not fit {self.path}; expected one or three numbers from 1 to {count}, "
                    f"got {list(bands)} (--bands chooses them; by default a run takes those of its training)"
                )
            return tuple(bands), "as given"
        if not count:
            raise RasterError(f"{self._origin}: {self.path} has no band; expected an image")
        colors = [color.name for color in self.source.colorinterp]
        if count == 2 and colors[1] != "alpha":
            raise ConfigError(
                f"{self._origin}: bands are not given; expected one or three of {self.path}'s 2 bands (--bands)"
            )
        if count < 3:
            return (1,), "the only one"
        if all(colors.count(color) == 1 for color in _COLORS):
            return tuple(colors.index(color) + 1 for color in _COLORS), "by colour interpretation"
        described = self.described_bands()
        if described is not None:
            return described, "by band descriptions"
        return (1, 2, 3), "the first three, as nothing says which"

    def described_bands(self) -> tuple[int, ...] | None:
        """Red, green and blue by the descriptions of the bands; None if these do not tell."""
        texts = [_EDGE.sub("", text or "") for text in self.source.descriptions]
        found = [[i + 1 for i, text in enumerate(texts) if pattern.search(text)] for pattern in _DESCRIBED]
        return tuple(some[0] for some in found) if all(len(some) == 1 for some in found) else None

    def band_warning(self) -> str | None:
        """A warning if the choice of bands may be wrong."""
        if self.reading.bands is not None or self.source.count < 3:
            return None
        described = self.described_bands()
        if described is not None and described != self.bands:
            order = ",".join(map(str, described))
            return f"{self.path.name}: descriptions of the bands say otherwise; --bands {order} takes them"
        if self.source.count > 3 and self.band_source.startswith("the first"):
            return (
                f"{self.path.name}: nothing says which of the {self.source.count} bands are red, green and blue; "
                "--bands R,G,B does"
            )
        return None

    def nodata_warning(self) -> str | None:
        """A warning of a nodata value that no pixel can have."""
        value = self.reading.nodata
        if value is None or any(holds(np.dtype(self.source.dtypes[band - 1]), value) for band in self.bands):
            return None
        return f"{self.path.name}: --nodata {value:.10g} is no value of {self.dtype}, so it leaves nothing out"

    def turn_warning(self) -> str | None:
        """A warning of a photograph that viewers, and data sets, show turned."""
        if self.source.tags().get("EXIF_Orientation", "1") == "1":
            return None
        return (
            f"{self.path.name}: its EXIF data say that it is to be turned, and the map lies as its pixels are stored; "
            "exiftran -a, or saving it in an image editor, turns the pixels"
        )

    def window_warning(self) -> str | None:
        """A warning of a file that GDAL has to decode as a whole; None if parts of it can be read."""
        from PIL.JpegImagePlugin import JpegImageFile
        from PIL.PngImagePlugin import PngImageFile

        block = max(h * w for h, w in self.source.block_shapes)
        size = self.height * self.width * len(self.bands) * np.dtype(self.source.dtypes[0]).itemsize / 2**20
        driver, why = self.source.driver, None
        if driver in ("PNG", "JPEG"):
            # Image.open would refuse large ones, of which no pixel is read here
            kind = PngImageFile if driver == "PNG" else JpegImageFile
            with contextlib.suppress(OSError, SyntaxError), kind(self.path) as image:
                why = "interlaced" if image.info.get("interlace") or image.info.get("progressive") else None
        elif driver in ("WEBP", "GIF", "BIGGIF"):
            why = f"a {driver}"
        elif block > self.height * self.width // 2:
            why = "stored in one block"
        if why is None or size < WHOLE_MB:
            return None
        return (
            f"{self.path.name}: it is {why}, so all {size:.0f} MB of it are in memory at a time; "
            f"gdal_translate -co TILED=YES {self.path.name} tiled.tif makes a file that can be read in parts"
        )

    def sample(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """A reduced copy: stored values of the bands in use (B, h, w), and which pixels are valid."""
        if self._sample is None:
            part = self._extent()
            scale = max(1.0, max(part.height, part.width) / _SAMPLED_SIDE)
            shape = (max(1, round(part.height / scale)), max(1, round(part.width / scale)))
            with self._explained("a reduced copy"):
                value = self.source.read(list(self.bands), window=part, out_shape=(len(self.bands), *shape))
                valid = self.source.dataset_mask(window=part, out_shape=shape) != 0
            self._sample = spread(value, self._highest), valid & self._present(value)
        return self._sample

    def _extent(self) -> Any:
        """The part of the file that is of interest, as a window of it."""
        from rasterio.windows import Window

        return Window(0, 0, self.width, self.height)

    def extreme_value(self) -> tuple[float, float] | None:
        """A value that looks like undeclared nodata, and its share of the valid pixels."""
        # of a colour table, or of few bits, an end is a value like others
        if self._colors is not None or self._highest is not None:
            return None
        return extreme_value(*self.sample())

    def _present(self, value: NDArray[Any]) -> NDArray[np.bool_]:
        present = np.isfinite(value).all(0) if value.dtype.kind == "f" else np.ones(value.shape[1:], bool)
        if self.reading.nodata is not None:
            present &= ~(value == self.reading.nodata).all(0)
        if self._colors is not None:
            # GDAL takes one transparent colour for nodata, and forgets several
            present &= self._shown[value[0]]
        return present

    @property
    def scale_warning(self) -> str | None:
        """A warning if the scale of the run is for values of another type."""
        if self.reading.scale == self._given:
            return None
        return (
            f"{self.path.name}: the scale of the run is for {self.reading.depth}, this is {self.dtype}; "
            "it is read without (--scale gives one)"
        )

    @functools.cached_property
    def limits(self) -> NDArray[np.float32] | None:
        """Values that become 0 and 255, for :func:`stretched`; None if values stay. Measured when needed."""
        if self._given is not None:
            return limits_array(self._given)
        if self._colors is not None or self.is_byte and not self.reading.measure:
            return None
        value, valid = self.sample()
        inside = value[:, valid].astype(np.float32)
        limits = np.percentile(inside, STRETCH, axis=1) if valid.any() else np.zeros((2, len(self.bands)))
        return limits.astype(np.float32)[:, :, None, None]

    def pairs(self) -> list[tuple[float, float]] | None:
        """LOW and HIGH of each band; None if 8-bit values stay."""
        if self.limits is None:
            return None
        return [(float(low), float(high)) for low, high in self.limits[:, :, 0, 0].T]

    def rows(self, first: int, last: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """Rows ``first`` to ``last`` (exclusive) in full width; see :meth:`window`."""
        return self.window(first, last, 0, self.width)

    def window(self, top: int, bottom: int, left: int, right: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """A part of the raster: (3, n, m) uint8 RGB, and (n, m) which pixels are valid.

        Raises:
            RasterError: it cannot be decoded; nothing is ever filled in.
        """
        from rasterio.windows import Window

        window = Window(left, top, right - left, bottom - top)
        with self._explained(f"rows {top} to {bottom}"):
            value = self.source.read(list(self.bands), window=window)
            valid = self.source.dataset_mask(window=window) != 0
        return self._rgb(spread(value, self._highest)), valid & self._present(value)

    def stored(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        """The first band in use as the file stores it."""
        from rasterio.windows import Window

        with self._explained(f"rows {top} to {bottom}"):
            return self.source.read(self.bands[0], window=Window(left, top, right - left, bottom - top))

    def _rgb(self, value: NDArray[Any]) -> Tensor:
        if self._colors is not None:
            value = self._colors[value[0]].transpose(2, 0, 1)
        elif self.limits is not None:
            value = stretched(value, self.limits)
        if len(value) == 1:
            value = np.repeat(value, 3, axis=0)
        return torch.from_numpy(np.ascontiguousarray(value))

    @contextlib.contextmanager
    def _explained(self, part: str) -> Iterator[None]:
        import rasterio

        try:
            yield
        except (rasterio.errors.RasterioError, OSError, ValueError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise RasterError(
                f"{self._origin}: {self.path} is damaged or incomplete; expected to decode {part}: {reason}"
            ) from None


def names_files(path: str | os.PathLike[str]) -> bool:
    """Whether a file, such as a VRT, only says where pixels or shapes are."""
    return _pointer(path) is not None


def points_elsewhere(path: str | os.PathLike[str]) -> bool:
    """Whether a file only says where pixels or shapes are, and that is on a network."""
    content = _pointer(path)
    return content is not None and _names_a_network(content)


def _pointer(path: str | os.PathLike[str]) -> bytes | None:
    """The content of a file that only says where pixels or shapes are; None for any other."""
    # what cannot be read is said where it is opened
    with contextlib.suppress(OSError), open(path, "rb") as file:
        content = file.read(1024)
        if _POINTS.match(content):
            return content + file.read()
    return None


def _names_a_network(content: bytes) -> bool:
    return _REMOTE.search(re.sub(rb'xmlns(:\w+)?="[^"]*"|"http://www.opengis.net[^"]*"', b"", content)) is not None


@contextlib.contextmanager
def open_raster(path: Path, *, origin: str, driver: str | None = None, address: str | None = None) -> Iterator[Any]:
    """An open rasterio data set; GDAL's cache stays small, and a file that is cut short is an error.

    Args:
        path: the file.
        origin: begins messages.
        driver: format that the file must have; any by default.
        address: where it lies in one of GDAL's virtual file systems, if it is no file.

    Raises:
        RasterError: no such file, or no image.
    """
    require(origin, "rasterio")
    import rasterio

    try:
        is_file = path.is_file()
    except OSError as error:
        raise RasterError(f"read_scene: {path} cannot be opened: {error.strerror}") from None
    if not is_file and address is None:
        raise RasterError(f"read_scene: {path} is not a file; expected an image")
    # libjpeg only warns of a file that is cut short, and GDAL would hand out gray; rasterio takes the cache in bytes
    options: dict[str, Any] = {"GDAL_ERROR_ON_LIBJPEG_WARNING": "YES", "GDAL_CACHEMAX": CACHE_MB * 2**20}
    if address is not None:
        # what lies beside it is not asked for, and a server may be busy for a moment
        options |= {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_HTTP_MAX_RETRY": 3}
    with rasterio.Env(**options), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            # an absolute path is never taken for the address of something remote
            source = rasterio.open(address or path.absolute(), driver=driver)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise RasterError(
                f"read_scene: {address or path} is not an image that GDAL reads; expected for example GeoTIFF, PNG or "
                f"JPEG, got {'an error' if address else f'first bytes {first_bytes(path)}'}: "
                f"{' '.join(str(error).split())}"
            ) from None
        with source:
            yield source
