# SPDX-License-Identifier: Apache-2.0
"""Class colours, and the pictures made of them: colour maps, overlays, legends."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.fonts import Text
from drseg_core.extras import require
from drseg_core.files import atomic_path

Image8 = NDArray[np.uint8]


@functools.cache
def _colors() -> NDArray[np.uint8]:
    """255 colours, each as far as can be from those before it (Oklab distance)."""
    level = np.array([40, 85, 130, 175, 215, 250])
    candidate = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1).reshape(-1, 3)
    extra = np.stack(np.meshgrid(level[:-1] + 22, level[:-1] + 22, level[:-1] + 22, indexing="ij"), -1).reshape(-1, 3)
    candidate = np.concatenate([candidate, extra])
    position = _oklab(candidate)
    # black and white are kept free for text, borders and missing data
    distance = np.min([np.linalg.norm(position - _oklab(np.array([g] * 3)), axis=1) for g in (0, 255)], axis=0)
    chosen = []
    for _ in range(255):
        best = int(np.argmax(distance))
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(position - position[best], axis=1))
    return candidate[chosen].astype(np.uint8)


def _oklab(color: NDArray[Any]) -> NDArray[np.float64]:
    value = color / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    lms = linear @ np.array(
        [[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
         [0.0514459929, 0.1073969566, 0.6299787005]]
    )  # fmt: skip
    return np.cbrt(lms) @ np.array(
        [[0.2104542553, 1.9779984951, 0.0259040371], [0.7936177850, -2.4285922050, 0.7827717662],
         [-0.0040720468, 0.4505937099, -0.8086757660]]
    )  # fmt: skip


def palette(count: int) -> NDArray[np.uint8]:
    """``count`` distinct colours (count, 3) uint8 RGB; class ``c`` has the same colour however many classes there are.

    Raises:
        ValueError: more than 255 or a negative number of classes.
    """
    if not 0 <= count <= 255:
        raise ValueError(f"palette: count is out of range; expected 0 to 255, got {count}")
    return _colors()[:count].copy()


def palette_beside(given: Sequence[Sequence[int] | None]) -> NDArray[np.uint8]:
    """(T, 3) uint8 RGB of T classes, some of which have a colour of their own.

    The others have that of :func:`palette` if it is as far from all given ones as those of T classes are from each
    other (Oklab distance). Else they have the one that is farthest from all that are there.
    """
    table = palette(len(given))
    colors = {place: color for place, color in enumerate(given) if color is not None}
    if not colors:
        return table
    own = list(colors)
    position = _oklab(table)
    least = (_distance(position, position) + np.diag([np.inf] * len(given))).min()
    table[own] = np.array(list(colors.values()))
    position[own] = _oklab(table[own])
    near = _distance(position, position[own]).min(1) < least
    near[own] = False
    level = np.linspace(40, 250, 12).round().astype(np.uint8)
    candidate = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1).reshape(-1, 3)
    there = _oklab(candidate)
    # black and white are kept free here too, but what is given matters more
    free = 2 * _distance(there, _oklab(np.array([[0] * 3, [255] * 3]))).min(1)
    distance = np.minimum(free, _distance(there, position[~near]).min(1))
    for place in np.flatnonzero(near):
        best = int(np.argmax(distance))
        table[place] = candidate[best]
        distance = np.minimum(distance, np.linalg.norm(there - there[best], axis=1))
    return table


def _distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(one[:, None] - other, axis=-1))


def colorize(class_index: Any, num_classes: int, colors: Any = None) -> Image8:
    """(H, W) ids -> (H, W, 3) class colours; ids without a class, such as 255, are black.

    Args:
        class_index: ids.
        num_classes: T.
        colors: (T, 3) RGB of the classes in id order; those of :func:`palette` by default.
    """
    table = np.zeros((256, 3), np.uint8)
    table[:num_classes] = palette(num_classes) if colors is None else np.asarray(colors, np.uint8)
    return table[np.asarray(class_index).astype(np.uint8)]


def overlay(image: Any, class_index: Any, num_classes: int, *, opacity: float = 0.55, colors: Any = None) -> Image8:
    """Class colours over an image (3, H, W) uint8 -> (H, W, 3) uint8; pixels of id 255 show the image alone."""
    base = np.asarray(image).transpose(1, 2, 0).astype(np.float32)
    index = np.asarray(class_index)
    mixed = base * (1 - opacity) + colorize(index, num_classes, colors) * opacity
    return np.where((index == IGNORE)[..., None], base, mixed).round().astype(np.uint8)


def with_legend(
    picture: Image8, class_names: Sequence[str], present: Sequence[int], *, limit: int = 80, colors: Any = None
) -> Image8:
    """Put a legend of the first ``limit`` ids of ``present`` to the right of a picture (H, W, 3)."""
    require("with_legend", "pillow")
    from PIL import Image, ImageDraw

    color = palette(len(class_names)) if colors is None else np.asarray(colors, np.uint8)
    shown = list(present)[:limit]
    text = [class_names[i] for i in shown]
    if len(present) > limit:
        text.append(f"and {len(present) - limit} more")
    font = Text(text)
    line = 20
    # as many columns as it takes to end with the picture
    per_column = max(10, (picture.shape[0] - 12) // line)
    step = 44 + int(max([font.width(t) for t in text], default=0))
    width = step * -(-len(text) // per_column)
    height = max(picture.shape[0], line * min(len(text), per_column) + 12)
    canvas = Image.new("RGB", (picture.shape[1] + width, height), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, label in enumerate(text):
        column, row = divmod(number, per_column)
        x, y = picture.shape[1] + 10 + column * step, 8 + row * line
        if number < len(shown):
            fill = tuple(int(v) for v in color[shown[number]])
            draw.rectangle((x, y + 1, x + 14, y + 15), fill=fill, outline="black")
        font.draw(draw, (x + 22, y), label)
    return np.array(canvas)


def save_png(path: str | Path, picture: Image8) -> None:
    """Write (H, W, 3) uint8 as PNG; the file appears complete or not at all."""
    require("save_png", "pillow")
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
