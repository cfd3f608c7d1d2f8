# SPDX-License-Identifier: Apache-2.0
"""A map from words: against the same in one piece and in float64, and what must not matter to it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drseg_core as drseg
from drseg_core.config.zero_shot import ZeroShotConfig, load_zero_shot, zero_shot_presets
from drseg_core.errors import ConfigError, NumericalError
from drseg_core.models.class_text import class_logits
from drseg_core.nn.pixel_propagation import propagate_pixels
from drseg_core.scenes import scene_graph
from drseg_core.scenes.enlarged import Enlarged
from drseg_core.scenes.predict import predict_scene
from drseg_core.scenes.reader import open_scene
from drseg_core.scenes.scene_graph import REFINING, GraphPredictor
from drseg_core.scenes.synthetic import write_synthetic_scene
from drseg_core.scenes.zero_shot import SceneZeroShot, _Arrays, check_words
from tests.checkpoints.real import real_prior

rasterio = pytest.importorskip("rasterio")

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
torch.set_num_threads(1)
CELL, SIDE, OVERLAP = 8, 32, 16
NAMES = ["building", "road", "tree"]
H, W = 53, 90


@pytest.fixture(scope="module")
def mapper() -> SceneZeroShot:
    found = drseg.zero_shot("tiny", k=6, decay=0.2, gamma=2.0, alpha=0.8, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        # initial weights tell no two classes apart
        for parameter in found.model.clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a collar of nodata, and a hole over a corner of several windows."""
    path = write_synthetic_scene(tmp_path_factory.mktemp("scene") / "scene.tif", width=W, height=H, collar=3)
    with rasterio.open(path, "r+") as file:
        value = file.read()
        value[:, 10:29, 20:61] = 0
        file.write(value)
    return path


def changed(mapper: SceneZeroShot, **options: Any) -> SceneZeroShot:
    return SceneZeroShot(mapper.model, dataclasses.replace(mapper.config, **options), mapper.facts, torch.device("cpu"))


# the same in one piece


