# SPDX-License-Identifier: Apache-2.0
"""Super-tiles: any partition gives what one graph gives, and a smaller halo does not."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import drseg_core as drseg
from drseg_core.errors import ConfigError
from drseg_core.nn.label_propagation import reach_of_steps
from drseg_core.scenes import scene_graph
from drseg_core.scenes.scene_graph import GraphPredictor, SceneCells
from drseg_core.scenes.super_tiles import super_tiles

GRID = 37, 52
LIMITS = [1178, 1300, 1600, 1923]
NARROW = {(2.9, 2): 300, (1.0, 4): 360, (2.0, 1): 200, (4.3, 1): 700}


@pytest.mark.promise("C47")
@pytest.mark.parametrize(
    ("halo", "limit"),
    [
        (0, 342),
        (0, 1),
        (0, 7),
        (2, 30),
        (5, 121),
        (1, 400),
        (0, 1000),
        (1, 700),
        (5, 800),
        (5, 1923),
        (5, 1924),
        (30, 1924),
    ],
)
def test_parts_cover_a_grid_once(halo: int, limit: int) -> None:
    seen = torch.zeros(GRID, dtype=torch.int)
    tiles = super_tiles(GRID, halo, limit)
    for tile in tiles:
        assert tile.grid[0] * tile.grid[1] <= limit
        seen[tile.top : tile.bottom, tile.left : tile.right] += 1
        for inner, outer, end in (
            ((tile.top, tile.bottom), (tile.outer_top, tile.outer_bottom), GRID[0]),
            ((tile.left, tile.right), (tile.outer_left, tile.outer_right), GRID[1]),
        ):
            assert outer == (max(inner[0] - halo, 0), min(inner[1] + halo, end))
    assert (seen == 1).all() and (len(tiles) == 1) == (limit == 1924)


@pytest.mark.parametrize(
    ("grid", "halo", "limit", "narrowest"),
    [(GRID, 4, 700, 16), (GRID, 4, 1600, 16), ((32, 47), 1, 600, 16), ((20, 60), 2, 479, 1)],
)
def test_as_few_cells_as_can_be(grid: tuple[int, int], halo: int, limit: int, narrowest: int) -> None:
    """Against every other regular partition; into narrow parts only where others do not fit."""
    work = sum(tile.grid[0] * tile.grid[1] for tile in super_tiles(grid, halo, limit))
    others = []
    for count in itertools.product(*(range(1, side // narrowest + 1) for side in grid)):
        sizes = [
            [min(n * (i + 1) // m + halo, n) - max(n * i // m - halo, 0) for i in range(m)]
            for n, m in zip(grid, count, strict=True)
        ]
        if max(sizes[0]) * max(sizes[1]) <= limit:
            others.append(sum(sizes[0]) * sum(sizes[1]))
    assert work == min(others)


def test_a_halo_that_does_not_fit() -> None:
    # a cell and five on each side of it
    with pytest.raises(
        ConfigError,
        match="super_tile is too small for radius and steps; expected at least 121 cells, one and the 5 on each side "
        "that decide what becomes of it, got 120",
    ):
        super_tiles(GRID, 5, 120)
    assert max(tile.grid[0] * tile.grid[1] for tile in super_tiles(GRID, 5, 121)) == 121
    # two parts of 18 or 19 cells down and three of 17 or 18 across, which reach over one border and over two: the
    # smallest that are no narrower than 16 cells; smaller ones are narrower
    assert max(tile.grid[0] * tile.grid[1] for tile in super_tiles(GRID, 5, 648)) == 648
    assert len(super_tiles(GRID, 5, 648)) == 6 < len(super_tiles(GRID, 5, 647))
    # nothing but the whole will do
    assert len(super_tiles(GRID, None, 5)) == 1
    with pytest.raises(ConfigError, match="at least 1924 cells"):
        super_tiles(GRID, 52, 1923)


def test_narrow_parts_of_a_large_grid_are_found_soon() -> None:
    begin = time.process_time()
    assert max(tile.grid[0] * tile.grid[1] for tile in super_tiles((1500, 2000), 8, 340)) <= 340
    assert time.process_time() - begin < 20


def predictor(**options: Any) -> GraphPredictor:
    mapper = drseg.zero_shot("tiny", device="cpu")
    text = mapper.model.encode(["a", "b", "c"])
    config = dataclasses.replace(mapper.config, k=options.pop("k", 6), gamma=2.0, alpha=0.8, **options)
    return GraphPredictor(
        mapper.model, text, ("a", "b", "c"), config, decay=0.2, radius=config.radius, device=torch.device("cpu")
    )


def cells(seed: int = 0) -> SceneCells:
    random = torch.Generator().manual_seed(seed)
    nodes = GRID[0] * GRID[1]
    prior = torch.nn.functional.normalize(torch.randn(nodes, 5, generator=random), dim=1)
    valid = torch.rand(GRID, generator=random) > 0.1
    prior[~valid.flatten()] = torch.nan
    return SceneCells(torch.randn(nodes, 3, generator=random), prior, valid)


def spread(found: GraphPredictor, given: SceneCells, limit: int) -> Tensor:
    found.config = dataclasses.replace(found.config, super_tile=limit)
    return found.spread(given)


@pytest.mark.promise("C47")
@pytest.mark.parametrize(("radius", "steps"), [(2.9, 2), (1.0, 4), (2.0, 1), (4.3, 1)])
@pytest.mark.parametrize("select", ["affinity", "cosine"])
def test_any_partition_is_one_graph(select: str, radius: float, steps: int) -> None:
    found, given = predictor(radius=radius, steps=steps, select=select), cells()
    whole = spread(found, given, 10**6)
    counts = set()
    for limit in (*LIMITS, NARROW[radius, steps]):
        counts.add(len(super_tiles(GRID, reach_of_steps(radius, steps), limit)))
        torch.testing.assert_close(spread(found, given, limit), whole, rtol=1e-5, atol=1e-6)
    assert len(counts) > 1 and min(counts) > 1


@pytest.mark.promise("C47")
@pytest.mark.parametrize(("k", "radius", "steps"), [(6, 2.9, 2), (2, 1.0, 1), (6, 4.3, 1)])
def test_a_smaller_halo_is_seen(k: int, radius: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted faults: the reach of labels alone, and that of labels and degrees without the choices that they count."""
    found, given = predictor(k=k, radius=radius, steps=steps), cells()
    whole = spread(found, given, 10**6)
    for short in (1, 2):
        monkeypatch.setattr(scene_graph, "reach_of_steps", lambda r, n, less=short: int(r) * (n + 2 - less))
        assert (spread(found, given, 1178) - whole).abs().max() > 1e-4


def test_what_has_no_reach_is_one_graph() -> None:
    for options in ({"radius": None, "steps": 3}, {"radius": 2.0, "steps": None}):
        found, given = predictor(**options), cells()
        assert len(found.tiles(GRID)) == 1
        assert torch.equal(spread(found, given, 300), spread(found, given, 10**6))
    assert len(predictor(radius=2.0, steps=3, super_tile=1044).tiles(GRID)) > 1


def test_a_radius_beyond_the_grid_is_a_halo_of_the_grid() -> None:
    with pytest.raises(ConfigError, match="expected at least 1924 cells, one and the 52 on each side"):
        predictor(radius=1e30, steps=3, super_tile=1000).tiles(GRID)


def test_a_large_prior_in_a_file_goes_in_parts_too() -> None:
    found, given = predictor(radius=2.0, steps=2), cells()
    assert given.prior is not None
    halves = given._replace(prior=given.prior.half())
    torch.testing.assert_close(spread(found, halves, 1000), spread(found, halves, 10**6), rtol=1e-5, atol=1e-6)
