# SPDX-License-Identifier: Apache-2.0
"""A scene of any size as one grid of cells, its prior as one exact graph, and logits that spread over all of it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.config.zero_shot import ZeroShotConfig
from drseg_core.errors import NumericalError, ResourceError
from drseg_core.evaluation.inference import Box, Piece, Prediction, ReadWindow
from drseg_core.files import check_room
from drseg_core.models.class_text import ClassText, class_logits
from drseg_core.models.tiling import tiles_of_bands
from drseg_core.models.window_maps import Windows, blended_bands, pixels_of_row
from drseg_core.models.zero_shot import ZeroShot
from drseg_core.nn.label_propagation import (
    normalized_graph,
    propagate_labels,
    reach_of_steps,
    solve_labels,
    weigh_neighbours,
)
from drseg_core.nn.pixel_propagation import propagate_pixels, reach_of_pixels
from drseg_core.ops import Graph
from drseg_core.scenes.block_store import BlockStore, share
from drseg_core.scenes.enlarged import Enlarged
from drseg_core.scenes.graph_rows import Neighbours, choose_parts, join_parts, missing_parts, row_parts
from drseg_core.scenes.super_tiles import SuperTile, super_tiles

PRIOR_BYTES = 2**30
"""A prior of more bytes in float32 is kept in float16, in a file."""

COLUMNS = 32
"""Classes whose logits are spread at a time."""

REFINING: dict[str, Any] = {"radius": 3, "colour": 0.03, "steps": 10, "alpha": 0.95}
"""Options of ``propagate_pixels`` for ``refine``; ``docs/zero_shot.md`` has measurements."""

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 64 * 2**20
# the smaller a block, the more its surroundings are worked on more than once
_REFINED_BYTES = 256 * 2**20


class SceneCells(NamedTuple):
    """The cells of a scene, on the CPU.

    ``logits`` (N, T) are float32. ``prior`` (N, D) is L2-normalised, NaN in invalid cells, and None without a prior.
    ``valid`` (h, w) is bool with ``h * w = N``.
    """

    logits: Tensor
    prior: Tensor | None
    valid: Tensor


class CellRow(NamedTuple):
    """The cells of a row of windows.

    ``valid`` (n, w) is bool. ``logits`` (n * w, T) and ``prior`` (n * w, D) are as in :class:`SceneCells`, None if
    nothing was computed yet.
    """

    valid: Tensor
    logits: Tensor | None = None
    prior: Tensor | None = None


class GraphPredictor:
    """Maps a scene by words: :class:`drseg_core.models.zero_shot.ZeroShot` in windows, one graph over all of them.

    The scene is read twice. First in windows, whose maps are blended into cells (:meth:`collect`). Then in blocks, for
    which the spread logits are enlarged (:meth:`pieces`). With ``refine`` they are also spread over the pixels of the
    block and around it. A cell without a valid pixel has no edges, and no share in any pixel. With a ``store`` finished
    work is kept.

    A pixel's score is the softmax of its logits times ``logit_scale``. Its uncertainty is the entropy of the softmax,
    divided by the largest possible.

    Args:
        model: on ``device``.
        text: from ``model.encode``.
        class_names: one for each class of ``text``.
        config: windows, graph and propagation.
        decay: for each cell of distance.
        radius: cells farther apart are no neighbours; None is no limit.
        device: where the model is and the graph is made.
        folder: where a large prior is kept.
        block: side in pixels of the blocks; by default chosen by a bound on memory.
        progress: show progress bars.

    Raises:
        ValueError: windows that do not fit the model.
    """

    steps = ("cells", "rows", "graph")
    """The steps before the pieces: features, neighbours of a graph that is one, and what the graph makes of logits."""

    store: BlockStore | None = None
    """Keeps finished work, if it is there."""

    watch: Callable[[Graph, Graph], object] | None = None
    """Called with the weights of each graph, and the graph."""

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
        """The cells of a scene. Memory: one row of windows besides the result. Rows that are kept are not made again.

        Args:
            read: gives a part of the scene and its valid pixels.
            height: H of the scene.
            width: W of the scene.

        Raises:
            NumericalError: features are not finite.
            ResourceError: no room for the file of a large prior.
        """
        grid = self.windows.grid(height, width)
        nodes = grid[0] * grid[1]
        logits = torch.zeros(nodes, len(self.class_names))
        prior: Tensor | None = None
        valid = torch.zeros(grid, dtype=torch.bool)

        def put(top: int, row: CellRow) -> None:
            nonlocal prior
            valid[top : top + len(row.valid)] = row.valid
            if row.logits is None:
                return
            place = slice(top * grid[1], top * grid[1] + len(row.logits))
            logits[place] = row.logits
            if row.prior is not None:
                if prior is None:
                    prior = self._room(nodes, row.prior.shape[1])
                prior[place] = row.prior

        starts = self.windows.starts(height, width)[0]
        missing = []
        for number, top in enumerate(starts):
            kept = None if self.store is None else self.store.load(f"cells-{number}")
            if kept is None:
                missing.append(number)
            else:
                put(top, CellRow(**{name: torch.from_numpy(value) for name, value in kept.items()}))
        for number, row in self._rows(read, height, width, missing):
            put(starts[number], row)
        return SceneCells(logits, prior, valid)

    def _rows(
        self, read: ReadWindow, height: int, width: int, wanted: Collection[int]
    ) -> Iterator[tuple[int, CellRow]]:
        """Rows of windows by number, each kept once it is made."""
        from tqdm import tqdm

        grid = self.windows.grid(height, width)
        each_channel = grid[0] * grid[1] * 4
        down, across = self.windows.starts(height, width)

        def pixels(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
            first = int(rows.min()), int(columns.min())
            image, known = read(first[0], int(rows.max()) + 1, first[1], int(columns.max()) + 1)
            rows, columns = rows - first[0], columns - first[1]
            seen = None if known is None else torch.from_numpy(known)[rows][:, columns]
            return image[:, rows][None, :, :, columns], seen

        if not wanted:
            return
        total = len(wanted) * len(across)
        with tqdm(total=total, desc="windows", disable=not self.progress) as bar:
            bands = blended_bands(
                lambda image: self.model.parts(image.to(self.device).float() / 255),
                pixels,
                height,
                width,
                self.windows,
                batch_size=self.config.batch_size,
                computed=bar.update,
                wanted=wanted,
            )
            for number, band in zip(sorted(wanted), bands, strict=True):
                known = band.valid.flatten()
                row = CellRow(band.valid)
                # nothing was computed yet where there are none
                if band.parts:
                    found = class_logits(band.parts[0], self.text)[0].flatten(1).T.cpu()
                    if not found[known].isfinite().all():
                        raise NumericalError("zero_shot: logits are not finite; expected finite values from CLIP")
                    row = row._replace(logits=torch.where(known[:, None], found, 0))
                    if self.has_graph:
                        unit = F.normalize(band.parts[1][0].flatten(1).T.float(), dim=1).cpu()
                        kind = torch.float16 if each_channel * unit.shape[1] > PRIOR_BYTES else torch.float32
                        row = row._replace(prior=torch.where(known[:, None], unit, torch.nan).to(kind))
                if self.store is not None:
                    arrays = {name: value.numpy() for name, value in row._asdict().items() if value is not None}
                    self.store.save(f"cells-{number}", arrays)
                yield number, row
            # windows without a valid pixel are left out
            bar.update(max(total - bar.n, 0))

    def make(self, step: str, read: ReadWindow, height: int, width: int, part: int, parts: int) -> None:
        """Do and keep one part of one of :attr:`steps`, which follow each other."""
        if self.store is None:
            raise ValueError("GraphPredictor: make keeps what it makes; expected a store")
        if step == "cells":
            down = self.windows.starts(height, width)[0]
            own = [n for n in share(range(len(down)), part, parts) if self.store.load(f"cells-{n}") is None]
            for _ in self._rows(read, height, width, own):
                pass
            return
        grid = self.windows.grid(height, width)
        tiles = self.tiles(grid) if self.has_graph else []
        if step == "rows":
            if len(tiles) == 1 and not self.store.has("spread"):
                self._choose(read, height, width, share(range(len(row_parts(grid))), part, parts))
        elif len(tiles) > 1 and not self.store.has("spread"):
            self.spread(self.collect(read, height, width), share(range(len(tiles)), part, parts))
        elif len(tiles) <= 1 and part == 0:
            # its rows are there: what is left of one graph is a small part of the work
            self._spread_cells(read, height, width)

    def _choose(self, read: ReadWindow, height: int, width: int, numbers: Sequence[int]) -> None:
        """Keep some parts of the rows of the whole scene's graph."""
        if self.store is None or not (missing := missing_parts(self.store, numbers)):
            return
        prior = self.collect(read, height, width).prior
        # a scene without data has none
        if prior is not None:
            for _ in self._parts(prior.to(self.device), self.windows.grid(height, width), missing, self.store):
                pass

    def _parts(
        self, prior: Tensor, grid: tuple[int, int], numbers: Sequence[int], store: BlockStore | None
    ) -> Iterator[Neighbours]:
        from tqdm import tqdm

        parts = row_parts(grid)
        total = sum(end - first for first, end in (parts[number] for number in numbers))
        with tqdm(total=total, desc="neighbours", unit="cell", disable=not self.progress or len(parts) == 1) as bar:
            options = {**self._weighing, "k": self.config.k, "radius": self.radius}
            yield from choose_parts(prior, grid, options, numbers, store=store, chosen=bar.update)

    @property
    def _weighing(self) -> dict[str, Any]:
        return {"gamma": self.config.gamma, "decay": self.decay, "select": self.config.select}

    def _spread_cells(self, read: ReadWindow, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The spread logits (N, T) and the valid cells (h, w), kept once they are made."""
        kept = None if self.store is None else self.store.load("spread")
        if kept is not None:
            return torch.from_numpy(kept["logits"]), torch.from_numpy(kept["valid"])
        cells = self.collect(read, height, width)
        spread = self.spread(cells)
        if self.store is not None:
            self.store.save("spread", {"logits": spread.numpy(), "valid": cells.valid.numpy()})
        return spread, cells.valid

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
            # a file without a name, so nothing is left of it, however this process ends
            with tempfile.TemporaryFile(dir=folder) as file:
                kept = torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))
            return kept.fill_(torch.nan)
        except OSError as error:
            raise ResourceError(f"zero_shot: {folder} has no room for the prior; {error.strerror}") from error

    def graph(self, prior: Tensor, grid: tuple[int, int], store: BlockStore | None = None) -> Graph:
        """The graph of a prior (N, D); with a store its rows are kept, and those that are there are taken."""
        # always in the same parts: on a GPU the last bits of a score may depend on how many rows are multiplied
        parts = range(len(row_parts(grid)))
        # without a name for the scores, or for who holds the normalised prior: they go once they are read
        weights = weigh_neighbours(
            *join_parts(self._parts(prior, grid, parts, store), len(prior), prior.device), grid, **self._weighing
        )
        graph = normalized_graph(weights)
        if self.watch is not None:
            self.watch(weights, graph)
        return graph

    def tiles(self, grid: tuple[int, int]) -> list[SuperTile]:
        """The parts of a scene that are graphs of their own.

        Raises:
            ConfigError: a part of ``super_tile`` cells cannot hold all cells that decide a single one.
        """
        halo = None
        if self.config.has_reach:
            # no farther than the grid goes
            halo = min(reach_of_steps(self.radius or 0.0, self.config.steps or 0), max(grid))
        return super_tiles(grid, halo, self.config.super_tile)

    def spread(self, cells: SceneCells, wanted: Collection[int] | None = None) -> Tensor:
        """Logits (N, T) after the propagation over the graph of the whole scene.

        Args:
            cells: of the scene.
            wanted: numbers of the super-tiles to compute; by default all. The result is undefined elsewhere. If there
                are several super-tiles, each is kept.
        """
        if cells.prior is None:
            return cells.logits
        grid = (cells.valid.shape[0], cells.valid.shape[1])
        from tqdm import tqdm

        spread = torch.empty_like(cells.logits)
        tiles, parts = self.tiles(grid), range(0, spread.shape[1], COLUMNS)
        own = [number for number in range(len(tiles)) if wanted is None or number in wanted]
        total = len(own) * len(parts) * (self.config.steps or 0)
        store, whole = (self.store, None) if len(tiles) > 1 else (None, self.store)
        with tqdm(total=total, desc="steps", disable=not self.progress or not total) as bar:
            for number in own:
                kept = None if store is None else store.load(f"graph-{number}")
                if kept is not None:
                    tiles[number].put(spread, torch.from_numpy(kept["logits"]), grid[1])
                    continue
                h, w = tiles[number].grid
                _log.info("graph %d of %d: %d x %d = %d cells", number + 1, len(tiles), w, h, w * h)
                found = self._spread_tile(cells.logits, cells.prior, tiles[number], grid[1], bar.update, whole)
                if store is not None:
                    store.save(f"graph-{number}", {"logits": found.numpy()})
                tiles[number].put(spread, found, grid[1])
        return spread

    def _spread_tile(
        self,
        logits: Tensor,
        prior: Tensor,
        tile: SuperTile,
        width: int,
        stepped: Callable[[int], object],
        store: BlockStore | None,
    ) -> Tensor:
        """Logits (N', T) of the larger part of a super-tile; the store keeps the rows of its graph."""
        steps = self.config.steps
        how = "solved to the end, mostly within a few dozen iterations" if steps is None else f"{steps} steps"
        graph = self.graph(tile.outer(prior, width).to(self.device), tile.grid, store)
        classes = logits.shape[1]
        _log.info("%d classes over %d edges: %s", classes, graph.index.numel(), how)
        found = []
        for first in range(0, classes, COLUMNS):
            some = tile.outer(logits[:, first : first + COLUMNS], width).to(self.device)
            found.append(self._spread(some, graph, stepped).cpu())
        return torch.cat(found, dim=1)

    def _spread(self, labels: Tensor, graph: Graph, stepped: Callable[[int], object]) -> Tensor:
        config = self.config
        if config.steps is None:
            try:
                return solve_labels(labels, graph, alpha=config.alpha)
            except NumericalError as error:
                # the error names options that a map does not have
                raise NumericalError(
                    "zero_shot: the propagation did not converge; expected an alpha further below 1, or steps, "
                    f"got alpha {config.alpha}"
                ) from error
        return propagate_labels(labels, graph, config.steps, alpha=config.alpha, stepped=stepped)

    def blocks(self, height: int, width: int) -> list[Box]:
        """Where the pieces of a scene lie, in the order of :meth:`pieces`."""
        return [
            Box(top, min(top + self.block, height), left, min(left + self.block, width))
            for top in range(0, height, self.block)
            for left in range(0, width, self.block)
        ]

    def reads(self, height: int, width: int, *, wanted: Collection[int] | None = None) -> Iterator[Box]:
        """What :meth:`pieces` will read, in its order."""
        if self.store is None or not self.store.has("spread"):
            down = self.windows.starts(height, width)[0]
            own = [n for n in range(len(down)) if self.store is None or not self.store.has(f"cells-{n}")]
            for number in tiles_of_bands(down, self.windows.cells, own):
                rows, columns = pixels_of_row(self.windows, height, width, down[number])
                yield Box(*(int(n) for n in (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)))
        for number, block in enumerate(self.blocks(height, width)):
            if wanted is None or number in wanted:
                yield self._around(block, height, width)

    def _around(self, block: Box, height: int, width: int) -> Box:
        """The box of all pixels that decide those of a block."""
        reach = reach_of_pixels(REFINING["radius"], REFINING["steps"]) if self.config.refine else 0
        return Box(
            max(block.top - reach, 0),
            min(block.bottom + reach, height),
            max(block.left - reach, 0),
            min(block.right + reach, width),
        )

    @torch.no_grad()
    def pieces(
        self, read: ReadWindow, height: int, width: int, *, wanted: Collection[int] | None = None
    ) -> Iterator[Piece]:
        """See :meth:`drseg_core.evaluation.inference.Predictor.pieces`: the blocks cover every pixel once."""
        spread, valid = self._spread_cells(read, height, width)
        enlarged = Enlarged(spread, valid, self.windows.cell)
        most = max(np.log(len(self.class_names)), 1e-12)
        for number, block in enumerate(self.blocks(height, width)):
            if wanted is not None and number not in wanted:
                continue
            outer = self._around(block, height, width)
            image, known = read(*outer)
            if self.config.refine:
                logits = refined_block(enlarged, image, known, outer, block, self.device)
            else:
                logits = enlarged.block(*block)
            score = (logits * self.config.logit_scale).softmax(dim=0)
            best, index = score.max(dim=0)
            entropy = torch.special.entr(score).sum(dim=0) / most
            yield Piece(block.top, block.left, Prediction(index.to(torch.uint8), best, entropy), score.__getitem__)


def pixel_bytes(classes: int) -> int:
    """Bytes of each pixel of a refined block: weights of its edges, logits before and after, scores, and workspace."""
    radius = REFINING["radius"]
    return 4 * (2 * radius * (radius + 1) + 3 * classes + 24)


def refined_block(
    enlarged: Enlarged, image: Tensor, known: np.ndarray | None, outer: Box, block: Box, device: torch.device
) -> Tensor:
    """Logits (T, n, m) of a block's pixels after ``propagate_pixels``, the same as for the whole scene at once.

    Args:
        enlarged: gives the enlarged logits of any block.
        image: the pixels of ``outer``.
        known: which of them are valid.
        outer: the block and all pixels with a share in it.
        block: within it.
        device: where the pixels are worked on.
    """
    valid = None if known is None else torch.from_numpy(known).to(device)
    found = propagate_pixels(enlarged.block(*outer).to(device), image.to(device), valid, **REFINING)
    rows = slice(block.top - outer.top, block.bottom - outer.top)
    return found[:, rows, block.left - outer.left : block.right - outer.left].cpu()


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
