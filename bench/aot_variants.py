# SPDX-License-Identifier: Apache-2.0
"""What ``aot.py`` compiles: every Triton kernel in the sizes that the launchers choose for a device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments, ready for the compiler.

    Args:
        name: what the baseline calls it.
        kernel: the kernel itself.
        types: of its pointers and floating-point arguments; every other argument is an int32.
        constants: compile-time arguments.
        options: what the compiler is told.
        shared_bytes: shared memory that the launcher expects it to take at most.
        even: sizes that are known to be multiples of 16, as the usual widths are.
        bounded: the launcher takes no image whose places int32 does not count.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    shared_bytes: int
    even: tuple[str, ...] = ()
    bounded: bool = False


# pointers of every kernel of knn_graph
_SELECTION = {f"{name}_ptr": "*fp32" for name in ("inverse_norm", "table", "score")} | {"index_ptr": "*i32"}
_ROUNDED = {
    **_SELECTION,
    **{f"{name}_ptr": "*fp32" for name in ("product", "prior", "residual", "loss")},
    **{f"{name}_ptr": "*i32" for name in ("list", "length", "count")},
    "slack": "fp32",
}
_LIVE = {
    **{f"{name}_ptr": "*fp32" for name in ("inverse_norm", "residual", "loss", "table", "bound", "score", "least")},
    **{f"{name}_ptr": "*i32" for name in ("list", "count", "visited")},
    "slack": "fp32",
}
_DTYPES = ("fp32", "bf16")

# nodes, neighbours, form, include_self, and whether the row already holds a result: every branch of the kernel, the
# smallest and the largest sizes
KNN_GRAPH = (
    (576, 75, "additive", True, True),
    (16_384, 75, "additive", True, True),
    (16_384, 75, "additive", True, False),
    (16_384, 75, "multiplicative", False, False),
    (16_384, 75, "product", True, False),
    (16_384, 512, "additive", True, False),
    (16_384, 2_048, "additive", False, False),
    (16, 4, "additive", True, True),
)


def variants(target: Any) -> Iterator[Variant]:
    """What is shipped for a device: the rules' sizes, and every one of its tables.

    Args:
        target: has the ``device`` whose sizes are chosen.
    """
    seen = set()
    for found in (
        _prepare_prior,
        _linear_map,
        _knn_graph,
        _csc,
        _edge_weight,
        _edge_coefficient,
        _degree_normalize,
        _graph_layer,
        _graph_layer_dense,
        _graph_propagate,
    ):
        for variant in found(target.device):
            if variant.name not in seen:
                seen.add(variant.name)
                yield variant


def _name(op: str, words: dict[str, Any], num_warps: int) -> str:
    return f"{op} " + " ".join(f"{key.lower()}={value}" for key, value in words.items()) + f" num_warps={num_warps}"


def _prepare_prior(device: Any) -> Iterator[Variant]:
    from drseg_kernels import prepare_prior as op
    from drseg_kernels._launch import FMA

    for dtype, channels in (("fp32", 1024), ("bf16", 1024), ("fp16", 1024), ("fp32", 96), ("fp32", 1000)):
        columns = op.columns_of(channels)
        rounds = {"SCALE": dtype != "fp16", "ROUND": dtype == "fp32"}
        constants = {**rounds, "BLOCK_N": columns}
        types = {"prior_ptr": f"*{dtype}", "scaled_ptr": f"*{dtype}", "inverse_ptr": "*fp32"}
        types |= {"rounded_ptr": "*fp16", "residual_ptr": "*fp32"}
        warps = op.warps_of(columns)
        even = channels % 16 == 0
        name = _name("prepare_prior", {"dtype": dtype, **constants} | ({} if even else {"even": False}), warps)
        options = {"num_warps": warps, **FMA}
        sizes = ("channels",) if even else ()
        yield Variant(name, op._prepare_prior_kernel, types, constants, options, 4 * columns + 64 * warps, sizes)
        constants = {**rounds} | {key: value for key, value in op.PLANES.items() if key.isupper()}
        warps = op.PLANES["num_warps"]
        words = {"dtype": dtype, **constants} | ({} if even else {"even": False})
        options = {"num_warps": warps, **FMA}
        name = _name("prepare_prior planes", words, warps)
        yield Variant(name, op._prepare_prior_kernel_planes, types, constants, options, 16_384, sizes)


def _linear_map(device: Any) -> Iterator[Variant]:
    from drseg_kernels import linear_map as op
    from drseg_kernels._launch import FMA

    sizes = op.sizes_of(device)
    flags = ("LEFT_DOWN", "LEFT_GROUPED", "RIGHT_DOWN", "RIGHT_GROUPED")
    for kernel, words, shared in (
        # of rows, and of a map; for the gradient to them; for that to the weight, of rows and of a map
        *((op._linear_map_kernel_split, {**dict(zip(flags, map(bool, given), strict=True)), **op.SPLIT}, 16_384)
          for given in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0), (1, 0, 0, 1))),
        (op._linear_map_kernel_product, sizes, op.shared_bytes(sizes)),
    ):  # fmt: skip
        constants = {name: value for name, value in words.items() if name.isupper()}
        options = {**FMA, **{name: value for name, value in words.items() if name.islower()}}
        types = {"left_ptr": "*fp32", "right_ptr": "*fp32", "parts_ptr": "*fp16", "exponent_ptr": "*i32"}
        types = {name: of for name, of in {**types, "out_ptr": "*fp32"}.items() if name in kernel.arg_names}
        name = _name(f"linear_map {kernel.__name__.split('_kernel_')[1]}", constants, words["num_warps"])
        yield Variant(name, kernel, types, constants, options, shared, ("stride", "piece"))


def _knn_graph(device: Any) -> Iterator[Variant]:
    import torch
    from drseg_kernels import _launch, knn_live, knn_rounded
    from drseg_kernels import knn_graph as op

    asked = [(*case, _launch.choose("knn_graph", device, torch.float32, *case[:2])) for case in KNN_GRAPH]
    for entry in _launch.tuned_entries("knn_graph", device):
        asked += [(entry.nodes, entry.k, "additive", True, first, entry.sizes) for first in (True, False)]
    yield _product()
    for nodes, k, form, include_self, first, sizes in asked:
        if first or nodes > sizes.block_n:
            yield _merge(op.constants(nodes, k, form, include_self, first, sizes), sizes)
        if nodes <= sizes.block_n:
            yield _rounded(knn_rounded.constants(nodes, k, form, include_self, False, sizes))
        elif k <= knn_live.LARGEST_K and op.JOIN_OF[form] == "subtract":
            side = math.isqrt(nodes)
            for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                live = _launch.choose("knn_live", device, kind, nodes, k)
                yield from _large((side, side), k, form, include_self, live, dtype)


def _large(grid: tuple[int, int], k: int, form: str, include_self: bool, sizes: Any, dtype: str) -> tuple[Variant, ...]:
    """Kernels of an image with more nodes than a tile has columns."""
    from drseg_kernels import knn_live as op
    from drseg_kernels import knn_rounded

    found = op.constants(grid, k, include_self, False, False, sizes)
    constants = {name: value for name, value in found.items() if name.isupper()}
    options = {**op.OPTIONS, **{name: value for name, value in found.items() if name.islower()}}
    ends = {"INCLUDE_SELF": include_self, **op.steps_of(found)}
    warps, one_warp = options["num_warps"], {"num_warps": 1, **op.OPTIONS}
    types = {**_LIVE, "rounded_ptr": "*bf16" if dtype == "bf16" else "*fp16"}
    tables = {"table_ptr": "*fp32", "bound_ptr": "*fp32"}
    bounds, live = op._knn_graph_fwd_kernel_bounds, op._knn_graph_fwd_kernel_live
    name = _name("knn_graph live", {"dtype": dtype, **constants, "stages": sizes.num_stages}, warps)
    return (
        Variant(_name("knn_graph bounds", ends, 1), bounds, tables, ends, one_warp, 1024, (), True),
        Variant(name, live, types, constants, options, sizes.shared_bytes(), ("channels",), True),
        _rounded(knn_rounded.list_constants(k, form, include_self, False), dtype),
        _whole_rows(k, form, include_self, dtype),
    )


def _product() -> Variant:
    from drseg_kernels import _products as op

    constants = {name: value for name, value in op.SIZES.items() if name.isupper()}
    types = {f"{name}_ptr": "*fp32" for name in ("left", "right", "out")}
    options = {**op.FMA, **{name: value for name, value in op.SIZES.items() if name.islower()}}
    name = _name("knn_graph product", constants, op.SIZES["num_warps"])
    return Variant(name, op._product_kernel, types, constants, options, 65_536, ("channels",))


def _rounded(sizes: dict[str, Any], dtype: str = "fp32") -> Variant:
    from drseg_kernels import knn_rounded as op

    constants = {name: value for name, value in sizes.items() if name.isupper()}
    options = {**op.OPTIONS, **{name: value for name, value in sizes.items() if name.islower()}}
    name = _name("knn_graph rounded", _half(dtype) | constants, options["num_warps"])
    types = _ROUNDED | {"prior_ptr": f"*{dtype}"}
    return Variant(name, op._knn_graph_fwd_kernel_rounded, types, constants, options, 16_384, ("channels",))


def _half(dtype: str) -> dict[str, Any]:
    return {} if dtype == "fp32" else {"dtype": dtype}


def _whole_rows(k: int, form: str, include_self: bool, dtype: str) -> Variant:
    from drseg_kernels import knn_rounded as op

    constants, options = op.whole_rows(k, form, include_self)
    name = _name("knn_graph whole_rows", _half(dtype) | constants, options["num_warps"])
    types = _ROUNDED | {"prior_ptr": f"*{dtype}"}
    return Variant(name, op._knn_graph_fwd_kernel_whole_rows, types, constants, options, 16_384, ("channels",))


def _merge(constants: dict[str, Any], sizes: Any) -> Variant:
    from drseg_kernels import knn_graph as op

    return Variant(
        _name("knn_graph", constants, sizes.num_warps),
        op._knn_graph_fwd_kernel_merge,
        {**_SELECTION, "product_ptr": "*fp32"},
        constants,
        {"num_warps": sizes.num_warps, **op.OPTIONS},
        sizes.shared_bytes(),
    )


# projections as they leave a product, and plain ones
RAW, PLAIN = {"NORMED": True, "SHIFT": True}, {"NORMED": False, "SHIFT": False}

# pointers that have one type whatever the dtype of the features
_FIXED = {
    **{f"{name}_ptr": "*fp32" for name in ("weight", "slope", "part", "row", "column", "dot", "coefficient")},
    **{f"{name}_ptr": "*fp32" for name in ("inverse", "shift", "scale", "grad_shift", "grad_bias", "grad_vector")},
    **{
        f"{name}_ptr": "*fp32"
        for name in ("exponent", "grad_exponent", "vector", "bias", "grad_norm_weight", "grad_norm_bias")
    },
    **{f"{name}_ptr": "*fp32" for name in ("given", "mean", "rstd", "moment", "norm_weight", "norm_bias")},
    **{f"{name}_ptr": "*i32" for name in ("index", "indptr", "perm", "count", "degree")},
    "mask_ptr": "*fp32",
    "eps": "fp32",
}


def _variant(
    op: str,
    kernel: Any,
    tile: Any,
    dtype: str,
    constants: dict[str, Any],
    even: bool = True,
    options: dict[str, Any] | None = None,
    exponent: bool = False,
) -> Variant:
    """A kernel of the ops on edges; every pointer that is not of one type always is one to ``dtype``."""
    names = kernel.arg_names
    of_exponents = {"exponent_ptr", "grad_exponent_ptr"} & {*names}
    absent = dict.fromkeys(() if exponent else of_exponents)
    sizes = {key: value for key, value in tile.constants().items() if key in names}
    types = {name: _FIXED.get(name, f"*{dtype}") for name in names if name.endswith("_ptr") or name == "eps"}
    if constants.get("MASK") == "flags":
        types["mask_ptr"] = "*u8"
    part = kernel.__name__.split(f"_{op}_")[1].replace("_kernel", "")
    words = {"dtype": dtype, **constants, **sizes}
    if not even:
        words["even"] = False
    if exponent:
        words["exponent"] = True
    return Variant(
        _name(f"{op} {part}", words, tile.num_warps),
        kernel,
        types,
        {**constants, **sizes, **absent},
        options or tile.options(),
        tile.shared_bytes(),
        ("width", "stride", "channels") if even else (),
    )


def _tiles(op: str, device: Any, *sizes: tuple[int, int, int]) -> list[Any]:
    """Tiles at (nodes, k, width) in float32, and everything in the table of the device's architecture."""
    import torch
    from drseg_kernels import _launch

    chosen = [_launch.choose(op, device, torch.float32, *size) for size in sizes]
    return chosen + [entry.sizes for entry in _launch.tuned_entries(op, device)]


