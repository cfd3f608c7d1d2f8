# SPDX-License-Identifier: Apache-2.0
"""Scenes as they are read, and what is said of how they are."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from drseg_core.config.reading import Reading, scale_text
from drseg_core.data.raster import RasterReader, open_raster
from drseg_core.data.values import nodata_hint
from drseg_core.errors import RasterError

SceneReader = RasterReader
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_scene(
    path: str | Path, *, bands: Sequence[int] | None = None, reading: Reading | None = None
) -> Iterator[SceneReader]:
    """Open a scene for reading.

    Args:
        path: a raster file that GDAL reads, such as GeoTIFF, PNG, JPEG or VRT.
        bands: one or three band numbers from 1, as red, green and blue; by default what the file says.
        reading: nodata, scale and bands.

    Raises:
        RasterError: no such file, not an image, or no usable band.
        ConfigError: ``bands`` are not in the file.
    """
    reading = reading or Reading()
    if bands is not None:
        reading = dataclasses.replace(reading, bands=tuple(bands))
    with open_raster(Path(path), origin="open_scene") as source:
        yield RasterReader(source, Path(path), reading)


def describe(scene: SceneReader) -> None:
    """Say how a scene is read: bands and scale, and what may be wrong with them."""
    name = scene.path.name
    order = ", ".join(map(str, scene.bands))
    label = "red, green, blue are bands" if len(scene.bands) == 3 else "gray is band"
    _log.info("%s: %s %s (%s)", name, label, order, scene.band_source)
    pairs = scene.pairs()
    if pairs is not None:
        measured = scene.reading.scale is None or scene.scale_warning is not None
        how = "measured, 2 and 98 % of this scene" if measured else "as given or as in training"
        _log.info("%s: %s scaled by %s (%s)", name, scene.dtype, scale_text(pairs), how)
    extreme = None
    # what is damaged is said where it is used
    with contextlib.suppress(RasterError):
        extreme = scene.extreme_value()
    for message in (scene.scale_warning, scene.window_warning(), scene.band_warning(), nodata_hint(name, extreme)):
        if message is not None:
            _log.warning("%s", message)
