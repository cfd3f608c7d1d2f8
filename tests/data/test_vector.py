# SPDX-License-Identifier: Apache-2.0
"""Vector files are read whatever they are called."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from drseg_core.data.vector import plain_path, read_shapes
from drseg_core.errors import DatasetError

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
shapely = pytest.importorskip("shapely")

SCENE = SimpleNamespace(crs=rasterio.crs.CRS.from_epsg(32632), transform=rasterio.Affine.identity(), height=9, width=9)
# pyogrio looks for an archive before "!", and drops line breaks and what follows ";"
NAMES = ["ao!i", "a\nb", "a;b", "a?", "caf\udce9", "Fotos!/area", "Fotos\n;/ao!i", "(1) area", " area"]


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = np.array([shapely.to_wkb(shapely.box(2, 3, 5, 7))], object)
    kinds = {".shp": "ESRI Shapefile", ".gpkg": "GPKG", ".geojson": "GeoJSON"}
    known = {"crs": "EPSG:32632", "geometry_type": "Polygon", "driver": kinds[path.suffix]}
    pyogrio.raw.write(path, shape, [np.array(["a"], object)], fields=["name"], **known)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_look_like_addresses(tmp_path, name):
    for suffix in (".gpkg", ".geojson", ".shp"):
        write(tmp_path / f"plain{suffix}")
        path = tmp_path / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        # a Shapefile is several files
        for part in tmp_path.glob("plain.*"):
            part.rename(path.with_name(path.stem + part.suffix))
        shapes = read_shapes(path, "name", SCENE)
        assert shapes.bounds() == (2, 3, 5, 7) and shapes.values == ["a"]


def test_a_path_with_two_slashes_is_no_server(tmp_path):
    write(tmp_path / "area.gpkg")
    assert read_shapes(Path(f"/{tmp_path}/area.gpkg"), None, SCENE).bounds() == (2, 3, 5, 7)


def test_links_go_when_the_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "in").mkdir()
    with plain_path(tmp_path / "in" / "area.gpkg") as plain:
        assert plain == tmp_path / "in" / "area.gpkg"
    for name in ("a!.gpkg", "b!/area.gpkg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        with plain_path(path) as plain:
            plain.write_text("x")
            assert "!" not in str(plain) and path.read_text() == "x"
    assert os.listdir(tmp_path) == ["in"]


def test_a_name_that_cannot_be_helped_is_one_line(tmp_path):
    (tmp_path / "area.g!pkg").write_text("x")
    with pytest.raises(DatasetError, match="read_shapes: .*area.g!pkg cannot be read as polygons: ") as caught:
        read_shapes(tmp_path / "area.g!pkg", None, SCENE)
    assert "\n" not in str(caught.value)
