# SPDX-License-Identifier: Apache-2.0
"""The area of each class on the ground."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import METHOD, PixelArea
from drseg_core.files import write_text_atomic

_ROWS, _COLUMNS = 64, 512

_NO_PLACE = "no place known"
_OFF_EARTH = f"{METHOD}; unknown where pixels leave the Earth or its projection"


class ClassAreas:
    """Pixels and m2 of each class, counted part by part."""

    def __init__(self, classes: int, pixel: PixelArea) -> None:
        self.classes, self.pixel = classes, pixel
        self.pixels = np.zeros(classes, np.int64)
        self.m2 = np.zeros(classes, np.float64)

    def add(self, top: int, left: int, label: NDArray[np.uint8]) -> None:
        """Count a part of the map whose first pixel is (top, left); 255 is no class."""
        boxes, counts, parts = [], [], []
        for row in range(0, label.shape[0], _ROWS):
            for column in range(0, label.shape[1], _COLUMNS):
                part = label[row : row + _ROWS, column : column + _COLUMNS]
                count = np.bincount(part.ravel(), minlength=IGNORE + 1)[: self.classes]
                if count.any():
                    boxes.append((top + row, left + column, *part.shape))
                    counts.append(count)
                    parts.append(part)
        if not boxes:
            return
        self.pixels += np.sum(counts, axis=0)
        if not self.pixel.known:
            return
        count = np.array(counts)
        # a box of unknown area has no say on a class that it does not have
        m2 = np.where(count > 0, count * self.pixel.of(boxes)[:, None], 0)
        pieces = self.pixel.pieces(boxes)
        for number in np.flatnonzero((pieces > 1).any(1)):
            part = parts[number]
            area = np.broadcast_to(self.pixel.field(boxes[number], pieces[number].tolist()), part.shape)
            m2[number] = np.bincount(part.ravel(), area.ravel(), IGNORE + 1)[: self.classes]
        self.m2 += m2.sum(0)

    @property
    def known(self) -> bool:
        """Whether the area of any class is known."""
        return self.pixel.known and bool(np.isfinite(self.m2[self.pixels > 0]).any() or not self.pixels.any())

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One row for each class that occurs or not; areas are None where the scene or a pixel has no place."""
        total = max(int(self.pixels.sum()), 1)
        known = np.isfinite(self.m2) & self.known
        without = _OFF_EARTH if self.known else _NO_PLACE
        return [
            {
                "id": number,
                "class": name,
                "pixels": int(self.pixels[number]),
                "percent": round(100 * float(self.pixels[number]) / total, 4),
                "area_m2": round(float(self.m2[number]), 3) if known[number] else None,
                "method": METHOD if known[number] else without,
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
