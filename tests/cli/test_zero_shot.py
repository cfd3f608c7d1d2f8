# SPDX-License-Identifier: Apache-2.0
"""``drseg predict zero-shot``: what it writes, what it says where weights are missing, and its exit codes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from PIL import Image

import drseg_core
from drseg_core.cli.zero_shot import listed
from drseg_core.scenes.synthetic import write_synthetic_scene

rasterio = pytest.importorskip("rasterio")
Command = Callable[..., tuple[int, str, str]]
WORDS = ("--classes", "building; road, street; tree#00ff00")
WRITTEN = ["map.qml", "map.tif", "map.tif.aux.xml", "map_areas.csv", "map_overlay.png", "map_uncertainty.tif"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_scene(tmp_path_factory.mktemp("scene") / "scene.tif", width=70, height=50, collar=4)


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub's cache with nothing in it, and no network; the list has what was asked of the hub."""
    asked: list[str] = []

    def download(repository: str, file: str) -> str:
        asked.append(f"{repository}/{file}")
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    def no_socket(*given: Any, **options: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(socket, "create_connection", no_socket)
    monkeypatch.setattr(socket.socket, "connect", no_socket)
    return asked


def test_a_map_and_what_is_said_of_it(drseg: Command, scene: Path, tmp_path: Path, empty: list[str]) -> None:
    pytest.importorskip("pyogrio")
    words = ["--scores", "--probabilities", "--polygons", tmp_path / "map.gpkg", "--background", "sky; wall"]
    code, text, errors = drseg("predict", "zero-shot:tiny", scene, *WORDS, "--out", tmp_path / "map.tif", *words)
    assert code == 0, errors
    assert empty == []
    assert "classes: building; road (or street); tree\n" in text and "clip: drseg-tiny, random weights" in text
    assert text.endswith("CLIP has random weights: this map means nothing\n") and "the map means nothing" in errors
    assert "one graph: 9 x 7 = 63 cells, about " in errors and text.count("written: ") == 9
    present = sorted(path.name for path in tmp_path.iterdir())
    assert present == sorted([*WRITTEN, "map.gpkg", "map_probabilities.tif", "map_scores.tif"])
    with rasterio.open(scene) as source, rasterio.open(tmp_path / "map.tif") as result:
        assert (result.crs, result.transform, result.shape) == (source.crs, source.transform, source.shape)
        assert result.colormap(1)[2][:3] == (0, 255, 0) and "means nothing" in result.tags()["warning"]
        assert json.loads(result.tags()["class_names"]) == ["building", "road", "tree", "background"]
        assert ((result.read(1) == 255) == (source.dataset_mask() == 0)).all()


def test_the_door_gives_the_files_of_the_command(drseg: Command, scene: Path, tmp_path: Path) -> None:
    words = ["--variant", "clearclip", "--rotations", 4, "--steps", 3, "--window", 48, "--k", 5, "--decay", 0.1]
    words += ["--radius", 2, "--super-tile", 500, "--refine"]
    out = tmp_path / "command" / "map.tif"
    assert drseg("predict", "zero-shot:tiny", scene, *WORDS, "--out", out, *words)[0] == 0
    options = {"variant": "clearclip", "rotations": 4, "steps": 3, "window": 48, "k": 5, "decay": 0.1}
    options |= {"radius": 2.0, "super_tile": 500, "refine": True}
    mapper = drseg_core.zero_shot("tiny", **options)
    found = mapper.predict(scene, WORDS[1], out=tmp_path / "door" / "map.tif")
    assert found.files is not None and mapper.config.overlap == 24
    for path in found.files.present():
        assert path.read_bytes() == (out.parent / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "words",
    [
        ["--prior", "none"],
        ["--clip", "random", "--prior", "random", "--prior-layer", 0],
        ["--prior", "none", "--variant", "naclip", "--templates", "a photo of a {}; {}", "--threshold", 0.4],
        ["--radius-metres", 12, "--steps", 2, "--super-tile", 700, "--refine"],
        ["--decay-per-metre", 0.1, "--select", "cosine", "--alpha", 0.5, "--gsd", 1],
        ["--variant", "proxyclip", "--overlap", 0, "--batch-size", 1, "--logit-scale", 40],
    ],
)
def test_options(drseg: Command, scene: Path, tmp_path: Path, empty: list[str], words: list[Any]) -> None:
    code, _, errors = drseg("predict", "zero-shot:tiny", scene, *WORDS, "--out", tmp_path / "map.tif", *words)
    assert code == 0, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == WRITTEN


def test_a_dry_run_writes_nothing(drseg: Command, scene: Path, tmp_path: Path) -> None:
    words = [*WORDS, "--out", tmp_path / "map.tif", "--dry-run"]
    code, text, _ = drseg("predict", "zero-shot:tiny", scene, *words)
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert "size: 70 x 50 pixels, 0.5 m each" in text and "one graph: 9 x 7 = 63 cells" in text
    assert "windows: 12 at most" in text and "time of the graph" in text
    # also where a map would be refused
    assert drseg("predict", "zero-shot:tiny", scene, *words, "--max-cells", 5)[0] == 0


@pytest.mark.parametrize("words", [["--dry-run"], []])
def test_geojson_of_half_a_place_is_refused_before_weights_are_loaded(drseg, tmp_path, empty, words) -> None:
    bare = tmp_path / "bare.tif"
    with rasterio.open(bare, "w", width=70, height=50, count=3, dtype="uint8", crs="EPSG:32632"):
        pass
    words = [*WORDS, "--out", tmp_path / "map.tif", "--polygons", tmp_path / "map.geojson", *words]
    code, _, errors = drseg("predict", "zero-shot", bare, *words, "--offline")
    assert code == 2 and "polygons as GeoJSON need degrees" in errors and "got no transform" in errors


# what is missing


def only_line(errors: str) -> str:
    (line,) = [line for line in errors.splitlines() if line.startswith("drseg: error")]
    assert "Traceback" not in errors
    return line


@pytest.mark.parametrize(
    ("preset", "files"),
    [
        ("zero-shot", ("timm/vit_base_patch16_clip_224.openai", "timm/vit_base_patch16_dinov3.lvd1689m")),
        ("zero-shot:l", ("timm/vit_large_patch14_clip_336.openai", "timm/vit_large_patch16_dinov3.sat493m")),
    ],
)
def test_offline_says_what_to_bring(drseg, scene, tmp_path, empty, preset: str, files: tuple[str, str]) -> None:
    code, _, errors = drseg("predict", preset, scene, *WORDS, "--out", tmp_path / "map.tif", "--offline")
    line = only_line(errors)
    assert code == 4 and empty == [] and list(tmp_path.iterdir()) == []
    for word in (*files, "open_clip_model.safetensors", "model.safetensors", "--clip FILE", "--prior FILE", "MIT"):
        assert word in line, word
    assert "dinov3-license" in line and "--offline never connects" in line
    assert line.endswith("--clip random --prior random works without weights: such a map means nothing")
    # one of them is here
    code, _, errors = drseg(
        "predict", preset, scene, *WORDS, "--out", tmp_path / "map.tif", "--offline", "--prior", "none"
    )
    assert code == 4 and files[0] in only_line(errors) and "--prior" not in only_line(errors)


def test_without_a_network_too_and_licences_come_first(drseg, scene, tmp_path, empty) -> None:
    code, _, errors = drseg("predict", "zero-shot", scene, *WORDS, "--out", tmp_path / "map.tif")
    line = only_line(errors)
    assert code == 4 and empty == ["timm/vit_base_patch16_clip_224.openai/open_clip_model.safetensors"]
    assert "--clip FILE" in line and "--prior FILE" in line and "no network" in line
    shown = errors[: errors.index("drseg: error")]
    assert "licence: MIT (OpenAI)" in shown and "licence: dinov3-license" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--variant", "odd"], 2, "variant is unknown; expected one of value"),
        (["--alpha", "1"], 2, "alpha is out of range"),
        (["--window", "33"], 2, "expected a multiple of 8, at least 16 pixels, got 33"),
        (["--overlap", "9"], 2, "overlap does not fit"),
        (["--max-cells", "5"], 2, "which take about"),
        (["--templates", "no place"], 2, "exactly one {}"),
        (["--background", ";"], 2, "--background is empty"),
        (["--background", "@absent.txt"], 2, "--background names no file"),
        (["--bands", "7,8,9"], 2, "expected one or three numbers from 1 to 3"),
        (["--clip", "absent.safetensors"], 4, "--clip absent.safetensors not found"),
        (["--prior", "folder/absent.pt"], 4, "--prior folder/absent.pt not found"),
        (["--clip", "ViT-B-32"], 2, "ViT-B-32 has no weights None"),
        (["--clip", "hub:owner/file.pt"], 2, "expected hub:owner/name/file"),
        (["--prior", "odd"], 2, "prior odd has no published weights"),
        (["--device", "gpu"], 2, "device: name is unknown"),
        (["--classes", "road; road"], 2, "twice; expected every"),
    ],
)
def test_refusals(drseg, scene, tmp_path, empty, words: list[str], code: int, said: str) -> None:
    found, _, errors = drseg("predict", "zero-shot:tiny", scene, *WORDS, "--out", tmp_path / "map.tif", *words)
    assert found == code, errors
    assert said in only_line(errors) and empty == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--radius", "nan"], "--radius has a wrong value; expected a number, got nan"),
        (["--steps", "1.5"], "--steps has a wrong value; expected a whole number, got 1.5"),
        (["--batch-size", "odd"], "--batch-size has a wrong value; expected a whole number, got odd"),
    ],
)
def test_what_is_no_number(drseg, scene, tmp_path, words: list[str], said: str) -> None:
    code, _, errors = drseg("predict", "zero-shot:tiny", scene, *WORDS, "--out", tmp_path / "map.tif", *words)
    assert code == 2 and errors.splitlines()[0] == f"drseg predict: error: {said}"


