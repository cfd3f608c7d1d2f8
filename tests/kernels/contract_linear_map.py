# SPDX-License-Identifier: Apache-2.0
"""The contract of ``linear_map`` on the Triton backend; ``test_interpreter.py`` runs it, and ``--gpu``.

Errors are compared with those of a float32 product, one term after the other, as the library's kernels without tensor
cores add, and with the bound of ``linear_map.py``. A model in NumPy has the rounding of a tensor core.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from drseg_kernels import linear_map as kernels
from torch import Tensor
from torch.library import opcheck

from drseg_core import ops
from drseg_core.errors import BackendDtypeError
from drseg_core.nn import PDGR
from drseg_core.ops.linear_map import reference

UNIT = 2.0**-24
LEAST_TERMS = kernels.LEAST_TERMS


@pytest.fixture
def device(request) -> str:
    on_gpu = request.config.getoption("--gpu")
    assert on_gpu or os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1, or pass --gpu"
    return "cuda" if on_gpu else "cpu"


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch) -> None:
    """Small products and short sums are the library's."""
    monkeypatch.setattr(kernels, "LEAST_FLOP", 0)
    monkeypatch.setattr(kernels, "LEAST_TERMS", 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spiky(x: Tensor) -> Tensor:
    """One entry of a row ten thousand times the others."""
    at = torch.randint(x.shape[-1], (*x.shape[:-1], 1), generator=torch.Generator().manual_seed(3))
    return x.scatter(-1, at, 1e4)


DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "uniform": lambda x: torch.special.ndtr(x),
    "rows of every scale": lambda x: x * torch.logspace(-25, 6, x.shape[-2])[:, None],
    "gradients of 1e-8": lambda x: x * 1e-8,
    "gradients of 1e-30": lambda x: x * 1e-30,
    "spiky": spiky,
    "ReLU": lambda x: x.relu(),
}


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """Rows of (R, K) by rows of (C, K), each term multiplied and added with one rounding to float32."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for k in range(left.shape[1]):
        total = (total + left[:, k, None].double() * right[None, :, k].double()).float().double()
    return total


def errors(got: Tensor, left: Tensor, right: Tensor) -> tuple[float, float]:
    """Largest error and root mean square, in units of the lengths of both rows."""
    left, right = left.double(), right.double()
    size = left.norm(dim=1)[:, None] * right.norm(dim=1)[None]
    error = (got.double().cpu() - left @ right.T) / size / UNIT
    return float(error.abs().max()), float(error.square().mean().sqrt())


def bound(left: Tensor, right: Tensor, pieces: int = 1) -> Tensor:
    """The bound of ``linear_map.py``."""
    left, right = left.double().abs(), right.double().abs()
    terms = left.shape[1]
    share = (160 + -(-terms // kernels.TERMS) + pieces) * UNIT * (left @ right.T)
    return share + terms * 2.0**-35 * left.amax(1)[:, None] * right.amax(1)[None] + 2.0**-148


def no_worse(got: Tensor, left: Tensor, right: Tensor, pieces: int = 1) -> None:
    worst, usual = errors(got, left, right)
    worst_of_float32, usual_of_float32 = errors(float32_product(left, right), left, right)
    assert worst <= worst_of_float32 and usual <= usual_of_float32
    assert ((got.double().cpu() - left.double() @ right.double().T).abs() <= bound(left, right, pieces)).all()


@pytest.mark.promise("C1", "C4")
@pytest.mark.parametrize("channels", [384, 1, 5, 127, 128, 129, 1100])
def test_no_less_accurate_than_float32_of_any_width(channels, device, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_TERMS", LEAST_TERMS)
    x, weight = draw(2, 13, channels), draw(21, channels, seed=1)
    got = ops.linear_map(x.to(device), weight.to(device), backend="triton")
    assert ops.last_backend("linear_map") == "triton" and got.shape == (2, 13, 21) and got.dtype == torch.float32
    if channels < LEAST_TERMS:
        assert torch.equal(got, torch.nn.functional.linear(x.to(device), weight.to(device)))
    else:
        no_worse(got.flatten(0, 1), x.flatten(0, 1), weight)


@pytest.mark.promise("C1", "C4")
@pytest.mark.parametrize("kind", DATA)
def test_no_less_accurate_than_float32_on_any_data(kind, device):
    x, weight = DATA[kind](draw(26, 384)), draw(21, 384, seed=1)
    got = kernels.linear_map(x[None].to(device), weight.to(device))[0]
    no_worse(got, x, weight)
    # the other operand may be the difficult one
    no_worse(kernels.linear_map(weight[None].to(device), x.to(device))[0], weight, x)


@pytest.mark.promise("C3", "C4")
@pytest.mark.parametrize("kind", ["normal", "gradients of 1e-30", "rows of every scale", "spiky", "ReLU"])
def test_gradients_no_less_accurate_than_those_of_float32(kind, device, monkeypatch):
    monkeypatch.setattr(kernels, "_PIECE", 128)
    x, weight, grad = draw(2, 150, 24), draw(160, 24, seed=1), DATA[kind](draw(2, 150, 160, seed=2))
    given = (grad.to(device), x.to(device), weight.to(device))
    to_x, to_weight = kernels.linear_map_backward(*given, [True, True])
    assert to_x.shape == x.shape and to_weight.shape == weight.shape
    no_worse(to_weight, grad.flatten(0, 1).T, x.flatten(0, 1).T, pieces=3)
    no_worse(to_x.flatten(0, 1), grad.flatten(0, 1), weight.T)
    for place, mask in enumerate(([True, False], [False, True])):
        alone = kernels.linear_map_backward(*given, mask)
        assert torch.equal(alone[place], (to_x, to_weight)[place]) and not alone[1 - place].numel()


def parts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """High and low parts of rows in float64, and the exponents of their scales."""
    exponent = np.frexp(np.abs(rows).max(1))[1]
    scaled = np.ldexp(rows, 13 - exponent[:, None]).astype(np.float32)
    high = scaled.astype(np.float16)
    return high.astype(float), (scaled - high.astype(np.float32)).astype(np.float16).astype(float), exponent


def cut(value: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """What a number of 24 bits with the exponent of ``largest`` holds of a value."""
    step = np.ldexp(1.0, np.frexp(largest)[1] - 24)
    return np.trunc(value / step) * step


def tensor_core(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``total`` and the sums of products, 16 at a time, cut off as the hardware does."""
    for k in range(0, left.shape[1], 16):
        terms = np.concatenate([total[None], left.T[k : k + 16, :, None] * right.T[k : k + 16, None]])
        total = cut(terms, np.abs(terms).max(0)).sum(0)
        total = cut(total, total)
    return total


