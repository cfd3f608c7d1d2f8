# SPDX-License-Identifier: Apache-2.0
"""``drseg::linear_map``: schema, fake, autograd and backends. Only what a kernel multiplies goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drseg_core.errors import BackendDtypeError, BackendUnavailableError
from drseg_core.ops import _cuda, _dispatch, _native, _triton
from drseg_core.ops._registration import (
    Differentiable,
    asked_for,
    backward_of,
    define,
    differentiated,
    fake_gradients,
)
from drseg_core.ops.linear_map import reference

# Whose tensor cores add products of float16 in float32 at full rate, 16 times that of float32 or more. Three products
# pay there. At half of that rate, as on sm_120, they take as long as the library's one.
FULL_RATE = ((8, 0), (9, 0))

_LIBRARY = (reference.linear_map, reference.linear_map_backward)

# the product of every other backend is the library's
_dispatch.add_table(
    "linear_map",
    _native.backend(*_LIBRARY),
    _triton.backend("linear_map"),
    _cuda.backend(*_LIBRARY),
    _dispatch.reference_backend(*_LIBRARY),
)


def _has_kernel(tensor: Tensor, requested: str) -> bool:
    if requested == "auto":
        # without a card to ask, a program is made for one of another machine
        if tensor.is_cuda and torch.cuda.is_available():
            if torch.cuda.get_device_capability(tensor.device) not in FULL_RATE:
                requested = "reference"
    elif not _dispatch.has_backend("linear_map", requested):
        requested = "reference"
    return _dispatch.resolve("linear_map", tensor, requested).run is not reference.linear_map


@_dispatch.asked_once
def _has_kernel_on(device: str, dtype: torch.dtype, requested: str) -> bool:
    try:
        return _has_kernel(torch.empty(0, dtype=dtype, device=device), requested)
    except (BackendUnavailableError, BackendDtypeError):
        # the op itself says so, in words that the compiler lets through
        return True


def has_kernel(x: Tensor, requested: str) -> bool:
    """Whether the backend for ``x`` has a kernel, and does not leave it to the library; a compiler asks once."""
    if torch.compiler.is_compiling():
        return _has_kernel_on(x.device.type, x.dtype, requested)
    return _has_kernel(x, requested)


def _run(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    chosen = _dispatch.resolve("linear_map", x, backend, weight=weight)
    found: Tensor = chosen.run(x, weight)
    return found


def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, output_mask: Sequence[bool], backend: str
) -> tuple[Tensor, ...]:
    chosen = _dispatch.resolve("linear_map", x, backend, weight=weight)
    with _dispatch.without_autocast(x):
        return asked_for(_dispatch.gradients("linear_map", chosen, grad, x, weight, output_mask), output_mask)


_forward = define(
    "linear_map",
    "(Tensor x, Tensor weight, str backend) -> Tensor",
    _run,
    lambda x, weight, backend: x.new_empty(*x.shape[:2], weight.shape[0]),
)
_backward = define(
    "linear_map_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool[2] output_mask, str backend) -> (Tensor, Tensor)",
    _run_backward,
    lambda grad, x, weight, mask, backend: fake_gradients(mask, x, weight),
)


class _LinearMap(Differentiable):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        found: Tensor = _forward(x, weight, backend)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[:2])
        to_x, to_weight = backward_of("linear_map", _backward, mask, grad, *ctx.saved_tensors, mask, ctx.backend)
        return to_x, to_weight, None


def linear_map(*arguments: Any) -> Tensor:
    return _LinearMap.call(*arguments) if differentiated(*arguments) else _forward(*arguments)
