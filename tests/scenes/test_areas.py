# SPDX-License-Identifier: Apache-2.0
"""Areas of classes on coarse, global and polar grids, and where a scene leaves the Earth or its projection."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import METHOD, PixelArea, pixel_side, pixel_sides
from drseg_core.data.vocabulary import plain_classes
from drseg_core.scenes.areas import ClassAreas
from drseg_core.scenes.regions import find_regions
from drseg_core.scenes.style import write_attributes
from drseg_core.view.page import write_page
from tests.evaluation.fake import color_image
from tests.scenes.test_predict import run, truth, write

rasterio = pytest.importorskip("rasterio")
from rasterio.shutil import copy  # noqa: E402

DISK = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84 +units=m"
PROMISED = 1e-3


def band(south: float, north: float, wide: float = 360.0) -> float:
    """m2 between two parallels of WGS 84, in closed form."""
    square = 6.694_379_990_14e-3
    sine, root = np.sin(np.radians([south, north])), square**0.5
    part = (1 - square) * (sine / (1 - square * sine**2) + np.arctanh(root * sine) / root)
    return float(6_378_137.0**2 / 2 * np.radians(wide) * (part[1] - part[0]))


def grid(left: float, top: float, side: float) -> Any:
    return rasterio.Affine(side, 0, left, 0, -side, top)


def pixels(crs: str, left: float, top: float, side: float) -> PixelArea:
    return PixelArea(rasterio.crs.CRS.from_user_input(crs), grid(left, top, side))


def counted(pixel: PixelArea, label: NDArray[np.uint8], part: int = 2048) -> ClassAreas:
    areas = ClassAreas(int(label[label != IGNORE].max()) + 1, pixel)
    for top in range(0, label.shape[0], part):
        for left in range(0, label.shape[1], part):
            areas.add(top, left, label[top : top + part, left : left + part])
    return areas


@pytest.mark.parametrize("side", [0.25, 1, 10, 90])
@pytest.mark.parametrize("beyond", [0, 0.5])
def test_the_whole_earth(side: float, beyond: float) -> None:
    # half a pixel beyond the poles, as grids have whose outer pixels have their middle there
    rows = round(180 / side) + (1 if beyond else 0)
    label = np.zeros((rows, round(360 / side)), np.uint8)
    label[: rows // 2] = 1
    areas = counted(pixels("EPSG:4326", -180, 90 + beyond * side, side), label)
    assert areas.m2.sum() == pytest.approx(band(-90, 90), rel=PROMISED)
    north = 90 + beyond * side - rows // 2 * side
    assert areas.m2[1] == pytest.approx(band(north, 90), rel=PROMISED)


def test_each_class_has_its_own_area() -> None:
    label = np.zeros((60, 60), np.uint8)
    label[30:] = 1
    areas = counted(pixels("EPSG:4326", 0, 70, 1), label)
    assert areas.m2 == pytest.approx([band(40, 70, 60), band(10, 40, 60)], rel=PROMISED)


def test_a_degree_beside_the_pole_and_over_the_date_line() -> None:
    pixel = pixels("EPSG:4326", 175, 90, 1)
    boxes = [(0, 0, 1, 1), (0, 0, 1, 10), (178, 3, 2, 4), (90, 0, 1, 355)]
    expected = [band(89, 90, 1), band(89, 90, 1), band(-90, -88, 1) / 2, band(-1, 0, 1)]
    assert pixel.of(boxes) == pytest.approx(expected, rel=PROMISED)


@pytest.mark.parametrize(("crs", "scale"), [("EPSG:3031", 0.972_769), ("EPSG:3413", 0.969_858), ("EPSG:5041", 0.994)])
@pytest.mark.parametrize("shift", [0.0, 0.05, 1e-3])
def test_around_a_pole(crs: str, scale: float, shift: float) -> None:
    side, middle = 0.1, 2e6 if crs == "EPSG:5041" else 0.0
    pixel = pixels(crs, middle - 4.8 + shift, middle + 4.8, side)
    label = np.zeros((96, 96), np.uint8)
    label[40:56, 40:56] = 1
    areas = counted(pixel, label)
    assert areas.m2 == pytest.approx(np.array([96**2 - 256, 256]) * (side / scale) ** 2, rel=PROMISED)


def test_a_coarse_polar_grid() -> None:
    # the cap north of 60 degrees, at 25 km
    rows, columns = (25_000 * (np.arange(400) + 0.5 - 200) for _ in range(2))
    label = np.where(np.hypot(rows[:, None], columns) < 3_320_000, 0, IGNORE).astype(np.uint8)
    areas = counted(pixels("EPSG:3995", -5e6, 5e6, 25_000), label)
    # 3 320 km on the map are at this latitude
    edge = rasterio.warp.transform("EPSG:3995", "EPSG:4326", [3_320_000], [0])[1][0]
    assert areas.m2[0] == pytest.approx(band(edge, 90), rel=PROMISED)


@pytest.mark.parametrize("side", [1000, 5000])
def test_an_equal_area_grid_has_equal_areas(side: int) -> None:
    label = np.arange(4).repeat(3_000_000 // side // 4)[:, None].repeat(3_000_000 // side, 1).astype(np.uint8)
    areas = counted(pixels("EPSG:3035", 2_500_000, 5_400_000, side), label)
    assert areas.m2 == pytest.approx(areas.pixels * side**2, rel=PROMISED)


def test_ordinary_scenes_are_measured_box_by_box() -> None:
    for crs, left, top, side in (
        ("EPSG:32632", 3e5, 5e6, 10),
        ("EPSG:3857", 7e5, 6.6e6, 1),
        ("EPSG:2154", 7e5, 6.6e6, 0.2),
    ):
        pixel = pixels(crs, left, top, side)
        boxes = [(row, column, 64, 512) for row in (0, 64, 1984) for column in (0, 1536)]
        assert (pixel.pieces(boxes) == 1).all()


def raster(path: Path, value: NDArray[Any], crs: str, transform: Any) -> Path:
    profile = {"driver": "GTiff", "count": 1, "dtype": value.dtype, "height": value.shape[0], "width": value.shape[1]}
    with rasterio.open(path, "w", crs=rasterio.crs.CRS.from_user_input(crs), transform=transform, **profile) as file:
        file.write(value, 1)
    return path


def regions(folder: Path, label: NDArray[np.uint8], crs: str, transform: Any, min_area: float) -> Any:
    one = raster(folder / "label.tif", label, crs, transform)
    other = raster(folder / "score.tif", np.zeros_like(label), crs, transform)
    with rasterio.open(one) as labels, rasterio.open(other) as scores:
        return find_regions(labels, scores, folder / "own.tif", min_area)


def test_regions_of_a_coarse_grid(tmp_path: Path) -> None:
    label = np.zeros((180, 360), np.uint8)
    label[90:] = 1
    label[0] = 2
    found = regions(tmp_path, label, "EPSG:4326", grid(-180, 90, 1), 0)
    expected = {0: band(0, 89), 1: band(-90, 0), 2: band(89, 90)}
    assert dict(zip(found.label.tolist(), found.area, strict=True)) == pytest.approx(expected, rel=PROMISED)


def full_disk() -> tuple[NDArray[np.uint8], Any]:
    """Class 0 on Earth, and one pixel of class 1 that is not; nodata in the corners."""
    label = np.full((100, 100), IGNORE, np.uint8)
    label[30:70, 30:70] = 0
    label[0, 0] = 1
    return label, grid(-5.5e6, 5.5e6, 1.1e5)


def test_pixels_off_the_earth_have_no_area(tmp_path: Path) -> None:
    label, transform = full_disk()
    areas = counted(pixels(DISK, transform.c, transform.f, transform.a), label)
    rows = areas.rows(["a", "b"])
    # the middle of the disk, near to its nominal area
    assert rows[0]["area_m2"] == pytest.approx(1600 * 1.1e5**2, rel=0.2) and rows[0]["method"] == METHOD
    assert rows[1]["area_m2"] is None and rows[1]["method"].startswith(f"{METHOD}; unknown")
    json.dumps(rows, allow_nan=False)
    areas.write(tmp_path / "areas.csv", ["a", "b"])
    with open(tmp_path / "areas.csv", newline="", encoding="utf-8") as file:
        assert [row["area_m2"] == "" for row in csv.DictReader(file)] == [False, True]
    assert areas.known and pixel_side(DISK, transform, 1, 1) is None and pixel_sides(DISK, transform, 1, 1) is None
    assert pixel_side(DISK, transform, 100, 100) == pytest.approx(1.1e5, rel=0.05)


def test_gdal_reads_no_area_where_it_is_unknown(tmp_path: Path) -> None:
    """GDAL takes an empty field of its attribute table for 0, and nan for what it is."""
    label, transform = full_disk()
    areas = counted(pixels(DISK, transform.c, transform.f, transform.a), label)
    path = raster(tmp_path / "map.tif", label, DISK, transform)
    write_attributes(tmp_path / "map.tif.aux.xml", plain_classes(["a", "b"]), areas.pixels.tolist(), areas.m2.tolist())
    with rasterio.open(path) as source, rasterio.io.MemoryFile(ext=".vrt") as memory:
        copy(source, memory.name, driver="VRT")
        rows = ElementTree.fromstring(memory.read()).findall(".//GDALRasterAttributeTable/Row")
    found = [float(row.findall("F")[-1].text or "0") for row in rows]
    assert found[0] == pytest.approx(areas.m2[0], rel=1e-5) and np.isnan(found[1]) and np.isnan(areas.m2[1])


def test_the_edge_of_the_earth_is_followed_pixel_by_pixel() -> None:
    pixel = pixels(DISK, -5.5e6, 5.5e6, 5e4)
    each = pixel.field((0, 0, 220, 220), (220, 220))
    label = np.where(np.isfinite(each), 0, IGNORE).astype(np.uint8)
    # no pixel that is wholly on Earth is lost to one beside it that is not
    assert counted(pixel, label).m2[0] == pytest.approx(np.nansum(each), rel=PROMISED)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("min_area", [0, 1e13])
def test_regions_off_the_earth(tmp_path: Path, min_area: float) -> None:
    label, transform = full_disk()
    label[50, 50] = 2
    found = regions(tmp_path, label, DISK, transform, min_area)
    area = dict(zip(found.label.tolist(), found.area.tolist(), strict=True))
    # small ones join; one of unknown area is not small
    assert set(area) == ({0, 1, 2, IGNORE} if min_area == 0 else {0, 1, IGNORE})
    assert np.isnan(area[1]) and np.isfinite(area[0])


LOCAL = 'ENGCRS["x",EDATUM["y"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["metre",1]]'


@pytest.mark.parametrize(
    ("crs", "left", "top"), [("EPSG:32632", 5e7, 9e9), ("ESRI:54009", 1.8e7, 9e6), (DISK, 6e6, 6e6), (LOCAL, 0, 0)]
)
def test_nothing_of_a_scene_is_on_earth(tmp_path: Path, crs: str, left: float, top: float) -> None:
    label = np.zeros((40, 40), np.uint8)
    label[3, 3] = 1
    areas = counted(pixels(crs, left, top, 10), label)
    rows = areas.rows(["a", "b"])
    assert not areas.known and {row["area_m2"] for row in rows} == {None}
    assert {row["method"] for row in rows} == {"no place known"}
    assert pixel_side(areas.pixel.crs, areas.pixel.transform, 40, 40) is None
    # the smallest area is then in pixels
    assert regions(tmp_path, label, crs, grid(left, top, 10), 2).pixels.tolist() == [1600]


@pytest.mark.parametrize("side", [1.1e5, 1e3])
@pytest.mark.parametrize("left", [-5.5e6, -4.5e6, 6e6])
def test_a_scene_off_the_earth_has_a_map_polygons_and_a_page(tmp_path: Path, side: float, left: float) -> None:
    place = {"crs": rasterio.crs.CRS.from_user_input(DISK), "transform": grid(left, 3.2e6, side)}
    image = write(tmp_path / "in.tif", color_image(truth()).numpy(), **place)
    files = run(image, tmp_path / "map.tif", polygons=tmp_path / "map.gpkg", min_area=1.0, scores=True)
    with open(files.areas, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["pixels"]) for row in rows) == truth().numel()
    assert all(row["area_m2"] == "" or float(row["area_m2"]) > 0 for row in rows)
    page = write_page(files.classes, tmp_path / "page.html")
    assert page.path.stat().st_size and "NaN" not in files.areas.read_text()
