# SPDX-License-Identifier: Apache-2.0
"""The contract of ``csc``, for every backend that can run here, and of the argument of that name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from drseg_core import ops
from drseg_core.ops import Graph
from drseg_core.ops.csc import reference
from drseg_core.ops.csc.cases import make_inputs
from drseg_core.ops.graph_propagate import registration as propagate_registration
from drseg_core.testing import CASES

Make = Callable[[Tensor], tuple[Tensor, Tensor]]

BACKENDS = [
    row["backend"] for row in ops.backend_report() if row["op"] == "csc" and row["device"] == "cpu" and row["available"]
]


def check(index: Tensor, make: Make) -> None:
    """Every edge once, under the node in which it ends, in ascending order."""
    indptr, perm = make(index)
    batched = index if index.dim() == 3 else index[None]
    nodes = batched.shape[1]
    end = batched.long().clamp(0, max(nodes - 1, 0)) + nodes * torch.arange(len(batched))[:, None, None]
    lists: list[list[int]] = [[] for _ in range(len(batched) * nodes)]
    for edge, node in enumerate(end.flatten().tolist()):
        lists[node].append(edge)
    assert perm.tolist() == sum(lists, [])
    assert indptr.diff().tolist() == [len(edges) for edges in lists] and indptr[0] == 0
    assert indptr.dtype == perm.dtype == torch.int32 and indptr.is_contiguous() and perm.is_contiguous()


def crowded(batch: int, nodes: int, slots: int, seed: int = 0) -> Tensor:
    """Half of the edges end in one node, some of a row's in the same, some outside."""
    random = torch.Generator().manual_seed(seed)
    index = torch.randint(-2, nodes + 2, (batch, nodes, slots), generator=random)
    return torch.where(torch.rand(index.shape, generator=random) < 0.5, nodes // 2, index)


@pytest.fixture(params=BACKENDS)
def make(request) -> Make:
    def call(index: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.csc(index, backend=request.param)
        assert ops.last_backend("csc") == request.param
        return found

    return call


@pytest.mark.parametrize("case", [case for case in CASES if not case.large], ids=lambda case: case.name)
def test_every_case(case, make):
    check(make_inputs(case)["index"], make)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 1, 40), (2, 40, 1), (1, 97, 33)], ids=str)
def test_any_index(shape, dtype, make):
    index = crowded(*shape).to(dtype)
    for form in (index, index[0], index.mT.contiguous().mT, index[:1].expand(index.shape)):
        check(form, make)


@pytest.mark.promise("C23")
def test_wild_indices_are_clamped_before_they_are_narrowed(make):
    assert make(torch.tensor([[[2**40, -(2**40)], [2**31, 1]]]))[0].tolist() == [0, 1, 4]


@pytest.mark.parametrize("edges, dtype", [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_numbers_are_as_wide_as_the_count_of_edges(edges, dtype):
    with FakeTensorMode():
        index = torch.empty(1, 1, edges, dtype=torch.int32)
        for made in (reference.csc(index), ops.csc(index)):
            assert [(len(part), part.dtype) for part in made] == [(2, dtype), (edges, dtype)]


@pytest.mark.promise("C14")
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0), (2, 0, 4)])
def test_nothing_to_list(shape, make):
    indptr, perm = make(torch.zeros(shape, dtype=torch.int32))
    assert len(perm) == 0 and indptr.tolist() == [0] * (shape[0] * shape[1] + 1)


@pytest.mark.promise("C24")
def test_any_threads(make):
    index = crowded(5, 300, 9)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            check(index, make)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.promise("C21")
def test_opcheck():
    for shape in ((2, 5, 3), (0, 5, 3), (1, 4, 0)):
        opcheck(torch.ops.drseg.csc.default, (torch.randint(0, 4, shape), "auto"))


@pytest.mark.parametrize(
    "index,error,message",
    [
        ([[1]], TypeError, "index must be a tensor"),
        (torch.ones(2, 3), TypeError, "index has an unsupported dtype"),
        (torch.ones(3).int(), ValueError, "index has the wrong rank"),
    ],
    ids=["list", "numbers", "rank"],
)
def test_what_it_cannot_use_is_refused(index, error, message):
    with pytest.raises(error, match=f"^csc: {message}"):
        ops.csc(index)


