# SPDX-License-Identifier: Apache-2.0
"""The connected areas of a class map: their sizes and scores, and small ones that join a neighbour."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE
from drseg_core.data.ground import PixelArea

BLOCK = 512
"""Side of the blocks of our maps."""

SIDE = BLOCK
"""Side of the parts that are worked on one after the other."""

_ROWS = 64


class Regions(NamedTuple):
    """Class, pixels, m2 (NaN where not known) and mean score by number. Nodata has numbers too: class 255."""

    label: NDArray[np.uint8]
    pixels: NDArray[np.int64]
    area: NDArray[np.float64]
    score: NDArray[np.float64]


def find_regions(
    labels: Any, scores: Any, own: Path, min_area: float, done: Callable[[int], object] = lambda pixels: None
) -> Regions:
    """Number the areas of one class whose pixels touch by their sides.

    Beginning with the smallest, each area below ``min_area`` joins the neighbour with which it has the longest border.
    This goes on until no such area with a neighbour is left. Nodata joins nothing, and nothing joins it.

    Args:
        labels: open class raster.
        scores: open raster of the best scores, in steps with a scale.
        own: raster to write, with the number of the area of each pixel.
        min_area: in m2, or in pixels if the map has no georeference.
        done: called with the number of pixels worked on; in all :func:`passes` times all pixels.
    """
    import rasterio

    size = labels.height, labels.width
    pixel = PixelArea(labels.crs, labels.transform)
    parts = own.with_name(f"{own.stem}.parts.tif")
    label: list[NDArray[np.uint8]] = []
    # of each area in one part: pixels, m2, sum of the scores, and pixels that have one
    sums: list[NDArray[np.float64]] = []
    links: list[NDArray[np.int64]] = [np.empty((2, 0), np.int64)]
    # numbers of the lowest row so far, and of the last column of the part before
    lowest, last = np.empty(size[1], np.int64), np.empty(0, np.int64)
    count = total_written = total_read = 0
    try:
        with _numbers(parts, size) as file:
            for top, left, height, width in _parts(*size):
                window, up, before = _extended(top, left, height, width)
                value = labels.read(1, window=window)
                part, of_part = _numbered(value[up:, before:])
                score = scores.read(1, window=((top, top + height), (left, left + width)))
                sums.append(_sums(part, len(of_part), score, _weights(pixel, top, left, height, width)))
                label.append(of_part)
                part += count
                count += len(of_part)
                # what goes on from the part above and from the one to the left
                columns = slice(left, left + width)
                if up:
                    links.append(_links(lowest[columns], part[0], value[0, before:] == value[1, before:]))
                if before:
                    links.append(_links(last, part[:, 0], value[up:, 0] == value[up:, 1]))
                lowest[columns], last = part[-1], part[:, -1]
                file.write(part.astype(np.int32), 1, window=((top, top + height), (left, left + width)))
                total_written += int(part.sum())
                done(height * width)
        region = _joined(count, *np.concatenate(links, axis=1))
        first, region = np.unique(region, return_inverse=True)
        of_region = np.concatenate(label)[first]
        total = _added(region, len(first), np.concatenate(sums, axis=1))
        with rasterio.open(parts) as numbers:
            if min_area > 0:
                # an area that is not known is not small
                area = np.where(np.isnan(total[1]), np.inf, total[1])
                measure = area if np.isfinite(area).any() else total[0]
                nodata = of_region == IGNORE
                borders = _borders(numbers, region, (measure < min_area) & ~nodata, nodata, done)
                joined, of_region = _eliminated(measure.tolist(), of_region, borders, min_area)
                first, joined = np.unique(joined, return_inverse=True)
                region, of_region, total = joined[region], of_region[first], _added(joined, len(first), total)
            with _numbers(own, size) as file:
                for top, left, height, width in _parts(*size):
                    window = (top, top + height), (left, left + width)
                    part = numbers.read(1, window=window)
                    total_read += int(part.sum(dtype=np.int64))
                    file.write(region[part].astype(np.int32), 1, window=window)
                    done(height * width)
        # GDAL may report a full disk only in its log, and reads zeros for what is not there
        if total_read != total_written:
            raise OSError("the areas are not stored in full")
    finally:
        parts.unlink(missing_ok=True)
    with np.errstate(invalid="ignore"):
        mean = total[2] / total[3] * scores.scales[0] + scores.offsets[0]
    return Regions(of_region, total[0].astype(np.int64), total[1], mean)


def _numbers(path: Path, size: tuple[int, int]) -> Any:
    """A raster of numbers, used in place of memory."""
    import rasterio

    profile: dict[str, Any] = {"driver": "GTiff", "count": 1, "dtype": "int32", "bigtiff": "if_safer"}
    profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "zlevel": 1}
    return rasterio.open(path, "w", height=size[0], width=size[1], **profile)


def passes(min_area: float) -> int:
    """How often all pixels are worked on."""
    return 3 if min_area > 0 else 2


def _parts(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    for top in range(0, height, SIDE):
        for left in range(0, width, SIDE):
            yield top, left, min(SIDE, height - top), min(SIDE, width - left)


def _extended(top: int, left: int, height: int, width: int) -> tuple[tuple[tuple[int, int], tuple[int, int]], int, int]:
    """A window of a part with the row above and the column to the left of it, where they are; how many of these."""
    up, before = int(top > 0), int(left > 0)
    return ((top - up, top + height), (left - before, left + width)), up, before


def _numbered(value: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Numbers from 0 of the areas of one part, and the class of each."""
    begins = np.ones(value.shape, bool)
    begins[:, 1:] = value[:, 1:] != value[:, :-1]
    run = (np.cumsum(begins) - 1).reshape(value.shape)
    # two runs of one class are linked where they begin to touch
    touch = (value[1:] == value[:-1]) & (begins[1:] | begins[:-1])
    first, region = np.unique(_joined(int(run[-1, -1]) + 1, run[:-1][touch], run[1:][touch]), return_inverse=True)
    return region[run], value[begins][first]