def _edge_weight(device: Any) -> Iterator[Variant]:
    from drseg_kernels import edge_weight as op

    name = "edge_weight"
    usual, *others = _tiles(name, device, (576, 75, 128), (576, 4, 24))
    for dtype in _DTYPES:
        yield _variant(name, op._edge_weight_fwd_kernel, usual, dtype, {**RAW, "MASK": "scores"})
        # as PDGR calls it, and as one op
        for form, known in ((RAW, True), (PLAIN, False)):
            everything = {**form, "SLOPES": known, "NEED_SOURCE": True, "NEED_PARAMETERS": True}
            yield _variant(name, op._edge_weight_bwd_kernel_source, op.two_sums(usual), dtype, everything)
            yield _variant(name, op._edge_weight_bwd_kernel_target, usual, dtype, form)
    yield _variant(name, op._edge_weight_fwd_kernel, usual, "fp32", {**PLAIN, "MASK": "flags"}, even=False)
    for tile in others:
        yield _variant(name, op._edge_weight_fwd_kernel, tile, "fp32", {**PLAIN, "MASK": "none"})
    unknown = {**RAW, "SLOPES": False, "NEED_SOURCE": True, "NEED_PARAMETERS": True}
    yield _variant(name, op._edge_weight_fwd_kernel, usual, "fp32", {**RAW, "MASK": "scores"}, exponent=True)
    yield _variant(name, op._edge_weight_bwd_kernel_source, op.two_sums(usual), "fp32", unknown, exponent=True)


