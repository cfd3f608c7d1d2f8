# SPDX-License-Identifier: Apache-2.0
"""The objects of the synthetic scenes, drawn into float images in their own rotated coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Bool = NDArray[np.bool_]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (196, 44, 40),
    "green": (52, 148, 58),
    "blue": (44, 92, 204),
    "yellow": (232, 204, 44),
    "white": (240, 240, 236),
    "gray": (120, 122, 128),
}


class Sun(NamedTuple):
    """Where shadows fall: direction in radians, and length relative to an object's height."""

    angle: float
    length: float


class Drawing(NamedTuple):
    """One object in its window: which pixels are its own, their brightness, lines drawn on it, its height in pixels.

    ``line`` pixels belong to the object but are painted light, or dark where the object is light.
    """

    inside: Bool
    shade: Array
    line: Bool | None = None
    height: float = 0.0


# (half extent along u, along v), or the (smallest, largest) half extent, in pixels of a 128 pixel scene
Extent = tuple[float, float]


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> Array:
    """Smooth noise in [-1, 1]: a coarse random grid, bilinearly enlarged."""
    rows, columns = height // cell + 2, width // cell + 2
    grid = rng.uniform(-1, 1, size=(rows, columns)).astype(np.float32)
    y, x = np.arange(height, dtype=np.float32) / cell, np.arange(width, dtype=np.float32) / cell
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = (y - y0)[:, None], (x - x0)[None, :]
    top = grid[y0[:, None], x0] * (1 - fx) + grid[y0[:, None], x0 + 1] * fx
    bottom = grid[y0[:, None] + 1, x0] * (1 - fx) + grid[y0[:, None] + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def soil(rng: np.random.Generator, height: int, width: int) -> Array:
    """Bare soil (H, W, 3): brown with noise of three sizes."""
    value = 18 * smooth_noise(rng, height, width, 32)
    value += 10 * smooth_noise(rng, height, width, 8)
    value += 6 * smooth_noise(rng, height, width, 3)
    base = np.array([146, 112, 82], np.float32) + rng.uniform(-8, 8, size=3).astype(np.float32)
    return base + value[..., None] * np.array([1.0, 0.9, 0.75], np.float32)


def _roof(rng: np.random.Generator, u: Array, v: Array, extent: Extent) -> Drawing:
    a, b = extent
    inside = (np.abs(u) <= a) & (np.abs(v) <= b)
    shade = np.where(v < 0, np.float32(1.04), np.float32(0.74))
    shade = shade + 0.03 * np.sign(np.sin(u * 2.1))
    ridge = inside & (np.abs(v) <= 0.6)
    shade[ridge] = 0.55
    return Drawing(inside, shade.astype(np.float32), None, 6.0)


def _tank(rng: np.random.Generator, u: Array, v: Array, extent: Extent) -> Drawing:
    radius = np.hypot(u, v) / extent[0]
    shade = 1.08 - 0.2 * np.hypot(u / extent[0] + 0.35, v / extent[0] + 0.35)
    shade = np.where(np.abs(radius - 0.82) < 0.09, 0.6, shade)
    return Drawing(radius <= 1, shade.astype(np.float32), None, 8.0)


def _field(rng: np.random.Generator, u: Array, v: Array, extent: Extent) -> Drawing:
    inside = (np.abs(u) <= extent[0]) & (np.abs(v) <= extent[1])
    period = rng.uniform(4.5, 6.5)
    shade = 0.92 + 0.16 * np.sin(2 * np.pi * v / period) + rng.normal(0, 0.04, size=u.shape)
    return Drawing(inside, shade.astype(np.float32))


def _pond(rng: np.random.Generator, u: Array, v: Array, extent: Extent) -> Drawing:
    angle = np.arctan2(v, u)
    edge = np.ones_like(u)
    for order in (2, 3, 5):
        edge += rng.uniform(0.03, 0.16) / order * 2 * np.sin(order * angle + rng.uniform(0, 2 * np.pi))
    radius = np.hypot(u / extent[0], v / extent[1]) / edge
    # smooth water, darker towards the middle
    shade = 0.82 + 0.22 * np.clip(radius, 0, 1) ** 2
    return Drawing(radius <= 1, shade.astype(np.float32))


def _court(rng: np.random.Generator, u: Array, v: Array, extent: Extent) -> Drawing:
    a, b = extent
    inside = (np.abs(u) <= a) & (np.abs(v) <= b)
    x, y = np.abs(u), np.abs(v)
    inner_a, inner_b = a - 3.0, b - 3.0
    frame = (x <= inner_a + 0.8) & (y <= inner_b + 0.8) & ((x >= inner_a - 0.8) | (y >= inner_b - 0.8))
    middle = (x <= 0.8) & (y <= inner_b)
    circle = np.abs(np.hypot(u, v) - 0.45 * inner_b) <= 0.8
    return Drawing(inside, np.ones_like(u), inside & (frame | middle | circle))


def _car(rng: np.random.Generator, u: Array, v: Array, extent: Extent) -> Drawing:
    # a row along u: cars of 7 x 13 pixels, 10 pixels apart
    a, b = extent
    pitch = 2 * b * 10 / 13
    count = max(2, round(2 * a / pitch))
    slot = np.floor(u / pitch + count / 2)
    across = np.abs(u - (slot - count / 2 + 0.5) * pitch)
    inside = (across <= 0.35 * pitch) & (np.abs(v) <= b) & (slot >= 0) & (slot < count)
    along = v / b
    shade = np.where(np.abs(along) > 0.85, 0.75, 1.0)
    glass = inside & (across <= 0.27 * pitch) & (((along > 0.2) & (along < 0.5)) | ((along > -0.65) & (along < -0.45)))
    shade[glass] = 0.3
    return Drawing(inside, shade.astype(np.float32), None, 2.5)


Drawer = Callable[[np.random.Generator, Array, Array, Extent], Drawing]

# kind -> how it is drawn, and the range of its half extents along u and v
_KIND: dict[str, tuple[Drawer, Extent, Extent]] = {
    "roof": (_roof, (15, 24), (12, 17)),
    "tank": (_tank, (8.5, 13), (8.5, 13)),
    "field": (_field, (18, 29), (14, 24)),
    "pond": (_pond, (14, 24), (13, 20)),
    "court": (_court, (17, 26), (12, 15)),
    "car": (_car, (18, 30), (7, 8.5)),
}
KINDS = tuple(_KIND)


def _grown(inside: Bool, margin: int) -> Bool:
    """``inside`` with a border of ``margin`` pixels."""
    result = inside.copy()
    for _ in range(margin):
        grown = result.copy()
        grown[1:] |= result[:-1]
        grown[:-1] |= result[1:]
        grown[:, 1:] |= result[:, :-1]
        grown[:, :-1] |= result[:, 1:]
        result = grown
    return result


def _color(rng: np.random.Generator, name: str) -> Array:
    base = np.array(COLORS[name], np.float32)
    return base * rng.uniform(0.92, 1.08) + rng.uniform(-9, 9, size=3).astype(np.float32)


def draw_object(
    rng: np.random.Generator,
    image: Array,
    mask: NDArray[np.uint8],
    taken: Bool,
    *,
    label: int,
    kind: str,
    color: str,
    scale: float,
    sun: Sun,
    attempts: int = 12,
    extents: tuple[Extent, Extent] | None = None,
    lit: Bool | None = None,
) -> bool:
    """Draw one object where it touches no other, with its shadow on the soil.

    Args:
        rng: source of place, size, direction and colour.
        image: (H, W, 3) float, changed.
        mask: (H, W) ids, changed.
        taken: (H, W) pixels that other objects keep free, changed.
        label: id written into the mask.
        kind: one of :data:`KINDS`.
        color: one of :data:`COLORS`.
        scale: factor on all sizes.
        sun: where the shadow falls.
        attempts: places tried before the object is given up.
        extents: ranges of the half extents along u and v; those of the kind by default.
        lit: (H, W) pixels that a shadow darkens, and then no other, changed; by default soil that is bright enough.

    Returns:
        Whether a place was found.
    """
    height, width = mask.shape
    draw, *span = _KIND[kind]
    span = span if extents is None else list(extents)
    for attempt in range(attempts):
        # a crowded scene still takes the smallest object of the kind
        share = rng.uniform(0, 1, size=2) * (1 - attempt / attempts)
        a, b = (low + (high - low) * float(part) for (low, high), part in zip(span, share, strict=True))
        if kind == "tank":
            b = a
        reach = 0.75 * min(a, b) * scale
        y = float(rng.uniform(reach, height - reach))
        x = float(rng.uniform(reach, width - reach))
        angle = float(rng.uniform(0, np.pi))
        radius = int(np.hypot(a, b) * scale * 1.25) + 3
        top, left = int(y) - radius, int(x) - radius
        rows = slice(max(top, 0), min(top + 2 * radius, height))
        columns = slice(max(left, 0), min(left + 2 * radius, width))
        dy = (np.arange(rows.start, rows.stop, dtype=np.float32) - y)[:, None] / scale
        dx = (np.arange(columns.start, columns.stop, dtype=np.float32) - x)[None, :] / scale
        u = np.cos(angle) * dx + np.sin(angle) * dy
        v = np.cos(angle) * dy - np.sin(angle) * dx
        drawing = draw(rng, u.astype(np.float32), v.astype(np.float32), (a, b))
        if not drawing.inside.any() or (drawing.inside & taken[rows, columns]).any():
            continue
        _paint(rng, image, mask, (rows, columns), drawing, label=label, color=color, sun=sun, lit=lit)
        taken[rows, columns] |= _grown(drawing.inside, max(1, round(3 * scale)))
        return True
    return False


def _paint(
    rng: np.random.Generator,
    image: Array,
    mask: NDArray[np.uint8],
    window: tuple[slice, slice],
    drawing: Drawing,
    *,
    label: int,
    color: str,
    sun: Sun,
    lit: Bool | None,
) -> None:
    rows, columns = window
    inside = drawing.inside
    tint = _color(rng, color)
    if drawing.height:
        shift = drawing.height * sun.length
        y, x = np.nonzero(inside)
        for step in np.arange(1.0, shift + 1):
            sy = y + rows.start + round(np.sin(sun.angle) * float(step))
            sx = x + columns.start + round(np.cos(sun.angle) * float(step))
            good = (sy >= 0) & (sy < mask.shape[0]) & (sx >= 0) & (sx < mask.shape[1])
            sy, sx = sy[good], sx[good]
            if lit is None:
                dark = (mask[sy, sx] == 0) & (image[sy, sx].sum(axis=1) > 210)
            else:
                dark = lit[sy, sx]
                lit[sy[dark], sx[dark]] = False
            image[sy[dark], sx[dark]] *= 0.5
    if lit is not None:
        lit[rows, columns][inside] = False
    view = image[rows, columns]
    view[inside] = tint * drawing.shade[inside][:, None]
    if drawing.line is not None:
        view[drawing.line] = 250.0 if tint.mean() < 150 else 60.0
    mask[rows, columns][inside] = label
