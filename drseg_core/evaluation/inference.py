# SPDX-License-Identifier: Apache-2.0
"""From a model and class names to class maps of images of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.data.dataset import check_class_names
from drseg_core.errors import ConfigError, NumericalError
from drseg_core.evaluation.tiling import blend_window, check_tiles, tile_starts

__all__ = ["Prediction", "Predictor"]


class Prediction(NamedTuple):
    """Per pixel: ``class_index`` (H, W) uint8, ``score`` (H, W) float32, the sigmoid score of that class, and
    ``uncertainty`` (H, W) float32, U of Eq. 12. All on the CPU.

    Example:
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


ReadRows = Callable[[int, int], Tensor]
"""``read(first, last)`` gives image rows ``first`` to ``last`` (exclusive) as (3, last - first, W) uint8."""


class Predictor:
    """Predicts with a fixed vocabulary; the text is encoded once.

    ``whole`` hands the image to the model in one piece, which resizes it to its own input size whatever the aspect
    ratio, and enlarges the sigmoid of the logits to the image (the benchmark protocol, except for its detour over a
    shortest edge of 640). ``tile`` does so with overlapping tiles, blends them with smooth weights, and holds only one
    row of tiles in memory.

    The class of a pixel is the one with the highest score, the lowest id on ties; there is no threshold.

    Args:
        model: a :class:`drseg_core.models.segmenter.Segmenter`, or anything with its ``tokenize``, ``encode_text`` and
            ``forward``.
        class_names: the vocabulary, 1 to 255 names.
        mode: ``whole`` or ``tile``.
        tile_size: side of a tile in pixels, a multiple of 16.
        overlap: pixels shared by neighbouring tiles.
        batch_size: images or tiles per forward pass.
        device: where to run; by default where the model's parameters are.

    Raises:
        ConfigError: unknown mode, or tile sizes that cannot cover an image.
        DatasetError: no class name, too many, or one twice.

    Calls raise NumericalError where the model's logits are not finite.

    Example:
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
        mode: Literal["whole", "tile"] = "whole",
        tile_size: int = 384,
        overlap: int = 128,
        batch_size: int = 4,
        device: torch.device | str | None = None,
    ) -> None:
        if mode not in ("whole", "tile"):
            raise ConfigError(f"Predictor: mode is unknown; expected whole or tile, got {mode!r}")
        if batch_size < 1:
            raise ConfigError(f"Predictor: batch_size is out of range; expected >= 1, got {batch_size}")
        check_tiles(tile_size, overlap)
        self.class_names = check_class_names(class_names, "Predictor")
        self.mode, self.tile_size, self.overlap, self.batch_size = mode, tile_size, overlap, batch_size
        if device is None:
            parameter = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
            device = parameter.device if parameter is not None else "cpu"
        self.device = torch.device(device)
        network: Any = model.to(self.device).eval() if isinstance(model, torch.nn.Module) else model
        with torch.no_grad():
            tokens = network.tokenize(list(self.class_names)).to(self.device)
            self.text: Tensor = network.encode_text(tokens)
        self.model = network

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

    @torch.no_grad()
    def _forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, T, h', w') and uncertainty (B, 1, h, w) of images (B, 3, H, W) uint8, in float32."""
        output = self.model(image.to(self.device).float() / 255, self.text)
        if not torch.isfinite(output.logits).all():
            raise NumericalError("Predictor: logits are not finite; expected finite values from the model")
        return output.logits.float().sigmoid(), output.uncertainty.float()

    def _whole(self, image: Tensor) -> list[Prediction]:
        score, uncertainty = self._forward(image)
        size = image.shape[-2:]
        uncertainty = _resize(uncertainty, size)[:, 0]
        # one class at a time: all classes at full size need not fit in memory
        best = torch.full_like(uncertainty, -torch.inf)
        index = torch.zeros(uncertainty.shape, dtype=torch.uint8, device=best.device)
        for label in range(score.shape[1]):
            value = _resize(score[:, label : label + 1], size)[:, 0]
            better = value > best
            best = torch.where(better, value, best)
            index[better] = label
        return [Prediction(*parts) for parts in zip(index.cpu(), best.cpu(), uncertainty.cpu(), strict=True)]

    def _tiled(self, image: Tensor) -> Prediction:
        _, height, width = image.shape
        bands = [band for _, band in self.rows(lambda first, last: image[:, first:last], height, width)]
        return Prediction(*(torch.cat(parts) for parts in zip(*bands, strict=True)))

    def rows(self, read: ReadRows, height: int, width: int) -> Iterator[tuple[int, Prediction]]:
        """Predict an image that is read as it is needed, in bands of complete rows from top to bottom.

        Each pixel's score is the weighted mean of the tiles that cover it, its weights summing to one. An image
        smaller than a tile is mirrored to the tile's size. Memory: (T + 2) x tile_size x W float32.

        Args:
            read: gives rows of the image; asked for each band of a tile's height once, in order.
            height: H of the image.
            width: W of the image.

        Yields:
            first row of a band, and its prediction; the bands cover every row once.
        """
        side, classes = self.tile_size, len(self.class_names)
        row_start, column_start = (tile_starts(n, side, self.overlap) for n in (height, width))
        line = torch.from_numpy(blend_window(side, self.overlap)).to(self.device)
        weight = line[:, None] * line[None, :]
        # channels: T scores, the uncertainty, the weight
        total = torch.zeros(classes + 2, side, max(width, side), device=self.device)
        for number, top in enumerate(row_start):
            band = _mirrored(read(top, min(top + side, height)), side)
            for first in range(0, len(column_start), self.batch_size):
                left = column_start[first : first + self.batch_size]
                score, uncertainty = self._forward(torch.stack([band[:, :, x : x + side] for x in left]))
                value = torch.cat([_resize(score, (side, side)), _resize(uncertainty, (side, side))], 1)
                for tile, x in zip(value, left, strict=True):
                    total[:-1, :, x : x + side] += tile * weight
                    total[-1, :, x : x + side] += weight
            last = number + 1 == len(row_start)
            done = min(side, height) if last else row_start[number + 1] - top
            mean = total[:-1, :done, :width] / total[-1, :done, :width]
            best, index = mean[:-1].amax(0), mean[:-1].argmax(0).to(torch.uint8)
            yield top, Prediction(index.cpu(), best.cpu(), mean[-1].cpu())
            total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], 1)


def _check_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"Predictor: image has a wrong shape; expected (3, H, W), got {tuple(image.shape)}")
    if image.dtype != torch.uint8:
        raise TypeError(f"Predictor: image has a wrong dtype; expected uint8, got {image.dtype}")


def _resize(value: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(value, size=list(size), mode="bilinear", align_corners=False)


def _mirrored(band: Tensor, side: int) -> Tensor:
    """Extend a band below and to the right to at least ``side`` pixels, mirrored as often as it takes."""
    _, height, width = band.shape
    padding = ((0, 0), (0, max(0, side - height)), (0, max(0, side - width)))
    if not padding[1][1] and not padding[2][1]:
        return band
    return torch.from_numpy(np.pad(band.cpu().numpy(), padding, mode="reflect"))