def _edge_coefficient(device: Any) -> Iterator[Variant]:
    from drseg_kernels import edge_coefficient as op

    name = "edge_coefficient"
    usual, *others = _tiles(name, device, (576, 75, 128), (576, 4, 24))
    forward = op._edge_coefficient_fwd_kernel
    for dtype in _DTYPES:
        yield _variant(name, forward, usual, dtype, {"NORM": "sym_row", **RAW, "MASK": "scores"})
    for norm in ("row", "sym_count", "sym_inout"):
        yield _variant(name, forward, usual, "fp32", {"NORM": norm, **RAW, "MASK": "scores"})
    for tile in others:
        yield _variant(name, forward, tile, "fp32", {"NORM": "sym_row", **PLAIN, "MASK": "none"}, even=False)
    (slots,) = _tiles("degree_normalize", device, (576, 75, 75))[:1]
    for apart in (True, False):
        yield _variant(name, op._edge_coefficient_bwd_kernel_slope, slots, "fp32", {"APART": apart})
    yield _variant(name, forward, usual, "fp32", {"NORM": "sym_row", **RAW, "MASK": "scores"}, exponent=True)
    yield _variant(name, op._edge_coefficient_bwd_kernel_slope, slots, "fp32", {"APART": True}, exponent=True)


def _csc(device: Any) -> Iterator[Variant]:
    from drseg_kernels import csc as op

    for kernel, nodes in (
        (op._csc_kernel_count, 576),
        (op._csc_kernel_count, 16_384),
        (op._csc_kernel_scan, None),
        (op._csc_kernel_place, 576),
        (op._csc_kernel_place, 16_384),
    ):
        sizes = op.tile_of(nodes) if nodes else op.SCAN
        part = kernel.__name__.removeprefix("_csc_kernel_")
        constants = {name: value for name, value in sizes.items() if name.isupper()}
        types = {name: _FIXED[name] for name in kernel.arg_names if name.endswith("_ptr")}
        options = {"enable_fp_fusion": True, **{name: value for name, value in sizes.items() if name.islower()}}
        yield Variant(_name(f"csc {part}", constants, sizes["num_warps"]), kernel, types, constants, options, 16_384)


