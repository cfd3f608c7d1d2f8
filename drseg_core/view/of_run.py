# SPDX-License-Identifier: Apache-2.0
"""What a trained run computed beneath a map: the graph of each tile, and both correlations of each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.checkpoints.run import LoadedRun
from drseg_core.data.vocabulary import OTHER
from drseg_core.device import select_device
from drseg_core.evaluation.inference import Predictor, mirrored
from drseg_core.models.tiling import blend_window, tile_starts
from drseg_core.ops import degree_normalize
from drseg_core.scenes.reader import SceneReader
from drseg_core.view.graph import GRAPH_BYTES, Beneath, Part, make_part, stride_for
from drseg_core.view.layers import MapReader

ONLY_FIRST = (
    "Correlations: of the first word of each class only, as this map of an earlier version does not name its synonyms"
)


def of_run(
    run: LoadedRun,
    *,
    device: str | None = None,
    progress: bool = True,
    **tiles: Any,
) -> Callable[[SceneReader, MapReader, int], Beneath]:
    """The ``beneath`` of :func:`drseg_core.view.page.write_page` for a trained run.

    Args:
        run: the run that made the map.
        device: where the model runs.
        progress: show a progress bar.
        tiles: ``mode``, ``tile_size``, ``overlap`` and ``batch_size`` of the map; the run's by default.
    """

    def beneath(scene: SceneReader, found: MapReader, room: int) -> Beneath:
        names, words, note = found.names, found.words, ""
        if words is None:
            # "other" is as a rule that of a threshold, which has no words
            asked = names[:-1] if names[-1] == OTHER and len(names) > 1 else names
            words, note = tuple((name,) for name in asked), ONLY_FIRST
            if len(asked) < len(names):
                note += f", and {OTHER!r} is taken for the class of a threshold"
        own = {name: getattr(run.config.evaluation, name) for name in ("tile_size", "overlap", "batch_size")}
        chosen = {"mode": "tile", **own, **{name: value for name, value in tiles.items() if value is not None}}
        predictor = Predictor(run.model, names[: len(words)], synonyms=words, device=select_device(device), **chosen)
        return beneath_run(predictor, scene, room=room, progress=progress)._replace(note=note)

    return beneath


@torch.no_grad()
def beneath_run(
    predictor: Predictor, scene: SceneReader, *, room: int = GRAPH_BYTES, progress: bool = False
) -> Beneath:
    """Run the model over a scene once more, tile by tile, and keep what it computes on the way to a map.

    Where tiles overlap, a pixel is in several of them. The correlations are blended like the scores of the map, and
    each tile has its own graph.

    Args:
        predictor: of the run; its mode and tiles are those of the map.
        scene: open, on the grid of the map.
        room: bytes that the graphs may take.
        progress: show a progress bar.
    """
    from tqdm import tqdm

    model = predictor.model
    pdgr = getattr(model, "pdgr", None)
    priors: list[Tensor] = []
    # what it is called with is what its graph is made of
    hook = None if pdgr is None else pdgr.register_forward_pre_hook(lambda _, given: priors.append(given[1]))
    whole = predictor.mode == "whole"
    size = (scene.height, scene.width) if whole else (predictor.tile_size, predictor.tile_size)
    tiles = [(0, 0)] if whole else list(_tiles(scene, predictor))
    parts: list[Part] = []
    sums: dict[str, _Mosaic] = {}
    step = 1
    try:
        for top, left in tqdm(tiles, desc="view", disable=not progress):
            image, valid = scene.window(top, min(top + size[0], scene.height), left, min(left + size[1], scene.width))
            if not valid.any():
                continue
            image = image if whole else mirrored(image, size[0])
            priors.clear()
            with predictor.autocast():
                output = model(image[None].to(predictor.device).float() / 255, predictor.text)
                if priors:
                    parts.append(_part(pdgr, priors[0], (top, left), size, len(tiles), room))
            step = max(1, round(size[0] / output.original.shape[2]))
            for name in ("original", "refined"):
                value = getattr(output, name)
                if value is not None:
                    place = sums.setdefault(name, _Mosaic(len(predictor.class_names), scene, step))
                    each = predictor.per_class(value)[0].float().cpu()
                    place.add(each, top, left, size, 0 if whole else predictor.overlap)
    finally:
        if hook is not None:
            hook.remove()
    found = {name: place.mean() for name, place in sums.items()}
    why_not = "" if parts else "this run has no graph" if pdgr is None else "no pixel of this scene is valid"
    words = "" if pdgr is None else f"coefficients with the norm {pdgr.norm}"
    return Beneath(parts, why_not, step, found.get("original"), found.get("refined"), words)


def _tiles(scene: SceneReader, predictor: Predictor) -> Iterator[tuple[int, int]]:
    side, overlap = predictor.tile_size, predictor.overlap
    for top in tile_starts(scene.height, side, overlap):
        for left in tile_starts(scene.width, side, overlap):
            yield top, left


def _part(pdgr: Any, prior: Tensor, place: tuple[int, int], size: tuple[int, int], tiles: int, room: int) -> Part:
    index, weight, real = (value[0] for value in pdgr.edges(prior))
    coefficient = degree_normalize(torch.where(real, weight, 0), index, norm=pdgr.norm)
    h, w = prior.shape[2:]
    stride = stride_for(tiles * h * w, index.shape[1], room)
    cell = size[0] / h, size[1] / w
    return make_part(index, weight, coefficient, real, (h, w), place=place, cell=cell, stride=stride)


class _Mosaic:
    """Maps of tiles, blended in the middles of the scene's cells."""

    def __init__(self, classes: int, scene: SceneReader, step: int) -> None:
        self.step = step
        size = -(-scene.height // step), -(-scene.width // step)
        self.row, self.column = (
            (torch.arange(n) * step + step // 2).clamp(max=most - 1)
            for n, most in zip(size, (scene.height, scene.width), strict=True)
        )
        self.total = torch.zeros(classes + 1, *size)

    def add(self, value: Tensor, top: int, left: int, size: tuple[int, int], overlap: int) -> None:
        """Add (T, h, w) of a tile whose first pixel is (top, left)."""
        rows = ((self.row >= top) & (self.row < top + size[0])).nonzero()[:, 0]
        columns = ((self.column >= left) & (self.column < left + size[1])).nonzero()[:, 0]
        pixels = F.interpolate(value[None], size=size, mode="bilinear", align_corners=False)[0]
        inside = self.row[rows] - top, self.column[columns] - left
        down, across = (torch.from_numpy(blend_window(n, overlap))[i] for n, i in zip(size, inside, strict=True))
        weight = down[:, None] * across
        some = pixels[:, inside[0]][:, :, inside[1]]
        part = torch.cat([some * weight, weight[None]])
        self.total[:, rows[:, None], columns] += part

    def mean(self) -> NDArray[np.float32]:
        return (self.total[:-1] / self.total[-1]).numpy()
