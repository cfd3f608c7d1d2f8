# SPDX-License-Identifier: Apache-2.0
"""What the ops mean, dense and in float64, and how far a float32 kernel may be off.

Written from the formulas, not from the references: dense N x N matrices, no blocks. Each function takes the op's
keyword arguments and a gradient of the output and returns ``name -> (value, limit)`` for the output and every
gradient. A limit is the sum of the absolute terms times the rounding errors that each may meet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drseg_core.testing import numerics

Expected = dict[str, tuple[Tensor, Tensor]]


def _double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().double() for tensor in tensors)


def _dense(value: Tensor, index: Tensor) -> Tensor:
    """(B, N, K) edge values to the (B, N, N) matrix; repeated edges add up."""
    matrix = value.new_zeros(*index.shape[:2], index.shape[1])
    return matrix.scatter_add(2, index.long(), value)


def _in_degree(index: Tensor) -> Tensor:
    return _dense(torch.ones(index.shape, dtype=torch.float64), index).sum(1)


def scores(prior: Tensor, grid: tuple[int, int], decay: float, form: str) -> Tensor:
    """(B, N, N) order scores of Eq. 7; ``-inf`` in the rows and columns of nodes that are not finite."""
    prior = prior.double()
    finite = prior.isfinite().all(-1)
    prior = torch.where(finite[..., None], prior, 0)
    prior = prior / prior.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    norm = prior.square().sum(-1, keepdim=True).sqrt()
    unit = torch.where(norm > 0, prior / norm.clamp_min(1e-300), 0)
    cosine = unit @ unit.mT
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    cell = torch.stack([y.flatten(), x.flatten()], -1).double()
    distance = torch.cdist(cell, cell, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / max(1.0, ((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2) ** 0.5)
    score = {
        "additive": lambda: cosine - decay * distance,
        "gauss": lambda: cosine - decay * distance**2,
        "multiplicative": lambda: cosine.clamp_min(0) * torch.exp(-decay * distance),
        "product": lambda: cosine * torch.exp(-decay * distance),
    }[form]()
    both = finite[:, :, None] & finite[:, None, :]
    return score.masked_fill(~both, -torch.inf)


def _softplus(value: Tensor) -> Tensor:
    return value.clamp_min(0) + torch.log1p(torch.exp(-value.abs()))


def share_of(inputs: dict[str, Any]) -> Tensor:
    """What softplus is multiplied by: 0 of padding, otherwise the exponential of an exponent."""
    index, mask, exponent = inputs["index"], inputs.get("mask"), inputs.get("exponent")
    share = torch.ones(index.shape, dtype=torch.float64) if exponent is None else exponent.detach().double().exp()
    return share if mask is None else share * mask


def edge_weight(inputs: dict[str, Any], grad: Tensor) -> Expected:
    given = [inputs[name] for name in ("source", "target", "vector", "bias")]
    source, target, vector, bias = _double(*given)
    index, share = inputs["index"].long(), share_of(inputs)
    batch, nodes, k = index.shape
    unit = numerics.accumulate_unit(given[0].dtype)
    near = torch.stack([target[b][index[b]] for b in range(batch)]) if batch else target.new_zeros(0, nodes, k, 1)
    hidden = (source[:, :, None] + near).relu()
    logit = hidden @ vector + bias
    slip = (vector.numel() + numerics.SPARE_UNITS) * unit * (hidden @ vector.abs() + bias.abs())
    weight = _softplus(logit) * share
    tiny = torch.finfo(torch.float32).tiny
    # of softplus, and of an exponential and its product
    limit = 20 * unit * weight + (_softplus(logit + slip) - _softplus(logit)) * share + tiny
    result = {"output": (weight, limit)}
    if "exponent" in inputs:
        value, limit = grad.double() * weight, grad.double().abs() * limit
        rounding = numerics.rounding_bound(value, inputs["exponent"].dtype)
        result["grad_exponent"] = (value, limit + unit * value.abs() + rounding)

    grad = grad.double() * share
    slope = grad * torch.sigmoid(logit)
    slope_limit = grad.abs() * (torch.sigmoid(logit + slip) - torch.sigmoid(logit - slip)) + 16 * unit * slope.abs()
    active = (hidden > 0).double()
    edges = index.numel()

    def through(value: Tensor, to_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        term = value[..., None] * to_hidden * active
        spread = torch.zeros_like(source)
        for b in range(batch):
            spread[b].index_add_(0, index[b].flatten(), term[b].flatten(0, 1))
        return term.sum(2), spread, (value[..., None] * hidden).sum((0, 1, 2))

    exact = through(slope, vector)
    size = through(slope.abs(), vector.abs())
    slip_sums = through(slope_limit, vector.abs())
    degree = _in_degree(index)[..., None]
    counts = (k, degree, 4 * edges**0.5)
    names = ("source", "target", "vector")
    for name, value, total, extra, count, tensor in zip(names, exact, size, slip_sums, counts, given, strict=False):
        limit = (count + numerics.SPARE_UNITS) * unit * total + extra + tiny
        result[f"grad_{name}"] = (value, limit + numerics.rounding_bound(value, tensor.dtype))
    total = slope.sum().reshape(given[3].shape)
    limit = (4 * edges**0.5 + numerics.SPARE_UNITS) * unit * slope.abs().sum() + slope_limit.sum() + tiny
    result["grad_bias"] = (total, limit.reshape(total.shape) + numerics.rounding_bound(total, given[3].dtype))
    return result


def degree_normalize(inputs: dict[str, Any], grad: Tensor) -> Expected:
    given, index = inputs["weight"], inputs["index"].long()
    norm, eps = inputs.get("norm", "sym_row"), inputs.get("eps", 1e-6)
    unit = numerics.accumulate_unit(given.dtype)
    k = index.shape[2]

    def coefficients(weight: Tensor) -> Tensor:
        matrix = _dense(weight, index)
        row, column = matrix.sum(2), matrix.sum(1)
        if norm == "sym_count":
            return weight / max(k, 1)
        if norm == "row":
            return (matrix / (row + eps)[:, :, None]).gather(2, index)
        if norm == "sym_undirected":
            row = column = (row + column) / 2
        start, end = (row + eps) ** -0.5, ((row if norm == "sym_row" else column) + eps) ** -0.5
        result = (matrix * start[:, :, None] * end[:, None, :]).gather(2, index)
        return result / 2 if norm == "sym_undirected" else result

    weight = given.detach().double().requires_grad_()
    value = coefficients(weight)
    (exact,) = torch.autograd.grad(value, weight, grad.double()) if value.numel() else (torch.zeros_like(weight),)
    # every term of the gradient with a plus sign: the direct one, and twice what goes through the degrees
    direct = coefficients(torch.ones_like(weight)).detach() if norm == "sym_count" else None
    positive = grad.double().abs()
    if value.numel():
        (mixed,) = torch.autograd.grad(coefficients(weight), weight, positive)
        if direct is None:
            with torch.no_grad():
                ratio = (value / weight).nan_to_num(0, 0, 0)
                zero = weight == 0
                # where the weight is zero the coefficient per weight is the limit of the ratio
                probe = coefficients(torch.where(zero, torch.finfo(torch.float64).tiny, weight.detach()))
                direct = torch.where(zero, probe / torch.finfo(torch.float64).tiny, ratio)
        size = 2 * positive * direct + mixed.abs() + (positive * direct - mixed).abs()
    else:
        size = torch.zeros_like(weight)
    degree = _in_degree(index).amax() if index.numel() else torch.tensor(0.0)
    count = k if norm in ("sym_row", "row", "sym_count") else torch.maximum(degree, torch.tensor(float(k)))
    tiny = torch.finfo(torch.float32).tiny
    limit = (count + numerics.SPARE_UNITS) * unit * value.abs() + tiny
    grad_limit = (k + degree + 2 * numerics.SPARE_UNITS) * unit * size + tiny
    return {
        "output": (value.detach(), limit.detach()),
        "grad_weight": (exact, grad_limit.detach() + numerics.rounding_bound(exact, given.dtype)),
    }


def graph_propagate(inputs: dict[str, Any], grad: Tensor) -> Expected:
    x, coefficient = _double(inputs["x"], inputs["coefficient"])
    grad, index = grad.double(), inputs["index"].long()
    dtype, unit = inputs["x"].dtype, numerics.accumulate_unit(inputs["x"].dtype)
    matrix, size = _dense(coefficient, index), _dense(coefficient.abs(), index)
    start, end, along = grad, x, index.shape[2] * torch.ones(())
    degree = _in_degree(index)[..., None]
    received, sent = along, degree
    if inputs.get("transpose", False):
        matrix, size = matrix.mT, size.mT
        start, end, received, sent = x, grad, degree, along
    tiny = torch.finfo(torch.float32).tiny
    y = matrix @ x
    limit = (received + numerics.SPARE_UNITS) * unit * (size @ x.abs()) + tiny
    grad_x = matrix.mT @ grad
    x_limit = (sent + numerics.SPARE_UNITS) * unit * (size.mT @ grad.abs()) + tiny
    dot = (start @ end.mT).gather(2, index)
    dot_size = (start.abs() @ end.abs().mT).gather(2, index)
    dot_limit = (x.shape[2] + numerics.SPARE_UNITS) * unit * dot_size + tiny
    return {
        "output": (y, limit + numerics.rounding_bound(y, dtype)),
        "grad_x": (grad_x, x_limit + numerics.rounding_bound(grad_x, dtype)),
        "grad_coefficient": (dot, dot_limit + numerics.rounding_bound(dot, inputs["coefficient"].dtype)),
    }


def literal_edge_weight(prior: Tensor, first: Tensor, first_bias: Tensor, vector: Tensor, bias: Tensor) -> Tensor:
    """Eq. 8 for every pair as the paper writes it, on the concatenation: (B, N, D) to (B, N, N)."""
    nodes = prior.shape[1]
    pair = torch.cat([prior[:, :, None].expand(-1, -1, nodes, -1), prior[:, None].expand(-1, nodes, -1, -1)], -1)
    return F.softplus(F.linear(pair, first, first_bias).relu() @ vector + bias)
