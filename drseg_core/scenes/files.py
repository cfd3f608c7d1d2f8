# SPDX-License-Identifier: Apache-2.0
"""The files of a map: their names, and whether they may be written."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drseg_core.data.raster import open_raster
from drseg_core.errors import ConfigError, RasterError
from drseg_core.files import check_room, free_bytes, remove_dead
from drseg_core.scenes.polygons import check_suffix

LEAST_BYTES = 0.01
"""For each pixel a map takes at least this while it is written: what one of nodata alone takes."""

USUAL_BYTES, BAND_BYTES, POLYGON_BYTES = 2.5, 1.7, 0.5
"""What a map usually takes while it is written, and what each band of scores and polygons add."""

BLOCK_BYTES = 5.0
"""Of each pixel in a block that is kept: class and uncertainty; each band of scores adds one."""

PAGE_MARK = b'<meta name="generator" content="drseg">'
"""The beginning of a page of a map; a page that does not begin so is never removed."""

_log = logging.getLogger(__name__)

__all__ = ["SceneFiles"]


class SceneFiles(NamedTuple):
    """What :func:`predict_scene` writes; what was not asked for is None.

    ``classes``, ``uncertainty``, ``scores`` and ``probabilities`` are GeoTIFFs, ``overlay`` is a PNG, ``areas`` a CSV,
    ``attributes`` what GDAL and ``style`` what QGIS reads beside the classes, ``polygons`` a vector file.

    Examples:
        >>> import drseg_core as drseg
        >>> files = drseg.predict("run", "scene.tif", out="map.tif", scores=True, progress=False)
        >>> [path.name for path in files if path is not None][:4]
        ['map.tif', 'map_overlay.png', 'map_uncertainty.tif', 'map_areas.csv']
        >>> files.scores.name
        'map_scores.tif'
    """

    classes: Path
    overlay: Path
    uncertainty: Path
    areas: Path
    attributes: Path
    style: Path
    scores: Path | None = None
    probabilities: Path | None = None
    polygons: Path | None = None

    def present(self) -> list[Path]:
        """Those that are written."""
        return [path for path in self if path is not None]


def scene_files(
    out_path: str | Path,
    *,
    scores: bool = False,
    probabilities: bool = False,
    polygons: str | Path | None = None,
) -> SceneFiles:
    """The outputs that belong to a map: ``map.tif``, ``map_overlay.png``, ``map_uncertainty.tif`` and so on."""
    path = Path(out_path)
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise ConfigError(f"predict_scene: out has a wrong suffix; expected a path ending in .tif, got {path}")
    if polygons is not None:
        check_suffix(Path(polygons))

    def beside(end: str) -> Path:
        return path.with_name(f"{path.stem}{end}")

    return SceneFiles(
        path,
        beside("_overlay.png"),
        beside("_uncertainty.tif"),
        beside("_areas.csv"),
        path.with_name(f"{path.name}.aux.xml"),
        beside(".qml"),
        beside("_scores.tif") if scores else None,
        beside("_probabilities.tif") if probabilities else None,
        None if polygons is None else Path(polygons),
    )


def leftovers(files: SceneFiles) -> list[Path]:
    """Files of a former map of the same name that would be taken for a part of this one.

    GDAL and SQLite would take them so, and people would take a page so.
    """
    path = files.classes
    bands = [path.with_name(f"{path.stem}_{word}.tif") for word in ("scores", "probabilities")]
    pictures = (path, files.overlay, files.uncertainty, *bands)
    beside = [raster.with_name(raster.name + end) for raster in pictures for end in (".aux.xml", ".ovr", ".msk")]
    if files.polygons is not None:
        beside += [files.polygons.with_name(files.polygons.name + end) for end in ("-wal", "-shm", "-journal")]
    if is_page(path.with_suffix(".html")):
        beside.append(path.with_suffix(".html"))
    return [other for other in (*bands, *beside) if other not in files and other.is_file()]


def _world_files(files: SceneFiles) -> list[Path]:
    """Files that GDAL takes for the place of a picture that has none itself."""
    found: dict[Path, None] = {}
    for picture in files.present():
        end = picture.suffix[1:].lower()
        if end in ("tif", "tiff", "png"):
            for one in (f"{end[0]}{end[-1]}w", f"{end}w", "wld", "tab"):
                found |= dict.fromkeys(picture.with_suffix(f".{word}") for word in (one, one.upper()))
    return [path for path in found if path.is_file()]


def _check_no_place(files: SceneFiles, source: Path) -> None:
    """Refuse world files beside the map of a scene without a place. They may belong to another picture, so they are
    never removed."""
    worlds = _world_files(files)
    if not worlds or not source.is_file():
        return
    # what cannot be opened is said where it is read
    with contextlib.suppress(RasterError), open_raster(source, origin="predict_scene") as scene:
        if scene.transform.is_identity:
            raise ConfigError(
                f"predict_scene: {worlds[0]} would give the map a place that the scene does not have; expected another "
                "path for the map, or no such file"
            )


def is_page(path: Path) -> bool:
    """Whether a file is the page of a map."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return PAGE_MARK in file.read(1024)
    return False


