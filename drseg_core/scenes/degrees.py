# SPDX-License-Identifier: Apache-2.0
"""Polygons of a map in degrees: their edges follow the pixels, and they end at the antimeridian and at the poles."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.ground import projected

_CENTIMETRE = 7
"""Decimals of degrees."""
_MOVED = 0.01
"""Share of a pixel by which rounding, or a pole that is near, may move a corner."""
_BEYOND = 0.75
"""Pixels by which a corner may be off when it is sent to degrees and back, and is still on Earth."""
_BENT = 0.25
"""Pixels by which an edge may leave the straight line in degrees."""
_ASIDE = 0.1
"""Pixels from an edge at which it is measured how wide a pixel is there."""
_SHORT = 0.5
"""Pixels below which the bend of a piece does not count."""
_BROAD = 90.0
"""Degrees of longitude along a piece, above which it is cut again."""
_DEPTH = 11
"""How often a piece is cut into three: down to a hundredth of a pixel of an edge of 2000."""
_BESIDE = 1e-4
"""Share of an edge from a pole at which its longitude is asked for."""
_BETWEEN = 17
"""Points along an edge that seems to go around half the world."""

Floats = NDArray[np.float64]


class _Points(NamedTuple):
    """Points of rings in pixels and in degrees, and which of them are at a pole, where any longitude is true."""

    pixel: Floats
    degrees: Floats
    pole: NDArray[np.bool_]


def on_ground(transform: Any, points: Floats) -> Floats:
    """Points of a grid in its CRS."""
    return np.column_stack(transform @ (points[:, 0], points[:, 1]))


def _to_degrees(grid: Any, points: Floats) -> Floats:
    """Points of the CRS of a grid; NaN for those not on Earth.

    Beyond the edge of the Earth some projections give places all the same, which lie elsewhere in the CRS.
    """
    degrees = np.column_stack(projected(grid.crs, "EPSG:4326", *points.T.tolist()))
    if grid.crs.is_geographic:
        # its pole is a line, also where that of WGS 84 lies beside it
        last = np.flatnonzero(abs(points[:, 1]) > np.pi / 2 / grid.crs.units_factor[1] - 1e-9)
        degrees[last, 0] = projected(grid.crs, "EPSG:4326", points[last, 0].tolist(), [0.0] * len(last))[0]
        degrees[last, 1] = np.copysign(90, points[last, 1])
    on_earth = np.isfinite(degrees[:, 0])
    off = np.column_stack(projected("EPSG:4326", grid.crs, *degrees[on_earth].T.tolist())) - points[on_earth]
    if _goes_around(grid.crs):
        off[:, 0] = np.nan_to_num(off[:, 0]) * 0
    t = grid.transform
    pixel = max(abs(t.a) + abs(t.b), abs(t.d) + abs(t.e))
    # two ways between datums may differ by metres
    on_earth[on_earth] = np.hypot(*off.T) < _BEYOND * pixel + 1e-5 * abs(points[on_earth]).max(1)
    degrees[~on_earth] = np.nan
    return degrees


@lru_cache(maxsize=8)
def _goes_around(crs: Any) -> bool:
    """Whether the first axis is the longitude, so that a map may go on beyond its end: there the Earth begins again."""
    if crs.is_geographic:
        return True
    east, _ = projected("EPSG:4326", crs, [-100, -10, 80, 170] * 2, [0] * 4 + [60] * 4)
    return bool(np.ptp(east.reshape(2, 4), axis=0).max() < 1e-3 * np.ptp(east))


def _places(pixel: Floats, grid: Any) -> Floats:
    return _to_degrees(grid, on_ground(grid.transform, pixel)) if len(pixel) else np.zeros((0, 2))


def _poles(grid: Any) -> Floats:
    """The poles that are points of a grid, in pixels, with their latitudes."""
    # in degrees they are lines
    if grid.crs.is_geographic:
        return np.zeros((0, 3))
    found = []
    for latitude in (-90.0, 90.0):
        from_all_sides = np.column_stack(projected("EPSG:4326", grid.crs, [-90, 0, 90, 180], [latitude] * 4))
        places = on_ground(~grid.transform, from_all_sides)
        if (np.ptp(places, axis=0) < _MOVED).all():
            found.append((*places.mean(0), latitude))
    return np.array(found).reshape(-1, 3)


def _sides(grid: Any) -> Floats:
    """Two sides of some pixels all over a grid, in degrees."""
    places = [(x, y) for y in np.linspace(0, grid.height, 3) for x in np.linspace(0, grid.width, 3)]
    pixels = np.array([(x + right, y + down) for x, y in places for right, down in ((0, 0), (1, 0), (0, 1))])
    corner, across, down = _to_degrees(grid, on_ground(grid.transform, pixels)).reshape(-1, 3, 2).swapaxes(0, 1)
    # a pixel may lie on the antimeridian
    sides = (np.stack([across - corner, down - corner], 2) + 180) % 360 - 180
    return np.asarray(sides[np.isfinite(sides).all((1, 2))])


def decimals_of(grid: Any) -> int:
    """Decimals of degrees by which no corner moves by more than a hundredth of a pixel; at least 7, a centimetre."""
    sides = _sides(grid)
    sides = sides[np.linalg.det(sides) != 0]
    if not len(sides):
        return _CENTIMETRE
    # pixels for each degree; a value is off by half of its last decimal
    pixels_of_degree = np.abs(np.linalg.inv(sides)).sum(2).max()
    return max(_CENTIMETRE, math.ceil(math.log10(0.5 * pixels_of_degree / _MOVED)))


def in_degrees(shapes: NDArray[Any], grid: Any, decimals: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Polygons in longitude and latitude, cut at the antimeridian (RFC 7946, 3.1.9).

    An edge gets more points where the straight line in degrees would leave it by more than a quarter of a pixel.

    Args:
        shapes: in the CRS of the grid.
        grid: the map, with its CRS, transform, height and width.
        decimals: of the degrees.

    Returns:
        Those whose corners are all on Earth, and which these are.
    """
    import shapely

    points, owner = shapely.get_coordinates(shapes, return_index=True)
    degrees = _to_degrees(grid, points)
    seen = np.ones(len(shapes), bool)
    seen[owner[np.isnan(degrees[:, 0])]] = False
    kept = seen[owner]
    shapes, degrees = shapes[seen], degrees[kept]
    found = shapely.set_coordinates(shapes.copy(), degrees)
    if not len(found):
        return found, seen
    rings, shape_of = shapely.get_rings(shapes, return_index=True)
    ring = np.repeat(np.arange(len(rings)), shapely.get_num_coordinates(rings))
    pixel = on_ground(~grid.transform, points[kept])
    every, ring, more = _followed(_at_poles(pixel, degrees, grid), ring, grid)
    longitude = every.degrees[:, 0]
    jump = (abs(np.diff(longitude)) > 180) & (ring[1:] == ring[:-1])
    # one that crosses has points on both sides, or goes on beyond 180
    over = np.concatenate([ring[1:][jump], ring[(abs(longitude) > 180) | every.pole]])
    beyond = np.unique(shape_of[over])
    first = np.searchsorted(ring, np.arange(len(rings) + 1))
    for number in np.union1d(beyond, shape_of[more]):
        ends = [slice(first[i], first[i + 1]) for i in np.flatnonzero(shape_of == number)]
        outlines = [_Points(every.pixel[end], every.degrees[end], every.pole[end]) for end in ends]
        if number in beyond:
            found[number] = _cut(outlines, grid, decimals)
        else:
            found[number] = shapely.Polygon(outlines[0].degrees, [hole.degrees for hole in outlines[1:]])
    rounded = shapely.transform(found, lambda points: np.round(points, decimals))
    for number in beyond:
        # of a part that is thinner than the last decimal nothing is left, and a thin place may close
        whole = rounded[number] if shapely.is_valid(rounded[number]) else shapely.make_valid(rounded[number])
        parts = [part for piece in shapely.get_parts(whole) for part in shapely.get_parts(piece) if part.area]
        rounded[number] = shapely.MultiPolygon(parts) if parts else found[number]
    return rounded, seen


