# SPDX-License-Identifier: Apache-2.0
"""Which scenes words stand for, and where their maps go."""

from __future__ import annotations

import http.server
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drseg_core.errors import ConfigError, DatasetError
from drseg_core.scenes.reader import open_scene
from drseg_core.scenes.sources import Scene, address, list_scenes, with_outputs
from tests.scenes.test_predict import NORTH_UP, write

rasterio = pytest.importorskip("rasterio")
from rasterio.shutil import copy  # noqa: E402


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.tif", "a.TIF", "deep/c.png", "deep/x/d.jpg", "notes.txt", "odd[1].tif"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    Path("list.txt").write_text("# scenes of May\nb.tif\n\ndeep\n")
    return tmp_path


def images(*words: str, **options: Any) -> list[str]:
    return [scene.image for scene in list_scenes(words, **options)]


def test_words(place):
    assert images("b.tif", "absent.tif") == ["b.tif", "absent.tif"]
    assert images(".") == ["a.TIF", "b.tif", "odd[1].tif"]
    assert images("deep/") == ["deep/c.png"]
    assert images("*.tif", "b.tif") == ["b.tif", "odd[1].tif"]
    assert images("deep/**/*.*") == ["deep/c.png", "deep/x/d.jpg"]
    # a file that has the name of a pattern is a file
    assert images("odd[1].tif") == ["odd[1].tif"]
    assert images("@list.txt", "a.TIF") == ["b.tif", "deep/c.png", "a.TIF"]


@pytest.mark.parametrize(
    ("word", "kind", "said"),
    [
        ("empty", ConfigError, "empty has no image; expected files such as .tif"),
        ("*.jp2", ConfigError, r"\*.jp2 matches no file"),
        ("@absent.txt", DatasetError, "absent.txt cannot be read as text"),
        ("ftp://host/a.tif", ConfigError, "ftp://host/a.tif has an unknown scheme; expected one of http://"),
        ("https://host/a.tif", ConfigError, "/vsicurl/https://host/a.tif is remote; expected a file, or --remote"),
        ("/vsis3/bucket/a.tif", ConfigError, "is remote"),
    ],
)
def test_words_that_stand_for_nothing(place, word, kind, said):
    (place / "empty").mkdir()
    with pytest.raises(kind, match=said):
        list_scenes([word])


VRT = '<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>{}'


def test_files_that_point_to_something_remote(place):
    near = VRT.format('<SourceFilename relativeToVRT="1">b.tif</SourceFilename>')
    Path("near.vrt").write_text(near)
    assert images("near.vrt") == ["near.vrt"]
    for number, source in enumerate(("/vsicurl/https://host/a.tif", "/vsis3/bucket/a.tif", "http://host/a.tif")):
        path = Path(f"{number}.vrt")
        # also where it is far down in the file
        path.write_text(VRT.format(f"{' ' * 5000}<SourceFilename>{source}</SourceFilename>"))
        with pytest.raises(ConfigError, match=f"{path} points to something remote; expected files, or --remote"):
            list_scenes([str(path)])
        assert images(str(path), remote=True) == [str(path)]
    Path("service.xml").write_text("<GDAL_WMS><ServerUrl>https://host/</ServerUrl></GDAL_WMS>")
    with pytest.raises(ConfigError, match="service.xml points to something remote"):
        list_scenes(["service.xml"])


def collection(*assets: dict[str, Any]) -> dict[str, Any]:
    features = [{"type": "Feature", "id": f"item-{n}", "assets": found} for n, found in enumerate(assets)]
    return {"type": "FeatureCollection", "features": features}


def test_stac(place):
    image, view = {"href": "./tiles/1.tif", "roles": ["data"]}, {"href": "view.png", "roles": ["overview"]}
    Path("deep/items.json").write_text(json.dumps(collection({"image": image, "overview": view}, {"any": view})))
    found = list_scenes(["deep/items.json"])
    assert [(scene.image, scene.name) for scene in found] == [
        ("deep/tiles/1.tif", "item-0"),
        ("deep/view.png", "item-1"),
    ]
    several = {"visual": {"href": "file:///data/v.tif"}, "B04": image, "B03": image}
    item = {**collection(several)["features"][0], "stac_version": "1.0.0"}
    Path("item.geojson").write_text(json.dumps(item))
    assert images("item.geojson") == ["/data/v.tif"] and images("item.geojson", asset="B04") == ["tiles/1.tif"]
    with pytest.raises(ConfigError, match="item item-0 has no asset red; expected visual, B04, B03"):
        list_scenes(["item.geojson"], asset="red")
    Path("bands.json").write_text(json.dumps(collection({"B04": image, "B03": image})))
    with pytest.raises(ConfigError, match="item item-0 has several assets; expected --asset with one of B04, B03"):
        list_scenes(["bands.json"])
    Path("remote.json").write_text(json.dumps(collection({"a": {"href": "s3://bucket/key.tif"}})))
    with pytest.raises(ConfigError, match="/vsis3/bucket/key.tif is remote"):
        list_scenes(["remote.json"])
    assert images("remote.json", remote=True) == ["/vsis3/bucket/key.tif"]
    for text in ("{}", "[1]", "no json", '{"type": "FeatureCollection", "features": [{"id": 1}]}'):
        Path("bad.json").write_text(text)
        with pytest.raises(
            DatasetError, match="bad.json is no STAC item or item collection; expected features with id"
        ):
            list_scenes(["bad.json"])