def check_outputs(
    image_path: str | Path,
    out_path: str | Path,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path | None] = (),
    **options: Any,
) -> SceneFiles:
    """The outputs of :func:`predict_scene`, after making sure that they may be written. Writes nothing.

    Args:
        image_path: the scene.
        out_path: the class raster.
        overwrite: outputs may exist.
        inputs: what else is read, such as the file of an area.
        options: those of :func:`scene_files`.

    Raises:
        ConfigError: an output exists, is an input or another output, cannot be written, has a wrong suffix, or a world
            file beside it would place the map of a scene without a place.
        RasterError: the system refuses the scene's path, such as one that is too long.
    """
    files, source = scene_files(out_path, **options), Path(image_path)
    try:
        source.exists()
    except OSError as error:
        raise RasterError(f"predict_scene: {source} cannot be opened: {error.strerror}") from None
    folders = dict.fromkeys(path.parent for path in files.present())
    seen: set[Path] = set()
    try:
        for path in (*files.present(), *leftovers(files)):
            check_input_stays(path, [source], "out is the scene itself")
            check_input_stays(path, inputs, "an output is an input")
            if path.is_dir() or path.exists() and not overwrite:
                # a call that was killed as it tidied may have left a folder for which nobody else would look
                remove_dead(path)
                raise ConfigError(f"predict_scene: {path} exists; expected a new path, or overwrite")
            if path.resolve() in seen:
                raise ConfigError(f"predict_scene: two outputs are one file; expected another path than {path}")
            seen.add(path.resolve())
        _check_no_place(files, source)
        folders = {_existing(folder): None for folder in folders}
    except OSError as error:
        raise ConfigError(f"predict_scene: {files.classes} cannot be written: {error.strerror}") from None
    for folder in folders:
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            name = files.classes if folder in files.classes.parents else files.polygons
            raise ConfigError(f"predict_scene: {name} cannot be written; expected a folder with write permission")
    return files


def check_input_stays(path: Path, inputs: Sequence[str | Path | None], problem: str) -> None:
    """Refuse an output that is a file which is read."""
    for source in inputs:
        if source is None:
            continue
        same = path.exists() and Path(source).exists() and path.samefile(source)
        if same or os.path.realpath(path) == os.path.realpath(source):
            raise ConfigError(f"predict_scene: {problem}; expected another path than {path}")


def usual_bytes(
    pixels: int, classes: int, *, scores: bool, probabilities: bool, polygons: bool, blocks: bool = False
) -> float:
    """What a map takes on the disk while it is written, as measured on maps of aerial images; with ``blocks`` that are
    kept."""
    bands = (scores or polygons) + probabilities * classes
    kept = blocks * (BLOCK_BYTES + bands)
    return pixels * (USUAL_BYTES + bands * BAND_BYTES + polygons * POLYGON_BYTES + kept)


def check_disks(files: SceneFiles, pixels: int, classes: int, *, blocks: bool = False) -> None:
    """Refuse a map that the disk is sure not to hold, and say where it may not; with ``blocks`` that are kept.

    Raises:
        ResourceError: there is too little room.
    """
    options = {name: getattr(files, name) is not None for name in ("scores", "probabilities", "polygons")}
    folder = files.classes.parent
    check_room(folder, int(pixels * LEAST_BYTES), "predict_scene")
    usual, free = usual_bytes(pixels, classes, **options, blocks=blocks), free_bytes(folder)
    if free < usual:
        _log.warning(
            "%s: the disk may be too small; such a map usually takes %.0f MB while it is written, %.0f MB are free",
            folder,
            usual / 1e6,
            free / 1e6,
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder
