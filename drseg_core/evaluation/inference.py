# SPDX-License-Identifier: Apache-2.0
"""From a model and class names to class maps of images of any size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.data.dataset import check_class_names
from drseg_core.device import PrecisionName, select_precision
from drseg_core.errors import ConfigError, NumericalError
from drseg_core.evaluation.compiled import compiled_network
from drseg_core.models.tiling import blend_window, check_tiles, tile_starts, tiles_of_bands

__all__ = ["Prediction", "Predictor"]


class Prediction(NamedTuple):
    """Per pixel: ``class_index`` (H, W) uint8, ``score`` (H, W) float32, the sigmoid score of that class, and
    ``uncertainty`` (H, W) float32, U of Eq. 12. All on the CPU.

    Examples:
        >>> import torch, drseg_core as drseg
        >>> from drseg_core.evaluation.inference import Predictor
        >>> predictor = Predictor(drseg.load("run").model, ["roof", "pond"])
        >>> found = predictor(torch.zeros(3, 40, 56, dtype=torch.uint8))
        >>> found.class_index.shape, found.class_index.dtype, bool((found.uncertainty <= 1).all())
        (torch.Size([40, 56]), torch.uint8, True)
    """

    class_index: Tensor
    score: Tensor
    uncertainty: Tensor


class Piece(NamedTuple):
    """A part of an image whose first pixel is (``top``, ``left``).

    ``score_of(c)`` gives the scores (n, m) of class c, until the next piece is asked for.
    """

    top: int
    left: int
    prediction: Prediction
    score_of: Callable[[int], Tensor]


class Box(NamedTuple):
    """A part of an image: rows ``top`` to ``bottom`` and columns ``left`` to ``right``, both exclusive at their end."""

    top: int
    bottom: int
    left: int
    right: int


class PredictsPieces(Protocol):
    """Maps a scene piece by piece: a :class:`Predictor`, or another class with these methods.

    Each piece begins at the first row of the part that was read last before it, and lies within that part.
    """

    class_names: tuple[str, ...]

    def blocks(self, height: int, width: int) -> list[Box]:
        """Where the pieces lie, in their order. They cover every pixel once."""
        ...

    def reads(self, height: int, width: int, *, wanted: Collection[int] | None = None) -> Iterator[Box]:
        """What :meth:`pieces` will read, in its order."""
        ...

    def pieces(
        self, read: ReadWindow, height: int, width: int, *, wanted: Collection[int] | None = None
    ) -> Iterator[Piece]:
        """All pieces, or those with these numbers. A piece has the same bits, whichever others are asked for."""
        ...


SUMS_BYTES = 400 * 2**20
"""Bound on the sums of a strip of tiles."""

STRIP_STEP, CLASSES_AT_A_TIME = 512, 16

ReadWindow = Callable[[int, int, int, int], "tuple[Tensor, np.ndarray | None]"]
"""``read(top, bottom, left, right)`` gives a part of the image, (3, n, m) uint8, and which pixels are valid (n, m)."""

ReadRows = Callable[[int, int], Tensor]
"""``read(first, last)`` gives image rows ``first`` to ``last`` (exclusive) as (3, last - first, W) uint8."""


class Predictor:
    """Predicts with a fixed vocabulary; the text is encoded once.

    ``whole`` gives the model the image in one piece. The model resizes it to its own input size whatever the aspect
    ratio. The sigmoid of the logits is enlarged to the image. This is the benchmark protocol, except for its detour
    over a shortest edge of 640. ``tile`` does the same with overlapping tiles, and blends them with smooth weights. It
    holds only a part of one row of tiles in memory (:meth:`pieces`).

    The class of a pixel is the one with the highest score, the lowest id on ties; there is no threshold.

    Args:
        model: a :class:`drseg_core.models.segmenter.Segmenter`, or anything with its ``tokenize``, ``encode_text`` and
            ``forward``.
        class_names: the vocabulary, 1 to 255 names.
        synonyms: the words of each class, of which the best counts; by default only its name.
        mode: ``whole`` or ``tile``.
        tile_size: side of a tile in pixels, a multiple of 16.
        overlap: pixels shared by neighbouring tiles.
        batch_size: images or tiles per forward pass.
        device: where to run; by default where the model's parameters are.
        precision: dtype of linear maps and convolutions: ``float32``, ``bfloat16``, or ``auto``, which takes bfloat16
            if the processor has units for it. Weights, correlations, selection and sums stay float32.
            ``docs/speed.md`` says what it changes.
        compiled: run the model compiled by ``torch.compile``. The first call takes minutes, and a CPU needs a C++
            compiler. The weights must not change from then on.

    Raises:
        ConfigError: unknown mode or precision, or tile sizes that cannot cover an image.
        DatasetError: no class name, too many, or one twice.
        BackendUnavailableError: bfloat16 on a device without it.

    Calls raise NumericalError if the model's logits are not finite, and BackendUnavailableError if the model cannot be
    compiled.

    Examples:
        >>> import torch, drseg_core as drseg
        >>> from drseg_core.evaluation.inference import Predictor
        >>> model = drseg.load("run").model
        >>> predictor = Predictor(model, ["roof", "pond", "road"], mode="tile", tile_size=32, overlap=8)
        >>> predictor(torch.zeros(3, 50, 70, dtype=torch.uint8)).class_index.shape
        torch.Size([50, 70])
    """

    def __init__(
        self,
        model: Any,
        class_names: Sequence[str],
        *,
        synonyms: Sequence[Sequence[str]] | None = None,
        mode: Literal["whole", "tile"] = "whole",
        tile_size: int = 384,
        overlap: int = 128,
        batch_size: int = 4,
        device: torch.device | str | None = None,
        precision: PrecisionName = "float32",
        compiled: bool = False,
    ) -> None:
        if mode not in ("whole", "tile"):
            raise ConfigError(f"Predictor: mode is unknown; expected whole or tile, got {mode!r}")
        if batch_size < 1:
            raise ConfigError(f"Predictor: batch_size is out of range; expected >= 1, got {batch_size}")
        check_tiles(tile_size, overlap)
        self.class_names = check_class_names(class_names, "Predictor")
        self.synonyms = tuple((name,) for name in self.class_names) if synonyms is None else tuple(map(tuple, synonyms))
        self._counts = [len(words) for words in self.synonyms]
        if len(self._counts) != len(self.class_names) or 0 in self._counts:
            raise ConfigError(
                f"Predictor: synonyms do not fit; expected one or more words for each of {len(self.class_names)} "
                f"classes, got {self._counts}"
            )
        self.mode, self.tile_size, self.overlap, self.batch_size = mode, tile_size, overlap, batch_size
        if device is None:
            parameter = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
            device = parameter.device if parameter is not None else "cpu"
        self.device = torch.device(device)
        self.precision = select_precision(precision, self.device)
        network: Any = model.to(self.device).eval() if isinstance(model, torch.nn.Module) else model
        with torch.no_grad():
            tokens = network.tokenize([word for words in self.synonyms for word in words]).to(self.device)
            self.text: Tensor = network.encode_text(tokens)
        self.model = network
        self.compiled = compiled
        self._network: Any = compiled_network(network, self.device) if compiled else network

    @property
    def arithmetic(self) -> str:
        """The precision, and whether the model is compiled, in words."""
        return f"{str(self.precision).removeprefix('torch.')}{', compiled' if self.compiled else ''}"

    def __call__(self, image: Tensor) -> Prediction:
        """Predict one image (3, H, W) uint8."""
        return self.many([image])[0]

    def many(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Predict several images; in ``whole`` mode those of one size go through the model together.

        Args:
            images: each (3, H, W) uint8 RGB; sizes may differ.
        """
        for image in images:
            _check_image(image)
        if self.mode == "tile":
            return [self._tiled(image) for image in images]
        results: list[Prediction] = []
        position = 0
        while position < len(images):
            batch = [images[position]]
            for image in images[position + 1 : position + self.batch_size]:
                if image.shape != batch[0].shape:
                    break
                batch.append(image)
            results += self._whole(torch.stack(batch))
            position += len(batch)
        return results

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and uncertainty of one batch of tiles (B, 3, side, side) uint8, at the model's own resolution."""
        return self._forward(image)

    @torch.no_grad()
    def _forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, T, h', w') and uncertainty (B, 1, h, w) of images (B, 3, H, W) uint8, in float32."""
        logits, uncertainty = self._logits(image)
        return logits.sigmoid(), uncertainty

    def _logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`_forward` makes scores of, and the uncertainty."""
        pixels = image.to(self.device).float() / 255
        with self.autocast():
            output = self._network(pixels, self.text)
        logits = output.logits
        if not torch.isfinite(logits).all():
            raise NumericalError("Predictor: logits are not finite; expected finite values from the model")
        return self.per_class(logits).float(), output.uncertainty.float()

    def per_class(self, value: Tensor) -> Tensor:
        """Values (B, W, h, w) of every word to (B, T, h, w): the best word of each class."""
        if value.shape[1] == len(self.class_names):
            return value
        return torch.stack([part.amax(1) for part in value.split(self._counts, dim=1)], dim=1)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model computes with ``precision``."""
        # with float32, autocast around the caller's own code stays as it is
        reduced = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision) if reduced else contextlib.nullcontext()

    def _whole(self, image: Tensor) -> list[Prediction]:
        return _enlarged_best(*self._forward(image), image.shape[-2:])

    def _tiled(self, image: Tensor) -> Prediction:
        _, height, width = image.shape
        whole = [torch.empty(height, width, dtype=kind) for kind in (torch.uint8, torch.float32, torch.float32)]
        for piece in self.pieces(lambda a, b, c, d: (image[:, a:b, c:d], None), height, width):
            rows, columns = piece.prediction.class_index.shape
            for target, part in zip(whole, piece.prediction, strict=True):
                target[piece.top : piece.top + rows, piece.left : piece.left + columns] = part
        return Prediction(*whole)

    def rows(self, read: ReadRows, height: int, width: int) -> Iterator[tuple[int, Prediction]]:
        """:meth:`strip` in full width, of an image whose rows are read as they are needed.

        Args:
            read: gives rows of the image; asked for each band of a tile's height once, in order.
            height: H of the image.
            width: W of the image.

        Yields:
            first row of a band, and its prediction; the bands cover every row once.
        """
        for piece in self.strip(lambda a, b, c, d: (read(a, b)[:, :, c:d], None), height, width, 0, width):
            yield piece.top, piece.prediction

    def strips(self, width: int, columns: int | None = None) -> list[tuple[int, int]]:
        """First and last column (exclusive) of the strips in which an image is predicted.

        Args:
            width: W of the image.
            columns: width of a strip; by default the largest that keeps the sums of a strip below ``SUMS_BYTES``.
        """
        if columns is None:
            fitting = SUMS_BYTES // (4 * (len(self.class_names) + 2) * self.tile_size)
            # whole blocks of the rasters that are written
            columns = max(STRIP_STEP, fitting // STRIP_STEP * STRIP_STEP)
        return [(left, min(left + columns, width)) for left in range(0, width, columns)]

    def blocks(self, height: int, width: int) -> list[Box]:
        """Where the pieces of an image lie, in the order of :meth:`pieces`."""
        if self.mode == "whole":
            return [Box(0, height, 0, width)]
        starts = tile_starts(height, self.tile_size, self.overlap)
        ends = [*starts[1:], height]
        return [
            Box(top, bottom, left, right)
            for left, right in self.strips(width)
            for top, bottom in zip(starts, ends, strict=True)
        ]

    def reads(self, height: int, width: int, *, wanted: Collection[int] | None = None) -> Iterator[Box]:
        """What :meth:`pieces` will read, in its order."""
        if self.mode == "whole":
            yield Box(0, height, 0, width)
            return
        starts = tile_starts(height, self.tile_size, self.overlap)
        for (left, right), bands in self._bands(height, width, wanted):
            columns = self._columns(width, left, right)
            for number in tiles_of_bands(starts, self.tile_size, bands):
                top = starts[number]
                yield Box(top, min(top + self.tile_size, height), columns[0], min(columns[-1] + self.tile_size, width))

    def pieces(
        self, read: ReadWindow, height: int, width: int, *, wanted: Collection[int] | None = None
    ) -> Iterator[Piece]:
        """Predict an image that is read as it is needed; the pieces cover every pixel once.

        In ``tile`` mode strips of columns follow each other, each from top to bottom. Tiles on the border of two strips
        are computed for both. So strips do not depend on each other, and a pixel's sums have the same order however
        wide the strips are. A tile without a valid pixel is not computed. Which tiles share a forward pass depends only
        on the image. So a piece has the same bits, whichever others are wanted.

        Args:
            read: gives a part of the image.
            height: H of the image.
            width: W of the image.
            wanted: numbers of the pieces, as :meth:`blocks` has them; all by default.
        """
        if self.mode == "whole":
            if wanted is None or 0 in wanted:
                yield self._one_piece(read(0, height, 0, width)[0])
            return
        for (left, right), bands in self._bands(height, width, wanted):
            yield from self.strip(read, height, width, left, right, bands=bands)

    def _bands(
        self, height: int, width: int, wanted: Collection[int] | None
    ) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """The strips, each with the numbers of its bands that are wanted."""
        count = len(tile_starts(height, self.tile_size, self.overlap))
        for number, strip in enumerate(self.strips(width)):
            bands = [band for band in range(count) if wanted is None or number * count + band in wanted]
            if bands:
                yield strip, bands

    def _columns(self, width: int, left: int, right: int) -> list[int]:
        """First columns of the tiles that have a share in a strip."""
        starts = tile_starts(width, self.tile_size, self.overlap)
        return [x for x in starts if x < right and x + self.tile_size > left]

    @torch.no_grad()
    def _one_piece(self, image: Tensor) -> Piece:
        score, uncertainty = self._forward(image[None])
        size = image.shape[-2:]
        prediction = _enlarged_best(score, uncertainty, size)[0]
        return Piece(0, 0, prediction, lambda label: _resize(score[:, label : label + 1], size)[0, 0])

    @torch.no_grad()
    def strip(
        self,
        read: ReadWindow,
        height: int,
        width: int,
        left: int,
        right: int,
        *,
        bands: Collection[int] | None = None,
    ) -> Iterator[Piece]:
        """Predict columns ``left`` to ``right`` (exclusive) in ``bands`` of rows from top to bottom, all or some.

        Each pixel's score is the mean of the tiles that cover it, with weights that sum to one. An image smaller than a
        tile is mirrored to the tile's size. Memory: (T + 2) x tile_size x (right - left) float32.
        """
        side, classes = self.tile_size, len(self.class_names)
        row_start = tile_starts(height, side, self.overlap)
        column_start = self._columns(width, left, right)
        begin, end = column_start[0], min(column_start[-1] + side, width)
        line = torch.from_numpy(blend_window(side, self.overlap)).to(self.device)
        weight = line[:, None] * line[None, :]
        # channels: T scores, the uncertainty, the weight
        total = torch.zeros(classes + 2, side, right - left, device=self.device)
        # row down to which something was added
        reach, before = 0, -1
        for number in tiles_of_bands(row_start, side, bands):
            top = row_start[number]
            if number != before + 1:
                # no tile above has a share in what follows
                total.zero_()
            before = number
            image, valid = read(top, min(top + side, height), begin, end)
            # pinned if the reading thread pinned it: then the copy waits for nothing
            band = mirrored(image, side).to(self.device, non_blocking=True)
            used = [x for x in column_start if valid is None or valid[:, x - begin : x - begin + side].any()]
            for first in range(0, len(used), self.batch_size):
                some = used[first : first + self.batch_size]
                batch = torch.stack([band[:, :, x - begin : x - begin + side] for x in some])
                for x, score, uncertainty in zip(some, *self._forward(batch), strict=True):
                    inside = slice(max(left - x, 0), min(right - x, side))
                    target = total[:, :, x + inside.start - left : x + inside.stop - left]
                    _add(target[:classes], score, weight, inside)
                    _add(target[classes:-1], uncertainty, weight, inside)
                    target[-1] += weight[:, inside]
            reach = top + side if used else reach
            last = number + 1 == len(row_start)
            done = min(side, height) if last else row_start[number + 1] - top
            asked = bands is None or number in bands
            if reach <= top:
                if asked:
                    blank = torch.zeros(done, right - left)
                    nothing = Prediction(blank.to(torch.uint8), blank, blank)
                    yield Piece(top, left, nothing, _constant(blank))
                continue
            if asked:
                # the weight is zero where nothing was computed, and nothing is valid there
                mean = total[:-1, :done].div_(total[-1, :done].clamp_min(1e-12))
                best, index = mean[:-1].amax(0), mean[:-1].argmax(0).to(torch.uint8)
                yield Piece(top, left, Prediction(index.cpu(), best.cpu(), mean[-1].cpu()), mean.__getitem__)
            for channel in total:
                channel[: side - done] = channel[done:].clone()
            total[:, side - done :] = 0


def _constant(value: Tensor) -> Callable[[int], Tensor]:
    return lambda label: value


def _add(target: Tensor, value: Tensor, weight: Tensor, inside: slice) -> None:
    """Add a tile's values, enlarged and weighted, to the sums; some classes at a time."""
    for first in range(0, len(value), CLASSES_AT_A_TIME):
        part = _resize(value[None, first : first + CLASSES_AT_A_TIME], weight.shape)[0]
        target[first : first + CLASSES_AT_A_TIME] += part[:, :, inside] * weight[:, inside]


