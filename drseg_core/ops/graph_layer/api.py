# SPDX-License-Identifier: Apache-2.0
"""Public function of the op; validates and hands over to a backend."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from drseg_core.ops import _checks
from drseg_core.ops._dispatch import requested_backend
from drseg_core.ops._registration import differentiated
from drseg_core.ops.csc.api import Csc, csc_of
from drseg_core.ops.graph_layer import registration

ACTIVATIONS = ("none", "relu", "layer_norm")

Activation = Literal["none", "relu", "layer_norm"]


def _check(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: Tensor | None,
    parameters: dict[str, Tensor | None],
    activation: str,
) -> None:
    op = "graph_layer"
    _checks.check_tensor(op, "x", x, ("B", "N", "C"))
    _checks.check_tensor(op, "index", index, ("B", "N", "K"), _checks.INDEX_DTYPES)
    _checks.check_tensor(op, "coefficient", coefficient, ("B", "N", "K"))
    _checks.check_choice(op, "activation", activation, ACTIVATIONS)
    given = {name: value for name, value in parameters.items() if value is not None}
    for name, value in given.items():
        _checks.check_tensor(op, name, value, ("C",))
    if scale is not None:
        _checks.check_tensor(op, "scale", scale, ("B", "N"), (torch.float32, torch.float64))
        _checks.check_same_device(op, x=x, scale=scale)
        _checks.check_no_tangent(op, scale=scale)
        _checks.check_shape(op, "scale", scale, tuple(x.shape[:-1]), "the shape of x without C")
        if scale.requires_grad:
            raise ValueError(f"{op}: scale has no gradient; expected a tensor that requires none, got one that does")
    _checks.check_same_device(op, x=x, index=index, coefficient=coefficient, **given)
    _checks.check_no_tangent(op, x=x, coefficient=coefficient, **given)
    for name in ("norm_weight", "norm_bias"):
        if (parameters[name] is None) is (activation == "layer_norm"):
            rule = "a tensor" if activation == "layer_norm" else "None"
            got = "None" if parameters[name] is None else "a tensor"
            raise ValueError(f"{op}: {name} does not fit the activation; expected {rule} for {activation}, got {got}")
    _checks.check_shape(op, "coefficient", coefficient, tuple(index.shape), "the shape of index")
    for name, value in given.items():
        _checks.check_shape(op, name, value, (x.shape[-1],), "(C,)")
    if index.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: index does not match x; expected {tuple(x.shape[:-1])} before K, got {tuple(index.shape)}"
        )


@overload
def graph_layer(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None = ...,
    norm_weight: Tensor | None = ...,
    norm_bias: Tensor | None = ...,
    *,
    activation: Activation = ...,
    eps: float = ...,
    undirected: bool = ...,
    scale: Tensor | None = ...,
    csc: Csc | None = ...,
    hand_on: Literal[False] = ...,
    validate: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def graph_layer(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None = ...,
    norm_weight: Tensor | None = ...,
    norm_bias: Tensor | None = ...,
    *,
    activation: Activation = ...,
    eps: float = ...,
    undirected: bool = ...,
    scale: Tensor | None = ...,
    csc: Csc | None = ...,
    hand_on: Literal[True],
    validate: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def graph_layer(
    x: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    eps: float = 1e-5,
    undirected: bool = False,
    scale: Tensor | None = None,
    csc: Csc | None = None,
    hand_on: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``graph_propagate``, bias and activation in one pass (arXiv 2604.02010, Eq. 9).

    ``y_i = activation(sum_k coefficient_ik x_j + bias)`` with ``j = index_ik``. With ``undirected`` the sum also runs
    over the edges that end in i, as ``graph_propagate`` does with ``transpose``. ``layer_norm`` normalises each row:
    ``norm_weight (z - mean(z)) / sqrt(var(z) + eps) + norm_bias``. The value before the activation is never rounded to
    half precision. A backend without a kernel for the whole op runs its ``graph_propagate`` and the library's
    functions.

    Args:
        x: (B, N, C) or (N, C) node features; float32, float64, float16 or bfloat16.
        index: (B, N, K) or (N, K) neighbour indices, int32 or int64; any indices, repeated ones too.
        coefficient: shape of ``index``, a floating-point dtype, not necessarily that of ``x``.
        bias: (C,) or None, any floating-point dtype, as ``norm_weight`` and ``norm_bias``.
        norm_weight, norm_bias: (C,) for ``layer_norm``, None otherwise.
        activation: ``none``, ``relu`` or ``layer_norm``.
        eps: of ``layer_norm``, > 0.
        undirected: follow every edge in both directions.
        scale: (B, N) or (N,), float32 or float64, from ``edge_coefficient(apart=True)``. A coefficient is multiplied by
            the scales of both ends of its edge, in the wider dtype of those. It gets no gradient here. None is 1.
        csc: ``csc(index)``, for reversed edges and for the gradient to ``x``; None makes it in every call.
        hand_on: also return the coefficient, for the next layer over the same graph. The kernels of the layers then add
            up their gradients to it, without extra passes. It shares the memory of the one given.
        validate: refuse indices outside [0, N) (synchronises a GPU); otherwise they are clamped into it.
        backend: one of ``backend_names()``; None takes the best that can run.

    Returns:
        (B, N, C) in the dtype of ``x``; sums in float32 (float64 if ``x`` or ``coefficient`` is) and rounds once.
        Differentiable once to ``x``, ``coefficient``, ``bias``, ``norm_weight`` and ``norm_bias``. With ``hand_on``, a
        pair of this and ``coefficient``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        BackendUnavailableError: the named backend cannot run here.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import graph_layer
        >>> x, index = torch.tensor([[1.0], [-3.0]]), torch.tensor([[0, 1], [1, 1]])
        >>> graph_layer(x, index, torch.full((2, 2), 0.5), torch.ones(1), activation="relu").tolist()
        [[0.0], [0.0]]
    """
    op = "graph_layer"
    parameters = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check(x, index, coefficient, scale, parameters, activation)
    eps = _checks.check_number(op, "eps", eps, positive=True)
    _checks.check_flag(op, "undirected", undirected)
    _checks.check_flag(op, "hand_on", hand_on)
    _checks.check_flag(op, "validate", validate)
    requested = requested_backend(op, backend)
    if validate:
        _checks.check_index_values(op, index, x.shape[-2])
    keep = differentiated(x, coefficient, bias, norm_weight, norm_bias)
    options = (
        bias,
        norm_weight,
        norm_bias,
        activation,
        eps,
        undirected,
        keep,
        *csc_of(op, csc, index, validate),
        requested,
        hand_on,
    )
    if x.dim() == 3:
        y, *_, share = registration.graph_layer(x, index, coefficient, scale, *options)
    else:
        given = (x[None], index[None], coefficient[None], None if scale is None else scale[None])
        found = registration.graph_layer(*given, *options)
        y, share = found[0][0], found[-1][0]
    return (y, share) if hand_on else y
