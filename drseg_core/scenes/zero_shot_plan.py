# SPDX-License-Identifier: Apache-2.0
"""Cells, memory and time that a map from words would take, before it is made."""

from __future__ import annotations

import logging
import math
import time
from typing import NamedTuple

import torch

from drseg_core.config.zero_shot import ZeroShotConfig
from drseg_core.data.raster import CACHE_MB
from drseg_core.errors import ConfigError
from drseg_core.nn.label_propagation import smooth
from drseg_core.nn.pixel_propagation import propagate_pixels, reach_of_pixels
from drseg_core.scenes.plan import time_text
from drseg_core.scenes.reader import SceneReader
from drseg_core.scenes.scene_graph import COLUMNS, PRIOR_BYTES, REFINING, GraphPredictor, pixel_bytes

_log = logging.getLogger(__name__)

_PROBES = 32, 80
"""Sides of the grids whose graphs are timed."""

_ITERATIONS = 30
"""Products with the graph until the solver converged, with the defaults."""


class ZeroShotPlan(NamedTuple):
    """What a map would take.

    In order: size in pixels, side of a pixel in metres, most windows to compute, bands, and size of the grid in cells.
    Then sizes of its super-tiles with their overlap (one if the scene is a single graph), and memory above the model in
    MB. Last, MB on the disk, and the seconds for the model, the graph and the refined pixels.

    The time of the graph is extrapolated from small graphs of noise. A scene is smoother, so its graph takes less.
    """

    height: int
    width: int
    gsd: float | None
    windows: int
    bands: tuple[int, ...]
    grid: tuple[int, int]
    tiles: tuple[tuple[int, int], ...]
    memory_mb: float
    disk_mb: float
    model_seconds: float
    graph_seconds: float
    pixel_seconds: float

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def graphs(self) -> str:
        """How many graphs, and of how many cells."""
        cells = f"{self.grid[1]} x {self.grid[0]} = {self.cells} cells"
        if len(self.tiles) == 1:
            return f"one graph: {cells}"
        largest, total = max(h * w for h, w in self.tiles), sum(h * w for h, w in self.tiles)
        return (
            f"{len(self.tiles)} overlapping super-tiles: {cells}, at most {largest} at a time, {total} with what they "
            "share"
        )

    def text(self) -> str:
        """For a person."""
        side = "" if self.gsd is None else f", {self.gsd:.3g} m each"
        disk = "" if not self.disk_mb else f"; {self.disk_mb:.0f} MB of the disk"
        return "\n".join(
            (
                f"size: {self.width} x {self.height} pixels{side}",
                f"windows: {self.windows} at most (those without data are left out)",
                f"bands: {', '.join(map(str, self.bands))}",
                self.graphs,
                f"memory above the model: {self.memory_mb:.0f} MB{disk}",
                f"time of the model: {time_text(self.model_seconds)}",
                f"time of the graph: about {time_text(self.graph_seconds)}",
                *((f"time of the pixels: about {time_text(self.pixel_seconds)}",) if self.pixel_seconds else ()),
            )
        )


def plan_cells(predictor: GraphPredictor, scene: SceneReader, *, time_model: bool = True) -> ZeroShotPlan:
    """Count cells and windows, and time the model on one batch of windows, and a small graph.

    Args:
        predictor: with its model.
        scene: open.
        time_model: False leaves the time of the model at 0.
    """
    config, windows, classes = predictor.config, predictor.windows, len(predictor.class_names)
    grid = windows.grid(scene.height, scene.width)
    nodes = grid[0] * grid[1]
    down, across = windows.starts(scene.height, scene.width)
    count = len(down) * len(across)
    prior = predictor.model.prior if predictor.has_graph else None
    tiles = tuple(tile.grid for tile in predictor.tiles(grid)) if predictor.has_graph else (grid,)
    most = max(h * w for h, w in tiles)
    channels = predictor.model.clip.embed_dim + (0 if predictor.model.prior is None else predictor.model.prior.width)
    # sums, the next ones and the quotient of a row of windows; logits twice, and the solver's own
    memory = 12.0 * channels * windows.cells * max(grid[1], windows.cells)
    memory += 4.0 * (nodes * 2 * classes + most * 5 * min(classes, COLUMNS))
    if config.refine:
        side = predictor.block + 2 * reach_of_pixels(REFINING["radius"], REFINING["steps"])
        memory += float(pixel_bytes(classes)) * min(side, scene.height) * min(side, scene.width)
    disk = 0.0
    if prior is not None:
        large = nodes * prior.width * 4 > PRIOR_BYTES
        disk = 2.0 * nodes * prior.width * large
        # the prior as kept, of a part and as normalised; index, scores, weights, coefficients and columns of the edges
        memory += 4.0 * (0 if large else nodes) * prior.width
        memory += 4.0 * most * prior.width * (1 if len(tiles) == 1 else 2) + 28.0 * most * config.k
    return ZeroShotPlan(
        scene.height,
        scene.width,
        scene.gsd,
        count,
        scene.bands,
        grid,
        tiles,
        memory / 2**20 + CACHE_MB,
        disk / 2**20,
        _model_seconds(predictor, count) if time_model else 0.0,
        0.0 if prior is None else _graph_seconds(predictor, [h * w for h, w in tiles], prior.width),
        _pixel_seconds(predictor, scene.height, scene.width) if config.refine and time_model else 0.0,
    )


