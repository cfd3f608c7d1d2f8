# SPDX-License-Identifier: Apache-2.0
"""Labels spread over the k-NN graph of a prior: rectification without training (Zhou et al. 2004, LPOSS 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.errors import NumericalError
from drseg_core.nn.spsd import SPSD
from drseg_core.ops import Graph, PreparedPrior, backend_names, degree_normalize, knn_graph
from drseg_core.ops._checks import (
    check_alpha,
    check_choice,
    check_count,
    check_flag,
    check_grid,
    check_number,
    check_tensor,
    check_unmapped,
)
from drseg_core.ops.graph import check_graph
from drseg_core.ops.prepare_prior.api import rows_of

__all__ = [
    "LPOSS_GRAPH",
    "LabelPropagation",
    "propagate_labels",
    "propagation_graph",
    "reach_of_steps",
    "smooth",
    "solve_labels",
]

Select = Literal["affinity", "cosine"]

# what LPOSS publishes for patches of 16 pixels: sigma = 0.01 for each pixel, and k = 400 with the node itself, whose
# edge it then drops
LPOSS_GRAPH: dict[str, Any] = {"k": 399, "gamma": 3.0, "decay": 0.16, "select": "cosine"}

# a decay can make weights very small, and what is added to their sums must be smaller still
_EPS = 1e-20

# float32 values in the widest register
_LANES = 16


def propagation_graph(
    prior: Tensor | PreparedPrior,
    grid: tuple[int, int],
    k: int = 75,
    *,
    gamma: float = 1.0,
    decay: float = 0.0,
    select: Select = "affinity",
    radius: float | None = None,
    backend: str | None = None,
) -> Graph:
    """The symmetric, normalised k-NN graph on which labels are propagated.

    Edge weights are ``w_ij = max(cos(d_i, d_j), 0)**gamma * exp(-decay * distance_ij)`` for the ``k`` neighbours j of
    i. They are 0 for all other j and for i itself. The operator is ``S = D^-1/2 (W + W^T) D^-1/2`` with ``D`` the row
    sums of ``W + W^T``, as in the public code of LPOSS (arXiv 2503.19777). :func:`smooth` applies it.

    The graph holds one half of ``S``, from ``degree_normalize(norm="sym_undirected")``. The degrees ``d`` of that norm
    are those of ``(W + W^T) / 2``, half of ``D``. So ``w_ij / (2 sqrt(d_i d_j))`` plus the same of ``W^T`` is ``S``
    term by term.

    The distance is in cells, not in shares of the grid. So it means the same in a window and in a whole scene.

    By default the k best by the whole weight are chosen. LPOSS chooses the k by the cosine alone, and multiplies by the
    spatial factor afterwards. That is ``select="cosine"``, and with ``**LPOSS_GRAPH`` this is its graph. Two
    differences are left. No node is its own neighbour here, while LPOSS takes it as one of its k, then clears the
    diagonal. Each cell is one node here, while LPOSS has a node for every window that covers the cell.

    Args:
        prior: (B, N, D) or (N, D) features, as ``knn_graph`` takes them, or what ``prepare_prior`` made of them.
        grid: (h, w) with ``h * w = N``.
        k: neighbours of each node besides itself, >= 1; a grid with fewer cells uses all.
        gamma: exponent of the cosine, > 0.
        decay: spatial decay for each cell of distance, >= 0; LPOSS's sigma times the pixels of a patch.
        select: neighbours are the largest by ``affinity``, the whole weight, or by ``cosine``.
        radius: cells farther apart than this many cells are no neighbours, >= 0; None is no limit. With a radius, a
            node depends only on cells within a reach (:func:`reach_of_steps`).
        backend: one of ``drseg_core.ops.backend_names()``; None takes the best that can run.

    Returns:
        A ``Graph``: ``index`` (B, N, K) or (N, K) int32 with K at most ``k``, ``coefficient`` of the same shape,
        float32 (float64 for a float64 prior), and its columns.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.
        BackendUnavailableError: the named backend cannot run here.

    Note:
        A node whose prior is not finite, or whose cosines are all negative, has no edge but one to itself, with which
        ``S_ii`` is 1. It keeps its own label, and the others are as if it were not there.

    Examples:
        >>> import torch
        >>> from drseg_core.nn.label_propagation import propagation_graph, smooth
        >>> prior = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> smooth(propagation_graph(prior, (2, 2), k=2), torch.eye(4)).round().tolist()[0]
        [0.0, 1.0, 0.0, 0.0]
    """
    options: dict[str, Any] = {"gamma": gamma, "decay": decay, "select": select, "radius": radius}
    return normalized_graph(weight_graph(prior, grid, k, **options, backend=backend), backend=backend)


def weight_graph(
    prior: Tensor | PreparedPrior,
    grid: tuple[int, int],
    k: int = 75,
    *,
    gamma: float = 1.0,
    decay: float = 0.0,
    select: Select = "affinity",
    radius: float | None = None,
    backend: str | None = None,
) -> Graph:
    """:func:`propagation_graph` with the weights ``w_ij`` as coefficients, before they are divided by degrees."""
    grid = check_grid("propagation_graph", grid)
    options: dict[str, Any] = {"gamma": gamma, "decay": decay, "select": select}
    index, score = choose_neighbours(prior, grid, k, **options, radius=radius, backend=backend)
    return weigh_neighbours(index, score, grid, **options, backend=backend)


def choose_neighbours(
    prior: Tensor | PreparedPrior,
    grid: tuple[int, int],
    k: int = 75,
    *,
    gamma: float = 1.0,
    decay: float = 0.0,
    select: Select = "affinity",
    radius: float | None = None,
    rows: tuple[int, int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Neighbours of :func:`weight_graph` and the scores by which they were chosen, (B, n, K) each.

    They are those of the n nodes from ``rows[0]`` to before ``rows[1]``, by default of all.
    """
    name = "propagation_graph"
    _check_graph_options(name, k, gamma, decay, select, radius)
    nodes = rows_of(name, prior)
    grid = check_grid(name, grid, nodes.shape[-2])
    by_cosine = select == "cosine"
    longest = max(math.hypot(grid[0] - 1, grid[1] - 1), 1.0)
    return knn_graph(
        prior,
        grid,
        # a grid of one cell has one padded slot
        min(k, max(nodes.shape[-2] - 1, 1)),
        # the op counts distances in shares of the longest, and the power is taken after it
        decay=0.0 if by_cosine else decay * longest / gamma,
        form="additive" if by_cosine else "multiplicative",
        include_self=False,
        return_score=True,
        pad=True,
        radius=radius,
        rows=rows,
        backend=backend,
    )


