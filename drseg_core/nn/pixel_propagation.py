# SPDX-License-Identifier: Apache-2.0
"""Labels of pixels spread to nearby pixels of like colour: after the second propagation of LPOSS+ (2025)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from drseg_core.errors import NumericalError
from drseg_core.ops._checks import check_alpha, check_count, check_number, check_same_device, check_shape, check_tensor

__all__ = ["propagate_pixels", "reach_of_pixels"]

# logits of so many classes are spread at a time: those of all would leave the caches
_CLASSES = 4


@torch.no_grad()
def propagate_pixels(
    logits: Tensor,
    image: Tensor,
    valid: Tensor | None = None,
    *,
    radius: int = 3,
    colour: float = 0.03,
    steps: int = 10,
    alpha: float = 0.95,
) -> Tensor:
    """``steps`` times ``F <- alpha D^-1 W F + (1 - alpha) Y`` from ``F = Y``, over the pixels of an image.

    Neighbours of a pixel are the others of a square of ``2 radius + 1`` pixels around it. Their weights are
    ``w_ij = exp(-|c_i - c_j| / colour)`` with colours c, the channels over 255. ``D`` are the row sums of ``W``.

    These are the edges of LPOSS+ (arXiv 2503.19777). It has the colours in CIELAB and a square of 13 pixels, divides by
    ``D^-1/2`` from both sides, and solves to the end by conjugate gradients. Here a pixel gets a mean, so logits keep
    their scale. And it depends only on pixels within a reach (:func:`reach_of_pixels`), so a scene can be done in
    parts.

    Args:
        logits: Y, (T, H, W), floating-point, finite.
        image: (C, H, W) uint8.
        valid: (H, W) bool; a pixel that is not valid has no neighbours and is no neighbour. None means all are valid.
        radius: pixels, >= 1.
        colour: distance at which a weight has fallen to 1 / e, > 0; between black and white it is ``sqrt(C)``.
        steps: number of steps, >= 0.
        alpha: share of the neighbours, in [0, 1).

    Returns:
        F, (T, H, W) in the dtype of ``logits``, without gradient; a pixel without neighbours keeps its own. So does one
        whose colour is so far from all others that its weights add up to no normal number of the sums' dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.
        NumericalError: a logit is not finite.

    Note:
        Memory: ``2 radius (radius + 1)`` values for each pixel, the result, and four times the logits of four classes.

    Examples:
        >>> import torch
        >>> from drseg_core.nn.pixel_propagation import propagate_pixels
        >>> image = torch.tensor([[[0, 0, 255]]], dtype=torch.uint8)
        >>> propagate_pixels(torch.tensor([[[1.0, 0.0, 0.0]]]), image, radius=1, steps=1, alpha=0.5).flatten().tolist()
        [0.5, 0.5, 0.0]
    """
    name = "propagate_pixels"
    check_tensor(name, "logits", logits, ("T", "H", "W"))
    size = logits.shape[1], logits.shape[2]
    check_tensor(name, "image", image, ("C", "H", "W"), (torch.uint8,))
    check_shape(name, "image", image, (image.shape[0], *size), "(C, H, W) with H and W of logits")
    if valid is not None:
        check_tensor(name, "valid", valid, ("H", "W"), (torch.bool,))
        check_shape(name, "valid", valid, size, "(H, W) of logits")
    check_same_device(name, logits=logits, image=image, valid=valid)
    radius = check_count(name, "radius", radius, positive=True)
    colour = check_number(name, "colour", colour, positive=True)
    check_count(name, "steps", steps)
    check_alpha(name, alpha)
    if not logits.isfinite().all():
        raise NumericalError(f"{name}: logits are not finite; expected finite values, got NaN or Inf")
    y = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tone = image.to(y.dtype) / 255
    # less than that is 0 in this dtype, and no two colours are as near
    width = max(colour, torch.finfo(y.dtype).tiny)
    edges, degree = [], torch.zeros(size, dtype=y.dtype, device=y.device)
    for here, there in _pairs(size, radius):
        weight = (tone[here] - tone[there]).square().sum(dim=0).sqrt().div_(-width).exp_()
        if valid is not None:
            weight *= valid[here[1:]] & valid[there[1:]]
        degree[here[1:]] += weight
        degree[there[1:]] += weight
        edges.append((here, there, weight))
    # a pixel without neighbours keeps all of its own; one over a smaller sum could be infinite
    alone = degree < torch.finfo(degree.dtype).tiny
    # of the dtype of the sums: a choice of two numbers would have the default one
    scale, kept = alpha / degree.masked_fill(alone, 1), torch.full_like(degree, 1 - alpha).masked_fill_(alone, 1)
    found = torch.empty_like(logits)

    def spread(x: Tensor, own: Tensor) -> Tensor:
        heard = torch.zeros_like(x)
        for here, there, weight in edges:
            heard[here] += weight * x[there]
            heard[there] += weight * x[here]
        return heard.mul_(scale).add_(kept * own)

    # a sum over all neighbours may leave the range of the dtype where their mean does not
    largest, lower = torch.finfo(y.dtype).max, 2.0 ** -(4 * len(edges)).bit_length()
    for first in range(0, len(y), _CLASSES):
        own = y[first : first + _CLASSES]
        x = own
        for _ in range(steps):
            near = spread(x, own)
            if not near.isfinite().all():
                # there alone, as what lies beyond its reach changes no pixel
                small = (spread(x * lower, own * lower) / lower).clamp_(-largest, largest)
                near = torch.where(near.isfinite(), near, small)
            x = near
        found[first : first + _CLASSES] = x
    return found


def reach_of_pixels(radius: int, steps: int) -> int:
    """Distance in pixels, down or across, within which all lies that decides a pixel in :func:`propagate_pixels`.

    That is one edge for each step. A mean is divided by the sum of the same edges, so nothing further counts.

    Examples:
        >>> from drseg_core.nn.pixel_propagation import reach_of_pixels
        >>> reach_of_pixels(3, 10)
        30
    """
    return radius * steps


_Place = tuple[slice, slice, slice]


def _pairs(size: tuple[int, int], radius: int) -> Iterator[tuple[_Place, _Place]]:
    """Every pair of neighbours once: the pixels with a neighbour at an offset below or to the right, and the latter."""
    widest = min(radius, size[1] - 1)
    for down in range(min(radius, size[0] - 1) + 1):
        for across in range(-widest, widest + 1):
            if down or across > 0:
                one, other = _shifted(size[0], down), _shifted(size[1], across)
                yield (slice(None), one[0], other[0]), (slice(None), one[1], other[1])


def _shifted(length: int, by: int) -> tuple[slice, slice]:
    first, second = slice(max(-by, 0), length - max(by, 0)), slice(max(by, 0), length - max(-by, 0))
    return first, second