def check_cells(plan: ZeroShotPlan, config: ZeroShotConfig) -> None:
    """Say what the graph takes, or refuse it if it is too large.

    Raises:
        ConfigError: the message says what it would take.
    """
    cost = f"about {plan.memory_mb:.0f} MB, and {time_text(plan.graph_seconds)} for the graph"
    if not config.has_reach and plan.cells > config.max_cells:
        raise ConfigError(
            f"zero_shot: the scene has too many cells for one graph; expected at most {config.max_cells} "
            f"(--max-cells), got {plan.grid[1]} x {plan.grid[0]} = {plan.cells}, which take {cost}: give it a reach "
            "(--radius with --steps, which makes super-tiles), read it coarser (--gsd), map parts of it (--aoi), leave "
            "the graph out (--steps 0), or raise the limit"
        )
    _log.info("%s, %s", plan.graphs, cost)


def _model_seconds(predictor: GraphPredictor, count: int) -> float:
    side, batch = predictor.config.window, min(predictor.config.batch_size, count)
    image = torch.zeros(batch, 3, side, side, device=predictor.device)
    predictor.model.parts(image)
    begin = time.perf_counter()
    predictor.model.parts(image)
    return (time.perf_counter() - begin) / batch * count


def _graph_seconds(predictor: GraphPredictor, parts: list[int], width: int) -> float:
    """Seconds for graphs of ``parts`` nodes each.

    The choice of neighbours is extrapolated by its growth between two sizes of noise, the propagation linearly.
    """
    config, random = predictor.config, torch.Generator().manual_seed(0)
    made: list[float] = []
    step = 0.0
    # the first call loads the kernels
    for side in (_PROBES[0], *_PROBES):
        prior = torch.randn(side**2, width, generator=random).to(predictor.device)
        labels = torch.randn(side**2, min(len(predictor.class_names), COLUMNS), generator=random)
        labels = labels.to(predictor.device)
        begin = time.perf_counter()
        graph = predictor.graph(prior, (side, side))
        float(graph.coefficient.sum())
        middle = time.perf_counter()
        float(smooth(graph, labels).sum())
        made.append(middle - begin)
        step = time.perf_counter() - middle
    few, many = (side**2 for side in _PROBES)
    # a spatial decay or a radius leaves out far cells, so the growth is between linear and quadratic
    power = min(max(math.log(made[2] / made[1]) / math.log(many / few), 1.0), 2.0)
    steps = _ITERATIONS if config.steps is None else config.steps
    rounds = -(-len(predictor.class_names) // COLUMNS)
    return sum(made[2] * (nodes / many) ** power + step * steps * rounds * nodes / many for nodes in parts)


def _pixel_seconds(predictor: GraphPredictor, height: int, width: int) -> float:
    """Seconds for the pixels, from a block of noise with its margin."""
    side, classes = predictor.block, len(predictor.class_names)
    some = min(side, 256)
    logits = torch.randn(classes, some, some, device=predictor.device)
    image = torch.randint(0, 256, (3, some, some), device=predictor.device).to(torch.uint8)
    begin = time.perf_counter()
    float(propagate_pixels(logits, image, **REFINING).sum())
    each = (time.perf_counter() - begin) / some**2
    halo = 2 * reach_of_pixels(REFINING["radius"], REFINING["steps"])
    rows, columns = (sum(min(side + halo, n) for _ in range(0, n, side)) for n in (height, width))
    return each * rows * columns