def _check_graph_options(name: str, k: int, gamma: float, decay: float, select: str, radius: float | None) -> None:
    check_count(name, "k", k, positive=True)
    check_number(name, "gamma", gamma, positive=True)
    check_number(name, "decay", decay)
    check_choice(name, "select", select, get_args(Select))
    if radius is not None:
        check_number(name, "radius", radius)


def weigh_neighbours(
    index: Tensor,
    score: Tensor,
    grid: tuple[int, int],
    *,
    gamma: float = 1.0,
    decay: float = 0.0,
    select: Select = "affinity",
    backend: str | None = None,
) -> Graph:
    """What :func:`weight_graph` makes of the result of :func:`choose_neighbours` for all nodes."""
    # padded slots have score -inf, and those of a prior that is not finite NaN: neither is an edge
    weight = torch.where(score > 0, score, 0) ** gamma
    # room for the edge of a node that has none
    lonely, own = (weight == 0).all(-1), torch.arange(index.shape[-2], device=index.device, dtype=index.dtype)
    index = torch.cat([torch.where(lonely, own, index[..., 0])[..., None], index[..., 1:]], -1)
    if select == "cosine" and decay:
        weight *= torch.exp(-decay * _distance(index, grid[1], weight.dtype))
    return Graph.of(index, weight, backend=backend)


def normalized_graph(graph: Graph, *, backend: str | None = None) -> Graph:
    """What :func:`propagation_graph` makes of the weights of :func:`weight_graph`."""
    index, weight, lists = graph
    coefficient = degree_normalize(weight, index, norm="sym_undirected", eps=_EPS, csc=lists, backend=backend)
    alone = (graph.degree() == 0) & (graph.degree(incoming=True, backend=backend) == 0)
    # counted along the edge and against it
    coefficient[..., 0].masked_fill_(alone, 0.5)
    return graph._replace(coefficient=coefficient)


