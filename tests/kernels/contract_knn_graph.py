# SPDX-License-Identifier: Apache-2.0
"""The selection contract on the Triton backend; ``test_interpreter.py`` runs it, and ``--gpu`` on a CUDA device.

Interpreted or compiled is decided when Triton is imported, so this file needs a process of its own.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from drseg_kernels import _knn_fused, _knn_on_chip, _knn_tiles, _patches
from drseg_kernels import knn_graph as kernels
from drseg_kernels._knn_sizes import STRATEGIES, Fused, OnChip, Way
from drseg_kernels._launch import Configuration
from test_knn_graph import *  # noqa: F403
from test_knn_graph import check
from torch import Tensor

from drseg_core import ops
from drseg_core.errors import BackendDtypeError
from drseg_core.ops import _dispatch
from drseg_core.ops.knn_graph import reference, registration

LARGEST_INTERPRETED = 600

# they ask for float64, which the kernels leave to other backends, or for another backend by name
for _name in (
    "test_permuting_nodes_permutes_neighbours",
    "test_scaling_float64_features_changes_nothing",
    "test_float64_features_of_any_size_have_the_same_neighbours",
    "test_decay_stays_in_the_range_of_the_scores",
    "test_scales_are_exact_powers_of_two",
    "test_reference_gives_the_same_for_any_block",
    "test_large_grids_give_the_same_bits_for_any_threads",
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


def on_small_graphs(function):
    """The same function, or a skipped test where the interpreter would take minutes."""

    @functools.wraps(function)
    def guarded(prior, *args, **options):
        if prior.shape[-2] > LARGEST_INTERPRETED:
            pytest.skip(f"more than {LARGEST_INTERPRETED} nodes are too many for the interpreter")
        return function(prior, *args, **options)

    return guarded


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    on_gpu = request.config.getoption("--gpu")
    assert on_gpu or os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1, or pass --gpu"
    for module in (ops, registration):
        function = module.knn_graph
        monkeypatch.setattr(module, "knn_graph", on_device(function, "cuda") if on_gpu else on_small_graphs(function))
    return "cuda" if on_gpu else "cpu"


# whatever is asked of the op, of every way to compute it
@pytest.fixture(params=STRATEGIES)
def backend(request, monkeypatch):
    way = Way(request.param)
    monkeypatch.setattr(kernels, "choose_strategy", lambda device, n, k: way.strategy if way.fits(n, k) else "tiles")
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("dtype") == torch.float64:
        pytest.skip("the kernels leave float64 to other backends")
    _dispatch._last.pop("knn_graph", None)
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


@pytest.mark.parametrize("form", ["additive", "gauss", "multiplicative", "product"])
def test_the_largest_decay_stays_in_range(form, backend):
    prior = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _, score = ops.knn_graph(prior.to(dtype), (2, 3), 3, decay=3.4e38, form=form, return_score=True)
        assert score.isfinite().all()


# tiles that cut the rows, the columns, both or nothing; images that share a tile and images that do not
CONFIGURATIONS = [
    Configuration(tile_bytes=4 * 16 * 20, columns=16, rows_per_program=16, num_warps=4),
    Configuration(tile_bytes=4 * 32 * 40, columns=32, rows_per_program=16, num_warps=1),
    Configuration(tile_bytes=1 << 20, columns=64, rows_per_program=64, num_warps=2),
    OnChip(rows=16, columns=16, depth=16, num_warps=8, num_stages=1),
    OnChip(rows=32, columns=64, depth=16, num_warps=4, num_stages=1),
    Fused(patch=16, depth=16, window=1, splits=3, num_warps=4, num_stages=1),
    Fused(patch=32, depth=16, window=2, splits=1, num_warps=8, num_stages=1),
]
ROW_BY_ROW = Configuration(tile_bytes=4 * 16, columns=16, rows_per_program=1, num_warps=4)


def prepared(batch: int, grid: tuple[int, int], channels: int, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Integer features, whose scores are exact in any order, and full of ties; one node is not finite."""
    random = torch.Generator().manual_seed(seed)
    nodes = grid[0] * grid[1]
    prior = torch.randint(-1, 2, (batch, nodes, channels), generator=random).float()
    inverse = torch.ones(batch, nodes)
    inverse[0, nodes // 2] = torch.nan
    table = torch.randint(0, 3, grid, generator=random).float()
    return prior.to(device), inverse.to(device), table.to(device)


def check_exactly(
    given: tuple[Tensor, ...], k: int, form: str, include_self: bool, chosen: Configuration | OnChip | Fused
) -> None:
    expected = reference.knn_graph(*given, k, form, include_self)
    got = kernels.knn_graph(*given, k, form, include_self, configuration=chosen)
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("chosen", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("form", ["additive", "multiplicative", "product"])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("k", [5, 1, 17, 36])
def test_every_configuration_gives_the_same_bits(k, include_self, form, chosen, device):
    check_exactly(prepared(2, (3, 12), 8, device), k, form, include_self, chosen)


def test_one_row_per_program(device):
    check_exactly(prepared(2, (1, 17), 8, device), 3, "additive", True, ROW_BY_ROW)


def test_more_images_than_a_launch_takes(device, monkeypatch):
    ways = ((_knn_tiles, CONFIGURATIONS[2]), (_knn_on_chip, CONFIGURATIONS[3]), (_knn_fused, CONFIGURATIONS[5]))
    for module, chosen in ways:
        monkeypatch.setattr(module, "LARGEST_GRID_Y", 2)
        check_exactly(prepared(5, (2, 6), 8, device), 4, "additive", True, chosen)


@pytest.mark.parametrize("k", [40, 45, 50])
def test_more_neighbours_than_a_tile_has_columns(k, device):
    check_exactly(prepared(1, (5, 9), 4, device), k, "additive", True, CONFIGURATIONS[0])


def test_scores_that_rise_and_fall_with_the_index(device):
    # rising: every tile replaces the whole list; falling: no tile after the first has anything to add
    grid, k = (1, 100), 12
    angle = torch.linspace(0, 1.5, 100)
    chosen = Configuration(tile_bytes=1 << 20, columns=16, rows_per_program=128, num_warps=4)
    for order in (angle, angle.flip(0)):
        prior = torch.stack([order.cos(), order.sin()], -1)[None]
        scaled, inverse = reference.prepare_prior(prior.to(device))
        table = reference.decay_table(grid, 0.0, "additive", torch.float32, scaled.device)
        index, score = kernels.knn_graph(scaled, inverse, table, k, "additive", True, configuration=chosen)
        check({"prior": prior, "grid": grid, "decay": 0.0}, index.cpu(), score.cpu())


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


def test_a_way_to_compute_is_chosen_by_name_by_sizes_or_by_the_rule(device):
    given = prepared(1, (3, 12), 8, device)
    expected = reference.knn_graph(*given, 5, "additive", True)[0]
    for options in ({"strategy": "tiles"}, {"strategy": "on_chip"}, {"strategy": "fused"}, {}):
        assert torch.equal(kernels.knn_graph(*given, 5, "additive", True, **options)[0], expected)
    for options, message in (
        ({"strategy": "fast"}, "strategy is unknown; expected one of tiles, on_chip, fused, got 'fast'"),
        ({"strategy": "tiles", "configuration": CONFIGURATIONS[3]}, "configuration is for on_chip; expected one for"),
        ({"strategy": "on_chip", "configuration": CONFIGURATIONS[5]}, "configuration is for fused; expected one for"),
    ):
        with pytest.raises(ValueError, match=f"^knn_graph: {message}"):
            kernels.knn_graph(*given, 5, "additive", True, **options)
    many = prepared(1, (41, 25), 1, device)
    with pytest.raises(ValueError, match="^knn_graph: too many nodes for on_chip; expected at most 1024, got 1025"):
        kernels.knn_graph(*many, 5, "additive", True, strategy="on_chip")
    with pytest.raises(ValueError, match="^knn_graph: too many neighbours for fused; expected at most 960, got 961"):
        kernels.knn_graph(*many, 961, "additive", True, strategy="fused")


# patches of 16 nodes, of which a row looks at one first and programs share the rest
SMALL_PATCHES = CONFIGURATIONS[5]


def test_a_row_without_room_for_another_patch_keeps_its_best(device):
    # six patches in one segment, which has room for four; the lowest indices come last in most rows
    chosen = Fused(patch=16, depth=16, window=3, splits=1, num_warps=4, num_stages=1)
    given = (torch.ones(1, 90, 3, device=device), torch.ones(1, 90, device=device), torch.zeros(1, 90, device=device))
    check_exactly(given, 7, "additive", True, chosen)


@pytest.mark.parametrize("grid", [(7, 9), (1, 70), (71, 1), (3, 25)], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_in_many_patches(value, grid, device):
    # every patch adds to every row, and the lowest index comes last; at 0 the bounds of patches are what they hold
    nodes = grid[0] * grid[1]
    prior, inverse = torch.full((1, nodes, 3), value, device=device), torch.ones(1, nodes, device=device)
    for include_self in (True, False):
        check_exactly((prior, inverse, torch.zeros(grid, device=device)), 7, "additive", include_self, SMALL_PATCHES)


@pytest.mark.parametrize("form", ["additive", "multiplicative", "product"])
@pytest.mark.parametrize("decay", [6.0, -6.0])
@pytest.mark.parametrize("grid", [(7, 13), (3, 30)], ids=str)
def test_patches_that_cannot_matter_change_nothing(grid, decay, form, device):
    # powers of two keep every score exact, and a negative decay puts the best of them far away
    random = torch.Generator().manual_seed(grid[0])
    nodes = grid[0] * grid[1]
    prior = torch.randint(-2, 3, (1, nodes, 6), generator=random).float()
    inverse = 2.0 ** -torch.randint(0, 5, (1, nodes), generator=random).float()
    distance = torch.arange(grid[0])[:, None] + torch.arange(grid[1])
    table = (decay * distance / 2).floor()
    table = table if form == "additive" else 2.0 ** -(table / 4).floor()
    given = (prior.to(device), inverse.to(device), table.to(device))
    check_exactly(given, 9, form, True, SMALL_PATCHES)


@pytest.mark.parametrize("include_self", [True, False])
def test_infinite_decays_rule_out(include_self, device):
    prior, inverse, table = prepared(1, (5, 17), 4, device)
    table[:, 3:] = torch.inf
    table[0, 0] = torch.inf
    # more neighbours than a node has within reach
    check_exactly((prior, inverse, table), 40, "additive", include_self, SMALL_PATCHES)


def test_a_workspace_for_a_part_of_the_patches(device, monkeypatch):
    # of three images, each of four patches: less than one image, and more than one
    given = prepared(3, (4, 13), 4, device)
    for blocks in (3, 9):
        monkeypatch.setattr(_knn_fused, "WORKSPACE", blocks * (8 * 16 * 4 * 65 + 4 * 4))
        check_exactly(given, 3, "additive", True, SMALL_PATCHES)


def test_what_is_listed_is_what_may_matter(device):
    # the kernel between the searches alone: thresholds and lengths are given, candidates there are none
    random = torch.Generator().manual_seed(0)
    patches = _patches.cut((21, 28), 16)
    window = (2, 3)
    length = torch.rand(1, 588, generator=random)
    length[0, ::7] = 0
    length[0, 200] = torch.inf
    inverse = torch.ones(1, 588)
    inverse[0, 5::11] = torch.nan
    threshold = torch.randn(16, generator=random) + 0.7
    lists = []
    for form in ("additive", "product"):
        table = 3 * torch.rand(21, 28, generator=random)
        table[17:] = torch.inf
        given = [inverse, patches.order(inverse.device), patches.windows(window, inverse.device), length]
        given += [patches.longest(length), patches.reach(table, form == "additive")]
        keys = threshold.view(torch.int32)
        keys = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
        chosen = Fused(patch=16, depth=16, window=1, splits=1, num_warps=4, num_stages=1)
        constants = _knn_fused.narrow_constants(4, form, True, chosen)
        for here in (0, 9, patches.count - 1):
            state = [torch.zeros(16 * 2 * 64, dtype=torch.int64), torch.zeros(32, dtype=torch.int32)]
            state += [keys.repeat_interleave(2), torch.full((patches.count,), -1, dtype=torch.int32)]
            state = [value.to(device) for value in [*given, *state, torch.zeros(1, dtype=torch.int32)]]
            sizes = (0, here, 588, 4, patches.count, patches.across, *window)
            _knn_fused._knn_graph_fwd_kernel_narrow[(1, 1)](*state, *sizes, **constants, **_knn_fused.no_pipeline(4))
            live, listed = state[-2].cpu(), int(state[-1])

            order, first = given[1][here], int(given[2][here, 0])
            rows = (order >= 0) & ~inverse[0, order.clamp_min(0).long()].isnan()
            own = length[0, order.clamp_min(0).long()]
            expected = []
            for other in range(patches.count):
                down = abs(here // patches.across - other // patches.across)
                reach = given[5][down, abs(here % patches.across - other % patches.across)]
                bound = own * given[4][0, other]
                bound = bound - reach if form == "additive" else bound * reach
                y, x = other // patches.across - first // patches.across, other % patches.across
                inside = 0 <= y < window[0] and 0 <= x - first % patches.across < window[1]
                if not inside and (rows & ~(bound < threshold)).any():
                    expected.append(other)
            assert live[:listed].tolist() == expected
            lists.append(len(expected))
    assert 0 < min(lists) < patches.count - 6
