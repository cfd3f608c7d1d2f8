# SPDX-License-Identifier: Apache-2.0
"""What must agree before a time counts. Every check returns None, or one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from drseg_core.testing import numerics

# PDGR ends in a LayerNorm: its outputs are near one, and two float32 evaluations differ by 1e-5 (CPU, 2026-11)
OUTPUT_TOLERANCE = 1e-3
# of a gradient's largest element
GRADIENT_TOLERANCE = 2e-3
# a ReLU at zero may fall either way, which changes some elements of a gradient by one node's share: on an H100 (4096
# nodes, 2026-11) one in 6700 by up to 1.14 times the limit
_FLIPPED_SHARE, _FLIPPED_TIMES = 5e-4, 2
# Where linear maps are in bfloat16: beside twice what they cost another module, and of a norm where two such modules
# are held against each other. What they cost depends on the size: 0.02 of an output, up to 0.05 of a gradient at 576
# nodes and 0.3 at 42, where a ReLU that falls the other way is a larger part of the sum (CPU, 2026-11).
_REDUCED_OUTPUT, _REDUCED_GRADIENT, _REDUCED_NORM = 0.02, 0.05, 0.5


class GivenSelection(TorchFunctionMode):
    """Within the block ``Tensor.topk`` picks the given neighbours.

    Two right selections may differ where scores are equal or nearly so, and one other neighbour moves an output by
    more than any rounding. So the selection is checked by itself, and the rest of the module on one and the same.

    Args:
        index: (B, N, K) neighbours.
    """

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index = index.long()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.topk:
            return torch.return_types.topk((args[0].gather(-1, self.index), self.index))
        return func(*args, **(kwargs or {}))


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max())


def output(got: Tensor, expected: Tensor, rounded: Tensor | None = None) -> str | None:
    """Absolute agreement of a module's output.

    ``rounded`` is what another module makes of the same in the precision of ``got``, where that is not float32.
    """
    limit = OUTPUT_TOLERANCE
    if rounded is not None:
        limit = _REDUCED_OUTPUT + 2 * _largest(rounded - expected)
    result = numerics.compare_values(got, expected.detach().double(), limit)
    return None if result.problem is None else f"output: {result.problem}"


def most_cells(got: Tensor, expected: Tensor) -> str | None:
    """Agreement of (B, C, h, w) in nearly all cells, where the two chose their neighbours each for itself."""
    share = float(((got - expected).detach().abs().amax(1) <= OUTPUT_TOLERANCE).double().mean())
    return None if share >= 0.95 else f"output: only {share:.4f} of the cells agree"


def most_of_gradients(names: Sequence[str], got: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Agreement of the norms of every gradient, where the two chose their neighbours each for itself."""
    for name, value, right in zip(names, got, expected, strict=True):
        share = float((value - right).double().norm() / right.double().norm().clamp_min(1e-30))
        # a sum over all edges that may cancel to nothing is left to the others
        if value.numel() > 1 and not share <= 0.1:
            return f"gradient of {name}: differs by {share:.2g} of its norm"
    return None


def gradients(
    names: Sequence[str],
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    like: dict[str, str],
    rounded: Sequence[Tensor] | None = None,
) -> str | None:
    """Agreement of every gradient relative to its largest element, or to that of the one named in ``like``, if larger.

    A single number that is a sum over all edges may cancel to nothing; its error is that of its terms. ``rounded`` as
    in ``output``.
    """
    right = {name: value.detach().double() for name, value in zip(names, expected, strict=True)}
    share = GRADIENT_TOLERANCE if rounded is None else _REDUCED_GRADIENT
    limits = {name: share * float(value.abs().max()) for name, value in right.items()}
    for name, value in zip(names, rounded or (), strict=rounded is not None):
        limits[name] += 2 * _largest(value - right[name])
    for name, value in zip(names, got, strict=True):
        limit = max(limits[name], limits[like.get(name, name)])
        problem = numerics.compare_values(value, right[name], limit).problem
        beyond = float(((value - right[name]).abs() > limit).double().mean())
        if problem is not None and beyond <= _FLIPPED_SHARE:
            problem = numerics.compare_values(value, right[name], _FLIPPED_TIMES * limit).problem
        if problem is not None:
            return f"gradient of {name}: {problem}"
    return None