def literal_cells(mapper: SceneZeroShot, image: np.ndarray, valid: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
    """Logits (h, w, T) and prior (h, w, D) of all cells from the whole image in float64, and which are valid."""
    model = copy.deepcopy(mapper.model).double()
    h, w = math.ceil(H / CELL), math.ceil(W / CELL)
    padded = np.pad(image, ((0, 0), (0, h * CELL - H), (0, w * CELL - W)), mode="reflect")
    pixels = torch.from_numpy(padded).double() / 255
    cells = np.zeros((h, w), bool)
    for y, x in np.ndindex(H, W):
        cells[y // CELL, x // CELL] |= valid[y, x]
    n, shared = SIDE // CELL, OVERLAP // CELL
    line = [math.sin(math.pi / 2 * min((min(i, n - 1 - i) + 0.5) / shared, 1)) ** 2 for i in range(n)]
    weight = torch.tensor([[a * b for b in line] for a in line], dtype=torch.float64)
    feature = prior = None
    total = torch.zeros(h, w, dtype=torch.float64)
    for y in sorted({*range(0, h - n, n - shared), h - n}):
        for x in sorted({*range(0, w - n, n - shared), w - n}):
            if not cells[y : y + n, x : x + n].any():
                continue
            maps = model.maps(pixels[None, :, y * CELL : y * CELL + SIDE, x * CELL : x * CELL + SIDE])
            if feature is None:
                feature, prior = (torch.zeros(m.shape[1], h, w, dtype=torch.float64) for m in maps)
            feature[:, y : y + n, x : x + n] += maps.features[0] * weight
            prior[:, y : y + n, x : x + n] += maps.prior[0] * weight
            total[y : y + n, x : x + n] += weight
    text = model.encode(NAMES)
    logits = class_logits((feature / total)[None], text)[0]
    return logits.permute(1, 2, 0), (prior / total).permute(1, 2, 0), cells


def literal_spread(logits: Tensor, prior: Tensor, cells: np.ndarray, config: ZeroShotConfig) -> Tensor:
    """Dense matrices over the valid cells; the others keep 0."""
    place = np.argwhere(cells)
    unit = prior[cells] / prior[cells].norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).clamp(min=0) ** config.gamma
    distance = np.linalg.norm(place[:, None] - place[None], axis=-1)
    affinity = cosine * torch.from_numpy(np.exp(-config.decay * distance))
    affinity.fill_diagonal_(0)
    if config.radius is not None:
        affinity[torch.from_numpy(distance > config.radius)] = 0
    best = affinity.topk(config.k, dim=1).indices
    kept = torch.zeros_like(affinity).scatter(1, best, affinity.gather(1, best))
    both = kept + kept.T
    scale = both.sum(1) ** -0.5
    operator = scale[:, None] * both * scale
    y = logits[cells]
    if config.steps is None:
        spread = torch.linalg.solve(torch.eye(len(y), dtype=y.dtype) - config.alpha * operator, (1 - config.alpha) * y)
    else:
        spread = y
        for _ in range(config.steps):
            spread = config.alpha * operator @ spread + (1 - config.alpha) * y
    found = torch.zeros_like(logits)
    found[cells] = spread
    return found


def literal_pixels(logits: Tensor, cells: np.ndarray) -> Tensor:
    """(T, H, W): each pixel between the up to four cells around it that are valid."""
    h, w = cells.shape
    found = torch.zeros(logits.shape[-1], H, W, dtype=torch.float64)
    for y, x in np.ndindex(H, W):
        a, b = (min(max((v + 0.5) / CELL - 0.5, 0), n - 1) for v, n in ((y, h), (x, w)))
        total = 0.0
        for i in {int(a), min(int(a) + 1, h - 1)}:
            for j in {int(b), min(int(b) + 1, w - 1)}:
                share = (1 - abs(a - i)) * (1 - abs(b - j)) * cells[i, j]
                total += share
                found[:, y, x] += share * logits[i, j]
        found[:, y, x] /= total or 1
    return found


def read(scene: Path) -> tuple[np.ndarray, np.ndarray]:
    with rasterio.open(scene) as file:
        return file.read(), file.dataset_mask() != 0


@pytest.mark.promise("C36")
@pytest.mark.parametrize(("steps", "radius"), [(None, None), (3, None), (0, None), (None, 1.5), (3, 2.0)])
def test_a_map_is_that_of_the_scene_in_one_piece(
    mapper: SceneZeroShot, scene: Path, steps: int | None, radius: float | None
) -> None:
    mine = changed(mapper, steps=steps, radius=radius)
    image, valid = read(scene)
    logits, prior, cells = literal_cells(mine, image, valid)
    assert not cells.all() and not cells[2, 4]
    if steps != 0:
        logits = literal_spread(logits, prior, cells, mine.config)
    score = (literal_pixels(logits, cells) * mine.config.logit_scale).softmax(0)
    found = mine.predict(scene, NAMES)
    best = score.sort(0, descending=True).values
    sure = valid & (best[0] - best[1] > 1e-3).numpy()
    assert sure.mean() > 0.5 and len(np.unique(found.class_index)) > 2
    assert np.array_equal(found.class_index[sure], score.argmax(0).numpy()[sure])
    assert (found.class_index[~valid] == 255).all() and (found.class_index[valid] < 3).all()
    np.testing.assert_allclose(found.score[valid], best[0].numpy()[valid], atol=2e-3)
    entropy = -(score * score.log()).sum(0) / math.log(3)
    np.testing.assert_allclose(found.uncertainty[valid], entropy.numpy()[valid], atol=5e-3)


def predictor(mapper: SceneZeroShot, **options: Any) -> GraphPredictor:
    config = mapper.config
    text = mapper.model.encode(NAMES)
    return GraphPredictor(
        mapper.model,
        text,
        tuple(NAMES),
        config,
        decay=config.decay,
        radius=config.radius,
        device=torch.device("cpu"),
        **options,
    )


@pytest.mark.promise("C47")
@pytest.mark.parametrize("batch", [1, 3, 50])
@pytest.mark.parametrize("block", [7, 32, 200])
def test_batches_and_blocks_do_not_matter(mapper: SceneZeroShot, scene: Path, tmp_path, batch: int, block: int) -> None:
    expected = mapper.predict(scene, NAMES)
    mine = changed(mapper, batch_size=batch)
    files = predict_scene(predictor(mine, block=block), scene, tmp_path / "map.tif", progress=False)
    with rasterio.open(files.classes) as file:
        found = file.read(1)
    unsure = expected.score < 0.34
    assert ((found == expected.class_index) | unsure).all() and (found == expected.class_index).mean() > 0.999


def test_blocks_have_the_same_bits() -> None:
    torch.manual_seed(0)
    valid = torch.rand(5, 7) > 0.3
    enlarged = Enlarged(torch.randn(35, 4), valid, 6)
    whole = enlarged.block(0, 30, 0, 42)
    for top, bottom, left, right in ((0, 1, 0, 1), (3, 17, 5, 42), (29, 30, 0, 42)):
        assert torch.equal(enlarged.block(top, bottom, left, right), whole[:, top:bottom, left:right])
    full = Enlarged(enlarged.logits.view(35, 4), torch.ones(5, 7, dtype=torch.bool), 6).block(0, 30, 0, 42)
    image = enlarged.logits.permute(2, 0, 1)[None]
    torch.testing.assert_close(full, torch.nn.functional.interpolate(image, scale_factor=6, mode="bilinear")[0])


def test_refined_pixels_are_those_of_the_whole_scene(mapper: SceneZeroShot, scene: Path) -> None:
    """In blocks of any size; the logits are spread over all pixels at once, and those without data have no part."""
    mine, found = changed(mapper, refine=True), {}
    image, valid = read(scene)
    plain, cells = collected(mapper, scene)
    logits = Enlarged(plain.spread(cells), cells.valid, CELL).block(0, H, 0, W)
    refined = propagate_pixels(logits, torch.from_numpy(image), torch.from_numpy(valid), **REFINING)
    score = (refined * mine.config.logit_scale).softmax(0).max(0).values.numpy()
    for block in (7, 32, 200):
        arrays = _Arrays(predictor(mine, block=block))
        with open_scene(scene) as opened:
            shapes = [piece.prediction.score.shape for piece in arrays.pieces(opened.window, H, W)]
        assert shapes == [(box.bottom - box.top, box.right - box.left) for box in arrays.blocks(H, W)]
        found[block] = arrays.result(None)
        np.testing.assert_allclose(found[block].score[valid], score[valid], atol=1e-5)
        assert np.isnan(found[block].score[~valid]).all()
    unrefined = mapper.predict(scene, NAMES)
    assert np.nanmax(abs(unrefined.score - found[7].score)) > 1e-2
    for name in ("score", "uncertainty"):
        np.testing.assert_allclose(getattr(mine.predict(scene, NAMES), name), getattr(found[7], name), atol=1e-5)
    # planted fault: a block that knows nothing of what is around it
    monkeyed = propagate_pixels(
        logits[:, :, :32], torch.from_numpy(image[:, :, :32]), torch.from_numpy(valid[:, :32]), **REFINING
    )
    assert (monkeyed - refined[:, :, :32]).abs().max() > 1e-4


def test_a_plan_knows_of_refined_pixels(mapper: SceneZeroShot, scene: Path) -> None:
    plain, refined = mapper.plan(scene, NAMES), changed(mapper, refine=True).plan(scene, NAMES)
    assert plain.pixel_seconds == 0 and "time of the pixels" not in plain.text()
    assert refined.pixel_seconds > 0 and "time of the pixels: about " in refined.text()
    assert refined.memory_mb - plain.memory_mb == pytest.approx(H * W * 4 * (24 + 3 * 3 + 24) / 2**20)


# one graph


def collected(mapper: SceneZeroShot, scene: Path, **options: Any) -> tuple[GraphPredictor, Any]:
    image, valid = read(scene)
    mine = predictor(mapper, **options)
    part = lambda a, b, c, d: (torch.from_numpy(image[:, a:b, c:d].copy()), valid[a:b, c:d])  # noqa: E731
    return mine, mine.collect(part, H, W)


@pytest.mark.promise("C47")
def test_the_graph_crosses_the_borders_of_windows(mapper: SceneZeroShot, scene: Path) -> None:
    """A label in one corner reaches windows that share no cell with its own, which graphs of windows cannot."""
    mine, cells = collected(changed(mapper, steps=6, decay=0.0), scene)
    label = torch.zeros_like(cells.logits)
    label[0, 0] = 1
    reached = (mine.spread(cells._replace(logits=label))[:, 0] > 0).view(cells.valid.shape)
    n = SIDE // CELL
    assert reached[:, 2 * n :].any() and reached[n:].any()
    # planted fault: each window by itself
    assert cells.prior is not None
    grid = cells.valid.shape
    near = torch.zeros(grid, dtype=torch.bool)
    near[:n, :n] = True
    alone = cells.prior.clone()
    alone[~near.flatten()] = torch.nan
    apart = (mine.spread(cells._replace(logits=label, prior=alone))[:, 0] > 0).view(grid)
    assert apart.any() and not apart[:, n:].any() and not apart[n:].any()


def test_cells_without_data_take_no_part(mapper: SceneZeroShot, scene: Path) -> None:
    mine, cells = collected(changed(mapper, steps=3), scene)
    assert cells.prior is not None and not cells.valid.all()
    absent = ~cells.valid.flatten()
    assert cells.prior[absent].isnan().all() and cells.prior[~absent].isfinite().all()
    assert (cells.logits[absent] == 0).all()
    graph = mine.graph(cells.prior, tuple(cells.valid.shape))
    rows = torch.arange(len(absent))[:, None].expand_as(graph.index)
    # an edge to itself keeps what is there
    used = (graph.coefficient > 0) & (graph.index != rows)
    assert not absent[graph.index[used].long()].any() and not absent[rows[used]].any()
    # whatever stands there
    hidden = cells.logits.clone()
    hidden[absent] = 1000.0
    spread, plain = mine.spread(cells._replace(logits=hidden)), mine.spread(cells)
    assert torch.equal(spread[~absent], plain[~absent])


def test_what_comes_is_said_before_it_is_done(mapper, scene, caplog, capsys, monkeypatch) -> None:
    """The size of the graph before it is made, that of the propagation before it begins; steps have a bar."""
    said: list[str] = []
    for method in ("graph", "_spread"):
        before = getattr(GraphPredictor, method)

        def noted(*given: Any, before: Any = before, method: str = method) -> Any:
            said.append(f"{method} after {caplog.messages[-1]}")
            return before(*given)

        monkeypatch.setattr(GraphPredictor, method, noted)
    for steps, how in ((4, "4 steps"), (None, "solved to the end, mostly within a few dozen iterations")):
        mine, cells = collected(changed(mapper, steps=steps), scene, progress=True)
        said.clear()
        capsys.readouterr()
        with caplog.at_level("INFO", "drseg_core"):
            mine.spread(cells)
        assert said == ["graph after graph 1 of 1: 12 x 7 = 84 cells", f"_spread after 3 classes over 504 edges: {how}"]
        assert ("4/4" in capsys.readouterr().err) == (steps == 4)


def test_a_large_prior_lies_in_a_file(mapper: SceneZeroShot, scene: Path, tmp_path: Path, monkeypatch) -> None:
    plain, cells = collected(mapper, scene)
    monkeypatch.setattr(scene_graph, "PRIOR_BYTES", 1000)
    _, stored = collected(mapper, scene, folder=tmp_path)
    assert stored.prior.dtype == torch.float16 and cells.prior.dtype == torch.float32
    torch.testing.assert_close(stored.prior.float(), cells.prior, atol=1e-3, rtol=1e-3, equal_nan=True)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(stored.logits, cells.logits)
    found = plain.spread(stored)
    # a few neighbours are others: nearly tied ones
    assert (found.argmax(1) == plain.spread(cells).argmax(1)).float().mean() > 0.95


def test_decay_per_metre_is_that_of_a_cell(mapper: SceneZeroShot, scene: Path, tmp_path: Path) -> None:
    # pixels of half a metre, cells of 8: 0.05 a metre is 0.2 a cell, but for the scale of the projection
    metres = changed(mapper, decay=None, decay_per_metre=0.05).predict(scene, NAMES)
    cells = mapper.predict(scene, NAMES)
    assert (metres.class_index == cells.class_index).mean() > 0.99
    far = changed(mapper, decay=None, decay_per_metre=50.0).predict(scene, NAMES)
    assert np.nanmax(abs(far.score - cells.score)) > 10 * np.nanmax(abs(metres.score - cells.score))
    from PIL import Image

    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "plain.png")
    with pytest.raises(ConfigError, match="decay_per_metre needs a place"):
        changed(mapper, decay=None, decay_per_metre=0.05).predict(tmp_path / "plain.png", NAMES)
    with pytest.raises(ConfigError, match="radius_metres needs a place; .*, or radius"):
        changed(mapper, radius_metres=5.0).predict(tmp_path / "plain.png", NAMES)