@pytest.mark.promise("C51")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--templates", "no braces"], "expected exactly one {}, got 'no braces'"),
        (["--variant", "foo"], "variant is unknown"),
        (["--threshold", 2], "threshold is out of range; expected 0 to 1, got 2"),
        (["--polygons", "m.gpkg", "--min-area=-5"], "min_area is out of range; expected a finite number, at least 0"),
        (["--polygons", "m.gpkg", "--min-area", "1e400"], "min_area is out of range; expected a finite number"),
        (["--min-area", 5], "min_area is for polygons; expected polygons beside it, got 5.0 alone"),
        (["--asset", "red"], "asset is for STAC items; expected one (.json, .geojson) among IMAGE, got red"),
        (["--overlap", 9], "overlap does not fit; expected a multiple of 16 pixels below 224, got 9"),
        (["--window", 100], "expected a multiple of 16, at least 32 pixels, got 100"),
        (["--prior", "none", "--variant", "proxyclip"], "prior is missing"),
        (["--radius-metres", 5, "--radius", 3], "radius and radius_metres are both given"),
        (["--background", "sky", "--classes", "road; background"], "a class is called background, as that of"),
        (["--background", "sky", "--classes", "road; Background"], "a class is called background, as that of"),
        (["--background", "sky; Lane", "--classes", "road, lane; roof"], "word once, and none of a class, got 'Lane'"),
        (["--background", "sky; wall; Sky"], "word once, and none of a class, got 'Sky'"),
        (["--background", "sky#ff0000; wall"], "background has a colour; expected words alone, got 'sky#ff0000'"),
        (["--background", "sky; wall#"], "background has a colour; expected words alone, got 'wall#'"),
        (["--background", "sk\x1by; wall"], "background has a control character; expected text, got 'sk\\x1by'"),
        (["--background", "sky; wa\ufffell"], "background has a control character; expected text, got 'wa\\ufffell'"),
    ],
)
def test_cheap_refusals_come_before_the_weights(drseg, scene, tmp_path, empty, words: list[Any], said: str) -> None:
    """Nothing is asked of the hub, and all are errors of options."""
    code, _, errors = drseg("predict", "zero-shot", scene, *WORDS, "--out", tmp_path / "map.tif", *words)
    assert code == 2, errors
    assert said in only_line(errors) and empty == []


