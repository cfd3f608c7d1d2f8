# SPDX-License-Identifier: Apache-2.0
"""Tiles, memory and time that a map would take, before it is made: ``drseg predict --dry-run``."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from drseg_core.data.raster import CACHE_MB
from drseg_core.evaluation.inference import Predictor, tile_starts
from drseg_core.scenes.reader import SceneReader

_REPEATS = 2


class Plan(NamedTuple):
    """What a map would take.

    In order: size in pixels, side of a pixel in metres, most tiles to compute, bands, and memory above the model in MB.
    Then seconds of the model for the tiles, MB on the disk while files are written, and whether polygons are traced.
    """

    height: int
    width: int
    gsd: float | None
    tiles: int
    bands: tuple[int, ...]
    memory_mb: float
    seconds: float
    disk_mb: float = 0.0
    polygons: bool = False

    def text(self) -> str:
        """For a person."""
        side = "" if self.gsd is None else f", {self.gsd:.3g} m each"
        traced = ("then the polygons are traced",) if self.polygons else ()
        return "\n".join(
            (
                f"size: {self.width} x {self.height} pixels{side}",
                f"tiles: {self.tiles} at most (those without data are left out)",
                f"bands: {', '.join(map(str, self.bands))}",
                f"memory above the model: {self.memory_mb:.0f} MB",
                f"disk while it is written: about {self.disk_mb:.0f} MB",
                f"time of the model: {time_text(self.seconds)}",
                *traced,
            )
        )


def time_text(seconds: float) -> str:
    """A time for a person, in one unit.

    Examples:
        >>> from drseg_core.scenes.plan import time_text
        >>> [time_text(seconds) for seconds in (0.2, 40, 1500, 220_000)]
        ['a second', '40 seconds', '25 minutes', '61 hours']
    """
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


def plan_scene(predictor: Predictor, scene: SceneReader, *, probabilities: bool = False) -> Plan:
    """Count the tiles, and time the model on one batch of them."""
    side, classes = predictor.tile_size, len(predictor.class_names)
    if predictor.mode == "whole":
        tiles, batch, pixels = 1, 1, scene.height * scene.width
        image = torch.zeros(1, 3, min(scene.height, 2048), min(scene.width, 2048), dtype=torch.uint8)
        memory = 14.0 * pixels
    else:
        rows = len(tile_starts(scene.height, side, predictor.overlap))
        starts, strips = tile_starts(scene.width, side, predictor.overlap), predictor.strips(scene.width)
        tiles = rows * sum(1 for left, right in strips for x in starts if x < right and x + side > left)
        batch = min(predictor.batch_size, len(starts))
        image = torch.zeros(batch, 3, side, side, dtype=torch.uint8)
        wide = max(right - left for left, right in strips)
        memory = 4.0 * (classes + 2) * side * wide + 4.0 * side * (wide + 2 * side)
        memory += probabilities * classes * side * wide
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        predictor.forward(image)
        seconds.append(time.perf_counter() - begin)
    each = min(seconds) / batch
    memory_mb = memory / 2**20 + CACHE_MB
    return Plan(scene.height, scene.width, scene.gsd, tiles, scene.bands, memory_mb, each * tiles)
