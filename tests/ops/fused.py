# SPDX-License-Identifier: Apache-2.0
"""The fused ops under the contract: how to call them, their inputs, and what they mean in float64.

As in ``oracle.py`` a limit is the sum of the absolute terms times the rounding errors that each may meet, carried
through what follows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from oracle import Expected, _dense, _in_degree, _softplus, share_of
from subjects import Inputs, Subject, registered_edges, with_exponents
from torch import Tensor

from drseg_core import ops
from drseg_core.ops.edge_coefficient import cases as coefficient_cases
from drseg_core.ops.graph_layer import cases as layer_cases
from drseg_core.testing import Case, numerics

TINY = torch.finfo(torch.float32).tiny


def _double(*tensors: Tensor | None) -> list[Tensor]:
    return [torch.zeros((), dtype=torch.float64) if value is None else value.detach().double() for value in tensors]


def graph_layer(inputs: Inputs, grad: Tensor) -> Expected:
    x, coefficient, bias, norm_weight, norm_bias = _double(
        *(inputs.get(n) for n in ("x", "coefficient", "bias", "norm_weight", "norm_bias"))
    )
    given, index, grad = inputs["x"], inputs["index"].long(), grad.double()
    activation = inputs.get("activation", "none")
    unit = numerics.accumulate_unit(given.dtype)
    channels = x.shape[-1]
    matrix, size = _dense(coefficient, index), _dense(coefficient.abs(), index)
    both = inputs.get("undirected", False)
    degree = _in_degree(index)[..., None]
    received, sent = index.shape[2] * torch.ones(()), degree
    if both:
        matrix, size = matrix + matrix.mT, size + size.mT
        received = sent = received + degree

    y = matrix @ x + bias
    slip = (received + numerics.SPARE_UNITS) * unit * (size @ x.abs() + bias.abs()) + TINY
    # the gradient before the activation, and how far it may be off
    inner, inner_slip = grad, torch.zeros_like(grad)
    result: Expected = {}
    rows = grad.shape[0] * grad.shape[1]
    # sums over rows are in chunks; four times the root of their number is what random roundings add up to
    count = 4 * rows**0.5 + channels + numerics.SPARE_UNITS
    if activation == "relu":
        # what may be zero in one and positive in the other, in the output's dtype too
        near = y.abs() <= slip + numerics.rounding_bound(torch.zeros_like(y), given.dtype)
        inner, inner_slip = grad * (y > 0), grad.abs() * near
        y = y.relu()
    if activation == "layer_norm":
        y = y - y.mean(-1, keepdim=True)
        inverse = (y.square().mean(-1, keepdim=True) + inputs.get("eps", 1e-5)) ** -0.5
        # rounding of the sums, of the mean, and of the deviation
        off = (slip + slip.mean(-1, keepdim=True)) * inverse
        off = off + (channels + numerics.SPARE_UNITS) * unit * (y.abs() + y.abs().mean(-1, keepdim=True)) * inverse
        normed = y * inverse
        loose = (normed.abs() * off).mean(-1, keepdim=True) + (channels + numerics.SPARE_UNITS) * unit
        # where a row's deviation is of the size of its rounding, the first order is not all
        off = 2 * (off + normed.abs() * loose)
        y = normed * norm_weight + norm_bias
        slip = off * norm_weight.abs() + numerics.SPARE_UNITS * unit * (y.abs() + norm_bias.abs()) + TINY
        result["grad_norm_weight"] = (
            (grad * normed).sum((0, 1)),
            (count * unit * (grad * normed).abs() + grad.abs() * off).sum((0, 1)) + TINY,
        )
        result["grad_norm_bias"] = (grad.sum((0, 1)), count * unit * grad.abs().sum((0, 1)) + TINY)
        scaled = grad * norm_weight
        along = (scaled * normed).mean(-1, keepdim=True)
        inner = (scaled - scaled.mean(-1, keepdim=True) - normed * along) * inverse
        terms = scaled.abs() + scaled.abs().mean(-1, keepdim=True)
        terms = (terms + normed.abs() * (scaled * normed).abs().mean(-1, keepdim=True)) * inverse
        moved = off * along.abs() + normed.abs() * (scaled.abs() * off).mean(-1, keepdim=True)
        inner_slip = (channels + numerics.SPARE_UNITS) * unit * terms + moved * inverse + 2 * loose * inner.abs()
    result["output"] = (y, slip + numerics.rounding_bound(y, given.dtype))

    absolute = inner.abs() + inner_slip
    result["grad_bias"] = (inner.sum((0, 1)), (count * unit * absolute + inner_slip).sum((0, 1)) + TINY)
    spread = (sent + numerics.SPARE_UNITS) * unit * (size.mT @ absolute) + size.mT @ inner_slip + TINY
    grad_x = matrix.mT @ inner
    result["grad_x"] = (grad_x, spread + numerics.rounding_bound(grad_x, given.dtype))

    def dot(start: Tensor, end: Tensor) -> Tensor:
        product = start @ end.mT
        return (product + (end @ start.mT if both else 0)).gather(2, index)

    value = dot(inner, x)
    limit = (2 * channels + numerics.SPARE_UNITS) * unit * dot(absolute, x.abs()) + dot(inner_slip, x.abs()) + TINY
    result["grad_coefficient"] = (value, limit + numerics.rounding_bound(value, inputs["coefficient"].dtype))
    for name in ("bias", "norm_weight", "norm_bias"):
        if inputs.get(name) is None:
            result.pop(f"grad_{name}", None)
        else:
            value, limit = result[f"grad_{name}"]
            result[f"grad_{name}"] = (value, limit + numerics.rounding_bound(value, inputs[name].dtype))
    return result


def edge_coefficient(inputs: Inputs, grad: Tensor) -> Expected:
    names = ("source", "target", "vector", "bias")
    given = [inputs[name] for name in names]
    source, target, vector, bias = (value.requires_grad_() for value in _double(*given))
    index, share = inputs["index"].long(), share_of(inputs)
    norm, eps = inputs.get("norm", "sym_row"), inputs.get("eps", 1e-6)
    batch, nodes, k = index.shape
    unit = numerics.accumulate_unit(torch.float64 if torch.float64 in [v.dtype for v in given] else torch.float32)
    half = 0.5 if norm == "sym_undirected" else 1.0

    def outgoing(value: Tensor) -> Tensor:
        return value.sum(2)

    def incoming(value: Tensor) -> Tensor:
        return _dense(value, index).sum(1)

    def at_end(value: Tensor) -> Tensor:
        return value.gather(1, index.flatten(1)).view(index.shape)

    # the values, by autograd
    near = torch.stack([target[b][index[b]] for b in range(batch)])
    hidden = (source[:, :, None] + near).relu()
    logit = hidden @ vector + bias
    weight = _softplus(logit) * share
    row, column = outgoing(weight), incoming(weight)
    if norm == "sym_undirected":
        row = column = (row + column) / 2
    start = (row + eps) ** -0.5
    end = (row + eps) ** -0.5 if norm == "sym_row" else (column + eps) ** -0.5
    if norm == "row":
        start, end = 1 / (row + eps), torch.ones_like(row)
    elif norm == "sym_count":
        start, end = torch.full_like(row, 1 / k), torch.ones_like(row)
    ratio = half * start[:, :, None] * at_end(end)
    value = weight * ratio
    weight.retain_grad()
    exact = torch.autograd.grad(value, [source, target, vector, bias, weight], grad.double())
    *grads, to_weight = exact

    # the limits: how far a weight may be off, then a degree, a coefficient, the gradient of a weight, that of a logit
    with torch.no_grad():
        slip = (vector.numel() + numerics.SPARE_UNITS) * unit * (hidden @ vector.abs() + bias.abs())
        # of softplus, and of an exponential and its product
        loose = 20 * unit * weight + (_softplus(logit + slip) - _softplus(logit)) * share + TINY
        count = (k + _in_degree(index).amax() + 2 * numerics.SPARE_UNITS) * unit
        # relative error of a degree, the largest of all nodes; no degree for sym_count
        leaving, ending = outgoing(loose), incoming(loose)
        if norm == "sym_undirected":
            leaving = ending = (leaving + ending) / 2
        scale_slip = 0.0 if norm == "sym_count" else (leaving / (row + eps)).amax() + count
        if norm == "sym_inout":
            scale_slip = scale_slip + (ending / (column + eps)).amax()
        off = loose * ratio + value * (scale_slip + numerics.SPARE_UNITS * unit) + TINY
        positive = grad.double().abs()
        direct = positive * ratio
        through = torch.zeros_like(direct)
        for terms in (positive * value, positive * off / (scale_slip + count)):
            if norm == "row":
                through = through + (start * outgoing(terms))[:, :, None]
            elif norm != "sym_count":
                to_start, to_end = start**2 * outgoing(terms), end**2 * incoming(terms)
                both = to_start + to_end
                through = through + (both if norm != "sym_inout" else to_start)[:, :, None]
                through = through + (0 if norm == "sym_row" else at_end(both if norm == "sym_undirected" else to_end))
        weight_slip = (direct + through) * 3 * (scale_slip + count)
        slope = to_weight * torch.sigmoid(logit) * share
        slope_slip = to_weight.abs() * (torch.sigmoid(logit + slip) - torch.sigmoid(logit - slip))
        slope_slip = (slope_slip + weight_slip * torch.sigmoid(logit)) * share + 16 * unit * slope.abs()

        def size_of(value: Tensor) -> tuple[Tensor, ...]:
            term = value[..., None] * vector.abs() * (hidden > 0)
            spread = torch.zeros_like(source)
            for b in range(batch):
                spread[b].index_add_(0, index[b].flatten(), term[b].flatten(0, 1))
            return term.sum(2), spread, (value[..., None] * hidden).sum((0, 1, 2)), value.sum()

        result = {"output": (value.detach(), off)}
        edges = 4 * index.numel() ** 0.5
        counts = (k, _in_degree(index)[..., None], edges, edges)
        for name, right, total, extra, terms, tensor in zip(
            names, grads, size_of(slope.abs()), size_of(slope_slip), counts, given, strict=True
        ):
            limit = ((terms + numerics.SPARE_UNITS) * unit * total + extra + TINY).reshape(right.shape)
            result[f"grad_{name}"] = (right, limit + numerics.rounding_bound(right, tensor.dtype))
        if "exponent" in inputs:
            right = to_weight * weight
            limit = weight_slip * weight + to_weight.abs() * loose + numerics.SPARE_UNITS * unit * right.abs() + TINY
            result["grad_exponent"] = (right, limit + numerics.rounding_bound(right, inputs["exponent"].dtype))
    return result


class Fused(Subject):
    """A fused op: its output has the dtype of its features, or is as wide as a coefficient."""

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.name == "graph_layer":
            return dtype
        return torch.float64 if dtype == torch.float64 else torch.float32


def _registered_layer(i: Inputs) -> tuple[Any, ...]:
    options = (i.get("activation", "none"), i.get("eps", 1e-5), i.get("undirected", False), True, None, None, "auto")
    names = ("x", "index", "coefficient", "scale", "bias", "norm_weight", "norm_bias")
    return *(i.get(name) for name in names), *options


GRAPH_LAYER = Fused(
    name="graph_layer",
    function=ops.graph_layer,
    make_inputs=layer_cases.make_inputs,
    oracle=graph_layer,
    differentiable=("x", "coefficient", "bias", "norm_weight", "norm_bias"),
    node_inputs=("x", "index", "coefficient"),
    registered=_registered_layer,
    variants=({"undirected": False}, {"undirected": True}),
)


def make_relu(*arguments: Any, **options: Any) -> Inputs:
    inputs = layer_cases.make_inputs(*arguments, **options)
    return {name: inputs[name] for name in ("x", "index", "coefficient", "bias")} | {"activation": "relu"}


GRAPH_LAYER_RELU = Fused(
    name="graph_layer",
    function=ops.graph_layer,
    make_inputs=make_relu,
    oracle=graph_layer,
    differentiable=("x", "coefficient", "bias"),
    node_inputs=("x", "index", "coefficient"),
    registered=_registered_layer,
    variants=({"undirected": False}, {"undirected": True}),
)


def _with_mask(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """One slot in nine masked, as padding is."""
    inputs = coefficient_cases.make_inputs(case, dtype, device, seed)
    inputs["mask"] = (torch.arange(inputs["index"].numel()).reshape(inputs["index"].shape) % 9 != 4).to(device)
    return inputs


def _registered_coefficient(i: Inputs) -> tuple[Any, ...]:
    return (
        *registered_edges(i),
        i.get("norm", "sym_row"),
        i.get("eps", 1e-6),
        i.get("apart", False),
        None,
        None,
        "auto",
        i.get("exponent"),
    )


EDGE_COEFFICIENT = Fused(
    name="edge_coefficient",
    function=ops.edge_coefficient,
    make_inputs=_with_mask,
    oracle=edge_coefficient,
    differentiable=("source", "target", "vector", "bias"),
    node_inputs=("source", "target", "index", "mask"),
    registered=_registered_coefficient,
    variants=tuple({"norm": norm} for norm in ("sym_row", "sym_count", "sym_inout", "row", "sym_undirected")),
)

EDGE_COEFFICIENT_EXPONENT = replace(
    EDGE_COEFFICIENT,
    make_inputs=with_exponents(_with_mask),
    differentiable=(*EDGE_COEFFICIENT.differentiable, "exponent"),
    node_inputs=(*EDGE_COEFFICIENT.node_inputs, "exponent"),
)

FUSED = {subject.name: subject for subject in (EDGE_COEFFICIENT, GRAPH_LAYER)}
