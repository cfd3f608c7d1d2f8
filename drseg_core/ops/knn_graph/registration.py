# SPDX-License-Identifier: Apache-2.0
"""``drseg::knn_graph``: schema, fake and backends. It has no gradient: the choice of neighbours is data."""

from __future__ import annotations

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._checks import FLOAT_DTYPES
from drseg_core.ops._dispatch import Backend
from drseg_core.ops.knn_graph import reference

# the order in which the library counts them
_FORMS = ("additive", "gauss", "multiplicative", "product")


def _run_native(
    prior: Tensor, inverse_norm: Tensor, table: Tensor, k: int, form: str, include_self: bool
) -> tuple[Tensor, Tensor]:
    # half-precision features are exact in float32
    given = _native.operands(prior, inverse_norm, table)
    return torch.ops.drseg_native.knn_graph(*given, k, _FORMS.index(form), include_self)


def _run_triton(
    prior: Tensor, inverse_norm: Tensor, table: Tensor, k: int, form: str, include_self: bool
) -> tuple[Tensor, Tensor]:
    from drseg_kernels.knn_graph import knn_graph as launch

    return launch(prior, inverse_norm, table, k, form, include_self)


_dispatch.add_table(
    "knn_graph",
    [
        Backend(
            name="native",
            run=_run_native,
            run_backward=None,
            why_not=lambda device: _native.why_not(device, "prepare_prior", "knn_graph"),
            dtypes=FLOAT_DTYPES,
        ),
        Backend(
            name="triton",
            run=_run_triton,
            run_backward=None,
            why_not=_triton.why_not,
            dtypes=_triton.DTYPES,
        ),
        Backend(
            name="reference",
            run=reference.knn_graph,
            run_backward=None,
            why_not=lambda device: None,
            dtypes=FLOAT_DTYPES,
        ),
    ],
)


@torch.library.custom_op("drseg::prepare_prior", mutates_args=())
def prepare_prior(prior: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    chosen = _dispatch.resolve("knn_graph", prior, backend)
    if chosen.name == "native" and prior.dtype in (torch.float32, torch.float64):
        batched = prior if prior.dim() == 3 else prior[None]
        scaled, inverse_norm = torch.ops.drseg_native.prepare_prior(batched.contiguous())
        return scaled.view(prior.shape), inverse_norm.view(prior.shape[:-1])
    if chosen.name == "triton":
        from drseg_kernels.prepare_prior import prepare_prior as launch

        return launch(prior)
    scaled, inverse_norm = reference.prepare_prior(prior)
    # the result of an op may not be its argument
    return scaled.clone() if scaled is prior else scaled.contiguous(), inverse_norm


@prepare_prior.register_fake
def _(prior: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if prior.dtype == torch.float64 else torch.float32
    return prior.new_empty(prior.shape), prior.new_empty(prior.shape[:-1], dtype=wide)


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
