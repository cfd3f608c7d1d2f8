# SPDX-License-Identifier: Apache-2.0
"""What a page is made of: tiles at every scale, the scene on the map's grid, graphs as numbers, and its size."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import drseg_core as drseg
from drseg_core.errors import ConfigError, RasterError
from drseg_core.evaluation.inference import Predictor
from drseg_core.models.tiling import blend_window, tile_starts
from drseg_core.nn.label_propagation import propagation_graph, weight_graph
from drseg_core.nn.pdgr import PDGR
from drseg_core.ops import padding_mask
from drseg_core.scenes import sources
from drseg_core.scenes.predict import predict_scene
from drseg_core.scenes.reader import open_scene
from drseg_core.view.graph import EDGE_BYTES, Beneath, Part, make_part, packed, stride_for
from drseg_core.view.layers import on_grid_of, open_map
from drseg_core.view.of_run import beneath_run, of_run
from drseg_core.view.of_words import beneath_words
from drseg_core.view.page import write_page
from drseg_core.view.pyramid import CLASSES, PICTURE, TILE, averaged, pyramid
from tests.view.conftest import HEIGHT, OVERLAP, SIDE, WIDTH, Mapped

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def decoded(tile: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(tile.partition(",")[2]))))


def content(path: Path) -> dict[str, Any]:
    """The data of a page."""
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def random_map() -> np.ndarray:
    label = np.random.default_rng(0).integers(0, 7, (2 * TILE + 3, TILE + 1)).astype(np.uint8)
    label[:TILE, :TILE] = 255
    return label


def test_a_pyramid_of_classes_is_exact_at_every_scale(random_map):
    asked = []

    def read(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        asked.append((top, bottom, left, right))
        return random_map[top:bottom, left:right, None]

    levels = pyramid(read, *random_map.shape, CLASSES, scale=3)
    assert [(level.scale, level.rows, level.columns) for level in levels] == [(3, 3, 2), (6, 2, 1), (12, 1, 1)]
    assert sum((b - t) * (r - left) for t, b, left, r in asked) == random_map.size
    for level in levels:
        wanted = random_map[:: level.scale // 3, :: level.scale // 3]
        for number, tile in enumerate(level.tiles):
            row, column = divmod(number, level.columns)
            part = wanted[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            assert np.array_equal(part, decoded(tile)) if tile else (part == 255).all()
    assert levels[0].tiles[0] is None and levels[1].tiles[0] is not None


def test_means_leave_out_what_is_not_valid():
    pixels = np.zeros((3, 2, 2), np.uint8)
    pixels[:, :, 0] = [[10, 20], [200, 31], [7, 7]]
    pixels[:, :, 1] = [[255, 255], [0, 255], [0, 0]]
    assert averaged(pixels).tolist() == [[[20, 255]], [[0, 0]]]


def test_a_picture_keeps_what_is_valid_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4)).astype(np.uint8)
    pixels[..., 3] = 255 * (pixels[..., 3] > 100)
    (level,) = pyramid(lambda a, b, c, d: pixels[a:b, c:d], 40, 50, PICTURE)
    assert np.array_equal(decoded(level.tiles[0])[..., 3], pixels[..., 3])


def test_a_map_of_random_weights_says_so_on_its_page(mapped, tmp_path):
    path = tmp_path / "map.tif"
    shutil.copy(mapped.map, path)
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        file.update_tags(warning="CLIP has random weights: this map means nothing")
    page = write_page(path, tmp_path / "page.html")
    assert page.notes == ["CLIP has random weights: this map means nothing"] == content(page.path)["notes"]


@pytest.mark.promise("C52")
def test_without_an_image_it_is_the_map_alone(mapped, tmp_path):
    page = write_page(mapped.map, tmp_path / "page.html")
    found = content(page.path)
    assert page.size == page.path.stat().st_size and page.notes == [] == found["notes"]
    assert [layer["key"] for layer in found["layers"]] == ["classes", "uncertainty", "scores"]
    assert found["graph"] is None and found["why_no_graph"] == "no run was given"
    with rasterio.open(mapped.map) as file:
        label = file.read(1)
    assert [row["pixels"] for row in found["areas"]] == [int((label == i).sum()) for i in range(3)]
    assert found["areas"][0]["area_m2"] == pytest.approx(0.25 * (label == 0).sum(), rel=0.01)
    # nothing is asked of a network, and no name ends a script
    text = page.path.read_text(encoding="utf-8")
    assert "<script>alert" not in text and not re.search(r"(src|href)=|https?://|url\(", text)


def test_a_constant_of_an_earlier_map_has_no_range_beyond_1(mapped, tmp_path):
    path = tmp_path / "map_uncertainty.tif"
    for word in ("", "_uncertainty"):
        shutil.copy(mapped.map.with_name(f"map{word}.tif"), tmp_path)
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        file.scales, file.offsets = (1.0,), (0.25,)
    (_, layer) = content(write_page(tmp_path / "map.tif").path)["layers"]
    assert (layer["key"], layer["low"], layer["high"]) == ("uncertainty", 0.25, 1.0)


@pytest.fixture
def copied(mapped, tmp_path) -> Path:
    """A map with what lies beside it, to be changed."""
    for path in mapped.map.parent.glob("map*.tif"):
        shutil.copy(path, tmp_path)
    return tmp_path / "map.tif"


@pytest.mark.parametrize(
    ("word", "dtype", "count", "said"),
    [
        ("uncertainty", "float32", 1, "expected 1 band of uint8, got 1 band of float32"),
        ("scores", "uint16", 1, "expected 1 band of uint8, got 1 band of uint16"),
        ("scores", "uint8", 2, "expected 1 band of uint8, got 2 bands of uint8"),
        ("probabilities", "float32", 3, "expected 3 bands of uint8, got 3 bands of float32"),
        ("probabilities", "uint8", 2, "expected 3 bands of uint8, got 2 bands of uint8"),
    ],
)
def test_a_raster_of_another_kind_beside_a_map_is_refused(copied, word, dtype, count, said):
    path = copied.with_name(f"map_{word}.tif")
    how = {"driver": "GTiff", "width": WIDTH, "height": HEIGHT, "count": count, "dtype": dtype}
    with rasterio.open(path, "w", **how) as file:
        file.write(np.zeros((count, HEIGHT, WIDTH), dtype))
    with pytest.raises(RasterError, match=f"map_{word}.tif is not what drseg predict writes beside a map; {said}"):
        write_page(copied)


def tagged(path: Path, **tags: str) -> None:
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        file.update_tags(**tags)


NO_TEXTS = ['"abc"', '{"a": 1, "b": 2, "c": 3}', "[1, 2, 3]",
            '["a", NaN, "c"]', '["a", " ", "c"]', '["a", "\\ud800", "c"]',
            '["a", ["b"], "c"]', '["a", null, "c"]', "[]", "{}", "3", "", "[" * 20_000]  # fmt: skip


@pytest.mark.parametrize("names", NO_TEXTS)
def test_names_that_are_no_list_of_texts_make_no_map(copied, names):
    tagged(copied, class_names=names)
    with pytest.raises(RasterError, match="is no map; expected a class raster with names as drseg predict writes it"):
        write_page(copied)
    assert not sources._is_map(copied)


def test_words_that_are_no_texts_are_not_known(copied):
    def words() -> Any:
        with open_map(copied) as found:
            return found.words

    assert sources._is_map(copied) and words() == (("bare soil",), ("roof",), ("pond",))
    for each in NO_TEXTS:
        for text in (f'[["a"], ["b"], {each or "[]"}]', each):
            tagged(copied, words=text)
            assert words() is None, text
    tagged(copied, words='["a", "b", "c", ["d"], ["e"], ["f"]]')
    assert words() is None


def run_of(mapped: Mapped) -> Any:
    """A run, as far as it looks beneath a map."""
    evaluation = SimpleNamespace(tile_size=SIDE, overlap=OVERLAP, batch_size=4)
    return SimpleNamespace(model=mapped.predictor.model, config=SimpleNamespace(evaluation=evaluation))


SYNONYMS = [["soil"], ["pond", "lake", "water"], ["other"]]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_looks_with_all_words_of_a_map(mapped, tmp_path, earlier):
    names, path = [words[0] for words in SYNONYMS], tmp_path / "map.tif"
    how = {"mode": "tile", "tile_size": SIDE, "overlap": OVERLAP}
    predictor = Predictor(mapped.predictor.model, names, synonyms=SYNONYMS, **how)
    predict_scene(predictor, mapped.scene, path, progress=False)
    if earlier:
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
            file.update_tags(words="")
        predictor = Predictor(mapped.predictor.model, names[:2], **how)
    with open_map(path) as found, open_scene(mapped.scene) as scene:
        below = of_run(run_of(mapped), progress=False)(scene, found, 10**6)
        wanted = beneath_run(predictor, scene)
    assert np.array_equal(below.refined, wanted.refined) and np.array_equal(below.original, wanted.original)
    said = "first word of each class only", "'other' is taken for the class of a threshold"
    assert all((part in below.note) == earlier for part in said)


@pytest.mark.parametrize("options", [{"gsd": 0.8}, {"gsd": 0.8, "aoi": True}])
def test_the_scene_is_read_as_the_map_was(mapped, tmp_path, options):
    """From the map alone: its transform, size and classes."""
    if "aoi" in options:
        x, y = 356000 + 0.5 * np.array([101.3, 400, 250]), 5645000 - 0.5 * np.array([80, 120.7, 390.2])
        ring = [[float(a), float(b)] for a, b in zip(x, y, strict=True)]
        area = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        feature = {"type": "Feature", "properties": {}, "geometry": area}
        crs = {"type": "name", "properties": {"name": "EPSG:32632"}}
        options["aoi"] = tmp_path / "aoi.geojson"
        options["aoi"].write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": [feature]}))
    predict_scene(mapped.predictor, mapped.scene, tmp_path / "map.tif", progress=False, **options)
    with open_scene(mapped.scene, **options) as wanted, open_scene(mapped.scene) as scene:
        with open_map(tmp_path / "map.tif") as found:
            on_grid_of(scene, found)
            window = 10, wanted.height, 0, wanted.width - 5
            assert (scene.height, scene.width) == (wanted.height, wanted.width)
            for one, other in zip(scene.window(*window), wanted.window(*window), strict=True):
                assert np.array_equal(one, other)


def test_another_image_is_refused(mapped, tmp_path):
    from drseg_core.scenes.synthetic import write_synthetic_scene

    for name, options in {
        "size": {"width": WIDTH - 1, "height": HEIGHT},
        "place": {"width": WIDTH, "height": HEIGHT, "origin": (356000.3, 5645000.0)},
        "crs": {"width": WIDTH, "height": HEIGHT, "crs": "EPSG:32633"},
    }.items():
        other = write_synthetic_scene(tmp_path / f"{name}.tif", **options)
        with pytest.raises(ConfigError, match="--image is not what the map was made of; expected the scene of"):
            write_page(mapped.map, tmp_path / "page.html", image=other)
    with pytest.raises(RasterError, match="is no map; expected a class raster with names"):
        write_page(mapped.scene, tmp_path / "page.html")
    with pytest.raises(ConfigError, match="the image is missing"):
        write_page(mapped.map, tmp_path / "page.html", beneath=lambda *given: None)
    assert not (tmp_path / "page.html").exists()


def test_what_does_not_fit_is_sampled_and_said(mapped, tmp_path):
    whole = write_page(mapped.map, tmp_path / "whole.html", image=mapped.scene)
    limit = 0.6 * whole.size / 1e6
    page = write_page(mapped.map, tmp_path / "page.html", image=mapped.scene, max_mb=limit)
    assert page.size <= limit * 1e6
    found = {layer["title"]: layer["scales"][0][0]["scale"] for layer in content(page.path)["layers"]}
    said = [f"{title}: sampled, a pixel here is {n} x {n} of the scene" for title, n in found.items() if n > 1]
    assert said and page.notes == said == content(page.path)["notes"]
    with pytest.raises(ConfigError, match="the page cannot be so small; expected room for layers of"):
        write_page(mapped.map, tmp_path / "small.html", max_mb=0.04)


def test_a_graph_of_too_many_cells_is_left_out_and_said(mapped, tmp_path):
    # random degrees, which no packing makes small
    degree = torch.rand(300_000).numpy()
    edge = np.ones((1, 2), np.float32)
    own = Part(0, 0, (1.0, 1.0), (600, 500), 600, np.zeros((1, 2), np.int32), edge, edge, edge, degree, edge > 0)
    found = Beneath([own], "", 1, None, None)
    page = write_page(mapped.map, tmp_path / "page.html", image=mapped.scene, beneath=lambda *_: found, max_mb=1)
    assert content(page.path)["graph"] is None and "no room" in content(page.path)["why_no_graph"]
    assert page.size <= 1e6 and not any("Graph" in note for note in page.notes)


# graphs


@pytest.mark.parametrize("self_loop", ["in_topk", "exclude", "extra"])
def test_weights_of_pdgr_are_those_of_its_graph(self_loop):
    torch.manual_seed(0)
    pdgr = PDGR(4, 6, k=5, self_loop=self_loop, norm="row", use_affinity_as_weight=self_loop == "exclude")
    prior = torch.randn(2, 6, 2, 2)
    index, weight, real = pdgr.edges(prior)
    graph = pdgr.graph(prior)
    assert torch.equal(index, graph.index) and not weight.requires_grad
    # four nodes are less than five neighbours
    assert real.sum(-1).unique().tolist() == [{"in_topk": 4, "exclude": 3, "extra": 4}[self_loop]]
    assert (weight[~real] == 0).all() and (weight[real] > 0).all()
    assert torch.allclose(weight / weight.sum(-1, keepdim=True), graph.coefficient, atol=1e-5)


def test_a_part_has_the_rows_and_both_coefficients():
    generator = torch.Generator().manual_seed(0)
    prior = torch.randn(30, 8, generator=generator)
    weights, graph = (make(prior, (5, 6), 7, radius=2.0) for make in (weight_graph, propagation_graph))
    real = padding_mask(graph.index, include_self=False)
    assert not real.all()
    part = make_part(
        graph.index, weights.coefficient, graph.coefficient, real, (5, 6), place=(8, 16), cell=(4, 4), stride=2
    )
    node = [r * 6 + c for r in (0, 2, 4) for c in (0, 2, 4)]
    assert np.array_equal(part.neighbour, graph.index[node])
    dense = torch.zeros(30, 30)
    for i, j in real.nonzero().tolist():
        dense[i, graph.index[i, j]] = graph.coefficient[i, j]
    for row, i in enumerate(node):
        for slot, j in enumerate(graph.index[i].tolist()):
            if real[i, slot]:
                assert part.forth[row, slot] == dense[i, j] and part.back[row, slot] == dense[j, i]
    assert np.allclose(part.degree, (weights.coefficient * real).sum(1))

    numbers = zlib.decompress(base64.b64decode(packed([part, part])["numbers"]))
    assert len(numbers) == 2 * 4 * (4 * 9 * 7 + 30)
    first = np.frombuffer(numbers, "<i4", 63).reshape(9, 7)
    assert np.array_equal(first, np.where(part.real, part.neighbour, -1))
    assert np.array_equal(np.frombuffer(numbers, "<f4", 63, 4 * 63), part.weight.ravel())


def test_edges_take_no_more_than_their_room():
    assert stride_for(100, 10, 1000 * EDGE_BYTES) == 1
    assert stride_for(101 * 100, 10, 25 * 1000 * EDGE_BYTES) == 3
    torch.manual_seed(0)
    pdgr = PDGR(4, 64, k=30)
    prior = torch.randn(1, 64, 40, 40).cumsum(2).cumsum(3)
    index, weight, real = (value[0] for value in pdgr.edges(prior))
    coefficient = pdgr.graph(prior).coefficient[0]
    part = make_part(index, weight, coefficient, real, (40, 40), place=(0, 0), cell=(8, 8), stride=1)
    assert 0.6 * EDGE_BYTES < len(packed([part])["numbers"]) / index.numel() < EDGE_BYTES


def test_correlations_of_one_piece_are_those_of_the_model(mapped):
    whole = type(mapped.predictor)(mapped.predictor.model, ["roof", "pond"], synonyms=[["roof", "road"], ["pond"]])
    with open_scene(mapped.scene) as scene:
        below = beneath_run(whole, scene)
        image = scene.window(0, HEIGHT, 0, WIDTH)[0]
        with torch.no_grad():
            output = whole.model(image[None].float() / 255, whole.text)
        wanted = torch.stack([output.refined[0, :2].amax(0), output.refined[0, 2]])
        wanted = torch.nn.functional.interpolate(wanted[None], (HEIGHT, WIDTH), mode="bilinear")[0]
    step = below.step
    assert below.refined.shape == (2, -(-HEIGHT // step), -(-WIDTH // step)) and len(below.parts) == 1
    middle = wanted[:, step // 2 :: step, step // 2 :: step]
    assert np.allclose(below.refined[:, : middle.shape[1], : middle.shape[2]], middle, atol=1e-5)


def test_correlations_of_tiles_are_blended_like_scores(mapped):
    predictor, side = mapped.predictor, mapped.predictor.tile_size
    with open_scene(mapped.scene) as scene:
        below = beneath_run(predictor, scene)
        image = scene.window(0, HEIGHT, 0, WIDTH)[0]
    line = torch.from_numpy(blend_window(side, predictor.overlap))
    total = torch.zeros(4, HEIGHT, WIDTH)
    for top in tile_starts(HEIGHT, side, predictor.overlap):
        for left in tile_starts(WIDTH, side, predictor.overlap):
            tile = image[None, :, top : top + side, left : left + side].float() / 255
            with torch.no_grad():
                value = predictor.model(tile, predictor.text).refined
            value = torch.nn.functional.interpolate(value, (side, side), mode="bilinear")[0]
            part = torch.cat([value, torch.ones(1, side, side)]) * line[:, None] * line
            total[:, top : top + side, left : left + side] += part
    step = below.step
    middle = (total[:-1] / total[-1])[:, step // 2 :: step, step // 2 :: step]
    assert np.allclose(below.refined[:, : middle.shape[1], : middle.shape[2]], middle, atol=1e-5)
    # each tile has its own graph
    assert len({part.neighbour.tobytes() for part in below.parts}) == len(below.parts) > 1


def test_a_run_without_a_graph_says_so(mapped):
    from drseg_core.config.load import load_config, override
    from drseg_core.models.build import build_model
    from tests.view.conftest import SMALL

    model = build_model(override(load_config("tiny"), {**SMALL, "model.fusion.kind": "cosine"}).model).eval()
    with open_scene(mapped.scene) as scene:
        below = beneath_run(Predictor(model, ["roof"]), scene)
    assert below.parts == [] and below.why_not == "this run has no graph" and below.refined is None


def test_beneath_words_is_the_graph_of_the_whole_scene(mapped):
    mapper = drseg.zero_shot("tiny", k=6, radius=3.0, steps=2, device="cpu")
    with open_scene(mapped.scene, gsd=1.0) as scene:
        predictor, _ = mapper.predictor(scene, ["roof", "road"])
        cells = predictor.collect(scene.window, scene.height, scene.width)
        below = beneath_words(predictor, scene)
        graph = predictor.graph(cells.prior, tuple(cells.valid.shape))
        spread = predictor.spread(cells)
    (part,) = below.parts
    assert part.stride == 1 and np.array_equal(part.neighbour, graph.index)
    assert np.array_equal(part.forth, graph.coefficient)
    known = cells.valid.numpy()
    assert not known.all() and np.isnan(below.original[:, ~known]).all()
    assert np.array_equal(below.original[:, known], cells.logits.T.reshape(2, *known.shape)[:, known])
    assert np.array_equal(below.refined[:, known], spread.T.reshape(2, *known.shape)[:, known])
    mapper.config = mapper.config.__class__(**{**vars(mapper.config), "steps": 0})
    with open_scene(mapped.scene, gsd=1.0) as scene:
        below = beneath_words(mapper.predictor(scene, ["roof", "road"])[0], scene)
    assert below.parts == [] and "no step over a graph" in below.why_not


def test_a_damaged_map_is_named(mapped, tmp_path):
    broken = tmp_path / "map.tif"
    broken.write_bytes(mapped.map.read_bytes()[:-3000])
    with pytest.raises(RasterError, match=r"map\.tif"):
        write_page(broken)