def _turned(step: Any) -> Any:
    """A step of longitude the shorter way around."""
    return (step + 180) % 360 - 180


def _at_poles(pixel: Floats, degrees: Floats, grid: Any) -> _Points:
    """Corners, of which those at a pole are there exactly."""
    pole = np.zeros(len(pixel), bool)
    for *place, latitude in _poles(grid):
        at_pole = np.hypot(*(pixel - place).T) < _MOVED
        pixel[at_pole], degrees[at_pole], pole[at_pole] = place, (0, latitude), True
    return _Points(pixel, degrees, pole)


def _followed(points: _Points, ring: NDArray[np.int64], grid: Any) -> tuple[_Points, NDArray[np.int64], Any]:
    """The points and those between them that they need, the ring of each, and the rings with more points."""
    start = np.flatnonzero(ring[1:] == ring[:-1])
    start = start[_may_bend(points, start, grid)]
    end = start + 1
    one, other = points.degrees[start], points.degrees[end]
    for own, place, far in ((one, start, end), (other, end, start)):
        # the longitude by which an edge comes to a pole
        at_pole = np.flatnonzero(points.pole[place])
        here, there = points.pixel[place[at_pole]], points.pixel[far[at_pole]]
        own[at_pole, 0] = _places(here + (there - here) * _BESIDE, grid)[:, 0]
    edge, share, pixel, degrees = _between(points.pixel[start], points.pixel[end], one, other, grid)
    order = np.argsort(np.concatenate([np.arange(len(ring)), start[edge] + share]), kind="stable")
    ring_of = ring[start[edge]]
    more = _Points(pixel, degrees, np.zeros(len(pixel), bool))
    joined = _Points(*(np.concatenate(both)[order] for both in zip(points, more, strict=True)))
    return joined, np.concatenate([ring, ring_of])[order], np.unique(ring_of)