def test_a_radius_in_metres_is_that_of_cells(mapper: SceneZeroShot, scene: Path) -> None:
    # cells of 8 pixels of half a metre, as in the test before; neither is the length of an edge between cells
    metres = changed(mapper, radius_metres=4 * 1.2).predict(scene, NAMES)
    cells = changed(mapper, radius=1.2).predict(scene, NAMES)
    assert np.array_equal(metres.score, cells.score, equal_nan=True)
    assert np.nanmax(abs(cells.score - changed(mapper, radius=1.5).predict(scene, NAMES).score)) > 1e-3


def test_metres_need_pixels_that_are_square_on_the_ground(mapper: SceneZeroShot, tmp_path: Path) -> None:
    def placed(crs: str, x: float, y: float, side: float, down: float | None = None) -> Path:
        path = write_synthetic_scene(tmp_path / "scene.tif", width=40, height=40)
        with rasterio.open(path, "r+") as file:
            file.crs = crs
            file.transform = rasterio.Affine(side, 0, x, 0, -(down or side), y)
        return path

    in_metres = changed(mapper, radius_metres=4.0), changed(mapper, decay=None, decay_per_metre=0.05)
    # a degree at 60 degrees north: 55.80 km across, 111.41 km down
    path = placed("EPSG:4326", 10, 60, 1e-5)
    for mine, option in zip(in_metres, ("radius_metres", "decay_per_metre"), strict=True):
        with pytest.raises(
            ConfigError,
            match=rf"zero_shot: {option} does not fit the scene; expected pixels that are square on the ground, got "
            rf"0.558 m across and 1.11 m down: reproject .*scene.tif, or give {option.partition('_')[0]}$",
        ):
            mine.predict(path, NAMES)
    mapper.predict(path, NAMES)
    placed("EPSG:32632", 500000, 5600000, 0.5, 0.6)
    with pytest.raises(ConfigError, match=r"got 0.5 m across and 0.6 m down"):
        in_metres[0].predict(path, NAMES)
    # near the equator a degree is as long either way, and Web Mercator has squares everywhere
    for crs, x, y, side in (("EPSG:4326", 10, 5, 1e-5), ("EPSG:3857", 1e6, 8e6, 0.6), ("EPSG:32632", 5e5, 5.6e6, 0.5)):
        placed(crs, x, y, side)
        for mine in in_metres:
            mine.predict(path, NAMES)


