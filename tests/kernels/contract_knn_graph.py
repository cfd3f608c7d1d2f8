# SPDX-License-Identifier: Apache-2.0
"""The selection contract on the Triton backend; ``test_interpreter.py`` runs it, and ``--gpu`` on a CUDA device.

Interpreted or compiled is decided when Triton is imported, so this file needs a process of its own.
"""

from __future__ import annotations

import functools
import os

import pytest
import test_knn_graph
import torch
from drseg_kernels import _products
from drseg_kernels import knn_graph as kernels
from drseg_kernels._launch import Selection
from test_knn_graph import *  # noqa: F403
from test_knn_graph import check
from torch import Tensor

from drseg_core import ops
from drseg_core.errors import BackendDtypeError
from drseg_core.ops import _dispatch
from drseg_core.ops.knn_graph import reference
from drseg_core.ops.prepare_prior import reference as prepare_reference

LARGEST_INTERPRETED = 600

# they ask for float64, which the kernels leave to other backends, or for another backend by name
for _name in (
    "test_permuting_nodes_permutes_neighbours",
    "test_scaling_float64_features_changes_nothing",
    "test_float64_features_of_any_size_have_the_same_neighbours",
    "test_decay_stays_in_the_range_of_the_scores",
    "test_reference_gives_the_same_for_any_block",
    "test_opcheck",
):
    del globals()[_name]


def on_device(function, device: str):
    """The same function for tensors of the CPU, computed on ``device``."""

    @functools.wraps(function)
    def moved(*args, **options):
        args = [value.to(device) if isinstance(value, Tensor) else value for value in args]
        options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
        result = function(*args, **options)
        return tuple(value.cpu() for value in result) if isinstance(result, tuple) else result.cpu()

    return moved


def on_small_graphs(function, most: int = LARGEST_INTERPRETED, whom: str = "the interpreter"):
    """The same function, or a skipped test where a graph is none for ``whom``."""

    @functools.wraps(function)
    def guarded(prior, *args, **options):
        if prior.shape[-2] > most:
            pytest.skip(f"more than {most} nodes are too many for {whom}")
        return function(prior, *args, **options)

    return guarded


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    on_gpu = request.config.getoption("--gpu")
    assert on_gpu or os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1, or pass --gpu"
    for module, name in ((ops, "knn_graph"), (test_knn_graph, "select")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, on_device(function, "cuda") if on_gpu else on_small_graphs(function))
    return "cuda" if on_gpu else "cpu"


@pytest.fixture
def backend(request):
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("dtype") == torch.float64:
        pytest.skip("the kernels leave float64 to other backends")
    _dispatch._last.of.pop("knn_graph", None)
    with ops.use_backend("triton"):
        yield "triton"
    # a test that was skipped has called nothing
    assert ops.last_backend("knn_graph") in ("triton", None)


def test_float64_is_refused_by_name_and_left_to_others():
    prior = torch.ones(1, 6, 3, dtype=torch.float64)
    with pytest.raises(BackendDtypeError, match="expected one of torch.float32, torch.float16, torch.bfloat16, got"):
        ops.knn_graph(prior, (2, 3), 2, backend="triton")
    ops.knn_graph(prior, (2, 3), 2)
    assert ops.last_backend("knn_graph") != "triton"


@pytest.mark.promise("C5")
@pytest.mark.parametrize("form", ["additive", "gauss", "multiplicative", "product"])
def test_the_largest_decay_stays_in_range(form, backend):
    prior = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _, score = ops.knn_graph(prior.to(dtype), (2, 3), 3, decay=3.4e38, form=form, return_score=True)
        assert score.isfinite().all()


# tiles that cut the rows, the columns, both or nothing; images that share a tile and images that do not
CONFIGURATIONS = [
    Selection(tile_bytes=4 * 16 * 20, block_m=16, block_n=16, num_warps=4),
    Selection(tile_bytes=4 * 32 * 40, block_m=16, block_n=32, num_warps=1),
    Selection(tile_bytes=1 << 20, block_m=64, block_n=64, num_warps=2),
]
ROW_BY_ROW = Selection(tile_bytes=4 * 16, block_m=1, block_n=16, num_warps=4)


def prepared(batch: int, grid: tuple[int, int], channels: int, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Integer features, whose scores are exact in any order, and full of ties; one node is not finite."""
    random = torch.Generator().manual_seed(seed)
    nodes = grid[0] * grid[1]
    prior = torch.randint(-1, 2, (batch, nodes, channels), generator=random).float()
    inverse = torch.ones(batch, nodes)
    inverse[0, nodes // 2] = torch.nan
    table = torch.randint(0, 3, grid, generator=random).float()
    return prior.to(device), inverse.to(device), table.to(device)


def check_exactly(given: tuple[Tensor, ...], k: int, form: str, include_self: bool, chosen: Selection) -> None:
    expected = reference.knn_graph(*given, k, form, include_self)
    got = kernels.knn_graph(*given, k, form, include_self, sizes=chosen)
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("chosen", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("form", ["additive", "multiplicative", "product"])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("k", [5, 1, 17, 36])
def test_every_configuration_gives_the_same_bits(k, include_self, form, chosen, device):
    check_exactly(prepared(2, (3, 12), 8, device), k, form, include_self, chosen)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("chosen", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("rows", [(0, 5), (7, 33), (35, 36), (4, 4)], ids=str)
def test_some_rows_of_every_configuration(rows, chosen, device):
    given = (*prepared(3, (3, 12), 8, device), 17, "additive", False)
    expected = reference.knn_graph(*given)
    for value, right in zip(kernels.knn_graph(*given, rows=rows, sizes=chosen), expected, strict=True):
        torch.testing.assert_close(value, right[:, rows[0] : rows[1]], rtol=0, atol=0, equal_nan=True)


def test_one_row_per_program(device):
    check_exactly(prepared(2, (1, 17), 8, device), 3, "additive", True, ROW_BY_ROW)


@pytest.mark.promise("C23")
def test_more_images_than_a_launch_takes(device, monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST_GRID_Y", 2)
    check_exactly(prepared(5, (2, 6), 8, device), 4, "additive", True, CONFIGURATIONS[2])


@pytest.mark.promise("C8")
@pytest.mark.parametrize("k", [40, 45, 50])
def test_more_neighbours_than_a_tile_has_columns(k, device):
    check_exactly(prepared(1, (5, 9), 4, device), k, "additive", True, CONFIGURATIONS[0])


def test_scores_that_rise_and_fall_with_the_index(device):
    # rising: every tile replaces the whole list; falling: no tile after the first has anything to add
    grid, k = (1, 100), 12
    angle = torch.linspace(0, 1.5, 100)
    chosen = Selection(tile_bytes=1 << 20, block_m=128, block_n=16, num_warps=4)
    for order in (angle, angle.flip(0)):
        prior = torch.stack([order.cos(), order.sin()], -1)[None]
        scaled, inverse = prepare_reference.prepare_prior(prior.to(device))
        table = reference.decay_table(grid, 0.0, "additive", torch.float32, scaled.device)
        index, score = kernels.knn_graph(scaled, inverse, table, k, "additive", True, sizes=chosen)
        check({"prior": prior, "grid": grid, "decay": 0.0}, index.cpu(), score.cpu())


@pytest.mark.promise("C15")
def test_nothing_outside_the_result_is_written(device):
    prior, inverse, table = prepared(2, (4, 9), 8, device)
    copies = [value.clone() for value in (prior, inverse, table)]
    for padding in (torch.nan, 1e30):
        # the tensors lie inside larger ones, and what surrounds them must not matter
        wide = [torch.full((value.numel() + 64,), padding, device=device) for value in copies]
        inner = [
            outer[32 : 32 + value.numel()].view(value.shape).copy_(value)
            for outer, value in zip(wide, copies, strict=True)
        ]
        check_exactly(tuple(inner), 7, "additive", True, CONFIGURATIONS[1])
        for outer, value in zip(wide, copies, strict=True):
            kept = outer[32 : 32 + value.numel()].view(value.shape)
            torch.testing.assert_close(kept, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 5, 7, 3), (2, 70, 65, 40), (3, 1, 130, 33)], ids=str)
def test_products_of_our_own(shape, device, monkeypatch):
    """Where a setting lets the library multiply less than float32; rows of a larger tensor, and what is around them."""
    images, rows, columns, channels = shape
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(images, count + 9, channels, generator=random).to(device) for count in (rows, columns))
    out = torch.full((images + 2, rows, columns), torch.nan, device=device)
    monkeypatch.setattr(_products, "LARGEST_GRID_Y", 2)
    _products.product(left[:, 4 : 4 + rows], right[:, :columns], out[1:-1])
    exact = left[:, 4 : 4 + rows].double() @ right[:, :columns].double().mT
    torch.testing.assert_close(out[1:-1].double(), exact, rtol=0, atol=2e-6 * channels**0.5 * 4)
    assert out[0].isnan().all() and out[-1].isnan().all()


@pytest.mark.promise("C4")
def test_a_gpu_that_is_set_to_less_than_float32_takes_them(device):
    if device == "cpu":
        pytest.skip("of a device")
    inputs = {"prior": torch.randn(2, 100, 64), "grid": (10, 10), "k": 9}
    torch.set_float32_matmul_precision("high")
    try:
        assert not _products.float32_is_whole()
        check(inputs, *ops.knn_graph(**inputs, return_score=True, backend="triton"))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert _products.float32_is_whole()


@pytest.mark.promise("C23")
def test_offsets_beyond_32_bits(device):
    if device == "cpu":
        pytest.skip("11 GB of results need a device")
    nodes, k = 50_000, 512
    prior = torch.randn(100, nodes, 1, device=device)
    inverse = torch.ones(100, nodes, device=device)
    table = torch.zeros(1, nodes, device=device)
    index, _ = kernels.knn_graph(prior, inverse, table, k, "additive", True)
    alone, _ = kernels.knn_graph(prior[-1:], inverse[-1:], table, k, "additive", True)
    assert index.numel() > 2**31 and torch.equal(index[-1:], alone)