def test_metres_without_a_place_are_refused_before_the_weights(drseg, tmp_path, empty) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "plain.png")
    for option in ("radius", "decay"):
        words = ["--radius-metres" if option == "radius" else "--decay-per-metre", 5]
        code, _, errors = drseg(
            "predict", "zero-shot", tmp_path / "plain.png", *WORDS, "--out", tmp_path / "map.tif", *words
        )
        assert code == 2 and "needs a place; expected a CRS" in only_line(errors) and empty == []


def test_other_refusals(drseg: Command, scene: Path, tmp_path: Path, empty: list[str]) -> None:
    out = tmp_path / "map.tif"
    code, _, errors = drseg("predict", "zero-shot", scene, "--out", out)
    assert code == 2 and "required: --classes" in errors and "usage: drseg predict zero-shot" in errors
    code, _, errors = drseg("predict", "zero-shot:odd", scene, *WORDS, "--out", out)
    assert code == 2 and "preset odd not found; expected a YAML file or one of b, l, tiny" in only_line(errors)
    code, _, errors = drseg("predict", "zeroshot:l", scene, *WORDS, "--out", out)
    assert code == 2 and "expected zero-shot, zero-shot:b, :l, :tiny or :FILE, got 'zeroshot:l'" in only_line(errors)
    # before any weights are asked for
    code, _, errors = drseg("predict", "zero-shot", tmp_path / "absent.tif", *WORDS, "--out", out)
    assert code == 3 and "absent.tif" in only_line(errors) and empty == []
    out.write_text("mine")
    assert drseg("predict", "zero-shot", scene, *WORDS, "--out", out)[0] == 2 and empty == []
    assert out.read_text() == "mine"
    assert drseg("predict", "zero-shot:tiny", scene, *WORDS, "--out", out, "--overwrite")[0] == 0
    code, text, _ = drseg("predict", "zero-shot", "--help")
    assert code == 0 and "--decay-per-metre" in text
    code, text, _ = drseg("predict", "--help")
    assert code == 0 and "drseg predict zero-shot --help" in text and "--decay-per-metre" not in text


def test_files_of_words_have_comments(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# what is no class\n sky\r\n\n  # walls\nwall; fence\n")
    assert listed("--background", f"@{words}") == ["sky", "wall", "fence"]
