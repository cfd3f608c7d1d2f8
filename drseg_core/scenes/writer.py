# SPDX-License-Identifier: Apache-2.0
"""GeoTIFF results on exactly the grid of their scene: Cloud Optimized, with overviews."""

from __future__ import annotations

import contextlib
import errno
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drseg_core.data.dataset import IGNORE
from drseg_core.errors import RasterError, ResourceError
from drseg_core.files import disk_is_full

LEVELS = 250
"""Steps of a value from 0 to 1 that is stored in 8 bits: 0 to 250, with the scale in the metadata; 255 is nodata."""

_ROUNDING = 2**-20
"""An entropy of float32 shares is not known better: the largest share is rounded to 2**-24, and a sum over classes adds
up such errors. It is so near 0 too: where the best class has a share of 1 as rounded, the entropy may be 1e-16.
"""

_BLOCK = 256
_COG = {"driver": "COG", "compress": "DEFLATE", "blocksize": 512, "bigtiff": "IF_SAFER", "overviews": "AUTO"}


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Any error while ``path`` is written becomes a ResourceError that names it."""
    import rasterio
    from rasterio._err import CPLE_BaseError

    try:
        yield
    # rasterio lets some errors of GDAL through as they are
    except (rasterio.errors.RasterioError, CPLE_BaseError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if getattr(error, "errno", None) == errno.ENOSPC or disk_is_full(path):
            reason = f"the disk is full ({reason})"
        raise ResourceError(f"predict_scene: {path} cannot be written: {reason}") from None


@contextlib.contextmanager
def raster_like(
    scene: Any,
    temporary: Path,
    path: Path,
    *,
    dtype: str,
    nodata: float,
    count: int = 1,
    resampling: str = "NEAREST",
    stretch: bool = False,
) -> Iterator[Any]:
    """A new GeoTIFF with the size, CRS, transform, ground control points and RPCs of an open scene.

    Values are written into a file beside ``temporary``. When the context ends, this becomes a Cloud Optimized GeoTIFF
    at ``temporary``, which is read once more as a check.

    Args:
        scene: from :func:`drseg_core.scenes.reader.open_scene`.
        temporary: where the result is put.
        path: its name in messages.
        dtype: dtype of the values that are written.
        nodata: nodata value of these.
        count: number of bands.
        resampling: how overviews are resampled.
        stretch: the result is 8-bit, from the lowest value that was written to the highest, with scale and offset in
            the metadata. The values are from 0 to 1, and those that differ by rounding alone are a constant.

    Raises:
        ResourceError: it cannot be written in full; the message names ``path``.
        RasterError: GeoTIFF cannot hold this CRS or transform.
    """
    import rasterio

    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": scene.height,
        "width": scene.width,
        "count": count,
        "dtype": dtype,
        "nodata": nodata,
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "interleave": "band",
        "compress": "deflate",
        "zlevel": 1,
        "bigtiff": "if_safer",
        **_georeference(scene),
    }
    working, scaled = (temporary.with_name(f"{temporary.stem}.{word}.tif") for word in ("work", "scaled"))
    # nothing may be left beside the file, and GDAL puts what a GeoTIFF cannot hold into an .aux.xml
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with written(path):
                target = rasterio.open(working, "w", **profile)
            try:
                _place(target, scene)
                yield target
            except BaseException:
                with contextlib.suppress(Exception):
                    target.close()
                raise
            with written(path):
                target.close()
                if stretch:
                    _stretched(working, scaled, scene)
                _optimized(scaled if stretch else working, temporary, resampling)
                kept = _verified(temporary)
        finally:
            for left in (working, scaled):
                left.unlink(missing_ok=True)
        _check_kept(path, scene, kept)


def check_place(scene: Any) -> None:
    """Refuse a CRS or transform that GeoTIFF cannot keep, before any work is done.

    Raises:
        RasterError: the message names it.
    """
    import rasterio
    from rasterio.io import MemoryFile

    profile: dict[str, Any] = {"driver": "GTiff", "height": 1, "width": 1, "count": 1, "dtype": "uint8"}
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with memory.open(**profile, **_georeference(scene)):
                pass
            with memory.open() as check:
                kept = check.crs, check.transform
        except rasterio.errors.RasterioError as error:
            kept = " ".join(str(error).split()), scene.transform
    _check_kept("the map", scene, kept)


def _georeference(scene: Any) -> dict[str, Any]:
    found = {"crs": scene.crs} if scene.crs else {}
    return found if scene.transform.is_identity else {**found, "transform": scene.transform}


def _check_kept(path: object, scene: Any, kept: tuple[Any, Any]) -> None:
    if kept != (scene.crs, scene.transform):
        raise RasterError(
            f"predict_scene: {path} would not keep the CRS or transform of the scene, as GeoTIFF has no place for it; "
            f"expected {scene.crs} and {tuple(scene.transform)[:6]}, got {kept[0]} and {tuple(kept[1])[:6]}"
        )


def _place(target: Any, scene: Any) -> None:
    points, points_crs = scene.gcps
    if points:
        target.gcps = (points, points_crs)
    if scene.rpcs:
        target.rpcs = scene.rpcs
    if "AREA_OR_POINT" in scene.source.tags():
        target.update_tags(AREA_OR_POINT=scene.source.tags()["AREA_OR_POINT"])


def _stretched(working: Path, scaled: Path, scene: Any) -> None:
    """Values from 0 to 1 in 8 bits, over their own range."""
    import rasterio

    low, high = np.inf, -np.inf
    with rasterio.open(working) as source:
        for _, window in source.block_windows(1):
            value = source.read(1, window=window)
            inside = value[np.isfinite(value)]
            if inside.size:
                low, high = min(low, float(inside.min())), max(high, float(inside.max()))
        constant = None
        # rounding would look like something of the scene
        if 0 <= high - low <= _ROUNDING:
            constant = high if high > _ROUNDING else 0.0
            # a constant is the end of its range, which begins at 0
            low, high = 0.0, constant
        low, high = (low, high) if low < high else (0.0, 1.0)
        step = (high - low) / LEVELS
        profile = {**source.profile, "dtype": "uint8", "nodata": IGNORE}
        if source.transform.is_identity:
            # GDAL would say that ground control points clear it
            del profile["transform"]
        with rasterio.open(scaled, "w", **profile) as target:
            _place(target, scene)
            target.scales, target.offsets = (step,), (low,)
            target.descriptions = source.descriptions
            for _, window in source.block_windows(1):
                value = source.read(1, window=window)
                share = ((value if constant is None else constant) - low) / step
                share = np.where(np.isfinite(value), share, IGNORE)
                target.write(share.round().astype(np.uint8), 1, window=window)


def _optimized(working: Path, temporary: Path, resampling: str) -> None:
    import rasterio.shutil

    # an empty file takes the place, and GDAL would not replace it
    temporary.unlink()
    rasterio.shutil.copy(working, temporary, overview_resampling=resampling, **_COG)


def _verified(path: Path) -> tuple[Any, Any]:
    """CRS and transform of the written file, which is decoded, since GDAL may report a full disk only in its log."""
    import rasterio

    with rasterio.open(path) as check:
        for _, window in check.block_windows(1):
            check.read(window=window)
        return check.crs, check.transform


def as_levels(value: Any, valid: Any) -> Any:
    """Values from 0 to 1 as 8-bit steps (``LEVELS``), 255 where they are not valid."""
    return np.where(valid, np.rint(np.clip(value, 0, 1) * LEVELS), IGNORE).astype(np.uint8)


def describe_levels(target: Any, names: Sequence[str]) -> None:
    """Scale and names of bands that hold steps."""
    target.scales = (1 / LEVELS,) * len(names)
    target.offsets = (0.0,) * len(names)
    for band, name in enumerate(names, 1):
        target.set_band_description(band, name)


def describe_classes(target: Any, class_names: Sequence[str], table: Any) -> None:
    """Put colour table and class names into a class raster: tags ``class_0`` ..., and ``class_names`` as JSON."""
    colors = {i: (*(int(v) for v in color), 255) for i, color in enumerate(table)}
    target.write_colormap(1, {**colors, IGNORE: (0, 0, 0, 0)})
    target.update_tags(
        **{f"class_{i}": name for i, name in enumerate(class_names)},
        class_names=json.dumps(list(class_names), ensure_ascii=False),
    )
    target.set_band_description(1, "class")