def test_an_asset_without_stac_items(place):
    for words in (["b.tif"], ["@list.txt"], ["deep", "a.TIF"]):
        with pytest.raises(ConfigError, match=r"asset is for STAC items; expected one \(.json, .geojson\) among IMAGE"):
            list_scenes(words, asset="red")
    Path("items.json").write_text(json.dumps(collection({"red": {"href": "b.tif"}, "nir": {"href": "n.tif"}})))
    Path("more.txt").write_text("items.json\n")
    assert images("a.TIF", "@more.txt", asset="red") == ["a.TIF", "b.tif"]


def test_hrefs_of_stac_are_decoded(place):
    for name in ("sp ace.tif", "as%20named.tif", "as named.tif", "ü#1.tif"):
        Path("deep", name).write_text("x")
    deep = place / "deep"

    def image(href: str) -> str:
        Path("deep/item.json").write_text(json.dumps(collection({"image": {"href": href}})))
        return images("deep/item.json")[0]

    for href in ("./sp%20ace.tif", "sp ace.tif"):
        assert image(href) == "deep/sp ace.tif"
    assert image("as%20named.tif") == "deep/as%20named.tif"
    for name in ("sp ace.tif", "as%20named.tif", "ü#1.tif"):
        uri = (deep / name).as_uri()
        for href in (uri, uri.replace("file:", "FILE:"), uri.replace("///", "//localhost/")):
            assert image(href) == str(deep / name)
    # what is no name of a file here is refused as before
    for href, said in (
        ("file://host/a.tif", "file://host/a.tif is on another host; expected file:///PATH"),
        ("file:///%76sicurl/https://host/a.tif", "/vsicurl/https://host/a.tif is remote"),
        ("%2Fvsis3/bucket/a.tif", "/vsis3/bucket/a.tif is remote"),
        ("a%FF.tif", r"a\\udcff.tif' is no UTF-8"),
    ):
        with pytest.raises(ConfigError, match=said):
            image(href)


def test_hidden_files_of_a_folder_are_no_scenes(place):
    # of macOS, and of a call that was killed
    for name in ("._a.tif", ".a_map-here-7-x.part.tif"):
        Path("deep", name).write_bytes(b"")
    assert images("deep") == ["deep/c.png"]


def outs(words: list[str], out: str, polygons: str | None = None) -> list[str]:
    return [str(scene.out) for scene in with_outputs(list_scenes(words), out, polygons)]


def test_a_name_that_is_no_text(place):
    (place / "deep" / "bad\udcff.png").write_text("x")
    with pytest.raises(ConfigError, match=r"'deep/bad\\udcff.png' is no UTF-8; expected a file of another name"):
        images("deep")


def test_outputs(place):
    assert outs(["b.tif"], "map.tif") == ["map.tif"]
    assert outs(["b.tif"], "maps/") == ["maps/b.tif"]
    assert outs(["b.tif", "a.TIF"], "maps") == ["maps/b.tif", "maps/a.tif"]
    assert outs(["deep/c.png", "b.tif"], "{folder}/{name}_map.tif") == ["deep/c_map.tif", "b_map.tif"]
    assert outs(["b.tif", "a.TIF"], "m{number:03}.tif") == ["m001.tif", "m002.tif"]
    found = with_outputs(list_scenes(["b.tif", "a.TIF"]), "{name}/m.tif", "{name}/m.gpkg")
    assert [str(scene.polygons) for scene in found] == ["b/m.gpkg", "a/m.gpkg"]
    # a file by several names
    assert outs(["b.tif", "./b.tif", str(Path("b.tif").absolute())], "maps/") == ["maps/b.tif"]
    # no pattern, but a name that someone may give a file
    assert outs(["b.tif"], "m{.tif") == ["m{.tif"]


@pytest.mark.parametrize(
    ("out", "polygons", "said"),
    [
        ("map.tif", None, "b.tif and a.TIF have one output, map.tif; expected a pattern such as maps/{name}.tif"),
        ("m{name}.tif", "all.gpkg", "b.tif and a.TIF have one output, all.gpkg"),
        ("{nmae}.tif", None, r"{nmae}.tif has an unknown field {nmae}; expected {name}, {number} or {folder}"),
        ("{}.tif", None, "unknown field {}"),
        ("{number:q}.tif", None, "cannot be filled in"),
    ],
)
def test_outputs_that_cannot_be(place, out, polygons, said):
    with pytest.raises(ConfigError, match=said):
        with_outputs(list_scenes(["b.tif", "a.TIF"]), out, polygons)


