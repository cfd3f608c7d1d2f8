# SPDX-License-Identifier: Apache-2.0
"""``drseg::prepare_prior``: schema, fake and backends. It has no gradient: the prior is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from drseg_core.ops import _cuda, _dispatch, _native, _triton
from drseg_core.ops._registration import define, widest
from drseg_core.ops.prepare_prior import reference


def _run_native(prior: Tensor) -> tuple[Tensor, Tensor]:
    (wide,) = _native.operands(prior if prior.dim() == 3 else prior[None])
    scaled, inverse_norm = torch.ops.drseg_native.prepare_prior(wide, prior.dtype != torch.float16)
    # half-precision rows are exact in float32, and so are their products with a power of two
    return scaled.view(prior.shape).to(prior.dtype), inverse_norm.view(prior.shape[:-1])


def _run_cuda(prior: Tensor, rounds: bool) -> tuple[Tensor, ...]:
    several = prior if prior.dim() == 3 else prior[None]
    found: tuple[Tensor, ...] = torch.ops.drseg_native_cuda.prepare_prior(several.contiguous(), rounds)
    return found if prior.dim() == 3 else tuple(value[0] if value.numel() else value for value in found)


_dispatch.add_table(
    "prepare_prior",
    _native.backend(_run_native, None, "prepare_prior"),
    _triton.backend("prepare_prior", backward=False, raw=True),
    # it reads rows, and a map would have to be transposed first
    _cuda.backend(_run_cuda, None, "prepare_prior", raw=True),
    _dispatch.reference_backend(reference.prepare_prior),
)


def _run(prior: Tensor, rounds: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _dispatch.resolve("prepare_prior", prior, backend)
    if chosen.raw:
        found: tuple[Tensor, Tensor, Tensor, Tensor] = chosen.run(prior, rounds)
        return found
    scaled, inverse_norm = chosen.run(prior)
    # the result of an op may not be its argument
    scaled = scaled.clone() if scaled is prior else scaled
    if rounds:
        return scaled, inverse_norm, *reference.rounding(scaled, inverse_norm)
    return scaled, inverse_norm, prior.new_empty(0, dtype=torch.float16), prior.new_empty(0, dtype=torch.float32)


def _fake(prior: Tensor, rounds: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rounded = prior.new_empty(prior.shape if rounds else (0,), dtype=torch.float16)
    residual = prior.new_empty(prior.shape[:-1] if rounds else (0,), dtype=torch.float32)
    return prior.new_empty(prior.shape), prior.new_empty(prior.shape[:-1], dtype=widest(prior)), rounded, residual


prepare_prior = define(
    "prepare_prior", "(Tensor prior, bool rounds, str backend) -> (Tensor, Tensor, Tensor, Tensor)", _run, _fake
)
