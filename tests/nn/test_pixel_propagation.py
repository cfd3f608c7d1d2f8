# SPDX-License-Identifier: Apache-2.0
"""Labels spread over pixels: against dense matrices written from the formula, and in parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.errors import NumericalError
from drseg_core.nn.pixel_propagation import propagate_pixels, reach_of_pixels

H, W, T = 7, 9, 3


def given(height: int = H, width: int = W, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, an image of few colours, and pixels of which some are not valid."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 3, (3, height, width), generator=random) * 20
    valid = torch.rand(height, width, generator=random) > 0.15
    return torch.randn(T, height, width, generator=random), image.to(torch.uint8), valid


def literal(
    logits: NDArray, image: NDArray, valid: NDArray, radius: int, colour: float, steps: int, alpha: float
) -> NDArray:
    """Pair by pair, and dense."""
    height, width = valid.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    weight = np.zeros((len(places), len(places)))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            if i != j and abs(y - v) <= radius and abs(x - u) <= radius and valid[y, x] and valid[v, u]:
                distance = math.dist(image[:, y, x] / 255, image[:, v, u] / 255)
                weight[i, j] = math.exp(-distance / colour)
    degree = weight.sum(1)
    operator = np.array([row / total if total > 0 else row for row, total in zip(weight, degree, strict=True)])
    share = np.where(degree > 0, 1 - alpha, 1.0)[:, None]
    y = logits.reshape(len(logits), -1).T
    x = y
    for _ in range(steps):
        x = alpha * operator @ x + share * y
    return x.T.reshape(logits.shape)


@pytest.mark.promise("C1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("radius", "colour", "steps", "alpha"), [(1, 0.05, 1, 0.95), (2, 0.2, 3, 0.6), (8, 0.1, 2, 0.9)]
)
def test_it_is_the_formula(radius: int, colour: float, steps: int, alpha: float, dtype: torch.dtype) -> None:
    logits, image, valid = given()
    # one that has no neighbour
    valid[:2, :2] = False
    valid[0, 0] = True
    options: dict[str, Any] = {"radius": radius, "colour": colour, "steps": steps, "alpha": alpha}
    for known in (valid, None):
        found = propagate_pixels(logits.to(dtype), image, known, **options)
        mask = np.ones((H, W), bool) if known is None else known.numpy()
        expected = literal(logits.double().numpy(), image.double().numpy(), mask, **options)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-12)
    # planted faults
    for wrong in ({"radius": radius + 1 if radius < 8 else 7}, {"colour": 0.15}, {"steps": steps + 1}, {"alpha": 0.5}):
        other = literal(logits.double().numpy(), image.double().numpy(), mask, **{**options, **wrong})
        assert np.abs(other - expected).max() > 1e-3


def test_what_is_not_valid_has_no_part() -> None:
    logits, image, valid = given()
    expected = propagate_pixels(logits, image, valid)
    image[:, ~valid] = 77
    logits[:, ~valid] = 1e6
    assert torch.equal(propagate_pixels(logits, image, valid)[:, valid], expected[:, valid])


@pytest.mark.promise("C47")
@pytest.mark.parametrize(("radius", "steps"), [(1, 3), (3, 1), (2, 2)])
def test_parts_with_their_reach_are_the_whole(radius: int, steps: int) -> None:
    logits, image, valid = given(40, 50)
    options: dict[str, Any] = {"radius": radius, "steps": steps, "colour": 0.1}
    whole = propagate_pixels(logits, image, valid, **options)
    halo = reach_of_pixels(radius, steps)
    for top, bottom, left, right in ((0, 13, 0, 50), (13, 27, 11, 30), (39, 40, 49, 50), (12, 40, 20, 50)):
        found = {}
        for reach in (halo, halo - radius):
            a, b, c, d = max(top - reach, 0), min(bottom + reach, 40), max(left - reach, 0), min(right + reach, 50)
            part = propagate_pixels(logits[:, a:b, c:d], image[:, a:b, c:d], valid[a:b, c:d], **options)
            found[reach] = part[:, top - a : bottom - a, left - c : right - c]
        expected = whole[:, top:bottom, left:right]
        torch.testing.assert_close(found[halo], expected, rtol=1e-6, atol=1e-6)
        # one pixel alone may have no neighbours
        assert expected[0].numel() == 1 or (found[halo - radius] - expected).abs().max() > 1e-4


def test_a_mean_keeps_the_scale() -> None:
    logits, image, valid = given()
    logits[0] = 3.0
    found = propagate_pixels(logits, image, valid)
    torch.testing.assert_close(found[0], logits[0])
    assert found[1:].min() >= logits[1:].min() and found[1:].max() <= logits[1:].max()


def test_classes_do_not_know_of_each_other() -> None:
    """More than are worked on at a time."""
    _, image, valid = given()
    logits = torch.randn(10, H, W, generator=torch.Generator().manual_seed(4))
    whole = propagate_pixels(logits, image, valid)
    for place in range(10):
        assert torch.equal(propagate_pixels(logits[place : place + 1], image, valid), whole[place : place + 1])
    assert propagate_pixels(logits[:0], image, valid).shape == (0, H, W)


def test_labels_stop_where_the_colour_changes() -> None:
    """A step of colour beside one of labels that lies two pixels off: the labels move to it."""
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    image[:, :, 10:] = 200
    logits = torch.zeros(2, 20, 20)
    logits[1, :, :12] = 1.0
    logits[0] = 1 - logits[1]
    assert (propagate_pixels(logits, image).argmax(0) == (torch.arange(20) < 10)).all()
    # without colour they stay
    assert (propagate_pixels(logits, image, colour=1e6).argmax(0) == (torch.arange(20) < 12)).all()


@pytest.mark.parametrize("colour", [0.03, 0.0195, 0.019, 0.018, 0.0175, 0.017])
def test_a_pixel_of_a_far_colour_stays_finite(colour: float) -> None:
    image = torch.zeros(3, 9, 9, dtype=torch.uint8)
    image[:, 4, 4] = 255
    logits = torch.ones(2, 9, 9)
    torch.testing.assert_close(propagate_pixels(logits, image, colour=colour), logits, rtol=1e-5, atol=0)


@pytest.mark.promise("C5")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_largest_logits_stay_finite_and_change_no_other_class(dtype: torch.dtype) -> None:
    logits, image, valid = given()
    logits, largest = logits.to(dtype), torch.finfo(dtype).max
    expected = propagate_pixels(logits, image, valid, colour=0.1)
    # powers of two, so that the bits are the same
    logits[1] *= 2.0 ** (math.frexp(largest)[1] - 3)
    assert logits.isfinite().all()
    found = propagate_pixels(logits, image, valid, colour=0.1)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert torch.equal(found[1] / 2.0 ** (math.frexp(largest)[1] - 3), expected[1])
    same = torch.stack([torch.full((H, W), value, dtype=dtype) for value in (largest, -largest)])
    torch.testing.assert_close(propagate_pixels(same, image, colour=0.1), same, rtol=1e-5, atol=0)


@pytest.mark.promise("C28")
def test_a_large_logit_beyond_reach_changes_no_bit() -> None:
    image = torch.randint(256, (3, 20, 60), dtype=torch.uint8)
    logits = torch.randn(2, 20, 60) * 1e-36
    logits[:, :, 55:] = 3e38
    found = propagate_pixels(logits, image, radius=2, steps=3)
    part = propagate_pixels(logits[..., :40].contiguous(), image[..., :40].contiguous(), radius=2, steps=3)
    assert found.isfinite().all() and torch.equal(found[..., :34], part[..., :34])


def test_the_smallest_colour_and_the_largest_radius() -> None:
    logits, image, _ = given()
    flat = torch.zeros_like(image)
    same = propagate_pixels(torch.ones_like(logits), flat, colour=1e-46)
    torch.testing.assert_close(same, torch.ones_like(logits))
    whole = propagate_pixels(logits, image, radius=max(H, W), steps=1)
    assert torch.equal(propagate_pixels(logits, image, radius=2**70, steps=1), whole)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_default_dtype_has_no_part(default: torch.dtype, dtype: torch.dtype) -> None:
    logits, image, valid = given()
    expected = literal(logits.double().numpy(), image.double().numpy(), valid.numpy(), 3, 0.1, 10, 0.95)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = propagate_pixels(logits.to(dtype), image, valid, colour=0.1)
    finally:
        torch.set_default_dtype(before)
    bounds = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    np.testing.assert_allclose(found.numpy(), expected, **bounds)


def test_no_step_and_small_images() -> None:
    logits, image, valid = given()
    assert torch.equal(propagate_pixels(logits, image, valid, steps=0), logits) and reach_of_pixels(3, 0) == 0
    for height, width in ((1, 1), (1, 5), (2, 1)):
        some, small, known = given(height, width, 3)
        known[:] = True
        # the defaults
        expected = literal(some.double().numpy(), small.double().numpy(), known.numpy(), 3, 0.03, 10, 0.95)
        np.testing.assert_allclose(propagate_pixels(some, small).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"image": torch.zeros(3, H, W)}, TypeError, "image has an unsupported dtype; expected one of uint8"),
        ({"image": np.zeros((3, H, W), np.uint8)}, TypeError, "image must be a tensor; .*, got ndarray"),
        ({"image": torch.zeros(H, W, dtype=torch.uint8)}, ValueError, "image has the wrong rank"),
        (
            {"image": torch.zeros(3, H, 2, dtype=torch.uint8)},
            ValueError,
            r"image has the wrong shape; expected \(C, H, W\) with H and W of logits",
        ),
        ({"valid": torch.ones(H, 2, dtype=torch.bool)}, ValueError, r"valid has the wrong shape; expected \(H, W\) of"),
        ({"valid": torch.ones(H, W)}, TypeError, "valid has an unsupported dtype; expected one of bool"),
        ({"valid": [[True] * W] * H}, TypeError, "valid must be a tensor; .*, got list"),
        ({"logits": np.zeros((T, H, W), np.float32)}, TypeError, "logits must be a tensor; .*, got ndarray"),
        ({"logits": torch.full((T, H, W), torch.nan)}, NumericalError, "logits are not finite"),
        ({"alpha": 1.0}, ValueError, "alpha is out of range"),
        ({"colour": 0.0}, ValueError, "colour is out of range"),
        ({"colour": 10**400}, ValueError, "colour is out of range"),
        ({"radius": 0}, ValueError, "radius is out of range"),
        ({"steps": -1}, ValueError, "steps"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], said: str) -> None:
    logits, image, valid = given()
    arguments = {"logits": logits, "image": image, "valid": valid, **change}
    with pytest.raises(error, match=said):
        propagate_pixels(**arguments)