def _may_bend(points: _Points, start: NDArray[np.int64], grid: Any) -> NDArray[np.bool_]:
    """Which edges are long enough for their place on Earth; nearly none of a usual map are."""
    one, other = points.degrees[start], points.degrees[start + 1]
    length = np.hypot(*(points.pixel[start + 1] - points.pixel[start]).T)
    east, latitude = np.radians(_turned(other[:, 0] - one[:, 0])), np.radians(abs(np.stack([one[:, 1], other[:, 1]])))
    arc = np.hypot(east * np.cos(latitude.min(0)), np.radians(other[:, 1] - one[:, 1]))
    nearest = np.minimum(latitude.max(0) + arc, np.pi / 2 - 1e-9)
    # four times what a line that is straight on the ground would bend
    bend = length * arc * (1 + np.tan(nearest)) / 2
    # the ends of an edge around the world may be one place
    widest = abs(_sides(grid)[:, 0]).max(initial=0)
    return np.asarray((bend > _BENT) | (abs(east) > 0.5) | (length * widest > 30))


def _between(p: Floats, q: Floats, at_p: Floats, at_q: Floats, grid: Any) -> tuple[Any, Floats, Floats, Floats]:
    """Points between the ends of edges: the edge of each, how far along, and the point in pixels and in degrees.

    A piece that bends too much is cut into three. At its thirds a bend that turns in the middle is seen as well.
    """
    edge = np.arange(len(p))
    # neighbours go along an edge in two directions, and get the same points
    back = (p[:, 0] > q[:, 0]) | (p[:, 0] == q[:, 0]) & (p[:, 1] > q[:, 1])
    p, q = np.where(back[:, None], q, p), np.where(back[:, None], p, q)
    at_p, at_q = np.where(back[:, None], at_q, at_p), np.where(back[:, None], at_p, at_q)
    begin = np.zeros(len(p))
    edges, shares, pixels, degrees = [edge[:0]], [begin[:0]], [p[:0]], [p[:0]]
    for depth in range(_DEPTH):
        thirds = [p + (q - p) / 3, p + (q - p) * 2 / 3]
        length = np.hypot(*(q - p).T)
        aside = _ASIDE * np.column_stack([p[:, 1] - q[:, 1], q[:, 0] - p[:, 0]]) / length[:, None]
        at = [_places(third, grid) for third in thirds]
        step = _turned(np.diff(np.stack([at_p, *at, at_q])[..., 0], axis=0))
        along, total = np.cumsum(step, 0), np.column_stack([step.sum(0), at_q[:, 1] - at_p[:, 1]])
        broad = abs(step).sum(0) > _BROAD
        bent = np.zeros(len(p), bool)
        for number, (third, place) in enumerate(zip(thirds, at, strict=True)):
            off = np.column_stack([along[number], place[:, 1] - at_p[:, 1]]) - total * (number + 1) / 3
            wide = _places(third + aside, grid) - place
            lost = np.isnan(wide[:, 0])
            if lost.any():
                wide[lost] = place[lost] - _places((third - aside)[lost], grid)
            wide[:, 0] = _turned(wide[:, 0])
            bent |= abs(_cross(total, off)) * _ASIDE > _BENT * abs(_cross(total, wide)) + 1e-9 * np.hypot(*total.T)
        cut = np.flatnonzero(broad | bent & (length > _SHORT))
        if not len(cut):
            break
        for number in range(2):
            edges.append(edge[cut])
            shares.append(begin[cut] + (number + 1) * 3.0 ** -(depth + 1))
            pixels.append(thirds[number][cut])
            degrees.append(at[number][cut])
        begin = np.concatenate([begin[cut] + number * 3.0 ** -(depth + 1) for number in range(3)])
        edge = np.tile(edge[cut], 3)
        p, q = (np.concatenate([v[cut] for v in vs]) for vs in ((p, *thirds), (*thirds, q)))
        at_p, at_q = (np.concatenate([v[cut] for v in vs]) for vs in ((at_p, *at), (*at, at_q)))
    which, share = np.concatenate(edges), np.concatenate(shares)
    return which, np.where(back[which], 1 - share, share), np.concatenate(pixels), np.concatenate(degrees)


