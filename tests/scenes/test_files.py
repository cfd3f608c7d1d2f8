# SPDX-License-Identifier: Apache-2.0
"""What a map may replace: no input, no output of its own, and nothing of a former map stays beside it."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from drseg_core.errors import ConfigError, RasterError
from drseg_core.scenes.files import check_outputs
from drseg_core.scenes.predict import predict_scene
from tests.cli.conftest import data, folder, run
from tests.evaluation.fake import color_image
from tests.scenes.test_place import PLACE, rings
from tests.scenes.test_predict import WRITTEN, predictor, truth, write
from tests.scenes.test_predict import run as mapped

__all__ = ["data", "folder", "run"]
rasterio = pytest.importorskip("rasterio")
from rasterio.shutil import copy  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def scene(path, **options):
    return write(path, color_image(truth()).numpy(), **{**PLACE, **options})


@pytest.mark.promise("C48")
def test_an_area_is_not_overwritten(tmp_path):
    pytest.importorskip("pyogrio")
    image = scene(tmp_path / "in.tif")
    area = rings(tmp_path / "area.geojson", (-10, 40, 20, 60))
    (tmp_path / "link.geojson").symlink_to(area)
    before = area.read_text()
    for polygons in ("area.geojson", "link.geojson"):
        with pytest.raises(ConfigError, match=f"an output is an input; expected another path than .*{polygons}"):
            mapped(image, tmp_path / "map.tif", aoi=area, polygons=tmp_path / polygons, overwrite=True)
    assert area.read_text() == before and not (tmp_path / "map.tif").exists()


@pytest.mark.promise("C48")
def test_a_file_of_classes_is_not_overwritten(drseg, run, tmp_path):
    image = scene(tmp_path / "in.tif")
    classes = tmp_path / "map_areas.csv"
    classes.write_text("roof\npond\n")
    words = ["predict", run, image, "--out", tmp_path / "map.tif", "--overwrite", "--classes"]
    for text in (f"@{classes}", f"field; @{classes}"):
        code, _, errors = drseg(*words, text)
        assert code == 2 and "an output is an input; expected another path than" in errors.splitlines()[0]
    assert classes.read_text() == "roof\npond\n" and not (tmp_path / "map.tif").exists()


@pytest.mark.promise("C48")
def test_a_member_of_a_mosaic_is_not_overwritten(tmp_path):
    member = scene(tmp_path / "a_uncertainty.tif")
    with rasterio.open(member) as source:
        copy(source, tmp_path / "scene.vrt", driver="VRT")
    before = member.read_bytes()
    with pytest.raises(ConfigError, match="an output is a file of the scene; expected another path than .*a_uncert"):
        mapped(tmp_path / "scene.vrt", tmp_path / "a.tif", overwrite=True)
    assert member.read_bytes() == before
    # nor is what would be removed as a part of a former map
    member.rename(tmp_path / "a_scores.tif")
    with pytest.raises(ConfigError, match="out is the scene itself; expected another path than .*a_scores.tif"):
        mapped(tmp_path / "a_scores.tif", tmp_path / "a.tif", overwrite=True)


@pytest.mark.promise("C48")
def test_two_outputs_are_two_files(tmp_path):
    # a name that leads to another one
    (tmp_path / "map_areas.csv").touch()
    (tmp_path / "map.gpkg").symlink_to(tmp_path / "map_areas.csv")
    options = {"overwrite": True, "polygons": tmp_path / "map.gpkg"}
    with pytest.raises(ConfigError, match="two outputs are one file; expected another path than .*map.gpkg"):
        check_outputs(tmp_path / "in.tif", tmp_path / "map.tif", **options)


def test_report_and_sheet_are_two_files(drseg, folder, tmp_path):
    words = ["data", "check", "folder", folder, "--out", tmp_path / "a.png", "--sheet", tmp_path / "a.png"]
    code, _, errors = drseg(*words)
    assert (
        code == 2
        and "--sheet and --out are the same file; expected two files" in errors
        and not (tmp_path / "a.png").exists()
    )


def test_nothing_of_a_former_map_stays(tmp_path):
    pytest.importorskip("pyogrio")
    image = scene(tmp_path / "in.tif")
    out, polygons = tmp_path / "out" / "map.tif", tmp_path / "out" / "map.gpkg"
    mapped(image, out, scores=True, probabilities=True, polygons=polygons)
    others = ["map.tif.ovr", "map_uncertainty.tif.aux.xml", "map_scores.tif.aux.xml", "map_overlay.png.aux.xml"]
    others += ["map.gpkg-wal", "map.tif.msk"]
    for name in others:
        (out.parent / name).write_text("of a former map")
    for name in ("map_notes.txt", "map2.tif", "map.csv"):
        (out.parent / name).write_text("mine")
    mapped(image, out, scores=True, polygons=polygons, overwrite=True)
    left = sorted(path.name for path in out.parent.iterdir())
    assert left == sorted([*WRITTEN, "map_scores.tif", "map.gpkg", "map_notes.txt", "map2.tif", "map.csv"])
    mapped(image, out, overwrite=True)
    left = sorted(path.name for path in out.parent.iterdir())
    assert left == sorted([*WRITTEN, "map.gpkg", "map_notes.txt", "map2.tif", "map.csv"])
    # and without --overwrite it is not taken over
    (out.parent / "new_scores.tif").write_text("of a former map")
    with pytest.raises(ConfigError, match="new_scores.tif exists; expected a new path, or overwrite"):
        mapped(image, out.parent / "new.tif")
    assert (out.parent / "new_scores.tif").read_text() == "of a former map"


WORLD = "0.5\n0\n0\n-0.5\n500000\n5600000\n"
TAB = """!table
!version 300
Definition Table
  File "map.tif"
  Type "RASTER"
  (500000,5600000) (0,0) Label "a",
  (500010,5600000) (20,0) Label "b",
  (500010,5599990) (20,20) Label "c"
  CoordSys Earth Projection 8, 104, "m", 9, 0, 0.9996, 500000, 0
