# SPDX-License-Identifier: Apache-2.0
"""``drseg::knn_graph``: schema, fake and backends. It has no gradient: the choice of neighbours is data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._registration import define, widest
from drseg_core.ops.knn_graph import reference

# the order in which the library counts them
_FORMS = ("additive", "gauss", "multiplicative", "product")


def _run_native(
    prior: Tensor, inverse_norm: Tensor, table: Tensor, k: int, form: str, include_self: bool
) -> tuple[Tensor, Tensor]:
    # half-precision features are exact in float32
    given = _native.operands(prior, inverse_norm, table)
    return torch.ops.drseg_native.knn_graph(*given, k, _FORMS.index(form), include_self)


_dispatch.add_table(
    "knn_graph",
    _native.backend(_run_native, None, "knn_graph"),
    _triton.backend("knn_graph", backward=False, raw=True),
    _dispatch.reference_backend(reference.knn_graph),
)


# the tables made last, and those that a recorded CUDA graph reads for as long as it lives
_kept: dict[Any, Tensor] = {}
_recorded: dict[Any, Tensor] = {}
_MOST_KEPT = 64


def decay_table(grid: tuple[int, int], decay: float, form: str, like: Tensor) -> Tensor:
    """The spatial term of Eq. 7 in the dtype and on the device of ``like``, made once and kept.

    On a GPU only what is made on the default stream is kept, and the host waits for it once: other streams may read it
    at any time. The memory of another stream may be the pool of a CUDA graph, which must not outlive it.
    """
    key = (grid, decay, form, like.dtype, like.device)
    recording = like.is_cuda and torch.cuda.is_current_stream_capturing()
    table = _kept.get(key)
    if table is None:
        with torch.inference_mode(False):
            table = reference.decay_table(grid, decay, form, like.dtype, like.device)
        if like.is_cuda:
            stream = torch.cuda.current_stream(like.device)
            if recording or stream != torch.cuda.default_stream(like.device):
                return table
            stream.synchronize()
        if len(_kept) >= _MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
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
) -> tuple[Tensor, Tensor]:
    chosen = _dispatch.resolve("knn_graph", prior, backend)
    table = decay_table((height, width), decay, form, inverse_norm)
    raw = (rounded, residual) if chosen.raw else ()
    with _dispatch.without_autocast(prior):
        return chosen.run(prior, inverse_norm, table, k, form, include_self, *raw)


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
) -> tuple[Tensor, Tensor]:
    return reference.knn_graph_at_once(prior, inverse_norm, height, width, k, decay, form, include_self)


def _fake(
    prior: Tensor,
    inverse_norm: Tensor,
    rounded: Tensor | None,
    residual: Tensor | None,
    height: int,
    width: int,
    k: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    shape = (*prior.shape[:2], k)
    return prior.new_empty(shape, dtype=torch.int32), prior.new_empty(shape, dtype=widest(prior))


knn_graph = define(
    "knn_graph",
    "(Tensor prior, Tensor inverse_norm, Tensor? rounded, Tensor? residual, SymInt height, SymInt width, SymInt k, "
    "float decay, str form, bool include_self, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
    _plain,
)
