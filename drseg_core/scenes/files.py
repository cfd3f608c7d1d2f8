# SPDX-License-Identifier: Apache-2.0
"""The files of a map: their names, and whether they may be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from drseg_core.errors import ConfigError, RasterError
from drseg_core.scenes.polygons import check_suffix

__all__ = ["SceneFiles"]


class SceneFiles(NamedTuple):
    """What :func:`predict_scene` writes; what was not asked for is None.

    ``classes``, ``uncertainty``, ``scores`` and ``probabilities`` are GeoTIFFs, ``overlay`` is a PNG, ``areas`` a CSV,
    ``attributes`` what GDAL and ``style`` what QGIS reads beside the classes, ``polygons`` a vector file.

    Example:
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


def check_outputs(
    image_path: str | Path, out_path: str | Path, *, overwrite: bool = False, **options: Any
) -> SceneFiles:
    """The outputs of :func:`predict_scene`, after making sure that they may be written. Reads and writes nothing.

    Raises:
        ConfigError: an output exists, is the input, cannot be written or has a wrong suffix.
        RasterError: the system refuses the scene's path, such as one that is too long.
    """
    files, source = scene_files(out_path, **options), Path(image_path)
    try:
        source_exists = source.exists()
    except OSError as error:
        raise RasterError(f"predict_scene: {source} cannot be opened: {error.strerror}") from None
    folders = dict.fromkeys(path.parent for path in files.present())
    try:
        for path in files.present():
            if path.exists() and source_exists and path.samefile(source):
                raise ConfigError(f"predict_scene: out is the scene itself; expected another path than {path}")
            if path.is_dir() or path.exists() and not overwrite:
                raise ConfigError(f"predict_scene: {path} exists; expected a new path, or overwrite")
        folders = {_existing(folder): None for folder in folders}
    except OSError as error:
        raise ConfigError(f"predict_scene: {files.classes} cannot be written: {error.strerror}") from None
    for folder in folders:
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            name = files.classes if folder in files.classes.parents else files.polygons
            raise ConfigError(f"predict_scene: {name} cannot be written; expected a folder with write permission")
    return files


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder
