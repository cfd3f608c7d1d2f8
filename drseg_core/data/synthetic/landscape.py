# SPDX-License-Identifier: Apache-2.0
"""Harder procedural scenes: textured ground, thin structures, small objects, shadows on everything, another domain.

The objects of :mod:`drseg_core.data.synthetic` differ by colour and stand apart on soil, which a dual encoder alone
nearly solves. Here the ground has several classes. Three of them have one colour and differ only by texture. Roads and
hedges are a few pixels wide, cars are smaller than a patch, and shadows fall on everything. Test scenes may come from
another ``domain``: another sensor, sun, season and ground sampling distance than any training scene. What is drawn was
fixed before any method was compared on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.synthetic.shapes import Array, Bool, Extent, Sun, draw_object, smooth_noise, soil

Domain = Literal["source", "shifted"]
DOMAINS: tuple[Domain, ...] = ("source", "shifted")

GROUNDS = ("bare soil", "ploughed field", "rocky ground", "grass", "orchard", "forest")
THIN = ("asphalt road", "dirt track", "hedge")
KINDS = ("roof", "tank", "court", "car")
COLORS = ("red", "blue", "white", "gray")

HELD_OUT = ("blue roof", "red tank", "gray court", "white car")
"""Combinations that scenes of the ``seen`` vocabulary never show: one per kind of object and one per colour."""

SEEN_NAMES = (*GROUNDS, *THIN, *(n for k in KINDS for c in COLORS if (n := f"{c} {k}") not in HELD_OUT))
CLASS_NAMES = (*SEEN_NAMES, *HELD_OUT)
"""All 25 names: 6 grounds, 3 thin structures, 12 seen combinations, 4 held-out ones (ids 21 to 24)."""

# half extents along u and v in pixels of a 128 pixel scene: a patch of the tiny encoders has 8
_EXTENTS: dict[str, tuple[Extent, Extent]] = {
    "roof": ((9, 20), (7, 13)),
    "tank": ((5, 10), (5, 10)),
    "court": ((12, 20), (9, 12)),
    "car": ((4.5, 9), (2.8, 3.6)),
}


def draw_landscape(
    rng: np.random.Generator, size: tuple[int, int], names: tuple[str, ...], domain: Domain
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one scene.

    Args:
        rng: source of everything.
        size: (height, width) in pixels, at least 32 each.
        names: the vocabulary; its objects are drawn with equal chance.
        domain: ``source``, or ``shifted``: longer shadows, dry vegetation, smaller objects, blur, haze, another white
            balance and more noise.

    Returns:
        image (H, W, 3) uint8 RGB and mask (H, W) uint8 with ids into ``names``.
    """
    height, width = size
    shifted = domain == "shifted"
    scale = min(1.0, min(height, width) / 128) * (0.8 if shifted else 1.0)
    # an area of 128 x 128 pixels at this sampling distance
    area = height * width / (128 * scale) ** 2
    image, mask = _ground(rng, height, width, scale)
    if shifted:
        _dry(image)
    thin = _thin(rng, image, mask, scale, area)
    taken, lit = thin.copy(), np.ones((height, width), bool)
    length = float(rng.uniform(1.4, 2.2) if shifted else rng.uniform(0.7, 1.2)) * scale
    sun = Sun(angle=float(rng.uniform(0, 2 * np.pi)), length=length)
    objects = [label for label, name in enumerate(names) if name not in GROUNDS + THIN]
    for _ in range(max(1, round(float(rng.uniform(8, 12)) * area))):
        label = int(rng.choice(objects))
        color, kind = names[label].split(" ")
        # vehicles stand on roads too
        blocked = taken & ~thin if kind == "car" else taken
        draw_object(
            rng,
            image,
            mask,
            blocked,
            label=label,
            kind=kind,
            color=color,
            scale=scale,
            sun=sun,
            extents=_EXTENTS[kind],
            lit=lit,
        )
        taken = taken | blocked
    image *= rng.uniform(0.92, 1.05)
    if shifted:
        image = _other_sensor(rng, image)
    image += rng.normal(0, 6.0 if shifted else 3.0, size=image.shape).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), mask


def _ground(rng: np.random.Generator, height: int, width: int, scale: float) -> tuple[Array, NDArray[np.uint8]]:
    """Three to five regions with wavy borders, each of one ground."""
    count = int(rng.integers(3, 6))
    y, x = rng.uniform(0, height, count), rng.uniform(0, width, count)
    row, column = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    # noise on the distances bends the straight borders of a Voronoi diagram
    distance = np.stack(
        [
            np.hypot(row - float(cy), column - float(cx)) + 10 * scale * smooth_noise(rng, height, width, 16)
            for cy, cx in zip(y, x, strict=True)
        ]
    )
    nearest = distance.argmin(axis=0)
    image, mask = np.empty((height, width, 3), np.float32), np.empty((height, width), np.uint8)
    for region in range(count):
        label = int(rng.integers(len(GROUNDS)))
        inside = nearest == region
        image[inside] = _TEXTURE[GROUNDS[label]](rng, height, width, scale)[inside]
        mask[inside] = label
    return image, mask


def _ploughed(rng: np.random.Generator, height: int, width: int, scale: float) -> Array:
    angle, period = rng.uniform(0, np.pi), rng.uniform(4.0, 5.5) * scale
    row, column = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    across = np.cos(angle) * row + np.sin(angle) * column
    return soil(rng, height, width) * (1 + 0.24 * np.sin(2 * np.pi * across / period)).astype(np.float32)[..., None]


