# SPDX-License-Identifier: Apache-2.0
"""A procedural scene with a place on the map, for demonstrations and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from drseg_core.data.dataset import IGNORE
from drseg_core.data.synthetic import Vocabulary, render_scene
from drseg_core.extras import require
from drseg_core.files import atomic_path

__all__ = ["write_synthetic_scene"]


def write_synthetic_scene(
    path: str | Path,
    *,
    width: int = 600,
    height: int = 400,
    seed: int = 0,
    vocabulary: Vocabulary = "full",
    crs: Any = "EPSG:32632",
    origin: tuple[float, float] = (356000.0, 5645000.0),
    resolution: float = 0.5,
    dtype: str = "uint8",
    bands: int = 3,
    collar: int = 0,
    mask_path: str | Path | None = None,
) -> Path:
    """Write a GeoTIFF of the objects of :mod:`drseg_core.data.synthetic`, north up, in UTM by default.

    Args:
        path: file to write.
        width: W in pixels.
        height: H in pixels.
        seed: seed of the scene.
        vocabulary: ``seen`` or ``full``.
        crs: anything that rasterio takes for a CRS.
        origin: x and y of the upper left corner, in the CRS.
        resolution: side of a pixel, in the CRS.
        dtype: ``uint8`` or ``uint16`` (values times 40 plus 300, as a sensor's).
        bands: 3, or more: those beyond RGB repeat the green one.
        collar: pixels of nodata (value 0) along the edges.
        mask_path: also write the class ids there, on the same grid, 255 in the collar.

    Returns:
        ``path``.

    Examples:
        >>> from drseg_core.scenes.reader import open_scene
        >>> from drseg_core.scenes.synthetic import write_synthetic_scene
        >>> path = write_synthetic_scene("drawn.tif", width=80, height=60)
        >>> with open_scene(path) as scene:
        ...     scene.height, scene.width
        (60, 80)
    """
    require("write_synthetic_scene", "rasterio")
    import rasterio
    from rasterio.transform import from_origin

    image, mask = render_scene(0, seed=seed, split="test", vocabulary=vocabulary, size=(height, width))
    data = np.maximum(image, 1).transpose(2, 0, 1)
    data = np.concatenate([data[:3], *[data[1:2]] * (bands - 3)])
    if dtype == "uint16":
        data = data.astype(np.uint16) * 40 + 300
    inside = np.zeros((height, width), bool)
    inside[collar : height - collar, collar : width - collar] = True
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "crs": crs,
        "transform": from_origin(*origin, resolution, resolution),
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
    }
    path = Path(path)
    with atomic_path(path) as temporary:
        nodata = 0 if collar else None
        with rasterio.open(temporary, "w", count=bands, dtype=dtype, nodata=nodata, **profile) as target:
            target.write(np.where(inside, data, 0).astype(dtype))
    if mask_path is not None:
        with atomic_path(mask_path) as temporary:
            with rasterio.open(temporary, "w", count=1, dtype="uint8", nodata=IGNORE, **profile) as target:
                target.write(np.where(inside, mask, IGNORE).astype(np.uint8), 1)
    return path
