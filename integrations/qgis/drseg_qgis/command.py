# SPDX-License-Identifier: Apache-2.0
"""Command lines of ``drseg``, where it is, and the environment that it gets. Needs the standard library alone."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# of the parameters: the option that each becomes
_MAP = {
    "CLASSES": "--classes",
    "THRESHOLD": "--threshold",
    "SCORES": "--scores",
    "POLYGONS": "--polygons",
    "MIN_AREA": "--min-area",
    "VIEW": "--view",
    "AOI": "--aoi",
    "GSD": "--gsd",
    "DEVICE": "--device",
}
_WORDS = {"BACKGROUND": "--background", "CLIP": "--clip", "PRIOR": "--prior", "OFFLINE": "--offline", **_MAP}
_TILE = {
    "FIELD": "--field",
    "CLASSES": "--classes",
    "BACKGROUND": "--background",
    "SIZE": "--size",
    "VAL_SHARE": "--val-share",
    "NODATA": "--nodata",
}
# what QGIS sets for its own Python and libraries, and another Python with other libraries must not find
_OF_QGIS = ("PYTHONHOME", "PYTHONPATH", "GDAL_DATA", "GDAL_DRIVER_PATH", "PROJ_LIB", "PROJ_DATA")


def find_executable(setting: str | None) -> str:
    """The path of ``drseg``: what the setting says, else what PATH has.

    Raises:
        FileNotFoundError: it is in neither.
    """
    found = shutil.which(setting or "drseg")
    if found is None:
        place = f"{setting}, as the settings say" if setting else "PATH"
        raise FileNotFoundError(
            f"drseg is not found; expected it in {place} (Settings > Options > Processing > Providers > drseg)"
        )
    return found


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of QGIS without what is for QGIS alone."""
    return {**{name: value for name, value in environment.items() if name not in _OF_QGIS}, "PYTHONUTF8": "1"}


def map_from_words(drseg: str, image: str, out: str, values: Mapping[str, Any]) -> list[str]:
    """``drseg predict zero-shot``; ``values`` are those of the algorithm's parameters.

    Example:
        >>> map_from_words("drseg", "a.tif", "map.tif", {"PRESET": "l", "CLASSES": "roof; tree", "SCORES": True})[2:]
        ['zero-shot:l', 'a.tif', '--out=map.tif', '--overwrite', '--classes=roof; tree', '--scores']
    """
    return _predict(drseg, f"zero-shot:{values.get('PRESET') or 'b'}", image, out, values, _WORDS)


def map_with_run(drseg: str, image: str, out: str, values: Mapping[str, Any]) -> list[str]:
    """``drseg predict RUN``."""
    return _predict(drseg, str(values["RUN"]), image, out, values, _MAP)


def _predict(
    drseg: str, model: str, image: str, out: str, values: Mapping[str, Any], options: Mapping[str, str]
) -> list[str]:
    # QGIS has asked whether a file may be replaced
    return [drseg, "predict", model, image, f"--out={out}", "--overwrite", *_options(values, options)]


def tile(drseg: str, scene: str, labels: str, out: str, values: Mapping[str, Any]) -> list[str]:
    """``drseg data tile``."""
    return [drseg, "data", "tile", scene, labels, f"--out={out}", *_options(values, _TILE)]


def _options(values: Mapping[str, Any], options: Mapping[str, str]) -> list[str]:
    found = []
    for name, option in options.items():
        value = values.get(name)
        if value is True:
            found.append(option)
        # False is 0
        elif value is not False and value not in (None, ""):
            # in one word: a value may begin with a dash
            found.append(f"{option}={value}")
    return found + shlex.split(values.get("MORE") or "")


def beside(out: str | Path, end: str) -> str:
    """A file that ``drseg predict`` writes beside the map ``out``, such as ``.qml`` or ``_areas.csv``."""
    path = Path(out)
    return str(path.with_name(f"{path.stem}{end}"))
