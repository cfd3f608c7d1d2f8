# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a kernel, or to the library."""

from __future__ import annotations

import torch
from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops.linear_map import reference, registration


def linear_map(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """A linear map of every node's features, ``y_i = W x_i``; the maps of PDGR (arXiv 2604.02010, Eq. 8 and 9).

    It is the library's product, which obeys autocast, with one exception. The Triton backend multiplies float32 by
    three products of float16 on tensor cores, with the accuracy of float32. It does so where that is faster, unless
    ``torch.set_float32_matmul_precision`` allows less than ``"highest"``.

    Args:
        x: (B, N, C) or (N, C) features, float32, float64, float16 or bfloat16; also the transposed view of a map
            (B, C, N), which is read as it lies.
        weight: (E, C), in the dtype of ``x`` (under autocast in any).
        backend: one of ``backend_names()``; None takes the best that can run. The product of every other one than
            ``triton`` is the library's. So is that of ``triton`` in half precision.

    Returns:
        (B, N, E) or (N, E), in the dtype of ``x`` (under autocast: of autocast). By a kernel it is differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import linear_map
        >>> linear_map(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]])).tolist()
        [[3.0, 6.0]]
    """
    op = "linear_map"
    _checks.check_tensor(op, "x", x, ("B", "N", "C"))
    _checks.check_tensor(op, "weight", weight, ("E", "C"))
    _checks.check_same_device(op, x=x, weight=weight)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight does not match x; expected (E, {x.shape[-1]}), got {tuple(weight.shape)}")
    autocast = torch.is_autocast_enabled(x.device.type)
    if weight.dtype != x.dtype and not autocast:
        raise TypeError(f"{op}: weight has another dtype than x; expected {x.dtype} or autocast, got {weight.dtype}")
    requested = requested_backend(op, backend)
    # the kernels multiply float32 alone
    if not registration.has_kernel(x, requested) or autocast or x.dtype != torch.float32:
        return reference.linear_map(x, weight)
    _checks.check_no_tangent(op, x=x, weight=weight)
    if x.dim() == 3:
        return registration.linear_map(x, weight, requested)
    return registration.linear_map(x[None], weight, requested)[0]