def roughly(
    names: Sequence[str], got: tuple[Tensor, Sequence[Tensor]], expected: tuple[Tensor, Sequence[Tensor]]
) -> str | None:
    """Agreement of the norms of two modules' outputs and gradients, both with linear maps in bfloat16."""
    for name, value, right in zip(("output", *names), (got[0], *got[1]), (expected[0], *expected[1]), strict=False):
        share = float((value - right).detach().double().norm() / right.detach().double().norm().clamp_min(1e-30))
        if value.numel() > 1 and not share <= _REDUCED_NORM:
            return f"{name}: differs by {share:.2g} of its norm"
    return None


def result_of_op(op: str, result: Tensor, reference: Tensor) -> str | None:
    """One backend of an op against the reference; selections are held to the gap rule by the tests."""
    if op == "knn_graph":
        share = float((result == reference).float().mean())
        return None if share > 0.999 else f"only {share:.4f} of the neighbours agree with the reference"
    return _near(result, reference, 1e-4)


def gradients_of_op(names: Sequence[str], got: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """The gradients of one backend against those of the reference."""
    for name, value, right in zip(names, got, expected, strict=True):
        problem = _near(value, right, GRADIENT_TOLERANCE)
        if problem is not None:
            return f"gradient of {name}: {problem}"
    return None


def _near(value: Tensor, right: Tensor, share: float) -> str | None:
    """Agreement within a share of the largest element, and what storing both in their dtype costs."""
    wide = right.double()
    stored = 2 * numerics.rounding_bound(wide, right.dtype) if right.dtype in numerics.UNIT else 0.0
    return numerics.compare_values(value, wide, share * wide.abs().max() + stored).problem


def true_scores(prior: Tensor, rows: Tensor, grid: tuple[int, int], decay: float) -> Tensor:
    """``cos - decay * distance`` in float64, (len(rows), N), of one sample's prior (N, D)."""
    wide = prior.double()
    norm = wide.norm(dim=-1)
    inverse = torch.where(norm > 0, 1 / norm, 0)
    cosine = (wide[rows] * inverse[rows, None]) @ wide.T * inverse
    cell = torch.arange(len(prior), device=prior.device)
    y, x = cell // grid[1], cell % grid[1]
    distance = ((y[rows, None] - y).square() + (x[rows, None] - x).square()).double().sqrt()
    longest = ((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2) ** 0.5
    return cosine - decay * distance / max(longest, 1.0)


def selection(
    index: Tensor, prior: Tensor, grid: tuple[int, int], decay: float, *, include_self: bool = True, rows: int = 256
) -> str | None:
    """The gap rule on some rows of each sample: the scores of the chosen nodes are the best ones, ties aside.

    Args:
        index: (B, N, K) chosen nodes in any order.
        prior: (B, N, D) features, all finite.
        grid: (h, w). decay: strength of the spatial term.
        include_self: every node must be among its own.
        rows: rows to look at in each sample, evenly spaced.
    """
    batch, nodes, k = index.shape
    slack = 2 * numerics.affinity_tolerance(prior.dtype)
    looked = torch.linspace(0, nodes - 1, min(rows, nodes), device=index.device).long()
    for b in range(batch):
        chosen = index[b, looked].long()
        if bool(((chosen < 0) | (chosen >= nodes)).any()):
            return f"sample {b}: an index is out of range"
        if bool((chosen.sort(-1).values.diff(dim=-1) == 0).any()):
            return f"sample {b}: a node is chosen twice"
        score = true_scores(prior[b], looked, grid, decay)
        if include_self:
            score[torch.arange(len(looked)), looked] = torch.inf
        best = score.topk(k, dim=-1).values
        picked = score.gather(1, chosen).sort(-1, descending=True).values
        right = (picked >= best - slack).all(1)
        if not bool(right.all()):
            return f"sample {b}: row {int(looked[~right][0])} holds a clearly lower node"
    return None