def _joined(count: int, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of ``count`` things the lowest one that links lead to."""
    root = np.arange(count)
    while True:
        a, b = root[one], root[other]
        apart = a != b
        if not apart.any():
            return root
        one, other = one[apart], other[apart]
        np.minimum.at(root, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
        while ((deeper := root[root]) != root).any():
            root = deeper


def _links(one: NDArray[Any], other: NDArray[Any], same: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.unique(np.stack([one[same], other[same]]).astype(np.int64), axis=1)


def _weights(pixel: PixelArea, top: int, left: int, height: int, width: int) -> NDArray[np.float64]:
    """m2 of the pixels of a part, or of each of its rows where they have one area; NaN where not known."""
    if not pixel.known:
        return np.full((height, 1), np.nan)
    rows = range(0, height, _ROWS)
    tall = [min(_ROWS, height - row) for row in rows]
    boxes = [(top + row, left, h, width) for row, h in zip(rows, tall, strict=True)]
    area = np.repeat(pixel.of(boxes), tall)[:, None]
    pieces = pixel.pieces(boxes)
    if (pieces[:, 1] > 1).any():
        area = np.repeat(area, width, axis=1)
    for number in np.flatnonzero((pieces > 1).any(1)):
        area[rows[number] : rows[number] + tall[number]] = pixel.field(boxes[number], pieces[number].tolist())
    return area


def _sums(
    part: NDArray[np.int64], count: int, score: NDArray[np.uint8], area: NDArray[np.float64]
) -> NDArray[np.float64]:
    flat, scored = part.ravel(), score != IGNORE
    columns = (np.ones(part.shape), np.broadcast_to(area, part.shape), np.where(scored, score, 0), scored)
    return np.stack([np.bincount(flat, column.ravel(), count) for column in columns])


def _added(region: NDArray[np.int64], count: int, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([np.bincount(region, row, count) for row in sums])


def _borders(
    numbers: Any,
    region: NDArray[np.int64],
    small: NDArray[np.bool_],
    nodata: NDArray[np.bool_],
    done: Callable[[int], object],
) -> dict[int, dict[int, int]]:
    """For each area that is small or has a small neighbour: its neighbours, and the pixel sides they share."""
    codes, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for top, left, height, width in _parts(*numbers.shape):
        window, up, before = _extended(top, left, height, width)
        value = region[numbers.read(1, window=window)]
        for a, b in ((value[up:, :-1], value[up:, 1:]), (value[:-1, before:], value[1:, before:])):
            border = (a != b) & (small[a] | small[b]) & ~(nodata[a] | nodata[b])
            low, high = np.minimum(a, b)[border], np.maximum(a, b)[border]
            code, shared = np.unique(low * len(small) + high, return_counts=True)
            codes.append(code)
            counts.append(shared)
        done(height * width)
    code, place = np.unique(np.concatenate(codes), return_inverse=True)
    shared = np.bincount(place, np.concatenate(counts), len(code)).astype(np.int64)
    result: dict[int, dict[int, int]] = defaultdict(dict)
    for low, high, sides in zip(*(v.tolist() for v in (*np.divmod(code, len(small)), shared)), strict=True):
        result[low][high] = result[high][low] = sides
    return result


def _eliminated(
    size: list[float], label: NDArray[np.uint8], borders: dict[int, dict[int, int]], smallest: float
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Join the small areas: the area to which each then belongs, and the class of that."""
    label = label.copy()
    root = np.arange(len(size))

    def join(one: int, other: int) -> int:
        """Make one of two neighbours, now of one class; the one with more neighbours stays."""
        gone, kept = sorted((one, other), key=lambda i: (len(borders[i]), -i))
        root[gone] = kept
        size[kept] += size[gone]
        for near, sides in borders.pop(gone).items():
            del borders[near][gone]
            if near != kept:
                borders[kept][near] = borders[near][kept] = borders[kept].get(near, 0) + sides
        return kept

    waiting = [(size[i], i) for i in borders if size[i] < smallest]
    heapq.heapify(waiting)
    while waiting:
        was, small = heapq.heappop(waiting)
        if root[small] != small or size[small] != was or not borders[small]:
            continue
        # the longest border; of several the larger area
        target = max(borders[small], key=lambda near: (borders[small][near], size[near], -near))
        kind = label[target]
        # it may have held areas of that class apart
        alike = [near for near in borders[small] if label[near] == kind]
        kept = small
        for near in alike:
            kept = join(kept, near)
        label[kept] = kind
        if size[kept] < smallest:
            heapq.heappush(waiting, (size[kept], kept))
    while ((deeper := root[root]) != root).any():
        root = deeper
    return root, label
