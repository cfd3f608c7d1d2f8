# SPDX-License-Identifier: Apache-2.0
"""Areas on the ground, whatever the projection: each small part is measured in an equal-area one."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.files import write_text_atomic

EQUAL_AREA = "EPSG:6933"
METHOD = f"equal-area projection {EQUAL_AREA}"

_ROWS, _COLUMNS = 64, 512
_TURN = 2 * 17_367_530.445
"""Width of the whole Earth in that projection, in metres."""


class PixelArea:
    """Area of the pixels of a grid in m2.

    Args:
        crs: of the grid; None has no area.
        transform: of the grid.
    """

    def __init__(self, crs: Any, transform: Any) -> None:
        self.crs, self.transform = crs, transform
        self.known = bool(crs) and not transform.is_identity and self._usable()

    def _usable(self) -> bool:
        import rasterio

        try:
            return bool(np.isfinite(self.of([(0, 0, 1, 1)])).all())
        except (rasterio.errors.RasterioError, ValueError):
            # such as a local system that lies nowhere on Earth
            return False

    def of(self, boxes: Sequence[tuple[int, int, int, int]]) -> NDArray[np.float64]:
        """Mean area of a pixel in each box (top, left, height, width)."""
        from rasterio.warp import transform

        box = np.array(boxes, np.float64)
        top, left, height, width = box.T
        column = np.stack([left, left + width, left + width, left])
        row = np.stack([top, top, top + height, top + height])
        t = self.transform
        x, y = t.a * column + t.b * row + t.c, t.d * column + t.e * row + t.f
        east, north = transform(self.crs, EQUAL_AREA, x.ravel().tolist(), y.ravel().tolist())
        a, b = np.reshape(east, x.shape), np.reshape(north, x.shape)
        # a box over the date line is as wide as it is, not as the way around
        a = a[:1] + (a - a[:1] + _TURN / 2) % _TURN - _TURN / 2
        twice = (a * np.roll(b, -1, 0) - np.roll(a, -1, 0) * b).sum(0)
        return np.abs(twice) / 2 / (height * width)


class ClassAreas:
    """Pixels and m2 of each class, counted part by part."""

    def __init__(self, classes: int, pixel: PixelArea) -> None:
        self.classes, self.pixel = classes, pixel
        self.pixels = np.zeros(classes, np.int64)
        self.m2 = np.zeros(classes, np.float64)

    def add(self, top: int, left: int, label: NDArray[np.uint8]) -> None:
        """Count a part of the map whose first pixel is (top, left); 255 is no class."""
        boxes, counts = [], []
        for row in range(0, label.shape[0], _ROWS):
            for column in range(0, label.shape[1], _COLUMNS):
                part = label[row : row + _ROWS, column : column + _COLUMNS]
                count = np.bincount(part.ravel(), minlength=IGNORE + 1)[: self.classes]
                if count.any():
                    boxes.append((top + row, left + column, *part.shape))
                    counts.append(count)
        if not boxes:
            return
        self.pixels += np.sum(counts, axis=0)
        if self.pixel.known:
            self.m2 += (np.array(counts) * self.pixel.of(boxes)[:, None]).sum(0)

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One row for each class that occurs or not; areas are None where the scene has no place."""
        total = max(int(self.pixels.sum()), 1)
        return [
            {
                "id": number,
                "class": name,
                "pixels": int(self.pixels[number]),
                "percent": round(100 * float(self.pixels[number]) / total, 4),
                "area_m2": round(float(self.m2[number]), 3) if self.pixel.known else None,
                "method": METHOD if self.pixel.known else "no place known",
            }
            for number, name in enumerate(names)
        ]

    def write(self, path: Path, names: Sequence[str]) -> None:
        """The rows as CSV."""
        text = io.StringIO()
        rows = self.rows(names)
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(path, text.getvalue())
