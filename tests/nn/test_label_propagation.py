# SPDX-License-Identifier: Apache-2.0
"""Label propagation against dense matrices in float64, and against LPOSS's graph written out in numpy."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.errors import NumericalError
from drseg_core.nn import SPSD
from drseg_core.nn.label_propagation import (
    LPOSS_GRAPH,
    LabelPropagation,
    choose_neighbours,
    propagate_labels,
    propagation_graph,
    smooth,
    solve_labels,
    weight_graph,
)
from drseg_core.ops import Graph, prepare_prior

H, W, D = 6, 7, 5
N = H * W


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def priors(seed: int = 0, nodes: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(nodes, D, generator=random, dtype=torch.float64) + 0.3).to(dtype)


def targets(columns: int, seed: int = 1, nodes: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(nodes, columns, generator=random, dtype=torch.float64).to(dtype)


def distance(i: int, j: int, width: int) -> float:
    return math.hypot(i // width - j // width, i % width - j % width)


def literal_weights(
    prior: NDArray, width: int, k: int, gamma: float, decay: float, select: str, radius: float = math.inf
) -> NDArray:
    """W of the docstring, pair by pair."""
    nodes = len(prior)
    weight, cosine = np.zeros((nodes, nodes)), np.zeros((nodes, nodes))
    for i in range(nodes):
        for j in range(nodes):
            cosine[i, j] = prior[i] @ prior[j] / (np.linalg.norm(prior[i]) * np.linalg.norm(prior[j]))
            weight[i, j] = max(cosine[i, j], 0.0) ** gamma * math.exp(-decay * distance(i, j, width))
    key = cosine if select == "cosine" else weight
    kept = np.zeros_like(weight)
    for i in range(nodes):
        near = (j for j in range(nodes) if j != i and distance(i, j, width) <= radius)
        others = sorted(near, key=lambda j: (-key[i, j], j))
        for j in others[:k]:
            kept[i, j] = weight[i, j]
    return kept


def literal_operator(weight: NDArray) -> NDArray:
    """S = D^-1/2 (W + W^T) D^-1/2, D the row sums of W + W^T; a node without edges has one to itself."""
    both = weight + weight.T
    both = both + np.diag(both.sum(1) == 0)
    degree = both.sum(1)
    scale = np.array([1 / math.sqrt(value) for value in degree])
    return scale[:, None] * both * scale[None, :]


def operator(graph: Graph, nodes: int = N) -> NDArray:
    return smooth(graph, torch.eye(nodes, dtype=graph.coefficient.dtype)).double().numpy()


@pytest.mark.promise("C1")
@pytest.mark.parametrize("select", ["affinity", "cosine"])
@pytest.mark.parametrize(("k", "gamma", "decay"), [(6, 1.0, 0.0), (6, 3.0, 0.16), (11, 0.5, 0.7), (60, 2.0, 0.3)])
def test_the_operator_is_the_formula(select: Any, k: int, gamma: float, decay: float) -> None:
    prior = priors()
    graph = propagation_graph(prior, (H, W), k, gamma=gamma, decay=decay, select=select)
    expected = literal_operator(literal_weights(prior.numpy(), W, k, gamma, decay, select))
    found = operator(graph)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found, found.T, atol=1e-15)
    assert np.abs(np.linalg.eigvalsh(found)).max() < 1 + 1e-9


@pytest.mark.parametrize("select", ["affinity", "cosine"])
@pytest.mark.parametrize("radius", [0.5, 1.0, 2.5, 100.0])
def test_no_edge_is_longer_than_the_radius(select: Any, radius: float) -> None:
    prior = priors()
    options: dict[str, Any] = {"gamma": 2.0, "decay": 0.3, "select": select}
    found = operator(propagation_graph(prior, (H, W), 6, **options, radius=radius))
    expected = literal_operator(literal_weights(prior.numpy(), W, 6, **options, radius=radius))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    edges = [distance(i, j, W) for i, j in np.argwhere(found > 0) if i != j]
    assert max(edges, default=0.0) <= radius and (radius < 1) == (not edges)
    module = LabelPropagation(6, **options, radius=radius, steps=2)
    label = targets(3)
    maps = module(label.T.reshape(1, 3, H, W), prior.T.reshape(1, D, H, W))
    once = 0.95 * expected @ label.numpy() + 0.05 * label.numpy()
    twice = 0.95 * expected @ once + 0.05 * label.numpy()
    np.testing.assert_allclose(maps[0].flatten(1).T.numpy(), twice, rtol=1e-9)
    with pytest.raises(ValueError, match="propagation_graph: radius is out of range; expected a finite number >= 0"):
        propagation_graph(prior, (H, W), 6, radius=-1.0)


def test_planted_faults_of_the_graph_are_seen() -> None:
    prior = priors()
    weight = literal_weights(prior.numpy(), W, 6, 3.0, 0.16, "cosine")
    found = operator(propagation_graph(prior, (H, W), 6, gamma=3.0, decay=0.16, select="cosine"))
    one_sided = weight / np.sqrt(weight.sum(1)[:, None] * weight.sum(1)[None, :])
    with_itself = literal_operator(weight + np.eye(N))
    other_decay = literal_operator(literal_weights(prior.numpy(), W, 6, 3.0, 0.01, "cosine"))
    other_power = literal_operator(literal_weights(prior.numpy(), W, 6, 1.0, 0.16, "cosine"))
    by_weight = literal_operator(literal_weights(prior.numpy(), W, 6, 3.0, 0.16, "affinity"))
    for wrong in (one_sided, with_itself, other_decay, other_power, by_weight):
        assert np.abs(found - wrong).max() > 1e-3


def lposs_matrix(feature: NDArray, grid: tuple[int, int], k: int, sigma: float, gamma: float) -> NDArray:
    """LPOSS's normalised matrix by the facts of its code: centres of patches of 16 pixels, the k largest inner products
    of unit features with the node itself among them, similarities cut at zero before the power, the diagonal cleared
    after W + W^T, and a node without edges divided by one."""
    nodes = len(feature)
    unit = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    place = np.array([(8 + 16 * (i // grid[1]), 8 + 16 * (i % grid[1])) for i in range(nodes)], dtype=float)
    product = unit @ unit.T
    weight = np.zeros((nodes, nodes))
    for i in range(nodes):
        for j in np.argsort(-product[i], kind="stable")[:k]:
            pixels = np.sqrt(((place[i] - place[j]) ** 2).sum())
            weight[i, j] = max(product[i, j], 0) ** gamma * np.exp(-sigma * pixels)
    weight = weight + weight.T
    np.fill_diagonal(weight, 0)
    total = weight.sum(1)
    total[total == 0] = 1
    return weight / np.sqrt(total)[:, None] / np.sqrt(total)[None, :]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lposs_own_graph_and_solution(dtype: torch.dtype) -> None:
    grid = (21, 24)
    nodes = grid[0] * grid[1]
    prior = priors(3, nodes).to(dtype)
    expected = lposs_matrix(prior.double().numpy(), grid, 400, 0.01, 3.0)
    graph = propagation_graph(prior, grid, **LPOSS_GRAPH)
    assert graph.index.shape == (nodes, 399)
    np.testing.assert_allclose(operator(graph, nodes), expected, atol=1e-5)

    label = targets(4, nodes=nodes).to(dtype)
    solution = np.linalg.solve(np.eye(nodes) - 0.95 * expected, label.double().numpy())
    found = solve_labels(label, graph, alpha=0.95, scaled=False, tolerance=1e-7)
    np.testing.assert_allclose(found.double().numpy(), solution, atol=1e-5 * np.abs(solution).max())
    module = LabelPropagation(**LPOSS_GRAPH, alpha=0.95, scaled=False, tolerance=1e-7)
    maps = module(label.T.reshape(1, 4, *grid), prior.T.reshape(1, D, *grid))
    torch.testing.assert_close(maps[0].flatten(1).T, found)


def literal_cg(matrix: NDArray, y: NDArray, iterations: int) -> NDArray:
    x, residual = np.zeros_like(y), y.copy()
    direction = residual.copy()
    for _ in range(iterations):
        step = residual @ residual / (direction @ matrix @ direction)
        x = x + step * direction
        reached = residual - step * matrix @ direction
        direction = reached + (reached @ reached) / (residual @ residual) * direction
        residual = reached
    return x


def test_ten_iterations_as_lposs_runs_them() -> None:
    graph = propagation_graph(priors(), (H, W), 20, gamma=3.0, decay=0.16, select="cosine")
    matrix, label = np.eye(N) - 0.95 * operator(graph), targets(3)
    options: dict[str, Any] = {"alpha": 0.95, "scaled": False, "max_iterations": 10}
    found = solve_labels(label, graph, must_converge=False, tolerance=1e-300, **options)
    for column in range(3):
        expected = literal_cg(matrix, label[:, column].numpy(), 10)
        np.testing.assert_allclose(found[:, column].numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95, 0.999, 0.99999])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_conjugate_gradients_are_the_dense_solution(
    scaled: bool, columns: int, alpha: float, dtype: torch.dtype, accuracy: float
) -> None:
    prior = priors()
    graph = propagation_graph(prior.to(dtype), (H, W), 9, gamma=2.0, decay=0.3)
    label = targets(columns).to(dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-7
    found = solve_labels(label, graph, alpha=alpha, scaled=scaled, tolerance=tolerance).double().numpy()
    # the very coefficients that were given, in float64
    matrix = np.eye(N) - alpha * operator(graph._replace(coefficient=graph.coefficient.double()))
    expected = np.linalg.solve(matrix, label.double().numpy()) * (1 - alpha if scaled else 1)
    # in float32 what the coefficients are rounded by is enlarged by 1 / (1 - alpha)
    room = accuracy if dtype == torch.float64 else max(accuracy, 6e-8 / (1 - alpha))
    np.testing.assert_allclose(found, expected, atol=room * np.abs(expected).max())


def test_a_column_does_not_depend_on_the_others() -> None:
    graph = propagation_graph(priors(), (H, W), 9)
    easy = torch.zeros(N, 1, dtype=torch.float64)
    # an eigenvector is solved in one step
    easy[:, 0] = torch.linalg.eigh(torch.from_numpy(operator(graph))).eigenvectors[:, -1]
    label = torch.cat([easy, targets(2), torch.zeros(N, 1, dtype=torch.float64), 1e200 * targets(1, seed=5)], dim=1)
    together = solve_labels(label, graph)
    for column in range(label.shape[1]):
        alone = solve_labels(label[:, column : column + 1], graph)
        torch.testing.assert_close(together[:, column : column + 1], alone, rtol=1e-12, atol=1e-12)
    assert together.isfinite().all() and (together[:, 3] == 0).all()


@pytest.mark.parametrize("exponent", [-100, -30, 60, 90, 126])
def test_labels_of_any_size_have_the_same_bits_but_for_the_exponent(exponent: int) -> None:
    graph = propagation_graph(priors(nodes=12, dtype=torch.float32), (3, 4), k=3)
    labels = targets(2, nodes=12, dtype=torch.float32).abs()
    labels /= labels.max()
    expected = solve_labels(labels, graph)
    found = solve_labels(labels * 2.0**exponent, graph)
    assert torch.equal(found, expected * 2.0**exponent) and found.isfinite().all()


def test_each_column_stops_by_its_own_size() -> None:
    graph = propagation_graph(priors(dtype=torch.float32), (H, W), 9)
    label = targets(1, dtype=torch.float32)
    sizes = torch.tensor([1.0, 1e-30, 1e30])
    found = solve_labels(label * sizes, graph)
    for column, size in enumerate(sizes):
        torch.testing.assert_close(found[:, column] / size, found[:, 0], rtol=1e-5, atol=1e-6)


def test_a_disconnected_graph_is_solved_piece_by_piece() -> None:
    prior = torch.zeros(N, 2, dtype=torch.float64)
    prior[: N // 2, 0] = 1
    prior[N // 2 :, 1] = 1
    graph = propagation_graph(prior, (H, W), 5)
    label = targets(2)
    label[N // 2 :] = 0
    found = solve_labels(label, graph, alpha=0.99, tolerance=1e-12)
    assert (found[N // 2 :] == 0).all()
    matrix = np.eye(N) - 0.99 * operator(graph)
    np.testing.assert_allclose(found.numpy(), 0.01 * np.linalg.solve(matrix, label.numpy()), atol=1e-9)
    # a node on its own: no cosine above zero
    prior = torch.cat([priors(nodes=N - 1), torch.zeros(1, D, dtype=torch.float64)])
    graph = propagation_graph(prior, (H, W), 5)
    lonely = targets(2)
    found = solve_labels(lonely, graph, tolerance=1e-12)
    torch.testing.assert_close(found[-1], lonely[-1])


def test_many_steps_come_to_the_solution_and_few_are_the_formula() -> None:
    graph = propagation_graph(priors(), (H, W), 9, gamma=3.0)
    matrix, label = operator(graph), targets(3)
    expected = label.numpy()
    for steps in range(4):
        found = propagate_labels(label, graph, steps, alpha=0.8)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
        expected = 0.8 * matrix @ expected + (1 - 0.8) * label.numpy()
    limit = solve_labels(label, graph, alpha=0.8, tolerance=1e-12)
    torch.testing.assert_close(propagate_labels(label, graph, 200, alpha=0.8), limit, rtol=0, atol=1e-10)


@pytest.mark.promise("C11")
@pytest.mark.parametrize("select", ["affinity", "cosine"])
def test_a_prior_that_is_not_finite_is_contained(select: Any) -> None:
    prior, label = priors(), targets(3)
    bad = prior.clone()
    bad[[4, 17]] = torch.tensor([[float("nan")], [float("inf")]], dtype=torch.float64)
    graph = propagation_graph(bad, (H, W), 9, gamma=2.0, decay=0.2, select=select)
    kept = [i for i in range(N) if i not in (4, 17)]
    # the others as if the two had been orthogonal to all
    absent = literal_weights(prior.numpy(), W, N, 2.0, 0.2, select)
    absent[[4, 17]] = 0
    absent[:, [4, 17]] = 0
    key = absent if select == "affinity" else prior.numpy() @ prior.numpy().T
    if select == "cosine":
        norm = np.linalg.norm(prior.numpy(), axis=1)
        key = key / norm[:, None] / norm[None, :]
    weight = np.zeros((N, N))
    for i in kept:
        for j in sorted((j for j in kept if j != i), key=lambda j: (-key[i, j], j))[:9]:
            weight[i, j] = absent[i, j]
    np.testing.assert_allclose(operator(graph), literal_operator(weight), rtol=1e-9, atol=1e-12)
    for found in (
        solve_labels(label, graph, tolerance=1e-12),
        propagate_labels(label, graph, 3, alpha=0.7),
    ):
        assert found.isfinite().all()
        torch.testing.assert_close(found[[4, 17]], label[[4, 17]])


@pytest.mark.promise("C7")
def test_a_batch_is_its_images_one_by_one() -> None:
    prior = torch.stack([priors(0), priors(7)]).float()
    label = torch.stack([targets(3), 50 * targets(3, seed=8)]).float()
    graph = propagation_graph(prior, (H, W), 9)
    solved, stepped = solve_labels(label, graph), propagate_labels(label, graph, 3)
    for b in range(2):
        alone = propagation_graph(prepare_prior(prior[b]), (H, W), 9)
        torch.testing.assert_close(solved[b], solve_labels(label[b], alone), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stepped[b], propagate_labels(label[b], alone, 3))


def test_backends_agree() -> None:
    prior, label = priors(dtype=torch.float32), targets(3, dtype=torch.float32)
    found = [
        solve_labels(label, propagation_graph(prior, (H, W), 9, decay=0.2, backend=name), backend=name)
        for name in (None, "reference")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_module_moves_structural_channels_only() -> None:
    spsd = SPSD(4, semantic_ratio=0.5, ranking=torch.tensor([0.1, 0.9, 0.3, 0.8]))
    features, prior = torch.randn(2, 4, H, W), torch.randn(2, D, H, W) + 0.3
    for module in (LabelPropagation(7, gamma=2.0, steps=2), LabelPropagation(7, gamma=2.0)):
        found, whole = module(features, prior, spsd), module(features, prior)
        assert torch.equal(found[:, [1, 3]], features[:, [1, 3]])
        torch.testing.assert_close(found[:, [0, 2]], whole[:, [0, 2]])
        assert not torch.allclose(found, features)


def test_small_grids_and_half_precision() -> None:
    for height, width in ((1, 1), (1, 2), (0, 3)):
        prior = torch.ones(height * width, 2)
        graph = propagation_graph(prior, (height, width), 75)
        label = torch.ones(height * width, 2)
        torch.testing.assert_close(solve_labels(label, graph, scaled=False), label / 0.05, rtol=1e-5, atol=0)
    graph = propagation_graph(priors().half(), (H, W), 9)
    label = targets(2).half()
    found = solve_labels(label, graph)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, solve_labels(label.float(), graph).half())


def test_what_does_not_converge_is_said_in_one_line() -> None:
    graph = propagation_graph(priors(), (H, W), 9)
    label = torch.cat([targets(2), torch.zeros(N, 1, dtype=torch.float64)], dim=1)
    found = solve_labels(label, graph, max_iterations=3, scaled=False, must_converge=False)
    assert found.isfinite().all()
    residual = label - found + 0.95 * graph.undirected().propagate(found)
    worst = float((residual.norm(dim=0) / label.norm(dim=0))[:2].max())
    with pytest.raises(NumericalError, match=f"= 3, got up to {worst:.2g} in 2 of 3 columns") as caught:
        solve_labels(label, graph, max_iterations=3)
    assert "\n" not in str(caught.value)


GRAPH = propagation_graph(torch.ones(6, 2), (2, 3), 2)
LABEL = torch.ones(6, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: solve_labels(LABEL, GRAPH, alpha=1.0), ValueError, "alpha is out of range"),
        (lambda: solve_labels(LABEL, GRAPH, alpha=-0.1), ValueError, "alpha is out of range"),
        (lambda: solve_labels(LABEL, GRAPH, tolerance=0.0), ValueError, "tolerance is out of range"),
        (lambda: solve_labels(LABEL, GRAPH, max_iterations=0), ValueError, "max_iterations is out of range"),
        (lambda: solve_labels(LABEL[:5], GRAPH), ValueError, "graph does not match labels"),
        (lambda: solve_labels(LABEL, None), TypeError, "solve_labels: graph is no graph"),  # type: ignore
        (lambda: propagate_labels(LABEL, tuple(GRAPH), 3), TypeError, "propagate_labels: graph is no graph"),  # type: ignore
        (lambda: solve_labels(LABEL, Graph(None, None)), TypeError, "solve_labels: graph.index must be a tensor"),  # type: ignore
        (lambda: smooth(GRAPH._replace(csc=5), LABEL), TypeError, "smooth: csc must be a pair"),  # type: ignore
        (
            lambda: propagate_labels(LABEL, GRAPH._replace(coefficient=LABEL[:, :1]), 1),
            ValueError,
            "propagate_labels: graph.coefficient has the wrong shape",
        ),
        (lambda: smooth(GRAPH.index, LABEL), TypeError, "smooth: graph is no graph"),  # type: ignore
        (lambda: solve_labels(LABEL.int(), GRAPH), TypeError, "labels has an unsupported dtype"),
        (lambda: solve_labels(LABEL * torch.nan, GRAPH), NumericalError, "labels are not finite"),
        (lambda: propagate_labels(LABEL, GRAPH, -1), ValueError, "steps must not be negative"),
        (lambda: propagate_labels(LABEL / 0, GRAPH, 1), NumericalError, "labels are not finite"),
        (lambda: propagation_graph(LABEL, (2, 3), 0), ValueError, "k is out of range"),
        (lambda: propagation_graph(LABEL, (2, 3), gamma=0.0), ValueError, "gamma is out of range"),
        (lambda: propagation_graph(LABEL, (2, 2)), ValueError, "propagation_graph: grid does not match prior"),
        (lambda: propagation_graph(LABEL, (10**400, 1)), ValueError, "propagation_graph: grid does not match prior"),
        (lambda: propagation_graph(LABEL, 6), ValueError, "propagation_graph: grid is not a pair"),  # type: ignore
        (lambda: weight_graph(LABEL, (6,)), ValueError, "propagation_graph: grid is not a pair"),  # type: ignore
        (lambda: choose_neighbours(LABEL, ("2", 3)), TypeError, "grid height must be an integer"),  # type: ignore
        (lambda: propagation_graph(LABEL, (2, 3), select="best"), ValueError, "select is unknown"),  # type: ignore
        (lambda: LabelPropagation(alpha="high"), TypeError, "LabelPropagation: alpha must be a number"),  # type: ignore
        (lambda: LabelPropagation(alpha=1.0), ValueError, "LabelPropagation: alpha is out of range"),
        (lambda: LabelPropagation(steps=-1), ValueError, "LabelPropagation: steps must not be negative"),
        (lambda: LabelPropagation(k=0), ValueError, "LabelPropagation: k is out of range"),
        (lambda: LabelPropagation(gamma=0), ValueError, "LabelPropagation: gamma is out of range"),
        (lambda: LabelPropagation(radius=-1.0), ValueError, "LabelPropagation: radius is out of range"),
        (lambda: LabelPropagation(select="best"), ValueError, "LabelPropagation: select is unknown"),  # type: ignore
        (lambda: LabelPropagation(backend="nope"), ValueError, "LabelPropagation: backend is unknown"),
        (lambda: LabelPropagation(tolerance=0), ValueError, "LabelPropagation: tolerance is out of range"),
        (lambda: LabelPropagation(max_iterations=0), ValueError, "LabelPropagation: max_iterations is out of range"),
        (lambda: LabelPropagation(scaled=1), TypeError, "LabelPropagation: scaled must be a flag"),  # type: ignore
        (lambda: LabelPropagation()(LABEL, LABEL), ValueError, "labels has the wrong rank"),
        (
            lambda: LabelPropagation()(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4)),
            ValueError,
            "prior does not match labels",
        ),
    ],
)
def test_wrong_arguments_are_named_in_one_line(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and "expected" in str(caught.value) and "got" in str(caught.value)


def test_vmap_is_refused_where_values_are_read_and_batches_do_the_same() -> None:
    several, graphs = torch.randn(3, 6, 2), torch.stack([GRAPH.coefficient] * 3)
    for way in (functools.partial(propagate_labels, steps=2), solve_labels):
        name = way.func.__name__ if isinstance(way, functools.partial) else way.__name__
        words = (
            f"^{name}: labels is mapped by torch.vmap, and its values are read; expected a batch dimension B instead"
        )
        with pytest.raises(TypeError, match=words):
            torch.vmap(lambda one, way=way: way(one, GRAPH))(several)
        with pytest.raises(TypeError, match=words):
            torch.vmap(torch.func.grad(lambda one, way=way: way(one, GRAPH).sum()))(several)
    with pytest.raises(TypeError, match="^solve_labels: graph.coefficient is mapped by torch.vmap"):
        torch.vmap(lambda one: solve_labels(LABEL, GRAPH._replace(coefficient=one)))(graphs)
    # nothing of a graph is read in the steps
    found = torch.vmap(lambda one: propagate_labels(LABEL, GRAPH._replace(coefficient=one), 2))(graphs)
    torch.testing.assert_close(found[1], propagate_labels(LABEL, GRAPH, 2))


@pytest.mark.parametrize("tolerance", [1e-23, 1e-10, np.float16(1e-4)])
def test_no_tolerance_ends_in_nan(tolerance):
    torch.manual_seed(2)
    labels, prior = torch.randn(1, 2, 5, 6), torch.randn(1, 16, 5, 6)
    found = LabelPropagation(k=5, tolerance=tolerance, max_iterations=300)(labels, prior)
    torch.testing.assert_close(found, LabelPropagation(k=5)(labels, prior), rtol=1e-3, atol=1e-4)


@pytest.mark.promise("C5")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("way", [functools.partial(propagate_labels, steps=1), solve_labels])
def test_the_largest_labels_stay_finite(way, dtype):
    graph = propagation_graph(torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3)), (4, 4), 3)
    largest = torch.finfo(dtype).max
    labels = torch.full((1, 16, 2), largest, dtype=dtype)
    labels[..., 1] = -largest
    found = way(labels, graph)
    assert found.isfinite().all() and torch.equal(found[..., 0], -found[..., 1])
    # some node has more than any label, others have less
    wide = way(labels.double() / largest, graph)
    assert wide.max() > 1.01
    torch.testing.assert_close(found.double() / largest, wide.clamp(-1, 1), atol=0, rtol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("radius", [None, 0.5])
def test_a_node_without_edges_keeps_its_label(radius: float | None) -> None:
    prior = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, -1.0], [torch.nan, 0.0], [0.0, 0.0]])
    graph = propagation_graph(prior, (1, 5), 2, radius=radius)
    label = torch.tensor([[3.0], [1.0], [5.0], [7.0], [-2.0]])
    alone = slice(2 if radius is None else 0, None)
    for way in (
        functools.partial(propagate_labels, steps=0),
        functools.partial(propagate_labels, steps=4),
        solve_labels,
    ):
        for alpha in (0.5, 0.95):
            found = way(label, graph, alpha=alpha)
            torch.testing.assert_close(found[alone], label[alone])
    assert torch.equal(smooth(graph, label)[alone], label[alone])
    # a node that chose none, and was chosen, has edges
    both = propagation_graph(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), (1, 2), 1)
    assert smooth(both, torch.tensor([[1.0], [2.0]])).flatten().tolist() == [2.0, 1.0]
