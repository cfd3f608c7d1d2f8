# SPDX-License-Identifier: Apache-2.0
"""Stored pixel values: their way to 8 bits, and the value that stands for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRETCH = (2.0, 98.0)
"""Percentiles that become 0 and 255 where a scale is measured."""

NODATA_SHARE = 0.05
"""A single extreme value in more than this share of the pixels is taken for an undeclared nodata value.

One that is far from all others is from the share on at which it becomes a percentile of ``STRETCH``.
"""
_USED_FOR_NODATA = {0, -1, -99, -999, -9999, -99999, -32768, -32767, 32767, 65535}


def stretched(value: NDArray[Any], limits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(B, H, W) to uint8: ``limits`` (2, B or 1, 1, 1) become 0 and 255; what is not finite becomes 0."""
    low, high = limits
    wide = value.astype(np.float32)
    share = (np.where(np.isfinite(wide), wide, low) - low) / np.maximum(high - low, 1e-12)
    return (np.clip(share, 0, 1) * 255).round().astype(np.uint8)


def highest_values(source: Any, bands: Sequence[int]) -> NDArray[np.float32] | None:
    """(B, 1, 1), the highest value that each 8-bit band of a raster can store; None if that is 255 in all."""
    bits = [int(source.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", 8)) for band in bands]
    return None if min(bits) >= 8 else np.array([2**n - 1 for n in bits], np.float32)[:, None, None]


def spread(value: NDArray[Any], highest: NDArray[np.float32] | None) -> NDArray[Any]:
    """Values (B, H, W) of fewer than 8 bits over 0 to 255, as Pillow and viewers take them; others as they are."""
    return value if highest is None else np.rint(value * (255 / highest)).astype(np.uint8)


def limits_array(limits: Sequence[tuple[float, float]]) -> NDArray[np.float32]:
    """Pairs as (2, B, 1, 1)."""
    return np.array(limits, np.float32).T[:, :, None, None]


def extreme_value(value: NDArray[Any], valid: NDArray[np.bool_]) -> tuple[float, float] | None:
    """The lowest or highest value of (B, H, W) that all bands share in too many valid pixels, and its share of them.

    Returns:
        None where no value stands out.
    """
    if not valid.any():
        return None
    inside = value[:, valid]
    same = (inside == inside[:1]).all(0)
    found = None
    # inside the values of a file, the lowest or the highest is that of a flat picture
    if inside.min() == inside.max():
        return None
    for candidate in {inside.min(), inside.max()}:
        share = float((same & (inside[0] == candidate)).mean())
        if share < STRETCH[0] / 100 or found is not None and share <= found[1] or not _stands_out(candidate, inside):
            continue
        if share > NODATA_SHARE or _ruins_a_stretch(candidate, inside):
            found = float(candidate), share
    return found


def holds(dtype: np.dtype[Any], value: float) -> bool:
    """Whether a type has a value."""
    if dtype.kind not in "iu":
        # in a few digits the largest of a type is written beyond it
        with np.errstate(over="ignore"):
            return not np.isfinite(value) or bool(np.isfinite(dtype.type(value)))
    return float(value).is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def _stands_out(candidate: Any, value: NDArray[Any]) -> bool:
    """Whether a lowest or highest value is one that is used for nodata, or is far from all others."""
    if candidate in _USED_FOR_NODATA or value.dtype.kind in "iu" and candidate in _ends(value.dtype):
        return True
    rest = value[value != candidate]
    if value.dtype.kind == "u" and value.dtype.itemsize == 1 or not rest.size:
        return False
    low, high = float(rest.min()), float(rest.max())
    return min(abs(float(candidate) - low), abs(float(candidate) - high)) > max(high - low, 1e-12)


def _ruins_a_stretch(candidate: Any, value: NDArray[Any]) -> bool:
    """Whether a lowest or highest value is so far from all others that these would share few of the 8 bits.

    8-bit values are not stretched, and saturated clouds or dark water have values beside theirs.
    """
    rest = value[value != candidate].astype(np.float64)
    if value.dtype.itemsize == 1:
        return False
    low, high = np.percentile(rest, STRETCH)
    return float(np.abs(rest - float(candidate)).min()) > (high - low) / 2


def _ends(dtype: np.dtype[Any]) -> tuple[int, int]:
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def nodata_hint(name: object, found: tuple[float, float] | None) -> str | None:
    """What to say of an extreme value."""
    if found is None:
        return None
    value = f"{found[0]:g}" if abs(found[0]) >= 1e15 or found[0] != int(found[0]) else f"{int(found[0])}"
    return (
        f"{name}: {100 * found[1]:.0f} % of the pixels have the value {value} in all bands, and nothing in the "
        f"file takes them out; --nodata {value} does"
    )