def modelled(left: Tensor, right: Tensor, multiply: Callable[..., np.ndarray]) -> Tensor:
    """The kernels' product in NumPy, with another way to multiply."""
    terms = -(-left.shape[1] // kernels.TERMS) * kernels.TERMS
    padded = [np.pad(rows.numpy(), ((0, 0), (0, terms - rows.shape[1]))) for rows in (left, right)]
    (high, low, of_left), (other_high, other_low, of_right) = map(parts, padded)
    total = np.zeros((len(left), len(right)), np.float32)
    for start in range(0, terms, kernels.TERMS):
        a, a_low, b, b_low = (part[:, start : start + kernels.TERMS] for part in (high, low, other_high, other_low))
        part = multiply(a_low, b, np.zeros(total.shape))
        part = multiply(a, b_low, part)
        total = total + multiply(a, b, part).astype(np.float32)
    return torch.from_numpy(np.ldexp(total, of_left[:, None] + of_right[None] - 26))


WAYS = {"tensor core": tensor_core, "float64": lambda left, right, total: total + left @ right.T}


@pytest.mark.promise("C4")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", DATA)
def test_the_bound_holds_for_a_model_of_the_hardware(kind, way, device):
    for terms in (1, 40, 384, 1100):
        left, right = DATA[kind](draw(20, terms)), draw(9, terms, seed=1)
        got = modelled(left, right, WAYS[way])
        exact = left.double() @ right.double().T
        assert ((got.double() - exact).abs() <= bound(left, right)).all()
        if terms >= 384:
            # what is claimed of the usual error; a spike is most of a sum
            assert errors(got, left, right)[1] <= (1.6 if kind == "spiky" else 0.5)


def test_the_model_has_the_kernels_scales_and_parts(device):
    """One term of a sum, where the ways to add do not differ."""
    x, weight = draw(5, 32), draw(7, 32, seed=1)
    keep = torch.zeros(32)
    keep[3] = 1
    got = kernels.linear_map((x * keep)[None].to(device), (weight * keep).to(device))[0]
    expected = modelled(x * keep, weight * keep, WAYS["float64"])
    torch.testing.assert_close(got.cpu(), expected, rtol=2 * UNIT, atol=0)


@pytest.mark.promise("C4")
def test_small_entries_beside_large_ones_keep_their_digits(device):
    """Entries of 2**-12 of the largest, which meets a zero."""
    x, weight = draw(6, 64) * 2.0**-12, draw(7, 64, seed=1) * 2.0**-12
    x[:, 0], weight[:, 1] = 1.0, 1.0
    x[:, 1], weight[:, 0] = 0.0, 0.0
    got = kernels.linear_map(x[None].to(device), weight.to(device))[0]
    # of the small entries alone: nothing of the large ones is in the sum
    worst, _ = errors(got, x[:, 2:], weight[:, 2:])
    assert worst <= 4


@pytest.mark.promise("C11")
def test_finite_entries_alone_decide_on_a_scale(device):
    """Exponents of both operands, as the first kernel writes them."""
    x = torch.ones(3, 64)
    x[0, 0], x[1, 5], x[2, 7] = torch.inf, torch.nan, -torch.inf
    found: list[Tensor] = []
    empty = torch.empty

    def noted(*size: int, **how: object) -> Tensor:
        made = empty(*size, **how)
        if made.dtype == torch.int32:
            found.append(made)
        return made

    torch.empty = noted
    try:
        kernels.multiply(kernels.rows_of(x.to(device)), kernels.rows_of(torch.ones(2, 64, device=device)), 64)
    finally:
        torch.empty = empty
    assert found[0].tolist() == [[1] * 5]


@pytest.mark.promise("C5")
def test_rows_of_any_size(device):
    """Products of the largest and the smallest numbers; what leaves the range does so at the end."""
    size = torch.tensor([3e38, 1e38, 1e20, 1.0, 1e-20, 2e-38, 1e-40, 1e-44, 0.0])
    x = size[:, None] * (0.5 + 0.5 * torch.rand(9, 32, generator=torch.Generator().manual_seed(0)))
    weight = x.flip(0) * torch.where(torch.arange(32) % 2 == 0, 1.0, -0.25)
    got = kernels.linear_map(x[None].to(device), weight.to(device))[0].cpu()
    exact = x.double() @ weight.double().T
    assert not got.isnan().any() and torch.equal(got.isinf(), exact.abs() > torch.finfo(torch.float32).max)
    inside = got.isfinite()
    assert ((got.double() - exact).abs() <= bound(x, weight))[inside].all() and inside.sum() > 60


@pytest.mark.promise("C11")
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_keeps_to_itself(bad, device):
    x, weight, grad = draw(2, 40, 70), draw(33, 70, seed=1), draw(2, 40, 33, seed=2)
    usual = kernels.linear_map(x.to(device), weight.to(device))
    broken = x.clone()
    broken[1, 3, 69] = bad
    got = kernels.linear_map(broken.to(device), weight.to(device))
    assert got[1, 3].isnan().all()
    assert torch.equal(got[0], usual[0]) and torch.equal(got[1, 4:], usual[1, 4:])
    broken_weight = weight.clone()
    broken_weight[5, 0] = bad
    got = kernels.linear_map(x.to(device), broken_weight.to(device))
    assert got[..., 5].isnan().all() and torch.equal(got[..., 6:], usual[..., 6:])
    # of the gradients a node or a channel
    usual = kernels.linear_map_backward(grad.to(device), x.to(device), weight.to(device), [True, True])
    _, to_weight = kernels.linear_map_backward(grad.to(device), broken.to(device), weight.to(device), [False, True])
    assert to_weight[:, 69].isnan().all() and torch.equal(to_weight[:, :69], usual[1][:, :69])


@pytest.mark.promise("C13")
@pytest.mark.parametrize("nodes", [6, 30])
def test_layouts(nodes, device, monkeypatch):
    """Rows, maps, and what is read as neither, forward and backward: the same bits."""
    monkeypatch.setattr(kernels, "_PIECE", 64)
    x, weight, grad = draw(3, nodes, 19), draw(18, 19, seed=1), draw(3, nodes, 18, seed=2)

    def both(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        given = (x.to(device), weight.to(device))
        return kernels.linear_map(*given), *kernels.linear_map_backward(grad.to(device), *given, [True, True])

    usual = both(x, weight, grad)

    def forms(value: Tensor) -> list[Tensor]:
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), torch.nan)
        wide[..., ::2] = value
        return [value.mT.contiguous().mT, wide[..., ::2], wide.repeat_interleave(2, 0)[::2, ..., ::2]]

    for laid in ((form, weight, grad) for form in forms(x)):
        assert all(map(torch.equal, both(*laid), usual))
    for laid in [(x, form, grad) for form in forms(weight)[:2]] + [(x, weight, form) for form in forms(grad)]:
        assert all(map(torch.equal, both(*laid), usual))
    one = both(x[:1].expand(3, -1, -1), weight, grad)
    assert torch.equal(one[0][0], usual[0][0])


