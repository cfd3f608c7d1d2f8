# SPDX-License-Identifier: Apache-2.0
"""How close is right: error budgets and the top-K gap rule, for the tests and for the benchmark's gate.

Every limit is compared with a float64 oracle that was given the very bits the kernel was given, so rounding the
inputs is no error. A limit counts rounding errors: ``terms`` additions of float32 lose at most ``terms`` units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Unit roundoff: half the distance from one to the next number.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# Two float32 cosines of unit rows, each summed in its own order (measured 4.8e-7 for D <= 1024, CPU, 2026-09).
AFFINITY_TOLERANCE = 2e-6

# Extra units for what is not a sum: divisions, roots, exp, the product itself.
SPARE_UNITS = 16

# Rows of gap-controlled data that may have a near-tie at the k-th place.
NEAR_TIE_SHARE = 0.05


def accumulate_unit(dtype: torch.dtype) -> float:
    """Unit roundoff of the sums for inputs of this dtype: float32, or float64 for float64.

    Examples:
        >>> import torch
        >>> from drseg_core.testing.numerics import UNIT, accumulate_unit
        >>> accumulate_unit(torch.bfloat16) == UNIT[torch.float32]
        True
    """
    return UNIT[torch.float64] if dtype == torch.float64 else UNIT[torch.float32]


def affinity_tolerance(dtype: torch.dtype) -> float:
    """How far the cosine of two nodes may be off.

    Examples:
        >>> import torch
        >>> from drseg_core.testing.numerics import affinity_tolerance
        >>> affinity_tolerance(torch.bfloat16)
        2e-06
    """
    return AFFINITY_TOLERANCE if dtype != torch.float64 else 1e-13


def rounding_bound(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What storing ``value`` in ``dtype`` may cost: half a unit in the last place, subnormal numbers included.

    Examples:
        >>> import torch
        >>> from drseg_core.testing.numerics import rounding_bound
        >>> bool((torch.tensor(0.1) - torch.tensor(0.1).half()).abs() <= rounding_bound(torch.tensor(0.1), torch.half))
        True
    """
    smallest = torch.finfo(dtype).smallest_normal * UNIT[dtype]
    return value.abs() * UNIT[dtype] + smallest


@dataclass(frozen=True)
class Comparison:
    """Three figures of a comparison, and whether it passed.

    Args:
        worst: largest error as a multiple of its limit; at most 1 passes.
        max_error: largest absolute error.
        rms_ratio: RMS of the error over RMS of the oracle (informs, never gates: it hides a wrong row).
        worst_row_ratio: the largest such ratio of a single row.
        problem: None, or one line that says what failed first.

    Examples:
        >>> import torch
        >>> from drseg_core.testing.numerics import Comparison, compare_values
        >>> found = compare_values(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 1.0)
        >>> isinstance(found, Comparison), found.worst, found.max_error
        (True, 0.5, 0.5)
    """

    worst: float
    max_error: float
    rms_ratio: float
    worst_row_ratio: float
    problem: str | None


def compare_values(got: Tensor, oracle: Tensor, limit: Tensor | float) -> Comparison:
    """Compare element by element; NaN must meet NaN, an infinity the same infinity.

    Args:
        got: what a backend returned.
        oracle: the same in float64.
        limit: largest absolute error of each element.

    Examples:
        >>> import torch
        >>> from drseg_core.testing.numerics import compare_values
        >>> compare_values(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.25).problem
        '1 of 2 elements over the limit; first at (1,): got 2.5, expected 2.0 +- 0.25'
    """
    if got.shape != oracle.shape:
        return Comparison(
            torch.inf, torch.inf, torch.inf, torch.inf, f"shape {tuple(got.shape)} != {tuple(oracle.shape)}"
        )
    if got.numel() == 0:
        return Comparison(0, 0, 0, 0, None)
    value = got.detach().double().cpu()
    oracle = oracle.detach().double().cpu()
    limit = torch.as_tensor(limit, dtype=torch.float64).cpu().expand_as(oracle)
    same = (value == oracle) | (value.isnan() & oracle.isnan())
    error = torch.where(same, 0, (value - oracle).abs())
    error = torch.where(error.isnan(), torch.inf, error)
    share = torch.where(same, 0, error / limit)
    finite = oracle.isfinite()
    power = torch.where(finite, oracle, 0).square()
    lost = error.square()
    width = oracle.shape[-1] if oracle.dim() else 1
    row_power, row_lost = power.reshape(-1, width).sum(-1), lost.reshape(-1, width).sum(-1)
    tiny = torch.finfo(torch.float64).tiny
    problem = None
    if not bool((share <= 1).all()):
        where = tuple((~(share <= 1)).nonzero()[0].tolist())
        problem = f"{int((~(share <= 1)).sum())} of {share.numel()} elements over the limit; first at {where}: "
        problem += f"got {float(value[where])!r}, expected {float(oracle[where])!r} +- {float(limit[where]):.3g}"
    return Comparison(
        worst=float(share.max()),
        max_error=float(error.max()),
        rms_ratio=float((lost.sum() / power.sum().clamp_min(tiny)).sqrt()),
        worst_row_ratio=float((row_lost / row_power.clamp_min(tiny)).sqrt().max()),
        problem=problem,
    )