@pytest.mark.parametrize("name", ["b_uncertainty.tif", "b_scores.tif", "b_probabilities.tif"])
def test_a_map_beside_another_is_no_part_of_it(place, name):
    """The score of one scene is not the map of the next, nor removed with a former map."""
    Path(name).touch()
    with pytest.raises(ConfigError, match=f"b.tif and {name} have one output, maps/{name}; expected a pattern"):
        outs(["b.tif", name], "maps/")
    assert outs(["b.tif", name], "maps/{number}.tif") == ["maps/1.tif", "maps/2.tif"]


@pytest.mark.promise("C48")
def test_no_scene_is_replaced_by_the_map_of_another(place):
    Path("deep/1.tif").touch()
    with pytest.raises(ConfigError, match="deep/1.tif, an output for b.tif, is one of the scenes; expected another"):
        outs(["b.tif", "deep/1.tif"], "deep/{number}.tif")
    # by other names: what a link stands for, and a folder that is one
    Path("link.tif").symlink_to("deep/1.tif")
    with pytest.raises(ConfigError, match="is one of the scenes"):
        outs(["b.tif", "link.tif"], "deep/{number}.tif")
    Path("also").symlink_to("deep")
    with pytest.raises(ConfigError, match="is one of the scenes"):
        outs(["b.tif", "deep/1.tif"], "also/{number}.tif")


def test_no_file_of_a_scene_is_replaced_by_the_map_of_another(tmp_path, monkeypatch):
    """A member of a mosaic, in a mosaic of mosaics too, and any other name of a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "deep/b", "c"):
        Path(name).parent.mkdir(exist_ok=True)
        write(Path(f"{name}.tif"), np.ones((3, 4, 5), np.uint8), crs="EPSG:32632", transform=NORTH_UP)
    for member, mosaic in (("deep/b.tif", "inner.vrt"), ("inner.vrt", "outer.vrt")):
        with rasterio.open(member) as source:
            copy(source, mosaic, driver="VRT")
    for scene in ("inner.vrt", "outer.vrt"):
        with pytest.raises(
            ConfigError, match=f"deep/b.tif, an output for c.tif, is a file of the scene {scene}; expect"
        ):
            with_outputs([Scene("c.tif", "b"), Scene(scene, "mosaic")], "deep/")
    Path("same").mkdir()
    os.link("a.tif", "same/c.tif")
    with pytest.raises(ConfigError, match="same/c.tif, an output for c.tif, is one of the scenes"):
        outs(["c.tif", "a.tif"], "same/")
    Path("same/c.tif").unlink()
    Path("same/c.tif").symlink_to("../deep/b.tif")
    with pytest.raises(ConfigError, match="same/c.tif, an output for c.tif, is a file of the scene outer.vrt"):
        outs(["c.tif", "outer.vrt"], "same/")
    Path("same/c.tif").unlink()
    assert outs(["c.tif", "outer.vrt"], "same/") == ["same/c.tif", "same/outer.tif"]
    Path("broken.vrt").write_text("<VRTDataset rasterXSize='1'")
    assert outs(["c.tif", "broken.vrt"], "same/") == ["same/c.tif", "same/broken.tif"]


def test_a_list_that_names_itself(place):
    Path("one.txt").write_text("b.tif\n@deep/two.txt\n")
    Path("deep/two.txt").write_text("@one.txt\n")
    with pytest.raises(ConfigError, match="one.txt names itself; expected a list of other files"):
        list_scenes(["@one.txt"])
    # twice is not within itself
    Path("deep/two.txt").write_text("a.TIF\n")
    assert [scene.image for scene in list_scenes(["@one.txt", "@deep/two.txt"])] == ["b.tif", "a.TIF"]


@pytest.mark.promise("C48")
def test_an_id_is_no_path(place):
    """A collection of others decides on no folder."""
    content = collection(*({"image": {"href": f"{n}.tif"}} for n in range(3)))
    for item, given in zip(content["features"], ("../../evil", "S2/b", ".."), strict=True):
        item["id"] = given
    Path("ids.json").write_text(json.dumps(content))
    assert outs(["ids.json"], "maps/{name}/m.tif") == ["maps/.._.._evil/m.tif", "maps/S2_b/m.tif", "maps/_/m.tif"]


def test_no_scene():
    with pytest.raises(ConfigError, match="no scene is given"):
        with_outputs([], "map.tif")


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_scene_that_lies_elsewhere(tmp_path, monkeypatch):
    """Through GDAL's file system for http, from a server of this machine."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    image = np.random.default_rng(0).integers(0, 256, (3, 50, 60)).astype(np.uint8)
    write(tmp_path / "far.tif", image, crs="EPSG:32632", transform=NORTH_UP)
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        word = f"http://127.0.0.1:{server.server_address[1]}/far.tif"
        (scene,) = list_scenes([word], remote=True)
        assert scene.name == "far" and scene.image == address(word)
        with open_scene(scene.image) as opened:
            found, valid = opened.window(0, 50, 0, 60)
        server.shutdown()
    assert np.array_equal(found.numpy(), image) and valid.all()