INDEX = torch.tensor([[0, 1], [1, 1], [0, 2]])
OTHER = torch.tensor([[0, 1], [2, 1], [0, 2]])
CALLS: dict[str, Callable[..., Tensor]] = {
    "graph_propagate": lambda **csc: ops.graph_propagate(torch.ones(3, 2), INDEX, torch.ones(3, 2), **csc),
    "graph_layer": lambda **csc: ops.graph_layer(torch.ones(3, 2), INDEX, torch.ones(3, 2), **csc),
    "degree_normalize": lambda **csc: ops.degree_normalize(torch.ones(3, 2), INDEX, **csc),
    "edge_weight": lambda **csc: ops.edge_weight(
        torch.ones(3, 4), torch.ones(3, 4), INDEX, torch.ones(4), torch.ones(1), **csc
    ),
    "edge_coefficient": lambda **csc: ops.edge_coefficient(
        torch.ones(3, 4), torch.ones(3, 4), INDEX, torch.ones(4), torch.ones(1), **csc
    ),
}


def test_known_columns_are_read_and_not_made_again():
    """Unchecked, those of another graph give another sum: whoever lists the edges anew would not show it."""
    random = torch.Generator().manual_seed(0)
    x, coefficient = torch.randn(3, 2, generator=random), torch.rand(3, 2, generator=random)
    wrong = ops.csc(OTHER)
    options: dict[str, Any] = {"transpose": True, "backend": "native"}
    right = ops.graph_propagate(x, INDEX, coefficient, **options)
    assert not torch.equal(ops.graph_propagate(x, INDEX, coefficient, csc=wrong, **options), right)
    halves, vector = torch.randn(2, 3, 4, generator=random).abs(), torch.ones(4)
    target = halves[1].requires_grad_()
    found = []
    for csc in (ops.csc(INDEX), wrong):
        weight = ops.edge_weight(halves[0].detach(), target, INDEX, vector, torch.zeros(1), csc=csc, backend="native")
        found += torch.autograd.grad((weight * coefficient).sum(), target)
    assert not torch.equal(*found)


@pytest.mark.parametrize("op", CALLS)
def test_columns_of_another_graph_are_refused(op):
    right: Any = ops.csc(INDEX)
    call = CALLS[op]
    assert torch.equal(call(csc=right, validate=True), call())
    with pytest.raises(ValueError, match=f"^{op}: csc is of another graph; expected csc"):
        call(csc=ops.csc(OTHER), validate=True)
    with pytest.raises(ValueError, match=f"^{op}: csc.indptr has the wrong shape; expected"):
        call(csc=ops.csc(INDEX[:2]))
    with pytest.raises(TypeError, match=f"^{op}: csc must be a pair of tensors; expected Csc or None, got Tensor"):
        call(csc=right.perm)
    with pytest.raises(TypeError, match=f"^{op}: csc.perm has an unsupported dtype"):
        call(csc=(right.indptr, right.perm.float()))


def test_a_graph_is_what_its_matrix_is():
    random = torch.Generator().manual_seed(0)
    index, x = crowded(2, 9, 4).clamp(0, 8), torch.randn(2, 9, 5, generator=random)
    coefficient = torch.rand(index.shape, generator=random).requires_grad_()
    matrix = torch.zeros(2, 9, 9).scatter_add(2, index, coefficient)
    for graph in (ops.Graph.of(index, coefficient), ops.Graph(index, coefficient)):
        torch.testing.assert_close(graph.propagate(x), matrix @ x)
        torch.testing.assert_close(graph.propagate_transposed(x), matrix.mT @ x)
        torch.testing.assert_close(graph.degree(), matrix.sum(2))
        torch.testing.assert_close(graph.degree(incoming=True), matrix.sum(1))
        got = torch.autograd.grad(graph.propagate(graph.propagate_transposed(x)).square().sum(), coefficient)
        right = torch.autograd.grad((matrix @ (matrix.mT @ x)).square().sum(), coefficient, retain_graph=True)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    one = ops.Graph.of(index[0], coefficient[0])
    torch.testing.assert_close(one.degree(incoming=True), matrix[0].sum(0))


def test_a_graph_is_listed_once():
    index, coefficient = INDEX[None], torch.ones(1, 3, 2, requires_grad=True)
    graph, x = ops.Graph.of(index, coefficient), torch.ones(1, 3, 2, requires_grad=True)
    before, ops._dispatch._last.of["csc"] = ops.last_backend("csc"), "none"
    assert before is not None
    for _ in range(3):
        x = graph.propagate_transposed(graph.propagate(x))
    x.sum().backward()
    assert ops.last_backend("csc") == "none"