def _enlarged_best(score: Tensor, uncertainty: Tensor, size: Sequence[int]) -> list[Prediction]:
    """The best class of (B, T, h, w) at full size, one class at a time: all of them need not fit in memory."""
    uncertainty = _resize(uncertainty, size)[:, 0]
    best = torch.full_like(uncertainty, -torch.inf)
    index = torch.zeros(uncertainty.shape, dtype=torch.uint8, device=best.device)
    for label in range(score.shape[1]):
        value = _resize(score[:, label : label + 1], size)[:, 0]
        better = value > best
        best = torch.where(better, value, best)
        index[better] = label
    return [Prediction(*parts) for parts in zip(index.cpu(), best.cpu(), uncertainty.cpu(), strict=True)]


def _check_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"Predictor: image has a wrong shape; expected (3, H, W), got {tuple(image.shape)}")
    if image.dtype != torch.uint8:
        raise TypeError(f"Predictor: image has a wrong dtype; expected uint8, got {image.dtype}")


def _resize(value: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(value, size=list(size), mode="bilinear", align_corners=False)


def mirrored(band: Tensor, side: int) -> Tensor:
    """Extend a band below and to the right to at least ``side`` pixels, mirrored as often as it takes."""
    _, height, width = band.shape
    padding = ((0, 0), (0, max(0, side - height)), (0, max(0, side - width)))
    if not padding[1][1] and not padding[2][1]:
        return band
    return torch.from_numpy(np.pad(band.cpu().numpy(), padding, mode="reflect"))
