# SPDX-License-Identifier: Apache-2.0
"""Prediction as a protocol prescribes it: the image resized first, then seen whole, in windows, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.data.protocols import Views
from drseg_core.device import PrecisionName
from drseg_core.evaluation.inference import Prediction, Predictor
from drseg_core.models.pixel_statistics import PIXEL_MEAN
from drseg_core.models.tiling import tile_starts


def resized_size(height: int, width: int, views: Views) -> tuple[int, int]:
    """Size (height, width) at which a protocol shows an image to the model."""
    if views.resize == "square":
        return views.edge, views.edge
    scale = views.edge / (min if views.resize == "short" else max)(height, width)
    if views.limit is not None:
        scale = min(scale, views.limit / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class ViewPredictor(Predictor):
    """Predicts with the views of a protocol; all views of a pixel count the same.

    With windows, logits are enlarged to a window's size. They are made scores there, as the public code of CAT-Seg and
    OVRS does, or after all else where the protocol averages logits. The mean on the resized image is first that over
    the windows, then that with the whole image, whose logits are enlarged to a window too. The result is enlarged to
    the image. Without windows, scores are enlarged to the image at once. If the protocol pads, the scores of the
    padding are stretched over the image too. Images go through the model one by one.

    Args:
        model: see :class:`Predictor`.
        class_names: the vocabulary.
        views: of the protocol.
        batch_size: windows per forward pass.
        device: where to run; by default where the model's parameters are.
        precision: see :class:`Predictor`.
        compiled: see :class:`Predictor`.
    """

    def __init__(
        self,
        model: Any,
        class_names: Sequence[str],
        views: Views,
        *,
        batch_size: int = 4,
        device: torch.device | str | None = None,
        precision: PrecisionName = "float32",
        compiled: bool = False,
    ) -> None:
        super().__init__(
            model, class_names, batch_size=batch_size, device=device, precision=precision, compiled=compiled
        )
        self.views = views

    def many(self, images: Sequence[Tensor]) -> list[Prediction]:
        return [self._one(image) for image in images]

    @torch.no_grad()
    def _one(self, image: Tensor) -> Prediction:
        size = resized_size(int(image.shape[1]), int(image.shape[2]), self.views)
        # antialiased, as image libraries enlarge and reduce
        small = F.interpolate(image[None].to(self.device).float(), size=list(size), mode="bilinear", antialias=True)
        resized = small[0].round().clamp(0, 255).to(torch.uint8)
        if self.views.window is None:
            if self.views.pad is not None:
                resized = _padded(resized, self.views.pad)
            score, uncertainty = self._forward(resized[None])
            mean = torch.cat([score, _enlarged(uncertainty, score.shape[-2:])], dim=1)[0]
        else:
            mean = self._windows(resized, self.views.window, self.views.stride or self.views.window)
            if self.views.whole:
                side = self.views.window
                mean = (mean + _enlarged(self._scores(resized[None], (side, side)), size)[0]) / 2
        found = _at_size(mean, (int(image.shape[1]), int(image.shape[2])))
        return found._replace(score=found.score.sigmoid()) if self.views.mean_of == "logits" else found

    def _windows(self, image: Tensor, side: int, stride: int) -> Tensor:
        """Mean (T + 1, H, W) of scores (or logits) and uncertainty over the windows, smaller if the image is."""
        _, height, width = image.shape
        rows, columns = min(side, height), min(side, width)
        corners = [
            (top, left)
            for top in tile_starts(height, rows, rows - min(stride, rows))
            for left in tile_starts(width, columns, columns - min(stride, columns))
        ]
        total = torch.zeros(len(self.class_names) + 2, height, width, device=self.device)
        for first in range(0, len(corners), self.batch_size):
            some = corners[first : first + self.batch_size]
            batch = torch.stack([image[:, y : y + rows, x : x + columns] for y, x in some])
            value = self._scores(batch, (rows, columns))
            for window, (y, x) in zip(value, some, strict=True):
                total[:-1, y : y + rows, x : x + columns] += window
                total[-1, y : y + rows, x : x + columns] += 1
        return total[:-1] / total[-1]

    def _scores(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores, or logits, and uncertainty (B, T + 1, *size) of windows."""
        logits, uncertainty = self._logits(image)
        value = _enlarged(logits, size)
        value = value if self.views.mean_of == "logits" else value.sigmoid()
        return torch.cat([value, _enlarged(uncertainty, size)], dim=1)


def _padded(image: Tensor, multiple: int) -> Tensor:
    """(3, H, W) float32, padded right and below to a multiple, with the colour that CLIP normalises to 0."""
    _, height, width = image.shape
    mean = 255 * torch.tensor(PIXEL_MEAN, device=image.device)
    canvas = mean[:, None, None].repeat(1, -(-height // multiple) * multiple, -(-width // multiple) * multiple)
    canvas[:, :height, :width] = image
    return canvas


def _enlarged(value: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(value, size=list(size), mode="bilinear", align_corners=False)


def _at_size(mean: Tensor, size: tuple[int, int]) -> Prediction:
    """The best class of (T + 1, h, w) at full size, one class at a time: all of them need not fit in memory."""
    best = torch.full(size, -torch.inf, device=mean.device)
    index = torch.zeros(size, dtype=torch.uint8, device=mean.device)
    for label, score in enumerate(mean[:-1]):
        value = _enlarged(score[None, None], size)[0, 0]
        index[value > best] = label
        best = torch.maximum(best, value)
    uncertainty = _enlarged(mean[None, -1:], size)[0, 0]
    return Prediction(index.cpu(), best.cpu(), uncertainty.cpu())
