# SPDX-License-Identifier: Apache-2.0
"""A graph as a value: what its layers share is made once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from drseg_core.ops._checks import INDEX_DTYPES, check_csc, check_shape, check_tensor
from drseg_core.ops.csc.api import Csc, csc
from drseg_core.ops.graph_propagate.api import Incoming, graph_propagate, incoming, propagate_incoming


class Graph(NamedTuple):
    """A sparse operator on the features of nodes: its edges, their coefficients, and its columns.

    ``Graph.of`` makes the columns. Without them everything works, but each call that goes against the edges lists them
    anew. Columns belong to one index: for another index call ``Graph.of`` again. The operator of an undirected graph
    (see ``degree_normalize``) is ``propagate(x) + propagate_transposed(x)``.

    What ``torch.save`` wrote is loaded after ``torch.serialization.add_safe_globals([Graph, Csc])``, both of
    ``drseg_core.ops``, or with ``weights_only=False``, which runs whatever the file holds.

    Args:
        index: (B, N, K) or (N, K) neighbour indices, int32 or int64; any indices, repeated ones too.
        coefficient: shape of ``index``, floating-point.
        csc: ``csc(index)``, or None.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import Graph
        >>> graph = Graph.of(torch.tensor([[0, 1], [1, 1]]), torch.full((2, 2), 0.5))
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> for _ in range(10):
        ...     x = graph.propagate(x)
        >>> round(x[0].item(), 3), graph.degree(incoming=True).tolist()
        (2.998, [0.5, 1.5])
    """

    # a tuple has a method of that name, which a field hides
    index: Tensor  # type: ignore[assignment]
    coefficient: Tensor
    csc: Csc | None = None

    @classmethod
    def of(cls, index: Tensor, coefficient: Tensor, *, backend: str | None = None) -> Graph:
        """With its columns, made here by ``backend``."""
        return cls(index, coefficient, csc(index, backend=backend))

    def propagate(self, x: Tensor, *, validate: bool = False, backend: str | None = None) -> Tensor:
        """``y_i = sum_k coefficient_ik x_j`` with ``j = index_ik``; arguments as in ``graph_propagate``."""
        return graph_propagate(x, self.index, self.coefficient, csc=self.csc, validate=validate, backend=backend)

    def propagate_transposed(self, x: Tensor, *, validate: bool = False, backend: str | None = None) -> Tensor:
        """The same with every edge reversed."""
        return graph_propagate(
            x, self.index, self.coefficient, transpose=True, csc=self.csc, validate=validate, backend=backend
        )

    def undirected(self) -> Undirected:
        """The operator along the edges and against them, for many applications. Its second list holds the coefficients
        as they are now: after a change in place ask again.
        """
        lists = None if self.csc is None else incoming(self.index, self.coefficient, self.csc)
        return Undirected(self, lists)

    def degree(self, *, incoming: bool = False, backend: str | None = None) -> Tensor:
        """(B, N) or (N,) sums of the coefficients of the edges that leave each node, or that end in it."""
        if not incoming:
            return self.coefficient.sum(-1)
        one = self.coefficient.new_ones(*self.index.shape[:-1], 1)
        return self.propagate_transposed(one, backend=backend).squeeze(-1)


def check_graph(op: str, graph: object) -> None:
    """Refuse what is no graph, a tuple of its fields too, and fields that do not fit, by types and sizes."""
    if not isinstance(graph, Graph):
        raise TypeError(f"{op}: graph is no graph; expected drseg_core.ops.Graph, got {type(graph).__name__}")
    index, coefficient, lists = graph
    check_tensor(op, "graph.index", index, ("B", "N", "K"), INDEX_DTYPES)
    check_tensor(op, "graph.coefficient", coefficient, None)
    check_shape(op, "graph.coefficient", coefficient, tuple(index.shape), "the shape of graph.index")
    check_csc(op, lists, index)


class Undirected(NamedTuple):
    """``S = A + A^T`` of a graph's operator ``A``, applied many times: conjugate gradients, label propagation.

    On a CPU a second list holds the edges by the node in which they end, with their coefficients. It takes eight bytes
    an edge. With it the step against the edges takes as long as the step along them. Elsewhere the graph itself is
    used.

    Args:
        graph: ``A``.
        incoming: the second list, or None.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import Graph
        >>> operator = Graph.of(torch.tensor([[1], [0], [0]]), torch.ones(3, 1)).undirected()
        >>> operator.propagate(torch.tensor([[1.0], [10.0], [100.0]])).flatten().tolist()
        [120.0, 2.0, 1.0]
    """

    graph: Graph
    incoming: Incoming | None

    def propagate(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """``S x``; arguments as in ``graph_propagate``, with the same bits as two calls of it."""
        along = self.graph.propagate(x, backend=backend)
        index, coefficient = self.graph.index, self.graph.coefficient
        against = propagate_incoming(x, index, coefficient, self.incoming, backend=backend)
        return along + (self.graph.propagate_transposed(x, backend=backend) if against is None else against)
