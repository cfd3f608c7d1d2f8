# SPDX-License-Identifier: Apache-2.0
"""The rasters and the picture of a map, filled piece by piece."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.palette import overlay, with_legend
from drseg_core.data.vocabulary import Vocabulary
from drseg_core.scenes.reader import SceneReader
from drseg_core.scenes.writer import describe_classes, describe_levels, raster_like, written


class Part(NamedTuple):
    """A block of a map whose first pixel is (``top``, ``left``), as it is written and kept.

    * ``label`` (n, m) uint8, 255 in invalid pixels.
    * ``uncertainty`` (n, m) float32, NaN in invalid pixels.
    * ``picture``: the pixels that :meth:`Overlay.sampled` takes of the image.
    * ``score`` (n, m) and ``probabilities`` (T, n, m) uint8 in steps, if asked for.
    * ``class_scores`` (T, n, m) float32 of the predicted classes, if a neighbouring scene has a share.
    """

    top: int
    left: int
    label: NDArray[np.uint8]
    uncertainty: NDArray[np.float32]
    picture: NDArray[np.uint8]
    score: NDArray[np.uint8] | None = None
    probabilities: NDArray[np.uint8] | None = None
    class_scores: NDArray[np.float32] | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By name, for :meth:`drseg_core.scenes.block_store.BlockStore.save`."""
        return {name: np.asarray(value) for name, value in self._asdict().items() if value is not None}

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]]) -> Part:
        values: dict[str, Any] = {**arrays, "top": int(arrays["top"]), "left": int(arrays["left"])}
        return cls(**values)


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

    def sampled(self, top: int, left: int, value: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The pixels for the picture, of a part (..., n, m) whose first pixel is (top, left)."""
        return value[..., -top % self.step :: self.step, -left % self.step :: self.step]

    def add(self, part: Part) -> None:
        label = self.sampled(part.top, part.left, part.label)
        row, column = -(-part.top // self.step), -(-part.left // self.step)
        place = slice(row, row + label.shape[0]), slice(column, column + label.shape[1])
        self.label[place] = label
        self.image[:, place[0], place[1]] = part.picture
        self.count += np.bincount(part.label.ravel(), minlength=256)

    def picture(self, legend: Vocabulary) -> NDArray[np.uint8]:
        table = legend.table()
        mixed = overlay(self.image, self.label, len(table), colors=table)
        present = [int(i) for i in np.argsort(-self.count, kind="stable") if self.count[i] and i != IGNORE]
        return with_legend(mixed, legend.names, present, colors=table)


class Rasters:
    """The rasters of a map while they are written; ``files`` and ``temporary`` as in
    :class:`drseg_core.scenes.files.SceneFiles`."""

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

    def add(self, part: Part) -> None:
        """Write one part."""
        from rasterio.windows import Window

        window = Window(part.left, part.top, part.label.shape[1], len(part.label))
        with written(self.files.classes):
            self.classes.write(part.label, 1, window=window)
        with written(self.files.uncertainty):
            self.uncertainty.write(part.uncertainty, 1, window=window)
        if self.scores is not None and part.score is not None:
            with written(self.files.scores or self.files.classes):
                self.scores.write(part.score, 1, window=window)
        if self.probabilities is not None and part.probabilities is not None:
            with written(self.files.probabilities):
                self.probabilities.write(part.probabilities, window=window)
