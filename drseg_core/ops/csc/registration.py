# SPDX-License-Identifier: Apache-2.0
"""``drseg::csc``: schema, fake and backends. It has no gradient."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from drseg_core.ops import _dispatch, _native, _triton
from drseg_core.ops._checks import INDEX_DTYPES
from drseg_core.ops._registration import define
from drseg_core.ops.csc import reference


def _run_native(index: Tensor) -> tuple[Tensor, Tensor]:
    if index.numel() >= 2**31:
        return reference.csc(index)
    found: tuple[Tensor, Tensor] = torch.ops.drseg_native.csc(_native.neighbours(index))
    return found


_dispatch.add_table(
    "csc",
    *(
        dataclasses.replace(backend, dtypes=INDEX_DTYPES)
        for backend in (
            _native.backend(_run_native, None, "csc"),
            _triton.backend("csc", backward=False),
            _dispatch.reference_backend(reference.csc),
        )
    ),
)


def _run(index: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _dispatch.resolve("csc", index, backend).run(index)
    return found


def _fake(index: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    # loads sympy, half a second that a process without symbolic sizes need not wait for
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    edges = index.numel()
    # of a symbolic size it is not asked, which would tie an exported program to small ones
    narrow = torch.int64 if statically_known_true(edges >= 2**31) else torch.int32
    rows = index.shape[0] * index.shape[1]
    return index.new_empty(rows + 1, dtype=narrow), index.new_empty(edges, dtype=narrow)


csc = define("csc", "(Tensor index, str backend) -> (Tensor, Tensor)", _run, _fake)
