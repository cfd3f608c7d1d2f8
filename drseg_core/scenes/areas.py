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