def _distance(index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Length in cells of every edge, of the shape of ``index``."""
    own = torch.arange(index.shape[-2], device=index.device, dtype=index.dtype)[:, None]
    rows, columns = index // width - own // width, index % width - own % width
    return torch.hypot(rows.to(dtype), columns.to(dtype))


def smooth(graph: Graph, x: Tensor, *, backend: str | None = None) -> Tensor:
    """``S x``: one step over a graph of :func:`propagation_graph`, along its edges and against them.

    Args:
        graph: half of a symmetric operator, see there.
        x: (B, N, C) or (N, C), floating-point.
        backend: see there.

    Returns:
        The shape and dtype of ``x``.

    Examples:
        >>> import torch
        >>> from drseg_core.nn.label_propagation import propagation_graph, smooth
        >>> graph = propagation_graph(torch.ones(6, 2), (2, 3), k=5)
        >>> smooth(graph, torch.ones(6, 1)).flatten().round(decimals=4).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    check_graph("smooth", graph)
    return graph.propagate(x, backend=backend) + graph.propagate_transposed(x, backend=backend)


def _start(name: str, labels: Tensor, graph: Graph, alpha: float) -> Tensor:
    """The labels in the dtype of the sums, checked."""
    check_tensor(name, "labels", labels, ("B", "N", "T"))
    check_alpha(name, alpha)
    check_graph(name, graph)
    if graph.index.shape[:-1] != labels.shape[:-1]:
        raise ValueError(
            f"{name}: graph does not match labels; expected {tuple(labels.shape[:-1])} before K, "
            f"got {tuple(graph.index.shape)}"
        )
    check_unmapped(name, labels=labels)
    # one such label would reach every node
    if not labels.isfinite().all():
        raise NumericalError(f"{name}: labels are not finite; expected finite values, got NaN or Inf")
    return labels.to(torch.promote_types(labels.dtype, torch.float32))


def _like(found: Tensor, labels: Tensor) -> Tensor:
    """The columns and the dtype of the labels. A node with few neighbours may have more than any label."""
    limit = torch.finfo(labels.dtype).max
    return found[..., : labels.shape[-1]].clamp(-limit, limit).to(labels.dtype)


def _widened(labels: Tensor) -> Tensor:
    """Columns of zeros up to one vector register: a CPU adds fewer columns one by one, several times as slowly."""
    missing = _LANES - labels.shape[-1]
    return F.pad(labels, (0, missing)) if labels.device.type == "cpu" and 0 < missing < _LANES else labels


def reach_of_steps(radius: float, steps: int) -> int:
    """Distance in cells, down or across, within which all lies that decides a node's result in ``propagate_labels``.

    A step brings labels along one edge, or against it. The last edge is divided by the degrees of its nodes, which
    count the edges that end there. So the degrees depend on what nodes one edge further chose. That depends on the
    priors of all nodes that these could have chosen, another edge further. In all these are ``steps + 2`` edges, and
    none spans more than ``radius`` whole cells.

    Examples:
        >>> from drseg_core.nn.label_propagation import reach_of_steps
        >>> reach_of_steps(4.5, 3)
        20
    """
    return int(radius) * (steps + 2) if steps else 0


@torch.no_grad()
def propagate_labels(
    labels: Tensor,
    graph: Graph,
    steps: int,
    *,
    alpha: float = 0.95,
    backend: str | None = None,
    stepped: Callable[[int], object] | None = None,
) -> Tensor:
    """``steps`` times ``F <- alpha S F + (1 - alpha) Y`` from ``F = Y`` (Zhou et al. 2004, step 3 of their algorithm).

    A node's result depends on labels at most ``steps`` edges away, and on priors at most two edges further
    (:func:`reach_of_steps`). After many steps it is the result of :func:`solve_labels` with ``scaled=True``.

    Args:
        labels: Y, (B, N, T) or (N, T) logits, probabilities or features, finite.
        graph: from :func:`propagation_graph`.
        steps: number of steps, >= 0.
        alpha: share of the neighbours, in [0, 1).
        backend: one of ``drseg_core.ops.backend_names()``; None takes the best that can run.
        stepped: called with 1 after each step, for a progress bar.

    Returns:
        F, shape and dtype of ``labels``, computed in float32 (float64 for float64 labels), without gradient. A value
        beyond the range of that dtype is its largest.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.
        NumericalError: a label is not finite.

    Examples:
        >>> import torch
        >>> from drseg_core.nn.label_propagation import propagate_labels, propagation_graph
        >>> graph = propagation_graph(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), (1, 3), k=1)
        >>> propagate_labels(torch.tensor([[1.0], [0.0], [5.0]]), graph, 1, alpha=0.5).flatten().tolist()
        [0.5, 0.5, 5.0]
    """
    y = _widened(_start("propagate_labels", labels, graph, alpha))
    check_count("propagate_labels", "steps", steps)
    x, operator = y, graph.undirected()
    for _ in range(steps):
        x = alpha * operator.propagate(x, backend=backend) + (1 - alpha) * y
        if stepped is not None:
            stepped(1)
    return _like(x, labels)


@torch.no_grad()
def solve_labels(
    labels: Tensor,
    graph: Graph,
    *,
    alpha: float = 0.95,
    scaled: bool = True,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    must_converge: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``F = (I - alpha S)^-1 Y``, the limit of the labels (Zhou et al. 2004), by conjugate gradients as LPOSS has it.

    ``S`` is symmetric with eigenvalues in [-1, 1]. So the matrix is positive definite, and the number of iterations
    grows as ``(1 - alpha)**-0.5``. All columns of Y are solved at once. Each stops when the norm of its residual is
    ``tolerance`` times the norm of its own Y. If a graph falls apart into pieces, each piece is solved by itself.

    Nothing is centred: a number added to all classes of a node adds another to all classes of every node, the same for
    each class.

    LPOSS's code leaves out the factor ``1 - alpha`` (``scaled=False``), which never changes the largest class. It stops
    after ten iterations, converged or not (``max_iterations=10, must_converge=False``).

    Args:
        labels: Y, (B, N, T) or (N, T) logits, probabilities or features, finite.
        graph: from :func:`propagation_graph`.
        alpha: share of the neighbours, in [0, 1); LPOSS has 0.95.
        scaled: multiply by ``1 - alpha``, so that F has the scale of Y and is the limit of :func:`propagate_labels`.
        tolerance: largest norm of a residual, relative to its right-hand side, > 0.
        max_iterations: most iterations of any column, >= 1.
        must_converge: False returns what is reached after ``max_iterations``.
        backend: one of ``drseg_core.ops.backend_names()``; None takes the best that can run.

    Returns:
        F, shape and dtype of ``labels``, computed in float32 (float64 for float64 labels), without gradient. A value
        beyond the range of that dtype is its largest.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.
        NumericalError: a label is not finite, or a column did not converge.

    Note:
        Memory: five times the labels, and on a CPU eight bytes for each edge. An iteration waits for the device once.

    Examples:
        >>> import torch
        >>> from drseg_core.nn.label_propagation import propagation_graph, solve_labels
        >>> graph = propagation_graph(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), (1, 3), k=1)
        >>> label = torch.tensor([[3.0], [0.0], [5.0]])
        >>> solve_labels(label, graph, alpha=0.5).flatten().round(decimals=4).tolist()
        [2.0, 1.0, 5.0]
    """
    name = "solve_labels"
    y = _start(name, labels, graph, alpha)
    # how many iterations are left is read
    check_unmapped(name, **{"graph.index": graph.index, "graph.coefficient": graph.coefficient})
    _check_solver_options(name, scaled, tolerance, max_iterations, must_converge)
    if y.numel() == 0:
        return labels.clone()

    y = _widened(y)
    # squares of very small or very large labels would leave the range of float32
    size = y.abs().amax(-2, keepdim=True)
    size = torch.where(size > 0, size, 1)
    residual = y / size
    x = torch.zeros_like(residual)
    direction = residual
    length = residual.square().sum(-2, keepdim=True)
    # a square below the normal numbers is one that nothing reaches
    limit = (float(tolerance) ** 2 * length).clamp_min(torch.finfo(length.dtype).tiny)
    operator = graph.undirected()
    for _ in range(max_iterations):
        going = length > limit
        if not going.any():
            break
        image = direction - alpha * operator.propagate(direction, backend=backend)
        # a column that is done has no direction left, or keeps its value
        step = torch.where(going, length / (direction * image).sum(-2, keepdim=True), 0)
        x = x + step * direction
        residual = residual - step * image
        reached = residual.square().sum(-2, keepdim=True)
        direction = residual + torch.where(going, reached / length, 0) * direction
        length = reached
    left = ~(length <= limit)
    if must_converge and left.any():
        worst = float(torch.where(left, length / limit, 0).amax().sqrt()) * tolerance
        raise NumericalError(
            f"{name}: conjugate gradients did not converge; expected a relative residual of at most {tolerance:g} "
            f"within max_iterations = {max_iterations}, got up to {worst:.2g} in {int(left.sum())} of "
            f"{left[..., : labels.shape[-1]].numel()} columns: raise max_iterations or tolerance, or lower alpha"
        )
    # before the last factor very large labels would leave that range; powers of two change no bit
    lower = torch.ones_like(size).masked_fill_(size > 2.0**80, 2.0**-40)
    found = x * (size * lower) * (1 - alpha if scaled else 1) / lower
    return _like(found, labels)


def _check_solver_options(name: str, scaled: bool, tolerance: float, max_iterations: int, must_converge: bool) -> None:
    check_flag(name, "scaled", scaled)
    check_number(name, "tolerance", tolerance, positive=True)
    check_count(name, "max_iterations", max_iterations, positive=True)
    check_flag(name, "must_converge", must_converge)


class LabelPropagation(nn.Module):
    """Graph and solver in one module, on maps: like :class:`drseg_core.nn.PDGR`, but without training.

    Args:
        k, gamma, decay, select, radius: see :func:`propagation_graph`.
        alpha: share of the neighbours, in [0, 1).
        steps: steps of :func:`propagate_labels`; None solves to the end by :func:`solve_labels`.
        scaled, tolerance, max_iterations, must_converge: see :func:`solve_labels`.
        backend: one of ``drseg_core.ops.backend_names()``; None takes the best that can run.

    Raises:
        TypeError, ValueError: an option has the wrong type or range.

    Shape:
        labels (B, T, h, w) and prior (B, D, h, w) to (B, T, h, w), in the dtype of the labels, without gradient.

    Examples:
        >>> import torch
        >>> from drseg_core.nn.label_propagation import LPOSS_GRAPH, LabelPropagation
        >>> lposs = LabelPropagation(**LPOSS_GRAPH, alpha=0.95, scaled=False)
        >>> lposs(torch.randn(1, 3, 6, 6), torch.randn(1, 16, 6, 6)).shape
        torch.Size([1, 3, 6, 6])
    """

    def __init__(
        self,
        k: int = 75,
        *,
        gamma: float = 1.0,
        decay: float = 0.0,
        select: Select = "affinity",
        radius: float | None = None,
        alpha: float = 0.95,
        steps: int | None = None,
        scaled: bool = True,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
        must_converge: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.graph_options: dict[str, Any] = {
            "k": k,
            "gamma": gamma,
            "decay": decay,
            "select": select,
            "radius": radius,
        }
        self.alpha, self.steps, self.backend = alpha, steps, backend
        self.solver_options: dict[str, Any] = {
            "scaled": scaled,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "must_converge": must_converge,
        }
        name = "LabelPropagation"
        _check_graph_options(name, **self.graph_options)
        _check_solver_options(name, **self.solver_options)
        check_alpha(name, alpha)
        if steps is not None:
            check_count(name, "steps", steps)
        if backend is not None:
            check_choice(name, "backend", backend, backend_names())

    def graph(self, prior: Tensor) -> Graph:
        """The graph of a prior map (B, D, h, w), for several calls of :meth:`spread`."""
        _check_map("prior", prior)
        nodes = prior.detach().flatten(2).transpose(1, 2)
        return propagation_graph(nodes, (prior.shape[2], prior.shape[3]), **self.graph_options, backend=self.backend)

    def spread(self, labels: Tensor, graph: Graph) -> Tensor:
        """Labels (B, N, T) or (N, T) of nodes over a graph."""
        if self.steps is not None:
            return propagate_labels(labels, graph, self.steps, alpha=self.alpha, backend=self.backend)
        return solve_labels(labels, graph, alpha=self.alpha, **self.solver_options, backend=self.backend)

    def forward(self, labels: Tensor, prior: Tensor, split: SPSD | None = None) -> Tensor:
        """Spread labels (B, T, h, w) over the graph of a prior (B, D, h, w).

        Args:
            labels: logits or features.
            prior: on the same grid.
            split: a split of T channels. The structural ones are spread, the semantic ones stay as they are.
        """
        _check_map("labels", labels)
        _check_map("prior", prior)
        if labels.shape[0] != prior.shape[0] or labels.shape[2:] != prior.shape[2:]:
            raise ValueError(
                "LabelPropagation: prior does not match labels; expected the same B, h, w as "
                f"{tuple(labels.shape)}, got {tuple(prior.shape)}"
            )
        semantic, moving = (None, labels) if split is None else split.split(labels)
        x = self.spread(moving.flatten(2).transpose(1, 2), self.graph(prior))
        x = x.transpose(1, 2).unflatten(2, labels.shape[2:])
        return x if split is None or semantic is None else split.merge(semantic, x)


def _check_map(name: str, value: Tensor) -> None:
    check_tensor("LabelPropagation", name, value, None)
    if value.dim() != 4:
        raise ValueError(
            f"LabelPropagation: {name} has the wrong rank; expected (B, channels, h, w), got {tuple(value.shape)}"
        )
