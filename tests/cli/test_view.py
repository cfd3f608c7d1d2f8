# SPDX-License-Identifier: Apache-2.0
"""``drseg view`` and ``predict --view``: what they write, say and refuse."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from drseg_core.cli.main import main
from drseg_core.files import atomic_path
from drseg_core.scenes.synthetic import write_synthetic_scene
from tests.cli.test_exit_codes import check
from tests.forks import in_child


def content(path: Path) -> dict:
    (found,) = re.findall(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(found)


@pytest.fixture
def scene(tmp_path):
    return write_synthetic_scene(tmp_path / "scene.tif", width=70, height=50)


def test_predict_view_and_view_write_the_same_page(drseg, run, scene, tmp_path):
    words = ["predict", run, scene, "--classes", "bare soil, ground; pond", "--device", "cpu", "--tile-size", 32]
    code, said, _ = drseg(*words, "--overlap", 8, "--out", tmp_path / "map.tif", "--view")
    page = tmp_path / "map.html"
    assert code == 0 and re.search(rf"^written: {re.escape(str(page))} \(0\.\d MB\)$", said, re.MULTILINE)
    found = content(page)
    keys = [layer["key"] for layer in found["layers"]]
    assert keys == ["image", "classes", "uncertainty", "original", "refined"]
    assert len(found["graph"]["parts"]) > 2 and found["graph"]["parts"][0]["k"] == 3
    # the map names its synonyms
    shown = drseg("view", tmp_path / "map.tif", "--image", scene, "--run", run, "--out", tmp_path / "two.html")
    assert shown[0] == 0 and shown[1].splitlines()[-1].startswith(f"written: {tmp_path / 'two.html'} (")
    again = content(tmp_path / "two.html")
    assert again == found and again["notes"] == []
    # refused before the model is read, and nothing is touched
    check(drseg(*words, "--out", tmp_path / "other.tif", "--view", "--aoi", "nowhere"), 3, "nowhere")
    (tmp_path / "third.html").write_text("mine")
    check(drseg(*words, "--out", tmp_path / "third.tif", "--view"), 2, "third.html", "--overwrite")
    assert (tmp_path / "third.html").read_text() == "mine" and not (tmp_path / "third.tif").exists()


def test_a_page_that_fails_is_listed_and_the_others_are_written(drseg, run, scene, tmp_path, monkeypatch):
    from drseg_core.errors import ConfigError
    from drseg_core.view import page

    own = page.write_page

    def write_page(out, **how):
        if Path(out).stem == "other":
            raise ConfigError("view: the page cannot be so small")
        return own(out, **how)

    monkeypatch.setattr(page, "write_page", write_page)
    write_synthetic_scene(tmp_path / "other.tif", width=40, height=40, seed=1, origin=(1000.0, 1000.0))
    out = tmp_path / "maps"
    code, said, err = drseg("predict", run, tmp_path, "--out", out, "--device", "cpu", "--view", "--keep-going")
    assert code == 8 and f"failed: the page of {out / 'other.tif'}: view: the page cannot be so small" in err
    assert [path.name for path in out.glob("*.html")] == ["scene.html"] and "mapped: 2 of 2 scenes" in said


def test_each_of_many_scenes_has_a_page(drseg, run, scene, tmp_path):
    write_synthetic_scene(tmp_path / "other.tif", width=40, height=40, seed=1, origin=(1000.0, 1000.0))
    (tmp_path / "broken.tif").write_text("none")
    out = tmp_path / "maps"
    code, said, _ = drseg("predict", run, tmp_path, "--out", out, "--device", "cpu", "--view", "--keep-going")
    assert code == 8 and said.count(".html (") == 2
    assert sorted(path.name for path in out.glob("*.html")) == ["other.html", "scene.html"]
    assert content(out / "other.html")["width"] == 40 and content(out / "other.html")["graph"] is not None
    # a page that is there is no file to list later
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "scene.html").write_text("mine")
    words = ["predict", run, tmp_path / "scene.tif", tmp_path / "other.tif", "--out", tmp_path / "elsewhere"]
    check(drseg(*words, "--view", "--keep-going"), 2, "scene.html", "--overwrite")


def test_zero_shot_view(drseg, scene, tmp_path):
    out = tmp_path / "map.tif"
    code, said, _ = drseg(
        *("predict", "zero-shot:tiny", scene, "--classes", "roof; road", "--background", "sky", "--out", out),
        *("--threshold", 0.1, "--device", "cpu", "--view"),
    )
    found = content(tmp_path / "map.html")
    assert code == 0 and f"written: {tmp_path / 'map.html'} (" in said
    assert found["names"] == ["roof", "road", "background", "other"] and len(found["graph"]["parts"]) == 1
    assert len(found["layers"][-1]["scales"]) == 3 and found["layers"][-1]["key"] == "refined"


def test_what_was_sampled_is_printed(drseg, run, scene, tmp_path):
    drseg("predict", run, scene, "--out", tmp_path / "map.tif", "--device", "cpu")
    code, said, _ = drseg("view", tmp_path / "map.tif")
    assert code == 0 and said.splitlines() == [f"written: {tmp_path / 'map.html'} (0.0 MB)"]
    check(drseg("view", tmp_path / "map.tif"), 2, "--out exists", "--overwrite")
    assert drseg("view", tmp_path / "map.tif", "--overwrite")[0] == 0
    check(drseg("view", tmp_path / "map.tif", "--overwrite", "--max-mb", 0.001), 2, "cannot be so small")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["view"], 2, "required: MAP"),
        (["view", "absent.tif"], 3, "absent.tif is not a file"),
        (["view", "scene.tif"], 3, "is no map; expected a class raster with names"),
        (["view", "scene.tif", "--run", "run"], 2, "--run needs the scene; expected --image"),
        (["view", "scene.tif", "--image", "scene.tif", "--run", "zero-shot:b"], 2, "drseg predict zero-shot:b --view"),
        (["view", "scene.tif", "--image", "scene.tif", "--run", "nope"], 4, "nope"),
        (["view", "scene.tif", "--out", "page.png"], 2, "expected a path ending in .html"),
        (["view", "scene.tif", "--max-mb", "0"], 2, "--max-mb is out of range"),
    ],
)
def test_refusals(drseg, scene, monkeypatch, tmp_path, words, code, said):
    monkeypatch.chdir(tmp_path)
    check(drseg(*words), code, said)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_help_names_what_is_written(drseg):
    code, text, _ = drseg("view", "--help")
    assert code == 0 and "opens without a server or a network" in text and "--max-mb" in text


def test_a_page_of_a_former_map_goes_with_it(drseg, run, scene, tmp_path):
    words = ["predict", run, scene, "--out", tmp_path / "map.tif", "--device", "cpu"]
    page = tmp_path / "map.html"
    assert drseg(*words, "--view")[0] == 0 and page.is_file()
    (tmp_path / "map.tif").unlink()
    # a map without its page would be shown as another: the same as with its scores
    check(drseg(*words), 2, "exists")
    assert page.is_file()
    code, _, errors = drseg(*words, "--overwrite")
    assert code == 0 and f"{page}, the page of the map before, is removed" in errors and not page.exists()
    # one that is somebody else's is no part of any map
    page.write_text("<!DOCTYPE html><title>mine</title>")
    assert drseg(*words, "--overwrite")[0] == 0 and "mine" in page.read_text()


def torn(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text[:1000])
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("several", [False, True])
def test_a_call_killed_at_its_page_goes_on_there(drseg, run, scene, tmp_path, monkeypatch, several):
    out = tmp_path / "maps"
    second = [write_synthetic_scene(tmp_path / "b.tif", width=40, height=40, seed=1)] if several else []
    words = [
        str(w) for w in ("predict", run, scene, *second, "--out", f"{out}/{{name}}.tif", "--device", "cpu", "--view")
    ]
    with monkeypatch.context() as patch:
        patch.setattr("drseg_core.view.page.write_text_atomic", torn)
        code, text = in_child(lambda: main(words), tmp_path / "said", 120)
    assert code == -9, text
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    assert len(before) == 2 * (1 + several) and not list(out.glob("[!.]*.html")) and list(out.glob(".*.part*"))
    code, said, errors = drseg(*words)
    assert code == 0, errors
    assert said.count(".html (") == 1 + several and content(out / "scene.html")["width"] == 70
    # the maps are those of before, and nothing else is left
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tif")} == before
    assert not [path.name for path in out.iterdir() if ".part" in path.name or ".work" in path.name]