"""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("end", [".tfw", ".TFW", ".tifw", ".wld", ".tab", "_scores.tfw", "_overlay.pgw"])
def test_no_world_file_places_a_map_without_a_place(tmp_path, end, overwrite):
    image = write(tmp_path / "in.png", color_image(truth()).numpy(), driver="PNG")
    world = tmp_path / "out" / f"map{end}"
    world.parent.mkdir()
    world.write_text(TAB if end == ".tab" else WORLD)
    said = f"predict_scene: .*map{end} would give the map a place that the scene does not have; expected another path"
    with pytest.raises(ConfigError, match=said):
        mapped(image, tmp_path / "out" / "map.tif", scores=True, overwrite=overwrite)
    assert list(world.parent.iterdir()) == [world]
    # GDAL would take it so
    mapped(image, tmp_path / "other" / "map.tif", scores=True)
    shutil.copy(world, tmp_path / "other")
    with rasterio.open(tmp_path / "other" / world.with_suffix(".png" if "overlay" in end else ".tif").name) as raster:
        assert not raster.transform.is_identity
    # a scene's own place comes first
    files = mapped(scene(tmp_path / "in.tif"), tmp_path / "out" / "map.tif")
    with rasterio.open(files.classes) as raster:
        assert raster.transform == PLACE["transform"]
    assert world.exists()


@pytest.mark.promise("C48")
def test_a_run_that_fails_removes_nothing(tmp_path):
    image = scene(tmp_path / "in.tif")
    mapped(image, tmp_path / "map.tif", scores=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = predictor()
    broken.model.forward = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        predict_scene(broken, image, tmp_path / "map.tif", overwrite=True, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_dry_run_does_not_mind_what_is_there(drseg, run, tmp_path):
    image = scene(tmp_path / "in.tif")
    (tmp_path / "map.tif").write_text("mine")
    words = ["predict", run, image, "--out", tmp_path / "map.tif", "--dry-run", "--polygons", tmp_path / "map.gpkg"]
    code, text, _ = drseg(*words)
    assert code == 0 and text.splitlines()[-1] == "then the polygons are traced"
    assert "disk while it is written: about 0 MB" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "map.tif"]
    assert (tmp_path / "map.tif").read_text() == "mine"
    # a file that cannot be written is said now, not after the hours that were asked for
    bare = write(tmp_path / "bare.tif", color_image(truth()).numpy(), crs="EPSG:32632")
    words[2], words[-1] = bare, tmp_path / "map.geojson"
    code, _, errors = drseg(*words)
    assert code == 2 and "polygons as GeoJSON need degrees" in errors and "got no transform" in errors


@pytest.mark.parametrize("crs", ["+proj=nsper +h=3000000 +lat_0=50 +lon_0=9", "+proj=isea"])
def test_a_crs_that_geotiff_cannot_keep_is_refused_before(tmp_path, crs):
    text = rasterio.crs.CRS.from_user_input(crs).to_wkt().replace("&", "&amp;").replace('"', "&quot;")
    member = scene(tmp_path / "member.tif")
    with rasterio.open(member) as source:
        copy(source, tmp_path / "scene.vrt", driver="VRT")
    content = (tmp_path / "scene.vrt").read_text()
    begin, end = content.index("<SRS"), content.index("</SRS>")
    (tmp_path / "scene.vrt").write_text(f"{content[:begin]}<SRS>{text}{content[end:]}")
    used = predictor()
    with pytest.raises(RasterError, match="the map would not keep the CRS or transform of the scene") as caught:
        predict_scene(used, tmp_path / "scene.vrt", tmp_path / "map.tif", progress=False)
    assert used.model.batches == [] and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member.tif", "scene.vrt"]


def test_the_room_on_the_disk(tmp_path, monkeypatch, caplog):
    size = 512
    label = truth(size // 8, size // 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    image = write(tmp_path / "in.tif", color_image(label).numpy(), **PLACE)
    free = 10**12
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    mapped(image, tmp_path / "a.tif")
    assert "may be too small" not in caplog.text
    # less than what such a map usually takes: said, and done
    free = 2_000_000
    mapped(image, tmp_path / "b.tif", scores=True, probabilities=True)
    assert "the disk may be too small; such a map usually takes 3 MB while it is written, 2 MB are free" in caplog.text


def test_a_map_of_nodata_takes_nearly_no_room(tmp_path, monkeypatch):
    image = write(tmp_path / "in.tif", np.zeros((3, 1000, 1000), np.uint8), nodata=0, **PLACE)
    # a map of a million pixels without data takes 12 kB while it is written
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 - 1))
    files = mapped(image, tmp_path / "map.tif")
    assert sum(path.stat().st_size for path in files.present()) < 100_000


def test_bands_of_a_run_that_a_scene_lacks(drseg, tmp_path, small):
    from tests.data.test_own_images import folder as write_folder

    deep = np.random.default_rng(0).integers(1, 255, size=(5, 40, 40)).astype(np.uint8)
    root = write_folder(tmp_path / "set", [deep, deep])
    own = tmp_path / "run"
    words = ["--data", f"folder:{root}", "--bands", "5,3,2", "--device", "cpu"]
    assert drseg("train", *small, *words, "--out", own)[0] == 0
    image = scene(tmp_path / "in.tif")
    code, _, errors = drseg("predict", own, image, "--out", tmp_path / "map.tif")
    assert code == 2 and errors.splitlines()[0] == (
        f"drseg: error: read_scene: bands do not fit {image}; expected one or three numbers from 1 to 3, got "
        "[5, 3, 2] (--bands chooses them; by default a run takes those of its training)"
    )
    assert drseg("predict", own, image, "--out", tmp_path / "map.tif", "--bands", "1,2,3")[0] == 0


@pytest.mark.parametrize("turn", [1, 6])
def test_a_photograph_that_is_to_be_turned_is_said_so(tmp_path, caplog, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(color_image(truth()).permute(1, 2, 0).numpy()).save(tmp_path / "photo.jpg", exif=exif)
    mapped(tmp_path / "photo.jpg", tmp_path / "map.tif")
    assert ("photo.jpg: its EXIF data say that it is to be turned" in caplog.text) == (turn != 1)
    with rasterio.open(tmp_path / "map.tif") as result:
        assert result.shape == tuple(truth().shape)
