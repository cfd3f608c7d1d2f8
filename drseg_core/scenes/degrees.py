# SPDX-License-Identifier: Apache-2.0
"""Polygons of a map in degrees: their edges follow the pixels, and they end at the antimeridian and at the poles."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.ground import projected

_CENTIMETRE = 7
"""Decimals of degrees."""
_MOVED = 0.01
"""Share of a pixel by which rounding may move a corner."""
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
_BETWEEN = 17
"""Points along an edge that seems to go around half the world."""
_CORNER, _POLE, _NEAR_POLE = 0, 1, 2
"""Kinds of points: others, those at a pole, and those where an edge passes so near that it may go through it."""

Floats = NDArray[np.float64]


class _Points(NamedTuple):
    """Points of rings in pixels and in degrees, with their kinds."""

    pixel: Floats
    degrees: Floats
    kind: NDArray[np.int64]


def on_ground(transform: Any, points: Floats) -> Floats:
    """Points of a grid in its CRS."""
    return np.column_stack(transform @ (points[:, 0], points[:, 1]))


def _to_degrees(crs: Any, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.column_stack(projected(crs, "EPSG:4326", *points.T.tolist()))


def _places(pixel: Floats, grid: Any) -> Floats:
    return _to_degrees(grid.crs, on_ground(grid.transform, pixel)) if len(pixel) else np.zeros((0, 2))


def _sides(grid: Any) -> Floats:
    """Two sides of some pixels all over a grid, in degrees."""
    places = [(x, y) for y in np.linspace(0, grid.height, 3) for x in np.linspace(0, grid.width, 3)]
    pixels = np.array([(x + right, y + down) for x, y in places for right, down in ((0, 0), (1, 0), (0, 1))])
    corner, across, down = _to_degrees(grid.crs, on_ground(grid.transform, pixels)).reshape(-1, 3, 2).swapaxes(0, 1)
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
    degrees = _to_degrees(grid.crs, points)
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
    every, ring, more = _followed(_Points(pixel, degrees, np.zeros(len(pixel), np.int64)), ring, grid)
    longitude = every.degrees[:, 0]
    jump = (abs(np.diff(longitude)) > 180) & (ring[1:] == ring[:-1])
    # one that crosses has points on both sides, or goes on beyond 180
    over = np.concatenate([ring[1:][jump], ring[(abs(longitude) > 180) | (every.kind != _CORNER)]])
    beyond = np.unique(shape_of[over])
    first = np.searchsorted(ring, np.arange(len(rings) + 1))
    for number in np.union1d(beyond, shape_of[more]):
        ends = [slice(first[i], first[i + 1]) for i in np.flatnonzero(shape_of == number)]
        outlines = [_Points(every.pixel[end], every.degrees[end], every.kind[end]) for end in ends]
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


def _followed(points: _Points, ring: NDArray[np.int64], grid: Any) -> tuple[_Points, NDArray[np.int64], Any]:
    """The points and those between them that they need, the ring of each, and the rings with more points."""
    start = np.flatnonzero(ring[1:] == ring[:-1])
    start = start[_may_bend(points, start, grid)]
    end = start + 1
    points = _Points(points.pixel, points.degrees, points.kind.copy())
    one, other = points.degrees[start], points.degrees[end]
    for own, place, far in ((one, start, end), (other, end, start)):
        # all longitudes are at a pole: that of an edge is the one by which it comes there
        at_pole = np.flatnonzero(abs(own[:, 1]) > 90 - 1e-9)
        here, there = points.pixel[place[at_pole]], points.pixel[far[at_pole]]
        beside = _places(here + (there - here) * 1e-4, grid)[:, 0]
        points.kind[place[at_pole[abs(_turned(beside - own[at_pole, 0])) > 1]]] = _POLE
        own[at_pole, 0] = np.where(np.isfinite(beside), beside, own[at_pole, 0])
    edge, share, more = _between(points.pixel[start], points.pixel[end], one, other, grid)
    order = np.argsort(np.concatenate([np.arange(len(ring)), start[edge] + share]), kind="stable")
    ring_of = ring[start[edge]]
    # a ring that begins at a pole also ends there
    first, last = (np.searchsorted(ring, np.unique(ring), side) for side in ("left", "right"))
    last = last - 1
    points.kind[first] = points.kind[last] = np.maximum(points.kind[first], points.kind[last])
    pixel, degrees = (np.concatenate(both)[order] for both in zip(points[:2], more[:2], strict=True))
    joined = _Points(pixel, degrees, np.concatenate([points.kind, more.kind])[order])
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


def _between(p: Floats, q: Floats, at_p: Floats, at_q: Floats, grid: Any) -> tuple[NDArray[np.int64], Floats, _Points]:
    """Points between the ends of edges: the edge of each, and how far along.

    A piece that bends too much is cut into three. At its thirds a bend that turns in the middle is seen as well.
    """
    edge = np.arange(len(p))
    # neighbours go along an edge in two directions, and get the same points
    back = (p[:, 0] > q[:, 0]) | (p[:, 0] == q[:, 0]) & (p[:, 1] > q[:, 1])
    p, q = np.where(back[:, None], q, p), np.where(back[:, None], p, q)
    at_p, at_q = np.where(back[:, None], at_q, at_p), np.where(back[:, None], at_p, at_q)
    begin = np.zeros(len(p))
    edges, shares, kinds, pixels, degrees = [], [], [], [np.zeros((0, 2))], [np.zeros((0, 2))]
    for depth in range(_DEPTH + 1):
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
        if depth == _DEPTH:
            ends = np.flatnonzero(broad & (abs(at_p[:, 1]) > 89))
            edges.append(edge[ends])
            shares.append(begin[ends] + 3.0**-depth / 2)
            kinds.append(np.full(len(ends), _NEAR_POLE))
            pixels.append((p[ends] + q[ends]) / 2)
            degrees.append(np.column_stack([at_p[ends, 0], np.copysign(90, at_p[ends, 1])]))
            break
        cut = np.flatnonzero(broad | bent & (length > _SHORT))
        if not len(cut):
            break
        for number in range(2):
            edges.append(edge[cut])
            shares.append(begin[cut] + (number + 1) * 3.0 ** -(depth + 1))
            kinds.append(np.zeros(len(cut), np.int64))
            pixels.append(thirds[number][cut])
            degrees.append(at[number][cut])
        begin = np.concatenate([begin[cut] + number * 3.0 ** -(depth + 1) for number in range(3)])
        edge = np.tile(edge[cut], 3)
        p, q = (np.concatenate([v[cut] for v in vs]) for vs in ((p, *thirds), (*thirds, q)))
        at_p, at_q = (np.concatenate([v[cut] for v in vs]) for vs in ((at_p, *at), (*at, at_q)))
    which = np.concatenate([np.zeros(0, np.int64), *edges])
    share = np.concatenate([np.zeros(0), *shares])
    kind = np.concatenate([np.zeros(0, np.int64), *kinds])
    more = _Points(np.concatenate(pixels), np.concatenate(degrees), kind)
    return which, np.where(back[which], 1 - share, share), more


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
    if abs(points[-1, 0] - points[0, 0]) > 180:
        # around a pole, which is a line in degrees
        pole = np.copysign(90, points[:, 1].mean())
        points = np.vstack([points, [(points[-1, 0], pole), (points[0, 0], pole)]])
    polygon = shapely.make_valid(shapely.Polygon(points))
    west, south, east, north = polygon.bounds
    parts = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360)):
        side = shapely.box(360 * turn - 180, south - 1, 360 * turn + 180, north + 1)
        parts.append(
            shapely.transform(shapely.intersection(polygon, side), lambda points, turn=turn: points - (360 * turn, 0))
        )
    # around a pole the parts meet where the ring begins, but for the last bit
    return shapely.union_all(parts, grid_size=10.0**-decimals)


def _around_poles(ring: _Points, grid: Any) -> _Points:
    """A ring whose points at a pole are lines there: from the longitude by which it comes to that by which it goes."""
    if not (ring.kind != _CORNER).any():
        return ring
    pixel, degrees, kind = (values[:-1] for values in ring)
    begin = int(np.flatnonzero(kind == _CORNER)[0])
    pixel, degrees, kind = (np.roll(values, -begin, 0) for values in (pixel, degrees, kind))
    turn = np.sign(_cross(pixel - pixel[0], np.roll(pixel, -1, 0) - pixel[0]).sum())
    rows = []
    for number in range(len(pixel)):
        if kind[number] == _CORNER:
            rows.append((pixel[number], degrees[number], _CORNER))
            continue
        here, share = pixel[number], 1e-4 if kind[number] == _POLE else 1.0
        before, after = pixel[number - 1] - here, pixel[(number + 1) % len(pixel)] - here
        # what lies between the two, within the ring
        out = math.atan2(after[1], after[0])
        angle = turn * (math.atan2(before[1], before[0]) - out) % (2 * math.pi)
        half = out + turn * angle / 2
        inside = 0.3 * np.array([math.cos(half), math.sin(half)])
        sides = _places(np.stack([here + share * before, here + inside, here + share * after]), grid)
        rows += [(here, np.array([side[0], np.copysign(90, side[1])]), _POLE) for side in sides if np.isfinite(side[0])]
    rows.append(rows[0])
    return _Points(*(np.array(values) for values in zip(*rows, strict=True)))


def _unwrapped(ring: _Points, grid: Any) -> Floats:
    """A ring in degrees whose longitudes go on beyond 180."""
    pixel, degrees = ring.pixel, ring.degrees.copy()
    step = np.diff(degrees[:, 0])
    turns = np.zeros(len(degrees))
    for edge in np.flatnonzero(abs(step) > 180):
        turns[edge + 1] = -round(step[edge] / 360)
        if _CORNER != ring.kind[edge] or _CORNER != ring.kind[edge + 1]:
            continue
        # a long edge that leaves the Earth between two corners that are on it, or a short one that crosses
        between = _places(np.linspace(pixel[edge], pixel[edge + 1], _BETWEEN), grid)[:, 0]
        small = np.diff(between[np.isfinite(between)])
        turns[edge + 1] = round((_turned(small).sum() - step[edge]) / 360)
    degrees[:, 0] += 360 * turns.cumsum()
    return degrees