@pytest.mark.promise("C47")
def test_a_map_in_super_tiles_is_that_of_one_graph(mapper: SceneZeroShot, tmp_path: Path, caplog) -> None:
    path = write_synthetic_scene(tmp_path / "scene.tif", width=300, height=280)
    local = changed(mapper, steps=2, radius=1.5)
    whole = local.predict(path, NAMES)
    assert local.plan(path, NAMES).tiles == ((35, 38),)
    parts = changed(local, super_tile=900)
    caplog.clear()
    with caplog.at_level("INFO"):
        found = parts.predict(path, NAMES, out=tmp_path / "map.tif")
    np.testing.assert_allclose(found.score, whole.score, atol=1e-5)
    assert (found.class_index == whole.class_index).mean() > 0.9999
    plan = parts.plan(path, NAMES)
    assert plan.tiles == ((35, 23), (35, 23)) and plan.graphs in plan.text() and plan.graphs in caplog.text
    assert plan.graphs == (
        "2 overlapping super-tiles: 38 x 35 = 1330 cells, at most 805 at a time, 1610 with what they share"
    )
    # neither is limited by what one graph may have, but where the whole scene is one
    assert changed(parts, max_cells=50).plan(path, NAMES).tiles == plan.tiles
    changed(local, max_cells=50).predict(path, NAMES)
    for whole_scene in ({"steps": None}, {"radius": None}):
        with pytest.raises(
            ConfigError, match=r"at most 50 \(--max-cells\).* \(--radius with --steps, which makes super-"
        ):
            changed(parts, max_cells=50, **whole_scene).predict(path, NAMES)
    with pytest.raises(ConfigError, match="super_tile is too small for radius and steps"):
        changed(parts, super_tile=80).predict(path, NAMES)