def _rocky(rng: np.random.Generator, height: int, width: int, scale: float) -> Array:
    grain = smooth_noise(rng, height, width, 2)
    return soil(rng, height, width) * np.where(grain > 0.3, 1.3, np.where(grain < -0.3, 0.7, 1.0))[..., None]


def _tinted(rng: np.random.Generator, base: tuple[int, int, int], value: Array) -> Array:
    tint = np.array(base, np.float32) * float(rng.uniform(0.92, 1.08))
    return tint + value[..., None] * np.array([0.8, 1.0, 0.6], np.float32)


def _grass(rng: np.random.Generator, height: int, width: int, scale: float) -> Array:
    return _tinted(
        rng, (104, 132, 74), 14 * smooth_noise(rng, height, width, 24) + 7 * smooth_noise(rng, height, width, 4)
    )


def _orchard(rng: np.random.Generator, height: int, width: int, scale: float) -> Array:
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(6.5, 8.0) * scale
    row, column = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    u, v = np.cos(angle) * column + np.sin(angle) * row, np.cos(angle) * row - np.sin(angle) * column
    offset = np.hypot((u + pitch / 2) % pitch - pitch / 2, (v + pitch / 2) % pitch - pitch / 2)
    tree = offset < 0.36 * pitch
    image = _grass(rng, height, width, scale)
    image[tree] = _tinted(rng, (56, 92, 46), 10 * smooth_noise(rng, height, width, 3))[tree]
    return image


def _forest(rng: np.random.Generator, height: int, width: int, scale: float) -> Array:
    crown = np.abs(smooth_noise(rng, height, width, max(2, round(6 * scale))))
    value = 60 * crown - 22 + 8 * smooth_noise(rng, height, width, 2)
    return _tinted(rng, (62, 98, 50), value)


_TEXTURE: dict[str, Callable[[np.random.Generator, int, int, float], Array]] = {
    "bare soil": lambda rng, height, width, scale: soil(rng, height, width),
    "ploughed field": _ploughed,
    "rocky ground": _rocky,
    "grass": _grass,
    "orchard": _orchard,
    "forest": _forest,
}


def _thin(rng: np.random.Generator, image: Array, mask: NDArray[np.uint8], scale: float, area: float) -> Bool:
    """Roads, tracks and hedges from one side of the scene to another; returns where they are."""
    height, width = mask.shape
    covered = np.zeros(mask.shape, bool)
    # name, width in pixels, colour, how many in 128 x 128 pixels
    plan = (
        ("hedge", 2.8, (46, 78, 40), rng.integers(0, 3)),
        ("dirt track", 3.2, (186, 158, 122), rng.integers(0, 2)),
        ("asphalt road", 5.0, (104, 106, 110), rng.integers(1, 3)),
    )
    for name, thickness, color, count in plan:
        for _ in range(max(round(int(count) * area), int(count))):
            inside = _curve(rng, height, width, thickness * scale / 2)
            shade = 1 + 0.06 * smooth_noise(rng, height, width, 3)[inside]
            image[inside] = np.array(color, np.float32) * float(rng.uniform(0.93, 1.07)) * shade[:, None]
            mask[inside] = len(GROUNDS) + THIN.index(name)
            covered |= inside
    return covered


def _curve(rng: np.random.Generator, height: int, width: int, reach: float) -> Bool:
    """(H, W) pixels within ``reach`` of a bent line between two sides of the scene."""
    first, second = rng.choice(4, size=2, replace=False)
    ends = [_on_side(rng, int(side), height, width) for side in (first, second)]
    middle = np.array([rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width])
    step = np.linspace(0, 1, 48)[:, None]
    points = (1 - step) ** 2 * ends[0] + 2 * step * (1 - step) * middle + step**2 * ends[1]
    inside = np.zeros((height, width), bool)
    for (y0, x0), (y1, x1) in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
        rows, columns = (
            slice(max(int(min(a, b) - reach), 0), min(int(max(a, b) + reach) + 2, size))
            for a, b, size in ((y0, y1, height), (x0, x1, width))
        )
        row = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - y0
        column = np.arange(columns.start, columns.stop, dtype=np.float32) - x0
        dy, dx = y1 - y0, x1 - x0
        along = np.clip((row * dy + column * dx) / max(dy * dy + dx * dx, 1e-6), 0, 1)
        inside[rows, columns] |= np.hypot(row - along * dy, column - along * dx) <= reach
    return inside


def _on_side(rng: np.random.Generator, side: int, height: int, width: int) -> NDArray[np.float64]:
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    return np.array([(0.0, x), (float(height), x), (y, 0.0), (y, float(width))][side])


def _dry(image: Array) -> None:
    """Vegetation late in the year: what is more green than red loses half of the difference."""
    surplus = np.clip(image[..., 1] - image[..., 0], 0, None)
    image[..., 0] += 0.6 * surplus
    image[..., 1] -= 0.1 * surplus


def _other_sensor(rng: np.random.Generator, image: Array) -> Array:
    """Blur of about a pixel, haze, and another white balance."""
    kernel = np.array([0.25, 0.5, 0.25], np.float32)
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        parts = [np.take(padded, range(k, k + image.shape[axis]), axis=axis) for k in range(3)]
        image = sum(weight * part for weight, part in zip(kernel, parts, strict=True))
    haze, gain = float(rng.uniform(0.15, 0.3)), rng.uniform(0.88, 1.12, size=3).astype(np.float32)
    return (image * gain * (1 - haze) + haze * np.array([186, 196, 212], np.float32)).astype(np.float32)
