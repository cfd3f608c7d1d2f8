# SPDX-License-Identifier: Apache-2.0
"""One HTML file of a map, which opens without a server or a network: what ``drseg view`` writes."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from drseg_core.config.reading import Reading
from drseg_core.errors import ConfigError
from drseg_core.extras import require
from drseg_core.files import write_text_atomic
from drseg_core.scenes.reader import SceneReader, open_scene
from drseg_core.view.graph import Beneath, packed
from drseg_core.view.layers import (
    Layer,
    MapReader,
    cell_layers,
    class_layer,
    on_grid_of,
    open_map,
    picture_layer,
    value_layers,
)
from drseg_core.view.pyramid import TILE

__all__ = ["Page", "page_path", "write_page"]

MAX_MB = 60.0
"""What a page takes at most, unless another size is asked for."""

GRAPH_SHARE = 0.2
"""Share of a page that the edges of graphs may take."""

# titles and notes
_REST = 4096

# beneath a map: its scene on the map's grid, the map, and bytes for its graphs
BeneathOf = Callable[[SceneReader, MapReader, int], Beneath]


class Page(NamedTuple):
    """``path`` of a page, its ``size`` in bytes, and ``notes``: what a reader must know, such as what was sampled.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.view.page import write_page
        >>> files = drseg.predict("run", "scene.tif", out="map.tif", progress=False)
        >>> page = write_page("map.tif", image="scene.tif")
        >>> page.path.name, page.notes
        ('map.html', [])
    """

    path: Path
    size: int
    notes: list[str]


def page_path(map_path: str | Path) -> Path:
    """Where the page of a map is by default: ``map.html`` beside ``map.tif``.

    Examples:
        >>> from drseg_core.view.page import page_path
        >>> page_path("maps/town.tif").name
        'town.html'
    """
    return Path(map_path).with_suffix(".html")


def write_page(
    map_path: str | Path,
    out: str | Path | None = None,
    *,
    image: str | Path | None = None,
    reading: Reading | None = None,
    gsd: float | None = None,
    aoi: str | Path | None = None,
    beneath: BeneathOf | None = None,
    max_mb: float = MAX_MB,
) -> Page:
    """Write a map as one HTML file with everything in it.

    The page has the scene, the classes with the area of each, and the rasters beside the map (uncertainty, scores,
    probabilities). From ``beneath`` it has the graph of each node and both correlations of each class. If all this
    takes more than ``max_mb``, the largest layer loses its finest scale, until it fits.

    Args:
        map_path: class raster of ``drseg predict``.
        out: file to write, replaced if it exists; ``map.html`` beside the map by default.
        image: the scene of the map.
        reading: how the scene is read: bands, nodata and scale.
        gsd: side of a pixel in metres that was given for the map; by default that of the map.
        aoi: vector file of the part that was mapped; by default the part where the map has classes.
        beneath: computes the graphs, such as :func:`drseg_core.view.of_run.beneath_run`; it needs ``image``.
        max_mb: size of the page in millions of bytes.

    Raises:
        ConfigError: the image is not the scene of the map, or the page cannot be that small.
        RasterError: map or image cannot be read.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.view.page import write_page
        >>> files = drseg.predict("run", "scene.tif", out="map.tif", scores=True, progress=False)
        >>> text = write_page("map.tif", "page.html").path.read_text()
        >>> "http://" in text or "https://" in text
        False
    """
    require("view", "maps")
    path, target = Path(map_path), page_path(map_path) if out is None else Path(out)
    if beneath is not None and image is None:
        raise ConfigError("view: the image is missing; expected the scene of the map in image, as the run reads it")
    with open_map(path) as found:
        classes, areas = class_layer(found)
        warning = str(found.source.tags().get("warning", ""))
        layers, below = [classes, *value_layers(found)], Beneath([], "no run was given", 1, None, None)
        if image is not None:
            with open_scene(image, reading=reading, gsd=gsd, aoi=aoi) as scene:
                on_grid_of(scene, found)
                layers.insert(0, picture_layer(scene, found))
                if beneath is not None:
                    below = beneath(scene, found, int(max_mb * 1e6 * GRAPH_SHARE))
        layers += _correlations(below)
        content = {
            "names": found.names,
            "colors": found.colors.tolist(),
            "width": found.shape[1],
            "height": found.shape[0],
            "tile": TILE,
            "areas": areas.rows(found.names),
            "threshold": found.threshold,
            "graph": {**packed(below.parts), "words": below.words} if below.parts else None,
            "why_no_graph": below.why_not,
        }
    room = int(max_mb * 1e6) - len(_template()) - _REST
    try:
        layers = fitted(layers, room - len(_json(content)))
    except ConfigError:
        if not below.parts:
            raise
        # its degrees are of every node, however few have edges here
        below = below._replace(parts=[])
        content |= {"graph": None, "why_no_graph": "the graph of so many cells has no room here"}
        layers = fitted(layers, room - len(_json(content)))
    # such as of random weights: a page is passed on without the map that says so
    notes = [note for note in (warning, below.note) if note]
    notes += [_sampled(layer) for layer in layers if layer.finest > layer.step]
    if below.parts and below.parts[0].stride > 1:
        notes.append(f"Graph: edges of the nodes of one row and column in {below.parts[0].stride}")
    content |= {"layers": [_described(layer) for layer in layers], "notes": notes}
    text = _filled(f"{path.stem}: {_listed(found)}", content)
    write_text_atomic(target, text)
    return Page(target, target.stat().st_size, notes)


def fitted(layers: list[Layer], room: int) -> list[Layer]:
    """The layers in at most ``room`` bytes: the largest loses its finest scale, until they fit; values count threefold.

    Raises:
        ConfigError: the coarsest of all take more.
    """
    layers = list(layers)
    while sum(layer.size for layer in layers) > room:
        able = [i for i, layer in enumerate(layers) if layer.can_be_coarser]
        if not able:
            least = sum(layer.size for layer in layers) / 1e6
            raise ConfigError(
                f"view: the page cannot be so small; expected room for layers of {least:.2f} MB, got {room / 1e6:.2f}"
            )
        # values change little from pixel to pixel: they go first, unless they are small already
        largest = max(able, key=lambda i: layers[i].size * (3 if layers[i].kind == "values" else 1))
        layers[largest] = layers[largest].coarser()
    return layers


def _correlations(below: Beneath) -> list[Layer]:
    titles = {"original": "Original correlation", "refined": "Refined correlation"}
    maps = {key: getattr(below, key) for key in titles}
    return [cell_layers(key, titles[key], cells, below.step) for key, cells in maps.items() if cells is not None]


def _sampled(layer: Layer) -> str:
    return f"{layer.title}: sampled, a pixel here is {layer.finest} x {layer.finest} of the scene"


def _described(layer: Layer) -> dict[str, Any]:
    scales = [[level._asdict() for level in levels] for levels in layer.scales]
    named = {key: getattr(layer, key) for key in ("key", "title", "kind", "low", "high", "by_class")}
    return {**named, "scales": scales}


def _listed(found: MapReader) -> str:
    return ", ".join(found.names[:4]) + (" ..." if len(found.names) > 4 else "")


def _json(content: Any) -> str:
    # no name can end the script that it stands in
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _template() -> str:
    folder = resources.files("drseg_core.view")
    parts = {"style": "page.css", "script": "page.js"}
    text = (folder / "page.html").read_text(encoding="utf-8")
    for name, file in parts.items():
        text = text.replace(f"{{{{{name}}}}}", (folder / file).read_text(encoding="utf-8").strip())
    return text


def _filled(title: str, content: Any) -> str:
    values = {"title": html.escape(title), "data": _json(content)}
    return re.sub(r"\{\{(title|data)\}\}", lambda found: values[found[1]], _template())
