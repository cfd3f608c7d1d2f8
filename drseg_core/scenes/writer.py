# SPDX-License-Identifier: Apache-2.0
"""GeoTIFF results that lie exactly on the grid of the scene they were made from."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from drseg_core.data.dataset import IGNORE
from drseg_core.errors import RasterError, ResourceError


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Whatever stops the writing of ``path`` becomes a ResourceError that names it."""
    import rasterio

    try:
        yield
    except (rasterio.errors.RasterioError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ResourceError(f"predict_scene: {path} cannot be written: {reason}") from None


@contextlib.contextmanager
def raster_like(source: Any, temporary: Path, path: Path, *, dtype: str, nodata: float) -> Iterator[Any]:
    """A new one-band GeoTIFF with the size, CRS, transform, ground control points and RPCs of ``source``.

    It is written to ``temporary`` and read once more before the context ends.

    Raises:
        ResourceError: it cannot be written in full; the message names ``path``.
        RasterError: GeoTIFF cannot hold this CRS or transform.
    """
    import rasterio

    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": source.height,
        "width": source.width,
        "count": 1,
        "dtype": dtype,
        "nodata": nodata,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
        "bigtiff": "if_safer",
    }
    if source.crs:
        profile["crs"] = source.crs
    points, points_crs = source.gcps
    if not source.transform.is_identity:
        profile["transform"] = source.transform
    # nothing may be left beside the file: what a GeoTIFF cannot hold GDAL would put into an .aux.xml
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with written(path):
            target = rasterio.open(temporary, "w", **profile)
        try:
            if points:
                target.gcps = (points, points_crs)
            if source.rpcs:
                target.rpcs = source.rpcs
            if "AREA_OR_POINT" in source.tags():
                target.update_tags(AREA_OR_POINT=source.tags()["AREA_OR_POINT"])
            yield target
        except BaseException:
            with contextlib.suppress(Exception):
                target.close()
            raise
        with written(path):
            target.close()
            # GDAL may report a full disk only in its log: what was written must decode
            with rasterio.open(temporary) as check:
                for _, window in check.block_windows(1):
                    check.read(1, window=window)
                kept = check.crs == source.crs and check.transform == source.transform
        if not kept:
            raise RasterError(
                f"predict_scene: {path} would not keep the CRS or transform of the scene; expected {source.crs} and "
                f"{tuple(source.transform)[:6]}, got {check.crs} and {tuple(check.transform)[:6]}"
            )


def describe_classes(target: Any, class_names: Sequence[str], table: Any) -> None:
    """Put colour table and class names into a class raster: tags ``class_0`` ..., and ``class_names`` as JSON."""
    colors = {i: (*(int(v) for v in color), 255) for i, color in enumerate(table)}
    target.write_colormap(1, {**colors, IGNORE: (0, 0, 0, 0)})
    target.update_tags(
        **{f"class_{i}": name for i, name in enumerate(class_names)},
        class_names=json.dumps(list(class_names), ensure_ascii=False),
    )
    target.set_band_description(1, "class")