def _degree_normalize(device: Any) -> Iterator[Variant]:
    from drseg_kernels import degree_normalize as op

    name = "degree_normalize"
    usual, *others = _tiles(name, device, (576, 75, 75), (4096, 512, 512))
    yield _variant(name, op._degree_normalize_fwd_kernel_row, usual, "fp32", {})
    yield _variant(name, op._degree_normalize_bwd_kernel_row, usual, "fp32", {})
    for norm in ("sym_row", "sym_inout", "sym_undirected"):
        yield _variant(name, op._degree_normalize_fwd_kernel_scale, usual, "fp32", {"NORM": norm})
        yield _variant(name, op._degree_normalize_fwd_kernel_edges, usual, "fp32", {"NORM": norm})
        yield _variant(name, op._degree_normalize_bwd_kernel_degree, usual, "fp32", {"NORM": norm})
        yield _variant(name, op._degree_normalize_bwd_kernel_edges, usual, "fp32", {"NORM": norm})
    yield _variant(name, op._degree_normalize_fwd_kernel_edges, usual, "fp32", {"NORM": "row"})
    for tile in others:
        yield _variant(name, op._degree_normalize_fwd_kernel_scale, tile, "fp32", {"NORM": "sym_inout"})


def _graph_propagate(device: Any) -> Iterator[Variant]:
    from drseg_kernels import graph_propagate as op

    name, dots = "graph_propagate", "graph_propagate_dot"
    for tile in _tiles(name, device, (4096, 75, 384), (4096, 4, 24)):
        for dtype in _DTYPES:
            for transpose in (False, True):
                yield _variant(name, op._graph_propagate_fwd_kernel, tile, dtype, {"TRANSPOSE": transpose})
        yield _variant(name, op._graph_propagate_fwd_kernel, tile, "fp32", {"TRANSPOSE": False}, even=False)
    for tile in _tiles("graph_gradients", device, (4096, 75, 384), (4096, 4, 24), (4096, 75, 1024)):
        options, needs = tile.options(limit_registers=True), {"NEED_X": True, "NEED_DOT": True}
        for transpose in (False, True):
            constants = {"TRANSPOSE": transpose, **needs}
            yield _variant(name, op._graph_propagate_bwd_kernel, tile, "fp32", constants, options=options)
    for tile in _tiles(dots, device, (4096, 75, 384)):
        options = tile.options(limit_registers=True)
        for dtype in _DTYPES:
            for both in (False, True):
                yield _variant(name, op._graph_propagate_bwd_kernel_dot, tile, dtype, {"BOTH": both}, options=options)


