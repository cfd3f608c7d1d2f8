# SPDX-License-Identifier: Apache-2.0
"""Properties of tiles and their weights, of polygons, and of colours, for maps of any size.

The same few cases at every commit; ``make test-deep`` draws more. Each test names a fault that it is for.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.data.dataset import IGNORE
from drseg_core.data.palette import colorize, overlay, palette
from drseg_core.data.prepare.labels import TOLERANCE, label_ids
from drseg_core.data.prepare.raw import Recipe
from drseg_core.data.vocabulary import parse_classes
from drseg_core.evaluation.inference import Predictor
from drseg_core.models.tiling import blend_window, tile_starts, tiles_of_bands
from drseg_core.scenes import polygons
from tests.evaluation.fake import COLORS, ColorModel, color_image

SEEDS = st.integers(0, 2**31)
SIDES = st.sampled_from([16, 32, 48])
DEEP = bool(os.environ.get("DRSEG_DEEP"))


def few(examples: int, deep: int = 2000) -> settings:
    count = int(os.environ.get("DRSEG_EXAMPLES", deep)) if DEEP else examples
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(max_examples=count, derandomize=not DEEP, deadline=None, database=None, phases=phases)


# ---- tiles


# the window falls along one side alone; the overlap of the last tile, which is moved back, was left out
@pytest.mark.promise("C36")
@few(50)
@given(side=SIDES, share=st.floats(0, 1), length=st.integers(1, 300))
def test_weights_of_overlapping_tiles(side, share, length):
    overlap = int(share * (side - 1))
    window = blend_window(side, overlap)
    assert window.dtype == np.float32 and window.shape == (side,) and (window > 0).all() and (window <= 1).all()
    assert np.array_equal(window, window[::-1]) and (np.diff(window[: side // 2]) >= 0).all()
    if 0 < 2 * overlap <= side:
        # sin^2 and cos^2: two neighbours share a pixel between them
        assert np.allclose(window[:overlap] + window[side - overlap :], 1, atol=2e-3)
        assert (window[overlap : side - overlap] == 1).all()
    starts, total = tile_starts(length, side, overlap), np.zeros(max(length, side))
    for start in starts:
        total[start : start + side] += window
    assert (total >= window.min()).all() and starts[-1] + side == len(total)
    # a pixel has the weight of every tile that reaches it
    assert total.sum() == pytest.approx(len(starts) * window.sum(dtype=np.float64))


# the tile before the last that reaches a band was left out
@pytest.mark.promise("C36")
@few(50)
@given(side=SIDES, share=st.floats(0, 1), length=st.integers(1, 300), data=st.data())
def test_bands_name_every_tile_that_reaches_them(side, share, length, data):
    starts = tile_starts(length, side, int(share * (side - 1)))
    bands = data.draw(st.sets(st.integers(0, len(starts) - 1)))
    ends = [*starts[1:], max(length, side)]
    right = {
        tile
        for tile, start in enumerate(starts)
        for band in bands
        if start < ends[band] and start + side > starts[band] and tile <= band
    }
    assert tiles_of_bands(starts, side, bands) == sorted(right)
    assert tiles_of_bands(starts, side) == list(range(len(starts)))


# a strip of the last tile was added to that of the one before
@pytest.mark.promise("C36")
@few(10, deep=500)
@given(
    height=st.integers(1, 60), width=st.integers(1, 60), side=st.sampled_from([16, 32]), share=st.floats(0, 1),
    batch=st.integers(1, 5), seed=SEEDS,
)  # fmt: skip
def test_any_tiles_give_the_whole(height, width, side, share, batch, seed):
    # the model looks at pixels alone, so tiles can change nothing
    label = torch.randint(0, 4, (height, width), generator=torch.Generator().manual_seed(seed))
    image, names = color_image(label), list(COLORS)
    predictor = Predictor(
        ColorModel(), names, mode="tile", tile_size=side, overlap=int(share * (side - 1)), batch_size=batch
    )
    found, mirrored = predictor(image), predictor(image.flip(1, 2))
    assert torch.equal(found.class_index.long(), label)
    whole = Predictor(ColorModel(), names)(image)
    assert torch.allclose(found.score, whole.score, atol=1e-5)
    assert torch.equal(mirrored.class_index.flip(0, 1), found.class_index)
    rows = [band.class_index for _, band in predictor.rows(lambda first, last: image[:, first:last], height, width)]
    assert torch.equal(torch.cat(rows), found.class_index)


# ---- polygons


def traced(value: np.ndarray, north_up: bool = True):
    """Shapes in pixels of a map, with their columns."""
    rasterio, pyogrio = pytest.importorskip("rasterio"), pytest.importorskip("pyogrio")
    shapely = pytest.importorskip("shapely")
    turn = -1 if north_up else 1
    place = rasterio.Affine(2, 0, 355_000, 0, 2 * turn, 5_640_000)
    with tempfile.TemporaryDirectory() as folder:
        labels, part = Path(folder, "labels.tif"), Path(folder, "part.gpkg")
        profile = {"driver": "GTiff", "count": 1, "height": len(value), "width": value.shape[1], "dtype": "uint8"}
        with rasterio.open(labels, "w", crs="EPSG:32632", transform=place, nodata=IGNORE, **profile) as file:
            file.write(value, 1)
        part.touch()
        names = [f"c{number}" for number in range(6)]
        count = polygons.write_polygons(labels, labels, part, Path(folder, "map.gpkg"), names)
        meta, _, geometry, columns = pyogrio.raw.read(part)
    assert count == len(geometry)
    back = ~place
    shapes = shapely.transform(
        shapely.from_wkb(geometry), lambda points: np.column_stack(back @ (points[:, 0], points[:, 1]))
    )
    return shapes, dict(zip(meta["fields"], columns, strict=True))


def map_of(height: int, width: int, classes: int, blobs: bool, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    value = random.integers(0, classes, (height, width)).astype(np.uint8)
    if blobs:
        value = value[:: 1 + height // 3, :: 1 + width // 3].repeat(height, 0).repeat(width, 1)
        value = value[: height * 3 : 3, : width * 3 : 3][:height, :width].copy()
    value[random.random(value.shape) < 0.05] = IGNORE
    return value


MAPS = st.builds(
    map_of, height=st.integers(1, 14), width=st.integers(1, 14), classes=st.integers(1, 6), blobs=st.booleans(),
    seed=SEEDS,
)  # fmt: skip


# the last row of pixels had no polygon; two areas that touch at a corner became one
@pytest.mark.promise("C36")
@few(5, deep=300)
@given(value=MAPS, north_up=st.booleans())
def test_polygons_are_the_map(value, north_up):
    import shapely
    from rasterio.features import rasterize

    smooth, columns = traced(value, north_up)
    assert np.allclose(shapely.area(smooth), columns["pixels"], rtol=1e-6) and shapely.is_valid(smooth).all()
    assert columns["pixels"].sum() == (value != IGNORE).sum()
    for label in range(6):
        mine = columns["class_id"] == label
        assert columns["pixels"][mine].sum() == (value == label).sum()
    assert [f"c{label}" for label in columns["class_id"]] == list(columns["class"])
    if not len(smooth):
        return
    with pytest.MonkeyPatch.context() as patch:
        # without the simplification the way back is exact
        patch.setattr(polygons, "HALF_PIXEL", 0.0)
        shapes, again = traced(value, north_up)
    assert np.array_equal(again["class_id"], columns["class_id"])
    # borders move by half a pixel at most, each on its own: two areas may overlap there
    assert (shapely.hausdorff_distance(smooth, shapes) <= 0.5 + 1e-6).all()
    assert shapely.area(shapely.union_all(shapes)) == pytest.approx(shapely.area(shapes).sum(), rel=1e-6)
    back = rasterize(zip(shapes, columns["class_id"], strict=True), value.shape, fill=IGNORE, dtype="uint8")
    assert np.array_equal(back, value)


# ---- colours


# the colours of a class depended on how many classes there are; class 255 had one
@pytest.mark.promise("C36")
@few(30)
@given(count=st.integers(1, 255), seed=SEEDS, own=st.booleans())
def test_colours_say_which_class(count, seed, own):
    random = np.random.default_rng(seed)
    table = palette(count)
    assert np.array_equal(table, palette(255)[:count]) and len({tuple(color) for color in table.tolist()}) == count
    if own:
        table = random.choice(2**24 - 1, count, replace=False) + 1
        table = np.stack([table >> 16, table >> 8 & 255, table & 255], -1).astype(np.uint8)
    ids = random.integers(0, count, (7, 9)).astype(np.uint8)
    ids[random.random(ids.shape) < 0.2] = IGNORE
    picture = colorize(ids, count, table if own else None)
    back = {tuple(color): number for number, color in enumerate(table.tolist())} | {(0, 0, 0): IGNORE}
    assert [back[tuple(color)] for color in picture.reshape(-1, 3).tolist()] == ids.ravel().tolist()
    image = random.integers(0, 256, (3, 7, 9)).astype(np.uint8)
    mixed = overlay(image, ids, count, opacity=1.0, colors=table)
    shown = ids != IGNORE
    assert np.array_equal(mixed[shown], picture[shown])
    assert np.array_equal(mixed[~shown], image.transpose(1, 2, 0)[~shown])


# a colour in capitals was none; the colour of a synonym went to the class before
@pytest.mark.promise("C51")
@few(30)
@given(colors=st.lists(st.none() | st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=9), upper=st.booleans())
def test_colours_of_a_list_of_classes(colors, upper):
    codes = ["" if color is None else "#{:02x}{:02x}{:02x}".format(*color) for color in colors]
    text = "; ".join(f"class {n}, word {n}{code.upper() if upper else code}" for n, code in enumerate(codes))
    found = parse_classes(text)
    assert found.colors == tuple(colors) and found.names == tuple(f"class {n}" for n in range(len(colors)))


# a painted colour took the id of the one behind it in the table
@pytest.mark.promise("C49")
@few(30)
@given(
    name=st.sampled_from(sorted(name for name, one in BENCHMARKS.items() if one.palette)), seed=SEEDS,
    off=st.integers(0, TOLERANCE), alpha=st.booleans(),
)  # fmt: skip
def test_labels_that_are_painted_a_little_off(name, seed, off, alpha):
    benchmark, random = BENCHMARKS[name], np.random.default_rng(seed)
    recipe = Recipe("", (), coding="colors")
    ids = random.integers(0, len(benchmark.class_names), (6, 7)).astype(np.uint8)
    painted = np.array(benchmark.palette)[ids] + random.integers(-off, off + 1, (6, 7, 3))
    codes = painted.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
    if alpha:
        codes = np.concatenate([codes, np.full((1, 6, 7), 255, np.uint8)])
    assert np.array_equal(label_ids(codes, benchmark, recipe, "a label"), ids)