def compare_selection(
    index: Tensor,
    score: Tensor,
    oracle: Tensor,
    tolerance: float,
    *,
    include_self: bool,
    near_tie_share: float = 1.0,
) -> str | None:
    """The gap rule for one sample's selection; None when it passes, otherwise what failed first.

    Two computed scores may each be off by ``tolerance``, so two nodes may change places if their true scores are
    within twice that. Nothing else is allowed.

    Args:
        index: (N, K) chosen nodes. score: (N, K) their scores.
        oracle: (N, N) true scores in float64; ``-inf`` where a node may not be chosen. The diagonal is the node itself.
        tolerance: largest error of one score; 0 demands exact ties to the lowest index.
        include_self: the node itself must be (or must never be) chosen.
        near_tie_share: fail if more than this share of the rows has a near-tie at the k-th place.

    Examples:
        >>> import torch
        >>> from drseg_core.testing.numerics import compare_selection
        >>> score = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
        >>> chosen = torch.tensor([[0, 1], [0, 1], [0, 2]])
        >>> compare_selection(chosen, score.gather(1, chosen), score, 1e-6, include_self=True)
        'row 2 holds a clearly lower node'
    """
    nodes, k = index.shape
    index, score, oracle = index.long().cpu(), score.double().cpu(), oracle.double().cpu()
    own = torch.arange(nodes)[:, None]
    key = oracle.clone()
    key.fill_diagonal_(torch.inf if include_self else -torch.inf)
    if bool(((index < 0) | (index >= nodes)).any()):
        return "an index is out of range"
    candidates = (key > -torch.inf).sum(1)
    real = torch.arange(k) < candidates[:, None]
    if bool((index != own)[~real].any()):
        return "a padded slot does not hold its own index"
    if bool((score[~real] != -torch.inf).any()):
        return "a padded slot has a score"
    rising = (index[:, 1:] > index[:, :-1]) | ~real[:, 1:]
    if not bool(rising.all()):
        return f"row {int((~rising).any(1).nonzero()[0])} is not strictly ascending"
    picked = key.gather(1, index)
    if bool((picked == -torch.inf)[real].any()):
        return f"row {int(((picked == -torch.inf) & real).any(1).nonzero()[0])} holds a node that may not be chosen"
    error = (score - oracle.gather(1, index)).abs()
    if not bool((error <= tolerance)[real].all()):
        where = (~(error <= tolerance) & real).nonzero()[0].tolist()
        return f"score at {tuple(where)} is not that of its node: off by {float(error[tuple(where)]):.3g}"
    if nodes == 0 or k == 0:
        return None
    ordered = key.sort(dim=1, descending=True).values
    last = torch.minimum(torch.tensor(k), candidates).clamp_min(1) - 1
    threshold = ordered.gather(1, last[:, None])
    slack = 2 * tolerance
    if not bool((picked >= threshold - slack)[real].all()):
        return f"row {int((~(picked >= threshold - slack) & real).any(1).nonzero()[0])} holds a clearly lower node"
    chosen = torch.zeros(nodes, nodes).scatter_add_(1, index, real.float()) > 0
    missing = (key > threshold + slack) & ~chosen
    if bool(missing.any()):
        return f"row {int(missing.any(1).nonzero()[0])} misses a clearly higher node"
    if tolerance == 0:
        # among equal scores at the k-th place the lowest indices are taken: none is skipped before a taken one
        tied = (key == threshold) & (threshold > -torch.inf)
        highest = torch.where(tied & chosen, torch.arange(nodes), -1).amax(1, keepdim=True)
        if bool((tied & ~chosen & (torch.arange(nodes) < highest)).any()):
            return "a tie did not go to the lowest index"
    beyond = ordered.gather(1, (last + 1).clamp_max(nodes - 1)[:, None])
    near = (threshold - beyond <= 2 * slack) & (last + 1 < nodes)[:, None] & (beyond > -torch.inf)
    if float(near.float().mean()) > near_tie_share:
        return f"{float(near.float().mean()):.0%} of the rows have a near-tie: the data do not test the selection"
    return None
