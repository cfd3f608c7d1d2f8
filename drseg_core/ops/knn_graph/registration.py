# SPDX-License-Identifier: Apache-2.0
"""``drseg::knn_graph``: schema, fake and backends. It has no gradient: the choice of neighbours is data."""

from __future__ import annotations

import torch
from torch import Tensor

from drseg_core.ops import _dispatch
from drseg_core.ops._checks import FLOAT_DTYPES
from drseg_core.ops._dispatch import Backend
from drseg_core.ops.knn_graph import reference

_dispatch.add_table(
    "knn_graph",
    [
        Backend(
            name="reference",
            run=reference.knn_graph,
            run_backward=None,
            why_not=lambda device: None,
            dtypes=FLOAT_DTYPES,
        )
    ],
)


@torch.library.custom_op("drseg::knn_graph", mutates_args=())
def knn_graph(
    prior: Tensor, inverse_norm: Tensor, table: Tensor, k: int, form: str, include_self: bool, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = _dispatch.resolve("knn_graph", prior, backend)
    with _dispatch.plain_float32(prior):
        return chosen.run(prior, inverse_norm, table, k, form, include_self)


@knn_graph.register_fake
def _(
    prior: Tensor, inverse_norm: Tensor, table: Tensor, k: int, form: str, include_self: bool, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (*prior.shape[:2], k)
    wide = torch.float64 if prior.dtype == torch.float64 else torch.float32
    return prior.new_empty(shape, dtype=torch.int32), prior.new_empty(shape, dtype=wide)
