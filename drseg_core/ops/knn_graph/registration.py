# SPDX-License-Identifier: Apache-2.0
"""``drseg::knn_graph``: schema, fake and backends. It has no gradient: the choice of neighbours is data."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _cuda, _dispatch, _native, _triton
from drseg_core.ops._registration import define, widest
from drseg_core.ops.knn_graph import reference

# the order in which the library counts them
_FORMS = ("additive", "gauss", "multiplicative", "product")


def _run_native(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    k: int,
    form: str,
    include_self: bool,
    *,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    # half-precision features are exact in float32
    given = _native.operands(prior, inverse_norm, table)
    return torch.ops.drseg_native.knn_graph(*given, k, _FORMS.index(form), include_self, *(rows or ()))


# products of so many bytes at a time stay in a GPU's second cache
_TILE_BYTES = 2**25
# columns of a row that a warp's registers hold
_MOST_NODES = 1024
# how cosine and decay are joined, as the library counts it
_JOINS = {"additive": 0, "gauss": 0, "multiplicative": 1, "product": 2}


_multiply = _triton.launcher("_products", "multiply")
_products_are_wide = _triton.launcher("_products", "products_are_wide")
_slack_of = _triton.launcher("knn_rounded", "slack_of")


def _refused_by_cuda(case: Mapping[str, Any]) -> str | None:
    nodes = case["nodes"]
    return f"its kernel takes at most {_MOST_NODES} nodes, got {nodes}" if nodes > _MOST_NODES else None


def _run_cuda(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    k: int,
    form: str,
    include_self: bool,
    rounded: Tensor | None = None,
    residual: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Products by the library, and what is selected from them; arguments as those of the Triton launcher.

    ``counts`` (B, N) int32 is filled with how many scores of a row were computed again, if it is given.
    """
    batch, nodes, channels = prior.shape
    like: dict[str, Any] = {"device": prior.device}
    index = torch.empty(batch, nodes, k, dtype=torch.int32, **like)
    score = torch.empty(batch, nodes, k, dtype=torch.float32, **like)
    if index.numel() == 0:
        return index, score
    join = _JOINS[form]
    if rounded is None or residual is None or join != 0 or not _products_are_wide():
        rounded = residual = None
    rows = (prior if rounded is None else rounded).contiguous()
    given = (
        prior.contiguous(),
        inverse_norm.contiguous(),
        None if residual is None else residual.contiguous(),
        table.contiguous(),
        join,
        include_self,
        _slack_of(channels),
    )
    # the library may sum in another order for another number of images
    most = 1 if torch.are_deterministic_algorithms_enabled() else max(1, _TILE_BYTES // (4 * nodes * nodes))
    buffer = torch.empty(min(batch, most), nodes, nodes, dtype=torch.float32, **like)
    for first in range(0, batch, most):
        part = rows[first : first + most]
        _multiply(part, part, buffer[: len(part)])
        torch.ops.drseg_native_cuda.select(buffer[: len(part)], *given, first, index, score, counts)
    return index, score


_dispatch.add_table(
    "knn_graph",
    _native.backend(_run_native, None, "knn_graph", some_rows=True),
    _cuda.backend(_run_cuda, None, "select", refuses=_refused_by_cuda, raw=True),
    _triton.backend("knn_graph", backward=False, raw=True, some_rows=True),
    _dispatch.reference_backend(reference.knn_graph, some_rows=True),
)


# the tables made last, and those that a recorded CUDA graph reads for as long as it lives
_kept: dict[Any, Tensor] = {}
_recorded: dict[Any, Tensor] = {}
_MOST_KEPT = 64
# another thread may neither add one between a count and what it leads to, nor while the oldest is looked for
_keeping = threading.Lock()
# nor may a child of this process wait for a thread that it does not have
os.register_at_fork(before=_keeping.acquire, after_in_parent=_keeping.release, after_in_child=_keeping.release)


def decay_table(grid: tuple[int, int], decay: float, form: str, like: Tensor, radius: float | None = None) -> Tensor:
    """The spatial term of Eq. 7 in the dtype and on the device of ``like``, made once and kept.

    On a GPU only what is made on the default stream is kept, and the host waits for it once: other streams may read it
    at any time. The memory of another stream may be the pool of a CUDA graph, which must not outlive it.
    """
    key = (grid, decay, form, radius, like.dtype, like.device)
    recording = like.is_cuda and torch.cuda.is_current_stream_capturing()
    table = _kept.get(key)
    if table is None:
        with torch.inference_mode(False):
            table = reference.decay_table(grid, decay, form, like.dtype, like.device, radius)
        if like.is_cuda:
            stream = torch.cuda.current_stream(like.device)
            if recording or stream != torch.cuda.default_stream(like.device):
                return table
            stream.synchronize()
        with _keeping:
            while len(_kept) >= _MOST_KEPT:
                del _kept[next(iter(_kept))]
            _kept[key] = table
    if recording:
        _recorded[key] = table
    return table


def _run(
    prior: Tensor,
    inverse_norm: Tensor,
    rounded: Tensor | None,
    residual: Tensor | None,
    height: int,
    width: int,
    k: int,
    decay: float,
    form: str,
    include_self: bool,
    backend: str,
    radius: float | None = None,
    rows: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    chosen = _dispatch.resolve("knn_graph", prior, backend, {"nodes": prior.shape[1]})
    table = decay_table((height, width), decay, form, inverse_norm, radius)
    raw = (rounded, residual) if chosen.raw else ()
    # a table of its own, subtracted as that of others is
    form = "additive" if form == reference.ACROSS else form
    given = (prior, inverse_norm, table, k, form, include_self, *raw)
    with _dispatch.without_autocast(prior):
        if rows is None:
            return chosen.run(*given)
        first, last = rows
        if chosen.some_rows:
            return chosen.run(*given, rows=(first, last))
        index, score = chosen.run(*given)
        return index[:, first:last], score[:, first:last]


def _plain(
    prior: Tensor,
    inverse_norm: Tensor,
    rounded: Tensor | None,
    residual: Tensor | None,
    height: int,
    width: int,
    k: int,
    decay: float,
    form: str,
    include_self: bool,
    backend: str,
    radius: float | None = None,
    rows: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    given = (prior, inverse_norm, height, width, k, decay, form, include_self, radius)
    index, score = reference.knn_graph_at_once(*given)
    return (index, score) if rows is None else (index[:, rows[0] : rows[1]], score[:, rows[0] : rows[1]])


def _fake(
    prior: Tensor,
    inverse_norm: Tensor,
    rounded: Tensor | None,
    residual: Tensor | None,
    height: int,
    width: int,
    k: int,
    decay: float,
    form: str,
    include_self: bool,
    backend: str,
    radius: float | None = None,
    rows: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    nodes = prior.shape[1] if rows is None else rows[1] - rows[0]
    shape = (prior.shape[0], nodes, k)
    return prior.new_empty(shape, dtype=torch.int32), prior.new_empty(shape, dtype=widest(prior))


knn_graph = define(
    "knn_graph",
    "(Tensor prior, Tensor inverse_norm, Tensor? rounded, Tensor? residual, SymInt height, SymInt width, SymInt k, "
    "float decay, str form, bool include_self, str backend, float? radius=None, int[]? rows=None) -> "
    "(Tensor, Tensor)",
    _run,
    _fake,
    _plain,
)