@pytest.mark.promise("C24")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "channels"), [((3, 7, 5), 4), ((1, 97, 33), 21), ((2, 300, 9), 40)], ids=str)
def test_an_undirected_operator_is_both_directions_bit_for_bit(shape, channels, dtype):
    index = crowded(*shape)
    random = torch.Generator().manual_seed(1)
    coefficient = torch.rand(shape, generator=random, dtype=torch.float64).to(dtype)
    x = torch.randn(*shape[:2], channels, generator=random, dtype=torch.float64).to(dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for graph, value in ((Graph.of(index, coefficient), x), (Graph.of(index[0], coefficient[0]), x[0])):
                operator = graph.undirected()
                assert operator.incoming is not None
                for backend in (None, "reference"):
                    wanted = graph.propagate(value, backend=backend) + graph.propagate_transposed(
                        value, backend=backend
                    )
                    assert torch.equal(operator.propagate(value, backend=backend), wanted)
    finally:
        torch.set_num_threads(threads)


def test_an_undirected_operator_takes_its_lists_where_it_can(monkeypatch):
    taken = []
    run = propagate_registration.propagate_incoming
    monkeypatch.setattr(propagate_registration, "propagate_incoming", lambda *given: taken.append(1) or run(*given))
    operator = Graph.of(crowded(1, 9, 3), torch.rand(1, 9, 3)).undirected()
    x = torch.rand(1, 9, 2)
    operator.propagate(x)
    assert len(taken) == (ops.last_backend("graph_propagate") == "native")
    # who asks for gradients, names another backend, or has no lists, gets the op itself
    leaf = x.clone().requires_grad_()
    operator.propagate(leaf).sum().backward()
    assert leaf.grad is not None
    operator.propagate(x, backend="reference")
    operator._replace(incoming=None).propagate(x)
    assert torch.func.vmap(operator.graph.undirected().propagate)(x[None]).shape == (1, 1, 9, 2)
    assert len(taken) <= 1


def test_an_undirected_operator_has_both_halves_of_the_gradient_to_its_coefficients():
    index, x = torch.tensor([[1, 2], [0, 2], [0, 1]]), torch.tensor([[1.0], [2.0], [4.0]])
    coefficient = torch.full((3, 2), 0.5, requires_grad=True)
    graph = Graph.of(index, coefficient)
    for backend in (None, "reference"):
        (found,) = torch.autograd.grad(graph.undirected().propagate(x, backend=backend).sum(), coefficient)
        assert found.tolist() == [[3, 5], [3, 6], [5, 6]]


def test_a_mode_sees_an_undirected_operator_as_operators_of_ours():
    graph, x = Graph.of(crowded(1, 9, 3), torch.rand(1, 9, 3)), torch.rand(1, 9, 2)
    traced = make_fx(lambda value: graph.undirected().propagate(value))(x)
    names = [str(node.target) for node in traced.graph.nodes if "drseg" in str(node.target)]
    assert names == ["drseg.graph_propagate.default"] * 2
    assert torch.equal(traced(x), graph.undirected().propagate(x))
    lists = graph.csc
    assert lists is not None
    with FakeTensorMode() as mode:
        index, coefficient, indptr, perm, value = map(mode.from_tensor, (*graph[:2], *lists, x))
        fake = Graph(index, coefficient, ops.Csc(indptr, perm)).undirected()
        assert fake.propagate(value).shape == x.shape


def test_nothing_undirected():
    for shape in ((0, 3, 2), (2, 3, 0), (2, 0, 4)):
        graph = Graph.of(torch.zeros(shape, dtype=torch.int32), torch.zeros(shape))
        x = torch.ones(*shape[:2], 5)
        assert torch.equal(graph.undirected().propagate(x), torch.zeros_like(x))


def test_a_saved_graph_is_loaded_as_its_docstring_says(tmp_path):
    graph = Graph.of(torch.tensor([[0, 1], [1, 1]]), torch.full((2, 2), 0.5))
    torch.save(graph, tmp_path / "graph.pt")
    for known in ([], [Graph], [ops.Csc]):
        with torch.serialization.safe_globals(known), pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "graph.pt")
    with torch.serialization.safe_globals([Graph, ops.Csc]):
        safe = torch.load(tmp_path / "graph.pt")
    for found in (safe, torch.load(tmp_path / "graph.pt", weights_only=False)):
        assert type(found) is Graph and type(found.csc) is ops.Csc
        x = torch.randn(2, 3)
        assert torch.equal(found.propagate_transposed(x), graph.propagate_transposed(x))
    words = " ".join(str(Graph.__doc__).split())
    assert "add_safe_globals([Graph, Csc])" in words and "weights_only=False" in words