def _cross(a: Floats, b: Floats) -> Floats:
    return np.asarray(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])


def _cut(rings: list[_Points], grid: Any, decimals: int) -> Any:
    """The parts of one polygon between -180 and 180 degrees."""
    import shapely

    # each ring by itself, as a hole may begin on the other side
    whole, *holes = (_within_a_turn(ring, grid, decimals) for ring in rings)
    left = shapely.difference(whole, shapely.union_all(holes)) if holes else whole
    return shapely.MultiPolygon([part for part in shapely.get_parts(left) if part.geom_type == "Polygon"])


def _within_a_turn(ring: _Points, grid: Any, decimals: int) -> Any:
    """What a ring encloses, from -180 to 180 degrees."""
    import shapely

    points = _unwrapped(_around_poles(ring, grid), grid)
    west, east = points[:, 0].min(), points[:, 0].max()
    turns = range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360))
    around = points[-1, 0] - points[0, 0]
    if abs(around) > 180:
        # around a pole, which is a line in degrees: once more on both sides, as a ring may go back below its begin
        within = [p[2] for p in _poles(grid) if shapely.contains_xy(shapely.Polygon(ring.pixel), *p[:2])]
        pole, more = within[0] if within else np.copysign(90, points[:, 1].mean()), max(-turns[0], turns[-1]) + 1
        points = np.vstack([points[:-1] + (number * around, 0) for number in range(-more, more + 1)])
        points = np.vstack([points, [(points[-1, 0], pole), (points[0, 0], pole)]])
        turns = range(1)
    polygon = shapely.make_valid(shapely.Polygon(points))
    parts = []
    for turn in turns:
        side = shapely.box(360 * turn - 180, -91, 360 * turn + 180, 91)
        parts.append(
            shapely.transform(shapely.intersection(polygon, side), lambda points, turn=turn: points - (360 * turn, 0))
        )
    # around a pole the parts meet where the ring begins, but for the last bit
    return shapely.union_all(parts, grid_size=10.0**-decimals)


def _around_poles(ring: _Points, grid: Any) -> _Points:
    """A ring whose points at a pole are lines there: from the longitude by which it comes to that by which it goes."""
    if not ring.pole.any():
        return ring
    begin = int(np.flatnonzero(~ring.pole)[0])
    pixel, degrees, pole = (np.roll(values[:-1], -begin, 0) for values in ring)
    turn = np.sign(_cross(pixel - pixel[0], np.roll(pixel, -1, 0) - pixel[0]).sum())
    rows = []
    for number in range(len(pixel)):
        if not pole[number]:
            rows.append((pixel[number], degrees[number], False))
            continue
        here = pixel[number]
        before, after = pixel[number - 1] - here, pixel[(number + 1) % len(pixel)] - here
        # what lies between the two, within the ring
        out = math.atan2(after[1], after[0])
        angle = turn * (math.atan2(before[1], before[0]) - out) % (2 * math.pi)
        half = out + turn * angle / 2
        inside = 0.3 * np.array([math.cos(half), math.sin(half)])
        sides = _places(here + np.stack([_BESIDE * before, inside, _BESIDE * after]), grid)
        rows += [(here, np.array([side[0], degrees[number, 1]]), True) for side in sides if np.isfinite(side[0])]
    rows.append(rows[0])
    return _Points(*(np.array(values) for values in zip(*rows, strict=True)))


def _unwrapped(ring: _Points, grid: Any) -> Floats:
    """A ring in degrees whose longitudes go on beyond 180."""
    pixel, degrees = ring.pixel, ring.degrees.copy()
    step = np.diff(degrees[:, 0])
    turns = np.zeros(len(degrees))
    for edge in np.flatnonzero(abs(step) > 180):
        turns[edge + 1] = -round(step[edge] / 360)
        if ring.pole[edge] or ring.pole[edge + 1]:
            continue
        # a long edge that leaves the Earth between two corners that are on it, or a short one that crosses
        between = _places(np.linspace(pixel[edge], pixel[edge + 1], _BETWEEN), grid)[:, 0]
        small = np.diff(between[np.isfinite(between)])
        turns[edge + 1] = np.clip(round((_turned(small).sum() - step[edge]) / 360), -1, 1)
    degrees[:, 0] += 360 * turns.cumsum()
    return degrees