@pytest.mark.promise("C7", "C24")
def test_bits_do_not_depend_on_the_batch_or_the_call(device):
    # a sample is a whole number of tiles: the interpreter's products depend on the place in a tile
    x, weight = draw(3, 64, 200).to(device), draw(10, 200, seed=1).to(device)
    usual = kernels.linear_map(x, weight)
    assert torch.equal(kernels.linear_map(x, weight), usual)
    for n in range(3):
        assert torch.equal(kernels.linear_map(x[n : n + 1], weight)[0], usual[n])


def test_sums_over_many_tokens_go_in_pieces():
    assert kernels.piece_of(1, 512) == 512 and kernels.piece_of(1, 513) == 320 and kernels.piece_of(256, 5000) == 5056
    # eight images of 24 x 24 nodes
    assert kernels.piece_of(18, 4608) == 512


def check_through_the_op(x: Tensor, weight: Tensor) -> None:
    given = [x.requires_grad_(), weight.requires_grad_()]
    y = ops.linear_map(*given, backend="triton")
    grad = torch.randn_like(y)
    expected = [kernels.linear_map(x, weight), *kernels.linear_map_backward(grad, x, weight, [True, True])]
    assert all(map(torch.equal, (y, *torch.autograd.grad(y, given, grad, retain_graph=True)), expected))
    for needed, right in zip(given, expected[1:], strict=True):
        assert torch.equal(torch.autograd.grad(y, needed, grad, retain_graph=True)[0], right)
    (once,) = torch.autograd.grad(y, given[0], grad, create_graph=True)
    # it is linear in the gradient alone, and no second derivative is implemented
    with pytest.raises(RuntimeError, match="^linear_map: backward is not twice differentiable"):
        (once * once.detach()).sum().backward()