def _graph_layer(device: Any) -> Iterator[Variant]:
    from drseg_kernels import graph_layer as op

    name = "graph_layer"

    def variant(kernel: Any, tile: Any, dtype: str, constants: dict[str, Any]) -> Variant:
        return _variant(name, kernel, tile, dtype, constants, options=tile.options(limit_registers=True))

    usual = {"UNDIRECTED": False, "SCALED": True, "BIAS": True, "ACTIVATION": "layer_norm", "KEEP": True}
    ends = (
        usual,
        {**usual, "SCALED": False},
        {**usual, "SCALED": False, "UNDIRECTED": True, "KEEP": False},
        {**usual, "ACTIVATION": "relu", "KEEP": False},
    )
    for tile in _tiles(name, device, (4096, 75, 384), (4096, 4, 24), (4096, 75, 1024)):
        for dtype in (*_DTYPES, "fp16"):
            for end in ends if tile.block_n == 512 else (usual,):
                yield variant(op._graph_layer_fwd_kernel, tile, dtype, end)
    for tile in _tiles("graph_gradients", device, (4096, 75, 384), (4096, 4, 24), (4096, 75, 1024)):
        # of the last layer, and of one whose coefficient a later layer has a gradient for
        for dtype, (added, scaled) in itertools.product(_DTYPES, ((False, True), (True, True), (False, False))):
            needs = {"NEED_X": True, "NEED_DOT": True, "ADDED": added, "SCALED": scaled, "BIAS": True}
            yield variant(op._graph_layer_bwd_kernel_edges, tile, dtype, needs)
    for tile in _tiles("graph_layer_rows", device, (576, 75, 384), (576, 75, 2048)):
        for activation, planes in (("relu", False), ("layer_norm", False), ("layer_norm", True)):
            whole = tile.block_n < 1024
            if planes and not whole:
                continue
            everything = {"NEED_INNER": True, "NEED_PARAMETERS": True}
            constants = {"ACTIVATION": activation, "PLANES": planes, "WHOLE": whole, **everything}
            sizes = op.rows_of_planes(tile) if planes else tile
            yield variant(op._graph_layer_bwd_kernel_activation, sizes, "fp32", constants)
        yield variant(op._graph_layer_bwd_kernel_sum, tile, "fp32", {"BIAS": True})
    yield variant(op._graph_layer_fwd_kernel_norm, tile, "fp32", {})
    yield variant(op._graph_layer_bwd_kernel_moments, tile, "fp32", {})


