# SPDX-License-Identifier: Apache-2.0
"""A scene of any size as one grid of cells, its prior as one exact graph, and logits that spread over all of it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.config.zero_shot import ZeroShotConfig
from drseg_core.errors import NumericalError, ResourceError
from drseg_core.evaluation.inference import Piece, Prediction, ReadWindow
from drseg_core.files import check_room
from drseg_core.models.class_text import ClassText, class_logits
from drseg_core.models.window_maps import Windows, blended_bands
from drseg_core.models.zero_shot import ZeroShot
from drseg_core.nn.label_propagation import (
    normalized_graph,
    propagate_labels,
    reach_of_steps,
    solve_labels,
    weight_graph,
)
from drseg_core.nn.pixel_propagation import propagate_pixels, reach_of_pixels
from drseg_core.ops import Graph
from drseg_core.scenes.enlarged import Enlarged
from drseg_core.scenes.super_tiles import SuperTile, super_tiles

PRIOR_BYTES = 2**30
"""A prior of more bytes in float32 is kept in float16, in a file."""

COLUMNS = 32
"""Classes whose logits are spread at a time."""

REFINING: dict[str, Any] = {"radius": 3, "colour": 0.03, "steps": 10, "alpha": 0.95}
"""What ``refine`` asks of ``propagate_pixels``; ``docs/zero_shot.md`` has what was measured of it."""

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 64 * 2**20
# what is around a smaller block would be worked on more than once
_REFINED_BYTES = 256 * 2**20


class SceneCells(NamedTuple):
    """``logits`` (N, T) float32 and ``prior`` (N, D), L2-normalised and NaN where nothing is valid, None without one;
    ``valid`` (h, w) bool with ``h * w = N``. On the CPU."""

    logits: Tensor
    prior: Tensor | None
    valid: Tensor


class GraphPredictor:
    """Maps a scene by words: :class:`drseg_core.models.zero_shot.ZeroShot` in windows, one graph over all of them.

    The scene is read twice: in windows, whose maps are blended into cells (:meth:`collect`), and in blocks, for
    which the spread logits are enlarged (:meth:`pieces`), and with ``refine`` spread over the pixels of the block and
    around it. A cell without a valid pixel has no edges, and no share in any pixel.

    A pixel's score is the softmax of its logits times ``logit_scale``, and its uncertainty the entropy of the softmax,
    divided by its largest.

    Args:
        model: on ``device``.
        text: of ``model.encode``.
        class_names: one for each class of ``text``.
        config: windows, graph and propagation.
        decay: for each cell of distance.
        radius: cells farther apart are no neighbours; None is no limit.
        device: where the model is and the graph is made.
        folder: where a large prior is kept.
        block: side in pixels of the blocks; by default what a bound on memory gives.
        progress: show progress bars.

    Raises:
        ValueError: windows that do not fit the model.
    """

    # is given the weights of each graph, and the graph
    watch: Callable[[Graph, Graph], object] | None = None

    def __init__(
        self,
        model: ZeroShot,
        text: ClassText,
        class_names: tuple[str, ...],
        config: ZeroShotConfig,
        *,
        decay: float,
        radius: float | None = None,
        device: torch.device,
        folder: Path | None = None,
        block: int | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.text, self.class_names, self.config = model, text, class_names, config
        self.decay, self.radius, self.device, self.folder, self.progress = decay, radius, device, folder, progress
        self.windows = scene_windows(model, config)
        bound = (
            _REFINED_BYTES / pixel_bytes(len(class_names))
            if config.refine
            else _BLOCK_BYTES / 8 / (len(class_names) + 1)
        )
        # whole blocks of the rasters that are written
        self.block = block or min(max(int(bound**0.5) // 256 * 256, 256), 1024)

    def collect(self, read: ReadWindow, height: int, width: int) -> SceneCells:
        """The cells of a scene. Memory: one row of windows besides the result.

        Args:
            read: gives a part of the scene and its valid pixels.
            height: H of the scene.
            width: W of the scene.

        Raises:
            NumericalError: features are not finite.
            ResourceError: no room for the file of a large prior.
        """
        from tqdm import tqdm

        grid = self.windows.grid(height, width)
        nodes = grid[0] * grid[1]
        logits = torch.zeros(nodes, len(self.class_names))
        prior: Tensor | None = None
        valid = torch.zeros(grid, dtype=torch.bool)

        def pixels(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
            first = int(rows.min()), int(columns.min())
            image, known = read(first[0], int(rows.max()) + 1, first[1], int(columns.max()) + 1)
            rows, columns = rows - first[0], columns - first[1]
            seen = None if known is None else torch.from_numpy(known)[rows][:, columns]
            return image[:, rows][None, :, :, columns], seen

        down, across = self.windows.starts(height, width)
        with tqdm(total=len(down) * len(across), desc="windows", disable=not self.progress) as bar:
            bands = blended_bands(
                lambda image: self.model.parts(image.to(self.device).float() / 255),
                pixels,
                height,
                width,
                self.windows,
                batch_size=self.config.batch_size,
                computed=bar.update,
            )
            for band in bands:
                rows = slice(band.top * grid[1], (band.top + len(band.valid)) * grid[1])
                valid[band.top : band.top + len(band.valid)] = band.valid
                known = band.valid.flatten()
                # nothing was computed yet
                if not band.parts:
                    continue
                found = class_logits(band.parts[0], self.text)[0].flatten(1).T.cpu()
                if not found[known].isfinite().all():
                    raise NumericalError("zero_shot: logits are not finite; expected finite values from CLIP")
                logits[rows] = torch.where(known[:, None], found, 0)
                if self.has_graph:
                    if prior is None:
                        prior = self._room(nodes, band.parts[1].shape[1])
                    unit = F.normalize(band.parts[1][0].flatten(1).T.float(), dim=1).cpu()
                    prior[rows] = torch.where(known[:, None], unit, torch.nan).to(prior.dtype)
            # windows without a valid pixel are left out
            bar.update(len(down) * len(across) - bar.n)
        return SceneCells(logits, prior, valid)

    @property
    def has_graph(self) -> bool:
        return self.model.prior is not None and self.config.steps != 0

    def _room(self, nodes: int, width: int) -> Tensor:
        """(N, D) of NaN, for the prior."""
        shape = nodes, width
        if nodes * width * 4 <= PRIOR_BYTES:
            return torch.full(shape, torch.nan)
        folder = self.folder or Path(tempfile.gettempdir())
        check_room(folder, nodes * width * 2, "zero_shot")
        try:
            # without a name: nothing is left of it, however this ends
            with tempfile.TemporaryFile(dir=folder) as file:
                kept = torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))
            return kept.fill_(torch.nan)
        except OSError as error:
            raise ResourceError(f"zero_shot: {folder} has no room for the prior; {error.strerror}") from error

    def graph(self, prior: Tensor, grid: tuple[int, int]) -> Graph:
        """The graph of a prior (N, D)."""
        config = self.config
        weights = weight_graph(
            prior,
            grid,
            config.k,
            gamma=config.gamma,
            decay=self.decay,
            select=config.select,
            radius=self.radius,
        )
        graph = normalized_graph(weights)
        if self.watch is not None:
            self.watch(weights, graph)
        return graph

    def tiles(self, grid: tuple[int, int]) -> list[SuperTile]:
        """The parts of a scene that are graphs of their own.

        Raises:
            ConfigError: a part of ``super_tile`` cells has no room for what decides what becomes of one.
        """
        halo = None
        if self.config.has_reach:
            # no farther than the grid goes
            halo = min(reach_of_steps(self.radius or 0.0, self.config.steps or 0), max(grid))
        return super_tiles(grid, halo, self.config.super_tile)

    def spread(self, cells: SceneCells) -> Tensor:
        """Logits (N, T) after the propagation over the graph of the whole scene."""
        if cells.prior is None:
            return cells.logits
        grid = (cells.valid.shape[0], cells.valid.shape[1])
        from tqdm import tqdm

        spread = torch.empty_like(cells.logits)
        tiles, parts = self.tiles(grid), range(0, spread.shape[1], COLUMNS)
        steps = self.config.steps
        how = "solved to the end, mostly within a few dozen iterations" if steps is None else f"{steps} steps"
        total = len(tiles) * len(parts) * (steps or 0)
        with tqdm(total=total, desc="steps", disable=not self.progress or not total) as bar:
            for number, tile in enumerate(tiles, 1):
                h, w = tile.grid
                _log.info("graph %d of %d: %d x %d = %d cells", number, len(tiles), w, h, w * h)
                graph = self.graph(tile.outer(cells.prior, grid[1]).to(self.device), tile.grid)
                _log.info("%d classes over %d edges: %s", spread.shape[1], graph.index.numel(), how)
                for first in parts:
                    some = tile.outer(cells.logits[:, first : first + COLUMNS], grid[1]).to(self.device)
                    found = self._spread(some, graph, bar.update)
                    tile.put(spread[:, first : first + COLUMNS], found.cpu(), grid[1])
        return spread

    def _spread(self, labels: Tensor, graph: Graph, stepped: Callable[[int], object]) -> Tensor:
        config = self.config
        if config.steps is None:
            try:
                return solve_labels(labels, graph, alpha=config.alpha)
            except NumericalError as error:
                # the options that it names are none of a map
                raise NumericalError(
                    "zero_shot: the propagation did not converge; expected an alpha further below 1, or steps, "
                    f"got alpha {config.alpha}"
                ) from error
        return propagate_labels(labels, graph, config.steps, alpha=config.alpha, stepped=stepped)

    @torch.no_grad()
    def pieces(self, read: ReadWindow, height: int, width: int) -> Iterator[Piece]:
        """See :meth:`drseg_core.evaluation.inference.Predictor.pieces`: the blocks cover every pixel once."""
        cells = self.collect(read, height, width)
        enlarged = Enlarged(self.spread(cells), cells.valid, self.windows.cell)
        del cells
        most = max(np.log(len(self.class_names)), 1e-12)
        for top in range(0, height, self.block):
            for left in range(0, width, self.block):
                bottom, right = min(top + self.block, height), min(left + self.block, width)
                if self.config.refine:
                    logits = refined_block(enlarged, read, (height, width), (top, bottom, left, right), self.device)
                else:
                    logits = enlarged.block(top, bottom, left, right)
                # a piece lies within what was read last
                read(top, bottom, left, right)
                score = (logits * self.config.logit_scale).softmax(dim=0)
                best, index = score.max(dim=0)
                entropy = torch.special.entr(score).sum(dim=0) / most
                yield Piece(top, left, Prediction(index.to(torch.uint8), best, entropy), score.__getitem__)


def pixel_bytes(classes: int) -> int:
    """Of each pixel of a block that is refined: weights of its edges; logits before and after, and scores; and what is
    worked on."""
    radius = REFINING["radius"]
    return 4 * (2 * radius * (radius + 1) + 3 * classes + 24)


def refined_block(
    enlarged: Enlarged,
    read: ReadWindow,
    size: tuple[int, int],
    block: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor:
    """Logits (T, n, m) of a block's pixels after ``propagate_pixels``, as all pixels of the scene at once would give.

    Args:
        enlarged: the logits of any block.
        read: gives a part of the scene and its valid pixels.
        size: (H, W) of the scene.
        block: top, bottom, left and right.
        device: where the pixels are worked on.
    """
    top, bottom, left, right = block
    reach = reach_of_pixels(REFINING["radius"], REFINING["steps"])
    outer = max(top - reach, 0), min(bottom + reach, size[0]), max(left - reach, 0), min(right + reach, size[1])
    image, known = read(*outer)
    valid = None if known is None else torch.from_numpy(known).to(device)
    found = propagate_pixels(enlarged.block(*outer).to(device), image.to(device), valid, **REFINING)
    return found[:, top - outer[0] : bottom - outer[0], left - outer[2] : right - outer[2]].cpu()


def scene_windows(model: ZeroShot, config: ZeroShotConfig) -> Windows:
    """The windows of a configuration.

    Raises:
        ValueError: they do not fit the model, or have a single cell.
    """
    windows = model.window_grid(config.window, config.overlap, config.batch_size)
    if windows.cells < 2:
        raise ValueError(
            f"zero_shot: window is too small; expected at least {2 * windows.cell} pixels, got {config.window}"
        )
    return windows
