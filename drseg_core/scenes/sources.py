# SPDX-License-Identifier: Apache-2.0
"""Which scenes a call maps, and where each map goes."""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple
from urllib.parse import unquote

from drseg_core.data.raster import names_files, points_elsewhere
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.files import is_text, parse_json
from drseg_core.scenes.files import scene_files
from drseg_core.scenes.tags import names_in

__all__ = ["Scene", "list_scenes", "with_outputs"]

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg", ".img")
"""Suffixes of the files that are taken from a folder."""

_ADDRESS = {"http://": "/vsicurl/http://", "https://": "/vsicurl/https://", "s3://": "/vsis3/"}
_log = logging.getLogger(__name__)
_FIELDS = ("name", "number", "folder")


class Scene(NamedTuple):
    """One scene to map.

    ``image`` is a file, or a remote address in GDAL's form. ``name`` is what patterns take. The others say where the
    map and its polygons go.

    Examples:
        >>> from drseg_core.scenes.sources import Scene
        >>> Scene("scene.tif", "scene").out is None
        True
    """

    image: str
    name: str
    out: Path | None = None
    polygons: Path | None = None


def list_scenes(words: Sequence[str], *, asset: str | None = None, remote: bool = False) -> list[Scene]:
    """The scenes that words stand for, each once, in their order.

    Args:
        words: files, folders (the images in them), globs, STAC items or item collections (``.json``, ``.geojson``), or
            ``@FILE`` (a text file with one word a line). With ``remote`` also addresses of http, https or s3.
        asset: key of the image in a STAC item.
        remote: allow scenes that lie elsewhere, also those that a file such as a VRT points to.

    Raises:
        ConfigError: a word stands for nothing, or for something remote without ``remote``; or ``asset`` for no item.
        DatasetError: a list or a STAC file cannot be read.

    Examples:
        >>> from drseg_core.scenes.sources import list_scenes
        >>> [scene.name for scene in list_scenes(["scene.tif", "*.tif"])]
        ['scene']
    """
    found: dict[str, Scene] = {}
    plain = list(_listed(words))
    if asset is not None and not any(map(_is_stac, plain)):
        raise ConfigError(f"predict: asset is for STAC items; expected one (.json, .geojson) among IMAGE, got {asset}")
    for scene in (scene for word in plain for scene in _expanded(word, asset)):
        if not is_text(scene.image):
            raise ConfigError(f"predict: {scene.image!a} is no UTF-8; expected a file of another name")
        if not remote:
            _check_near(scene.image)
        # a.tif, ./a.tif and /data/a.tif are one
        found.setdefault(scene.image if scene.image.startswith("/vsi") else os.path.abspath(scene.image), scene)
    return list(found.values())


def _listed(words: Iterable[str], lists: tuple[Path, ...] = ()) -> Iterator[str]:
    """Words, with those of list files in their place; ``lists`` are the nested files that name them."""
    for word in words:
        if not word.startswith("@"):
            yield word
            continue
        file = Path(word[1:])
        if file.resolve() in lists:
            raise ConfigError(f"predict: {file} names itself; expected a list of other files")
        lines = (line.strip() for line in _text(file).splitlines())
        yield from _listed([line for line in lines if line and not line.startswith("#")], (*lists, file.resolve()))


def _is_remote(word: str) -> bool:
    return "://" in word or word.startswith("/vsi")


def _is_stac(word: str) -> bool:
    return Path(word).suffix.lower() in (".json", ".geojson") and not _is_remote(word)


def _expanded(word: str, asset: str | None) -> Iterator[Scene]:
    """The scenes of a word."""
    path = Path(word)
    if _is_remote(word):
        yield Scene(address(word), path.stem)
    elif _is_stac(word):
        yield from _stac(path, asset)
    elif path.is_dir():
        there = (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        # what begins with a dot belongs to a system, or to a call that was killed
        images = sorted(file for file in there if not file.name.startswith("."))
        if not images:
            raise ConfigError(f"predict: {word} has no image; expected files such as {', '.join(SUFFIXES[:3])}")
        yield from (Scene(str(file), file.stem) for file in images)
    elif glob.has_magic(word) and not path.exists():
        files = sorted(name for name in glob.glob(word, recursive=True) if Path(name).is_file())
        if not files:
            raise ConfigError(f"predict: {word} matches no file; expected images")
        yield from (Scene(name, Path(name).stem) for name in files)
    else:
        yield Scene(word, path.stem)


def address(word: str) -> str:
    """A remote address in GDAL's form.

    Raises:
        ConfigError: its kind is not supported.
    """
    if word.startswith("/vsi"):
        return word
    for begin, system in _ADDRESS.items():
        if word.startswith(begin):
            return system + word[len(begin) :]
    raise ConfigError(f"predict: {word} has an unknown scheme; expected one of {', '.join(_ADDRESS)}")


def _check_near(image: str) -> None:
    """Refuse remote images, and files that point to them."""
    if image.startswith("/vsi"):
        raise ConfigError(f"predict: {image} is remote; expected a file, or --remote")
    if points_elsewhere(image):
        raise ConfigError(f"predict: {image} points to something remote; expected files, or --remote")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"predict: {path} cannot be read as text; {' '.join(str(error).split())}") from None