@pytest.mark.parametrize(
    ("classes", "background", "said"),
    [
        (["roof", "road"], ["roof "], "background has a word twice"),
        (["roof ", "road"], ["roof"], "background has a word twice"),
        (["parking lot"], [" Parking  LOT"], "background has a word twice"),
        (["roof"], ["sky", "sky\n"], "background has a word twice"),
        ([" background"], ["sky"], "a class is called background"),
        (["roof"], ["sky", " "], "background has an empty word"),
        (["roof"], ["sky #ff0000"], "background has a colour"),
        (["roof"], ["s\0ky"], "background has a control character"),
        (["roof", "road"], ["sky, road"], "background has a word twice"),
        (["roof"], "sky", "background is one text; expected a list of them, got 'sky'"),
    ],
)
def test_words_of_the_background(classes: list[str], background: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"zero_shot: {said}"):
        check_words(classes, background)


# files


def test_the_files_of_a_map(mapper: SceneZeroShot, scene: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    found = mapper.predict(
        scene, "roof, building#ff0000; road", out=out, background=[" sky , wall"], scores=True, probabilities=True
    )
    assert found.files is not None and found.class_names == ("roof", "road", "background")
    with rasterio.open(scene) as source, rasterio.open(out) as result:
        assert (result.crs, result.transform, result.shape) == (source.crs, source.transform, source.shape)
        assert np.array_equal(result.read(1), found.class_index) and result.nodata == 255
        assert result.colormap(1)[0][:3] == (255, 0, 0)
        tags = result.tags()
    assert json.loads(tags["class_names"]) == ["roof", "road", "background"]
    options = json.loads(tags["zero_shot"])
    assert options["words"] == [["roof", "building"], ["road"], ["sky", "wall"]] and options["k"] == 6
    assert options["variant"] == "segearth" and len(options["templates"]) > 5
    assert tags["clip"] == "drseg-tiny, random weights" and "means nothing" in tags["warning"]
    with rasterio.open(found.files.probabilities) as result:
        assert result.count == 3
    with rasterio.open(found.files.scores) as result:
        score = result.read(1)
        valid = score != 255
        np.testing.assert_allclose(score[valid] * result.scales[0], found.score[valid], atol=0.0021)
    assert len(found.files.present()) == 8 and "background" in found.files.areas.read_text()


@pytest.mark.promise("C39")
def test_hashes_of_weight_files_stand_in_the_map(scene: Path, tmp_path: Path) -> None:
    import hashlib

    from open_clip.model import CLIP
    from safetensors.torch import save_file

    from drseg_core.models.clip import ARCHITECTURES

    torch.manual_seed(0)
    state = CLIP(**ARCHITECTURES["drseg-tiny"]).state_dict()
    file = tmp_path / "clip.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    found = drseg.zero_shot("tiny", clip=str(file), prior="none").predict(scene, NAMES, out=tmp_path / "map.tif")
    assert found.files is not None
    with rasterio.open(found.files.classes) as result:
        tags = result.tags()
    assert tags["clip"] == "drseg-tiny, clip.safetensors" and "prior" not in tags and "warning" not in tags
    assert tags["clip_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_thresholds_and_parts(mapper: SceneZeroShot, scene: Path, tmp_path: Path) -> None:
    found = mapper.predict(scene, NAMES, out=tmp_path / "map.tif", threshold=0.6, gsd=1.0)
    assert found.files is not None and found.class_names == (*NAMES, "other") and found.class_index.shape == (27, 45)
    with rasterio.open(found.files.classes) as result:
        assert np.array_equal(result.read(1), found.class_index)
    assert (found.class_index == 3).any() and (found.score[found.class_index == 3] < 0.6).all()


@pytest.mark.parametrize("size", [(5, 90), (33, 32), (1, 1), (40, 7)])
def test_any_size(mapper: SceneZeroShot, tmp_path: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    path = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)).save(path)
    found = mapper.predict(path, NAMES)
    assert found.class_index.shape == size and (found.class_index < 3).all()


def test_a_scene_without_data(mapper: SceneZeroShot, tmp_path: Path) -> None:
    path = write_synthetic_scene(tmp_path / "scene.tif", height=40, width=40, collar=19)
    with rasterio.open(path, "r+") as file:
        file.write(np.zeros_like(file.read()))
    assert (mapper.predict(path, NAMES).class_index == 255).all()


# refusals


@pytest.mark.promise("C46")
def test_a_scene_with_too_many_cells_is_refused_before_the_work(mapper, scene, tmp_path, monkeypatch) -> None:
    small = changed(mapper, max_cells=50)
    monkeypatch.setattr(GraphPredictor, "collect", None)
    with pytest.raises(
        ConfigError,
        match=r"expected at most 50 \(--max-cells\), got 12 x 7 = 84, which take about .* MB, and .* for the graph",
    ):
        small.predict(scene, NAMES, out=tmp_path / "map.tif")
    assert list(tmp_path.iterdir()) == []
    plan = small.plan(scene, NAMES)
    assert plan.cells == 84 and plan.memory_mb > 64 and plan.model_seconds > 0 and "12 x 7 = 84 cells" in plan.text()


@pytest.mark.promise("C11")
def test_features_that_are_not_finite(scene: Path) -> None:
    broken = drseg.zero_shot("tiny")
    with torch.no_grad():
        broken.model.clip.visual.proj.fill_(torch.nan)
    with pytest.raises(NumericalError, match="zero_shot: logits are not finite"):
        broken.predict(scene, NAMES)


def test_a_solution_that_is_not_reached(mapper: SceneZeroShot, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # whether a thousand iterations suffice at an alpha next to 1 is up to the processor's rounding
    monkeypatch.setattr(scene_graph, "solve_labels", functools.partial(scene_graph.solve_labels, max_iterations=3))
    with pytest.raises(
        NumericalError,
        match="zero_shot: the propagation did not converge; expected an alpha further below 1, or steps, got alpha "
        "0.999$",
    ):
        changed(mapper, alpha=0.999).predict(scene, NAMES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 1.0}, "alpha is out of range"),
        ({"k": 0}, "k is out of range"),
        ({"steps": -1}, "steps is out of range"),
        ({"radius": -1.0}, "radius is out of range"),
        ({"radius_metres": -0.5}, "radius_metres is out of range"),
        ({"super_tile": 0}, "super_tile is out of range"),
        (
            {"radius": 3.0, "radius_metres": 4.0},
            "zero_shot: radius and radius_metres are both given; expected one, got 3.0 and 4.0",
        ),
        ({"decay": 0.0, "decay_per_metre": 0.1}, "decay and decay_per_metre are both given; expected one"),
        ({"rotations": 2}, "rotations is out of range; expected 1 or 4"),
        ({"variant": "odd"}, "variant is unknown"),
        ({"window": 33}, "window does not fit CLIP; expected a multiple of 8, at least 16 pixels, got 33"),
        ({"window": 8}, "at least 16 pixels, got 8"),
        ({"overlap": 32}, "overlap does not fit"),
        ({"colour": 1}, "option colour is unknown; expected one of variant"),
        ({"prior": "none", "variant": "proxyclip"}, "prior is missing"),
        ({"prior": "odd"}, "prior odd has no published weights"),
        ({"prior_layer": 7}, "layer is out of range"),
        ({"steps": 1.5}, "steps has a wrong type; expected int, got float 1.5"),
        ({"select": "odd"}, "select is not a choice; expected affinity, cosine"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        drseg.zero_shot("tiny", **options)


@pytest.mark.parametrize("threshold", [2, -1, math.nan])
def test_a_threshold_is_a_score(mapper: SceneZeroShot, scene: Path, tmp_path: Path, threshold: float) -> None:
    for more in ({}, {"out": tmp_path / "map.tif"}):
        with pytest.raises(ConfigError, match=f"threshold is out of range; expected 0 to 1, got {threshold}"):
            mapper.predict(scene, NAMES, threshold=threshold, **more)
    assert list(tmp_path.iterdir()) == []


def test_options_of_files_go_with_files(mapper: SceneZeroShot, scene: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scores is unknown without out"):
        mapper.predict(scene, NAMES, scores=True)
    with pytest.raises(ConfigError, match="option colour is unknown; expected one of background, .*polygons, .*aoi$"):
        mapper.write(scene, NAMES, tmp_path / "map.tif", colour=1)
    with pytest.raises(ConfigError, match="option view is unknown; expected one of background, .*out, bands, .*aoi$"):
        mapper.predict(scene, NAMES, view=True)
    with pytest.raises(ConfigError, match="option out is unknown; expected one of background, templates, bands, .*"):
        mapper.plan(scene, NAMES, out="map.tif")
    assert list(tmp_path.iterdir()) == []
    found = mapper.predict(scene, NAMES, threshold=0.6)
    assert found.class_names == (*NAMES, "other")
    assert ((found.class_index == 3) == (found.score < 0.6)).all() and np.isnan(found.score[0, 0])


def test_a_prior_without_patches(scene: Path) -> None:
    """A convolutional one has fewer channels in its maps than it counts."""
    found = drseg.zero_shot("tiny", prior="tf_efficientnet_lite0:random", window=64).predict(scene, NAMES)
    assert (found.class_index < 3).any()


def test_no_prior_is_asked_for_where_none_is_used() -> None:
    assert drseg.zero_shot("tiny", steps=0).model.prior is None
    assert drseg.zero_shot("tiny", steps=0, variant="proxyclip").model.prior is not None


def test_presets() -> None:
    assert zero_shot_presets() == ("b", "l", "tiny")
    for name, window in (("b", 224), ("l", 336), ("tiny", 32)):
        config = load_zero_shot(name)
        assert config.window == window and config.overlap == window // 2
    with pytest.raises(ConfigError, match="preset odd not found; expected a YAML file or one of b, l, tiny"):
        load_zero_shot("odd")


def test_an_option_takes_the_place_of_the_other_of_a_preset(scene: Path, tmp_path: Path) -> None:
    path, tiny = tmp_path / "own.yaml", "clip: {name: drseg-tiny, weights: null}\nprior: {name: none}\nwindow: 64\n"
    path.write_text(f"{tiny}overlap: 0\nradius: 2.0\ndecay_per_metre: 0.3\n")
    config = drseg.zero_shot(path, radius_metres=5.0, decay=0.1).config
    assert (config.radius, config.radius_metres, config.decay, config.decay_per_metre) == (None, 5.0, 0.1, None)
    path.write_text(f"{tiny}overlap: 0\nradius: 2.0\nradius_metres: 5.0\n")
    with pytest.raises(ConfigError, match="radius and radius_metres are both given"):
        drseg.zero_shot(path)
    with open_scene(scene) as opened:
        assert drseg.zero_shot("tiny")._distances(opened) == (0.16, None)


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("clip: {name: drseg-tiny, weights: null}\nprior: {name: none}\nwindow: 64\noverlap: 0\n")
    found = drseg.zero_shot(path, rotations=4)
    assert found.config.window == 64 and found.model.prior is None and found.model.rotations == 4
    path.write_text("windows: 64\n")
    with pytest.raises(ConfigError, match="own.yaml:1: windows is unknown"):
        drseg.zero_shot(path)


# what is real, where it is


def test_a_real_image_with_a_real_prior(tmp_path: Path) -> None:
    """CLIP stays random: it says nothing of the map, only that the way to it works."""
    image = Path(__file__).parents[2].parent / "shared" / "data" / "oem_koeln_50.tif"
    if not image.exists():
        pytest.skip("oem_koeln_50.tif is not here: no part of this project")
    real = real_prior(image_size=224)
    with rasterio.open(image) as source:
        profile = {**source.profile, "width": 500, "height": 300, "driver": "GTiff"}
        with rasterio.open(tmp_path / "part.tif", "w", **profile) as target:
            target.write(source.read(window=((0, 300), (0, 500))))
    prior = f"{real.name}:{real.weights}"
    options = {"prior_layer": real.layer, "window": 224, "k": 20, "offline": True}
    mapper = drseg.zero_shot("tiny", prior=prior, **options)
    found = mapper.predict(tmp_path / "part.tif", NAMES, out=tmp_path / "map.tif")
    assert found.class_index.shape == (300, 500) and (found.class_index < 3).all() and found.files is not None
    with rasterio.open(found.files.classes) as result:
        assert len(result.tags()["prior_sha256"]) == 64
    # neighbours by a real prior lie closer together than those of noise would, with no spatial decay to make them
    plain = predictor(mapper)
    image_bytes, valid = read(tmp_path / "part.tif")
    cells = plain.collect(
        lambda a, b, c, d: (torch.from_numpy(image_bytes[:, a:b, c:d].copy()), valid[a:b, c:d]), 300, 500
    )
    assert cells.prior is not None
    plain.decay = 0.0
    grid = (cells.valid.shape[0], cells.valid.shape[1])
    index = plain.graph(cells.prior, grid).index.long()
    noise = plain.graph(torch.randn_like(cells.prior), grid).index.long()
    own = torch.arange(len(index))[:, None]
    mean = [
        torch.hypot((some // grid[1] - own // grid[1]).float(), (some % grid[1] - own % grid[1]).float()).mean()
        for some in (index, noise)
    ]
    assert mean[0] < 0.7 * mean[1]