@pytest.mark.promise("C3", "C16")
def test_gradients_come_through_the_op(device):
    x, weight = draw(2, 18, 33).to(device), draw(34, 33, seed=1).to(device)
    check_through_the_op(x, weight)
    check_through_the_op(x.mT.contiguous().mT.detach(), weight)
    alone = ops.linear_map(x[0], weight, backend="triton")
    assert torch.equal(alone, ops.linear_map(x, weight, backend="triton")[0])


@pytest.mark.promise("C4")
def test_a_setting_or_another_dtype_leaves_it_to_the_library(device):
    x, weight = draw(2, 18, 64).to(device), draw(32, 64, seed=1).to(device)
    mine = ops.linear_map(x, weight, backend="triton")
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(ops.linear_map(x, weight, backend="triton"), torch.nn.functional.linear(x, weight))
        to_x, _ = kernels.linear_map_backward(mine, x, weight, [True, False])
        assert torch.equal(to_x, torch.matmul(mine, weight))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(ops.linear_map(x, weight, backend="triton"), mine)
    for dtype in (torch.float16, torch.bfloat16):
        given = x.to(dtype), weight.to(dtype)
        assert torch.equal(ops.linear_map(*given, backend="triton"), reference.linear_map(*given))
    with pytest.raises(BackendDtypeError, match="^linear_map: backend triton cannot take torch.float64"):
        ops.linear_map(x.double(), weight.double(), backend="triton")
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ops.linear_map(x, weight, backend="triton"), torch.nn.functional.linear(x, weight))