def _stac(path: Path, asset: str | None) -> Iterator[Scene]:
    try:
        content = parse_json(_text(path))
        items = content["features"] if content["type"] == "FeatureCollection" else [content]
        for item in items:
            key = _asset(path, item, asset)
            yield _asset_scene(path, _file_name(str(item["id"])), str(item["assets"][key]["href"]))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DatasetError(
            f"predict: {path} is no STAC item or item collection; expected features with id and assets, got "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from None


def _asset_scene(path: Path, name: str, href: str) -> Scene:
    if href.lower().startswith("file://"):
        host, _, place = href[len("file://") :].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ConfigError(f"predict: {path}: {href} is on another host; expected file:///PATH")
        return Scene("/" + _decoded(place), name)
    if _is_remote(href):
        return Scene(address(href), name)
    # relative to the file that names it; many writers leave names as they are, where STAC has %20 for a blank
    named = str(path.parent / href)
    return Scene(named if os.path.exists(named) else str(path.parent / _decoded(href)), name)


def _decoded(text: str) -> str:
    # what is no UTF-8 is refused later, by its name
    return unquote(text, errors="surrogateescape")


def _file_name(text: str) -> str:
    """An id as a file name: an id may have any characters, but the map must stay in its folder."""
    name = re.sub(r"[/\\\0]", "_", text)
    return "_" if name in ("", ".", "..") else name


def _asset(path: Path, item: dict[str, Any], asset: str | None) -> str:
    """The key of the image of an item: the one asked for, the only one, or the only one for viewing or of data."""
    assets = item["assets"]
    if asset is not None:
        if asset not in assets:
            raise ConfigError(f"predict: {path}: item {item['id']} has no asset {asset}; expected {', '.join(assets)}")
        return asset
    roles = {key: value.get("roles") or [] for key, value in assets.items()}
    visual = [key for key in assets if "visual" in (key, *roles[key])]
    data = [key for key in assets if "data" in roles[key]]
    for fitting in (list(assets), visual, data):
        if len(fitting) == 1:
            return fitting[0]
    raise ConfigError(
        f"predict: {path}: item {item['id']} has several assets; expected --asset with one of {', '.join(assets)}"
    )


def with_outputs(scenes: Sequence[Scene], out: str, polygons: str | None = None) -> list[Scene]:
    """The scenes with where their maps go.

    Args:
        scenes: from :func:`list_scenes`.
        out: a file for a single scene; a folder, for ``{name}.tif`` in it; or a pattern with ``{name}``, ``{number}``
            (from 1) or ``{folder}`` (that of the scene).
        polygons: a file or pattern in the same way.

    Raises:
        ConfigError: an unknown field, two maps with a file in common, or a map that would replace a scene.

    Examples:
        >>> from drseg_core.scenes.sources import list_scenes, with_outputs
        >>> [str(scene.out) for scene in with_outputs(list_scenes(["scene.tif"]), "maps/{number:03}_{name}.tif")]
        ['maps/001_scene.tif']
    """
    if not scenes:
        raise ConfigError("predict: no scene is given; expected files, folders or lists of them")
    several = len(scenes) > 1 and Path(out).suffix.lower() not in (".tif", ".tiff")
    if not _fields(out) and (out.endswith("/") or several):
        out = f"{out.rstrip('/')}/{{name}}.tif"
    if len(scenes) > 1 and "number" not in _fields(out):
        scenes = _without_maps(scenes, out)
    found: list[Scene] = []
    taken: dict[Path, str] = {}
    read = _read_files(scenes) if len(scenes) > 1 else {}
    for number, scene in enumerate(scenes, 1):
        values = {"name": scene.name, "number": number, "folder": str(Path(scene.image).parent)}
        places = [None if text is None else Path(_filled(text, values)) for text in (out, polygons)]
        # also what is not asked for: of a former map it is removed; a single one is looked at where it is written
        alone = len(scenes) == 1
        files = None if alone else scene_files(str(places[0]), scores=True, probabilities=True, polygons=places[1])
        for place in files.present() if files is not None else ():
            owner = next((read[name] for name in _names(place) if name in read), None)
            if owner is not None:
                what = "one of the scenes" if owner[1] else f"a file of the scene {owner[0]}"
                raise ConfigError(f"predict: {place}, an output for {scene.image}, is {what}; expected another folder")
            if taken.setdefault(_entry(place), scene.image) != scene.image:
                raise ConfigError(
                    f"predict: {taken[_entry(place)]} and {scene.image} have one output, {place}; expected a "
                    "pattern such as maps/{name}.tif or maps/{number}.tif"
                )
        found.append(scene._replace(out=places[0], polygons=places[1]))
    return found


def _without_maps(scenes: Sequence[Scene], out: str) -> list[Scene]:
    """The scenes without those that are maps of others, which an earlier call wrote beside them."""
    made: dict[Path, str] = {}
    for scene in scenes:
        place = Path(_filled(out, {"name": scene.name, "folder": str(Path(scene.image).parent)}))
        if _is_map(place):
            files = scene_files(str(place), scores=True, probabilities=True)
            made |= {_entry(file): scene.image for file in files.present() if file != Path(scene.image)}
    for scene in scenes:
        if (owner := made.get(_entry(Path(scene.image)))) is not None:
            _log.info("predict: %s belongs to the map of %s, and is left out", scene.image, owner)
    return [scene for scene in scenes if _entry(Path(scene.image)) not in made]


def _is_map(path: Path) -> bool:
    """Whether a file is a class raster that drseg wrote."""
    if not path.is_file():
        return False
    import rasterio

    with contextlib.suppress(rasterio.errors.RasterioError), rasterio.open(path) as source:
        return bool(names_in(source.tags()))
    return False


def _read_files(scenes: Iterable[Scene]) -> dict[Any, tuple[str, bool]]:
    """For every name of every file that is read: the scene, and whether the file is the scene itself."""
    found: dict[Any, tuple[str, bool]] = {}
    for scene in scenes:
        if not scene.image.startswith("/vsi"):
            found |= dict.fromkeys(_names(Path(scene.image)), (scene.image, True))
    for scene in scenes:
        for member in _members(scene.image):
            for name in _names(member):
                found.setdefault(name, (scene.image, False))
    return found


def _members(image: str) -> Iterator[Path]:
    """The files that one such as a VRT points to, and those that they point to."""
    if names_files(image):
        import rasterio

        # what cannot be opened is said in its turn
        with contextlib.suppress(rasterio.errors.RasterioError), rasterio.open(image) as source:
            yield from map(Path, source.files[1:])


def _names(path: Path) -> list[Any]:
    """All names of a file: its own, the target of a link, and what two links to one file have in common."""
    names: list[Any] = [_entry(path), path.resolve()]
    with contextlib.suppress(OSError):
        found = path.stat()
        names.append((found.st_dev, found.st_ino))
    return names


def _entry(path: Path) -> Path:
    """The name of the file that would be replaced: a link itself, not its target."""
    return _real(path.parent.absolute()) / path.name


@functools.lru_cache(maxsize=10_000)
def _real(folder: Path) -> Path:
    return folder.resolve()


def _fields(text: str) -> list[str | None]:
    try:
        return [field for _, field, _, _ in Formatter().parse(text) if field is not None]
    except ValueError:
        # a file may have such a name
        return []


def _filled(text: str, values: dict[str, Any]) -> str:
    fields = _fields(text)
    if not fields:
        return text
    unknown = next((field for field in fields if field not in _FIELDS), None)
    if unknown is not None:
        raise ConfigError(
            f"predict: {text} has an unknown field {{{unknown}}}; expected {{name}}, {{number}} or {{folder}}"
        )
    try:
        return text.format(**values)
    except ValueError as error:
        raise ConfigError(f"predict: {text} cannot be filled in; {error}") from None
