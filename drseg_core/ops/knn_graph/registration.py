# SPDX-License-Identifier: Apache-2.0
"""``drseg::knn_graph``: schema, fake and backends. It has no gradient: the choice of neighbours is data."""

from __future__ import annotations

import functools
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
    _triton.backend("knn_graph", backward=False),
    _dispatch.reference_backend(reference.knn_graph),
)


@functools.lru_cache(maxsize=64)
def _kept_table(
    grid: tuple[int, int], decay: float, form: str, dtype: torch.dtype, device: torch.device, stream: Any
) -> Tensor:
    return reference.decay_table(grid, decay, form, dtype, device)


def decay_table(grid: tuple[int, int], decay: float, form: str, like: Tensor) -> Tensor:
    """The spatial term of Eq. 7 in the dtype and on the device of ``like``, made once and kept.

    What is made while a CUDA graph is recorded has no content yet; and another stream may run before what was made on
    this one is there.
    """
    stream = torch.cuda.current_stream(like.device) if like.is_cuda else None
    recorded = like.is_cuda and torch.cuda.is_current_stream_capturing()
    with torch.inference_mode(False):
        make = _kept_table.__wrapped__ if recorded else _kept_table
        return make(grid, decay, form, like.dtype, like.device, stream)


def _run(
    prior: Tensor,
    inverse_norm: Tensor,
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
    with _dispatch.plain_float32(prior):
        return chosen.run(prior, inverse_norm, table, k, form, include_self)


def _fake(prior: Tensor, inverse_norm: Tensor, height: int, width: int, k: int, *options: Any) -> tuple[Tensor, Tensor]:
    shape = (*prior.shape[:2], k)
    return prior.new_empty(shape, dtype=torch.int32), prior.new_empty(shape, dtype=widest(prior))


knn_graph = define(
    "knn_graph",
    "(Tensor prior, Tensor inverse_norm, SymInt height, SymInt width, SymInt k, float decay, str form, "
    "bool include_self, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