@pytest.mark.promise("C14")
def test_empty(device):
    for shape, width in (((0, 3, 32), 4), ((2, 0, 32), 4), ((2, 3, 0), 4), ((2, 3, 32), 0)):
        x, weight = torch.ones(shape, device=device), torch.ones(width, shape[2], device=device)
        y = kernels.linear_map(x, weight)
        assert y.shape == (*shape[:2], width) and not y.any()
        to_x, to_weight = kernels.linear_map_backward(y, x, weight, [True, True])
        assert to_x.shape == shape and to_weight.shape == weight.shape and not to_x.any() and not to_weight.any()


@pytest.mark.promise("C21")
def test_compiles_and_passes_opcheck(device):
    x, weight = draw(2, 18, 33).to(device), draw(34, 33, seed=1).to(device)
    torch.compiler.reset()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_map(x, weight, backend="triton") * 2

    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x, weight), function(x, weight))
    for form in (x, x.mT.contiguous().mT):
        opcheck(torch.ops.drseg.linear_map.default, (form, weight, "triton"))
    opcheck(
        torch.ops.drseg.linear_map_backward.default, (draw(2, 18, 34).to(device), x, weight, [True, True], "triton")
    )


@pytest.mark.promise("C1")
def test_pdgr_multiplies_by_parts(device, monkeypatch):
    torch.manual_seed(0)
    module = PDGR(33, 40, k=5, edge_hidden=20, backend="triton").to(device)
    features, prior = torch.randn(2, 33, 4, 5, device=device), torch.randn(2, 40, 4, 5, device=device)
    products: list[int] = []
    multiply = kernels.multiply

    def noted(left: kernels.Rows, right: kernels.Rows, terms: int, in_pieces: bool = False) -> Tensor:
        products.append(terms)
        return multiply(left, right, terms, in_pieces)

    monkeypatch.setattr(kernels, "multiply", noted)
    output = module(features.requires_grad_(), prior)
    assert products == [40, 33, 33]
    output.square().sum().backward()
    # to features and weights of two layers, and to the projection's
    assert sorted(products[3:]) == [33, 33, 40, 40, 40]
    exact = PDGR(33, 40, k=5, edge_hidden=20, backend="reference").double()
    exact.load_state_dict({name: value.double().cpu() for name, value in module.state_dict().items()})
    right = exact(features.detach().double().cpu(), prior.double().cpu())
    assert (output.detach().cpu() - right).abs().max() < 1e-4
