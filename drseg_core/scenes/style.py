# SPDX-License-Identifier: Apache-2.0
"""What GIS programs read beside a class raster: GDAL's category names and attribute table, and QGIS' style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from drseg_core.data.vocabulary import Vocabulary
from drseg_core.files import write_text_atomic

# name, type (0 whole number, 1 real number, 2 text) and usage of the columns, as GDAL numbers them
_COLUMNS = (
    ("Value", 0, 5),
    ("Count", 0, 1),
    ("Class", 2, 2),
    ("Red", 0, 6),
    ("Green", 0, 7),
    ("Blue", 0, 8),
    ("Area_m2", 1, 0),
)


def write_attributes(path: Path, legend: Vocabulary, pixels: Sequence[int], areas: Sequence[float] | None) -> None:
    """``map.tif.aux.xml``: category names, and a raster attribute table with a row for each class.

    Args:
        path: file to write.
        legend: names and colours.
        pixels: pixels of each class.
        areas: m2 of each class, NaN where unknown; None where the scene has no place.
    """
    root = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    names = ElementTree.SubElement(band, "CategoryNames")
    for name in legend.names:
        ElementTree.SubElement(names, "Category").text = name
    table = ElementTree.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    columns = _COLUMNS if areas is not None else _COLUMNS[:-1]
    for number, (name, kind, usage) in enumerate(columns):
        field = ElementTree.SubElement(table, "FieldDefn", index=str(number))
        for tag, value in (("Name", name), ("Type", kind), ("Usage", usage)):
            ElementTree.SubElement(field, tag).text = str(value)
    for number, (name, color) in enumerate(zip(legend.names, legend.table().tolist(), strict=True)):
        row = ElementTree.SubElement(table, "Row", index=str(number))
        values: list[Any] = [number, pixels[number], name, *color]
        # an unknown area stays nan: of an empty field GDAL makes an area of 0
        for value in values if areas is None else [*values, f"{areas[number]:.6g}"]:
            ElementTree.SubElement(row, "F").text = str(value)
    _write(path, root, "")


def write_style(path: Path, legend: Vocabulary) -> None:
    """``map.qml``: QGIS shows the classes alone, by name and colour, when it opens ``map.tif``."""
    root = ElementTree.Element("qgis", version="3.22", styleCategories="Symbology")
    pipe = ElementTree.SubElement(root, "pipe")
    renderer = ElementTree.SubElement(pipe, "rasterrenderer", type="paletted", band="1", opacity="1", alphaBand="-1")
    entries = ElementTree.SubElement(renderer, "colorPalette")
    for number, (name, color) in enumerate(zip(legend.names, legend.table().tolist(), strict=True)):
        code = "#" + "".join(f"{part:02x}" for part in color)
        ElementTree.SubElement(entries, "paletteEntry", value=str(number), label=name, color=code, alpha="255")
    _write(path, root, "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n")


def category_names(path: str | Path) -> list[str]:
    """Category names of a raster, as GDAL reads them."""
    import rasterio.shutil
    from rasterio.io import MemoryFile

    with rasterio.open(path) as source, MemoryFile(ext=".vrt") as memory:
        # rasterio has no call for them; GDAL's own description of the file does
        rasterio.shutil.copy(source, memory.name, driver="VRT")
        root = ElementTree.fromstring(memory.read())
    return [item.text or "" for item in root.iterfind("VRTRasterBand/CategoryNames/Category")]


def _write(path: Path, root: ElementTree.Element, head: str) -> None:
    ElementTree.indent(root)
    write_text_atomic(path, head + ElementTree.tostring(root, encoding="unicode") + "\n")
