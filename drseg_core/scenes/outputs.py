# SPDX-License-Identifier: Apache-2.0
"""The rasters and the picture of a map, filled piece by piece."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.palette import overlay, with_legend
from drseg_core.data.vocabulary import Vocabulary
from drseg_core.evaluation.inference import Piece
from drseg_core.scenes.reader import SceneReader
from drseg_core.scenes.writer import as_levels, describe_classes, describe_levels, raster_like, written


class Overlay:
    """Collects every ``step``-th row and column of the scene."""

    def __init__(self, height: int, width: int, side: int) -> None:
        self.step = max(1, -(-max(height, width) // max(side, 1)))
        size = -(-height // self.step), -(-width // self.step)
        self.image = np.zeros((3, *size), np.uint8)
        self.label = np.full(size, IGNORE, np.uint8)
        self.count = np.zeros(256, np.int64)

    @property
    def pixels(self) -> int:
        return int(self.count.sum())

    def add(self, top: int, left: int, image: NDArray[np.uint8], label: NDArray[np.uint8]) -> None:
        first = -top % self.step, -left % self.step
        part = label[first[0] :: self.step, first[1] :: self.step]
        row, column = (top + first[0]) // self.step, (left + first[1]) // self.step
        place = slice(row, row + part.shape[0]), slice(column, column + part.shape[1])
        self.label[place] = part
        self.image[:, place[0], place[1]] = image[:, first[0] :: self.step, first[1] :: self.step]
        self.count += np.bincount(label.ravel(), minlength=256)

    def picture(self, legend: Vocabulary) -> NDArray[np.uint8]:
        table = legend.table()
        mixed = overlay(self.image, self.label, len(table), colors=table)
        present = [int(i) for i in np.argsort(-self.count, kind="stable") if self.count[i] and i != IGNORE]
        return with_legend(mixed, legend.names, present, colors=table)


class Rasters:
    """The rasters of a map while they are written; ``files`` and ``temporary`` are what
    :class:`drseg_core.scenes.files.SceneFiles` says."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        scene: SceneReader,
        files: Any,
        temporary: Any,
        legend: Vocabulary,
    ) -> None:
        self.files = files

        def raster(name: str, **options: Any) -> Any:
            path = getattr(files, name) or files.classes
            return stack.enter_context(raster_like(scene, getattr(temporary, name), path, **options))

        self.classes = raster("classes", dtype="uint8", nodata=IGNORE)
        describe_classes(self.classes, legend.names, legend.table())
        nan = float("nan")
        self.uncertainty = raster("uncertainty", dtype="float32", nodata=nan, resampling="AVERAGE", stretch=True)
        self.uncertainty.set_band_description(1, "uncertainty")
        self.scores = self.probabilities = None
        if temporary.scores is not None:
            self.scores = raster("scores", dtype="uint8", nodata=IGNORE, resampling="AVERAGE")
            describe_levels(self.scores, ["score of the best class"])
        if temporary.probabilities is not None:
            self.probabilities = raster(
                "probabilities", dtype="uint8", nodata=IGNORE, resampling="AVERAGE", count=len(legend.names)
            )
            describe_levels(self.probabilities, legend.names)

    def add(self, piece: Piece, label: NDArray[np.uint8], valid: NDArray[np.bool_], classes: int) -> None:
        """Write one piece; ``classes`` have a score, further ones have none."""
        from rasterio.windows import Window

        window = Window(piece.left, piece.top, label.shape[1], len(label))
        prediction = piece.prediction
        with written(self.files.classes):
            self.classes.write(label, 1, window=window)
        with written(self.files.uncertainty):
            value = np.where(valid, prediction.uncertainty.numpy(), np.float32("nan"))
            self.uncertainty.write(value, 1, window=window)
        if self.scores is not None:
            with written(self.files.scores or self.files.classes):
                self.scores.write(as_levels(prediction.score.numpy(), valid), 1, window=window)
        if self.probabilities is not None and self.files.probabilities is not None:
            with written(self.files.probabilities):
                for band in range(self.probabilities.count):
                    score = piece.score_of(band).cpu().numpy() if band < classes else np.zeros(label.shape)
                    self.probabilities.write(as_levels(score, valid), band + 1, window=window)