def _graph_layer_dense(device: Any) -> Iterator[Variant]:
    from drseg_kernels import graph_layer
    from drseg_kernels import graph_layer_dense as op
    from drseg_kernels._launch import FMA

    # LayerNorm comes after the product at any width
    rows, norm = op.norm_sizes(384), graph_layer._graph_layer_fwd_kernel_norm
    yield _variant("graph_layer", norm, rows, "bf16", {}, options=rows.options(limit_registers=True))

    sizes = op.product_sizes(device)
    sums = {"SCALED": True, "BIAS": True}
    for dtype, (kernel, words, shared, out) in itertools.product(
        ("bf16", "fp16"),
        (
            # of a layer with ReLU, and of what a launch more normalises
            (op._graph_layer_dense_kernel_product, {**sums, "RELU": True, **sizes}, op.shared_bytes(sizes), None),
            (op._graph_layer_dense_kernel_product, {**sums, "RELU": False, **sizes}, op.shared_bytes(sizes), "fp32"),
            (op._graph_layer_dense_kernel_fill, {"SCALED": True, **op.fill_sizes(75)}, 16_384, None),
            (op._graph_layer_dense_kernel_fill, {"SCALED": False, **op.fill_sizes(1024)}, 16_384, None),
        ),
    ):
        constants = {name: value for name, value in words.items() if name.isupper()}
        options = {**FMA, **{name: value for name, value in words.items() if name.islower()}}
        types = {name: _FIXED.get(name, f"*{dtype}") for name in kernel.arg_names if name.endswith("_ptr")}
        types["exponent_ptr"] = "*i32"
        if out is not None:
            types["y_ptr"] = f"*{out}"
        part = kernel.__name__.split("_kernel_")[1]
        name = _name(f"graph_layer dense {part}", {"dtype": dtype, **constants}, words["num_warps"])
        yield Variant(name, kernel, types, constants, options, shared, ("channels", "stride"))
