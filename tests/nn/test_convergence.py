# SPDX-License-Identifier: Apache-2.0
"""Reference and engine train the same small segmentation net to the same place, and faulty engines do not.

Plain SGD, because an adaptive optimiser hides any constant factor of a gradient. Weights are compared relative to the
distance they travelled, each by itself: a tolerance on their values would pass a module that never learns.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drseg_core import ops
from drseg_core.nn import PDGR, pdgr
from drseg_core.ops import _dispatch

CLASSES, SIDE, CELL, POOL, BATCH, STEPS = 4, 32, 4, 12, 4, 200


class Net(nn.Module):
    """Two convolutions to a grid of cells, the graph module, a linear head on every cell."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 5, stride=2, padding=2)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.graph = PDGR(12, 10, k=5, edge_hidden=8, residual=True)
        self.head = nn.Conv2d(12, CLASSES, 1)

    def forward(self, image: Tensor, prior: Tensor) -> Tensor:
        return self.head(self.graph(self.second(self.first(image).relu()), prior))


def scenes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of blocks with one of four striped textures each, a prior of fixed filters, and the class of each cell."""
    random = torch.Generator().manual_seed(100 + seed)
    label = torch.randint(0, CLASSES, (POOL, 1, 3, 3), generator=random).float()
    label = F.interpolate(label, size=SIDE // CELL, mode="nearest").squeeze(1).long()
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    waves = torch.stack(
        [torch.sin(step * (a * x + b * y)) for a, b, step in ((1, 0, 1), (0, 1, 1), (1, 1, 1), (1, 0, 2))]
    )
    pixel = label.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    image = waves.gather(0, pixel) + 0.6 * torch.randn(POOL, SIDE, SIDE, generator=random)
    filters = torch.randn(10, 1, 5, 5, generator=random)
    prior = F.avg_pool2d(F.conv2d(image[:, None], filters, padding=2).abs(), CELL)
    return image[:, None], prior, label


@dataclass(frozen=True)
class Training:
    """Losses, the weights before and after, and the mean intersection over union at the end."""

    losses: Tensor
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    miou: float


def train(backend: str, seed: int, prepare: Callable[[Net], Any] = lambda net: None) -> Training:
    torch.manual_seed(seed)
    net = Net()
    before = copy.deepcopy(dict(net.named_parameters()))
    prepare(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    image, prior, label = scenes(seed)
    losses = []
    with ops.use_backend(backend):
        for step in range(STEPS):
            pick = torch.arange(step * BATCH, (step + 1) * BATCH) % POOL
            loss = F.cross_entropy(net(image[pick], prior[pick]), label[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert ops.last_backend("graph_propagate") == backend
        with torch.no_grad():
            chosen = net(image, prior).argmax(1)
    both = [((chosen == c) & (label == c)).sum() / ((chosen == c) | (label == c)).sum() for c in range(CLASSES)]
    after = {name: value.detach() for name, value in net.named_parameters()}
    return Training(torch.stack(losses).double(), before, after, float(torch.stack(both).mean()))


def difference(got: Training, expected: Training) -> str | None:
    """What the two disagree in first; None where they went the same way."""
    drop = float(expected.losses[:3].mean() - expected.losses[-3:].mean())
    early = ((got.losses[:20] - expected.losses[:20]).abs() / expected.losses[:20]).max()
    if early > 1e-5:
        return f"early losses: {float(early):.2g} apart"
    late = (got.losses - expected.losses).abs().max()
    if late > 0.02 * drop:
        return f"losses: {float(late):.2g} apart, {drop:.2g} is the whole drop"
    if abs(got.miou - expected.miou) > 0.005:
        return f"mIoU: {got.miou} and {expected.miou}"
    for name, end in expected.after.items():
        distance = (end - expected.before[name]).norm()
        if (got.after[name] - end).norm() > 1e-2 * distance:
            return f"{name} ends elsewhere"
    return None


@pytest.fixture(scope="module")
def reference() -> Iterator[Callable[[int], Training]]:
    done: dict[int, Training] = {}
    yield lambda seed: done.setdefault(seed, train("reference", seed)) if seed not in done else done[seed]


@pytest.mark.promise("C3")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_engine_trains_to_where_the_reference_does(seed, reference):
    expected = reference(seed)
    # the runs compare something: the net learns
    assert expected.losses[-3:].mean() < 0.5 * expected.losses[:3].mean() and expected.miou > 0.9
    assert difference(train("native", seed), expected) is None


@contextmanager
def replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(pdgr, name)
    setattr(pdgr, name, lambda *args, **options: function(original, *args, **options))
    try:
        yield
    finally:
        setattr(pdgr, name, original)


@contextmanager
def spoilt(op: str, **changes: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """The native kernels of an op with a fault: ``run`` or ``run_backward`` made of the right one."""
    original = _dispatch._tables[op]

    def spoil(backend: _dispatch.Backend) -> _dispatch.Backend:
        if backend.name != "native":
            return backend
        return dataclasses.replace(backend, **{name: fault(getattr(backend, name)) for name, fault in changes.items()})

    _dispatch.add_table(op, *map(spoil, original))
    try:
        yield
    finally:
        _dispatch.add_table(op, *original)


def scaled(factor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def fault(run: Callable[..., Any]) -> Callable[..., Any]:
        def scaled_run(*arguments: Any) -> Any:
            found = run(*arguments)
            return factor * found if isinstance(found, Tensor) else tuple(factor * value for value in found)

        return scaled_run

    return fault


def next_best(op: Callable[..., Any], prior: Any, grid: tuple[int, int], k: int, **options: Any) -> Any:
    """The (k+1)-th neighbour in place of the k-th."""
    index, score = op(prior, grid, k + 1, **options)
    drop = score.argsort(dim=-1, descending=True, stable=True)[..., k - 1 : k]
    keep = torch.arange(k + 1) != drop
    return tuple(value[keep].view(*value.shape[:-1], k) for value in (index, score))


def no_degree(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A slot's share of the row, forward and backward."""
    return lambda first, *others: first / first.shape[-1]


@pytest.mark.promise("C3")
@pytest.mark.parametrize("op", ["edge_weight", "degree_normalize", "graph_propagate"])
@pytest.mark.parametrize("factor", [0.5, -1.0], ids=["half the gradient", "negated gradient"])
def test_a_wrong_gradient_is_seen(op, factor, reference):
    with spoilt(op, run_backward=scaled(factor)):
        got = train("native", 0)
    assert difference(got, reference(0)) is not None


@pytest.mark.promise("C43")
@pytest.mark.parametrize(
    "fault",
    [
        lambda: replaced("knn_graph", next_best),
        lambda: spoilt("degree_normalize", run=no_degree, run_backward=no_degree),
    ],
    ids=["knn_graph", "degree_normalize"],
)
def test_a_wrong_graph_is_seen(fault, reference):
    with fault():
        got = train("native", 0)
    assert difference(got, reference(0)) is not None


@pytest.mark.promise("C43")
def test_a_module_that_does_not_learn_is_seen(reference):
    assert difference(train("native", 0, lambda net: net.graph.requires_grad_(False)), reference(0)) is not None


@pytest.mark.promise("C43")
@pytest.mark.parametrize("name", ["edge_vector", "edge_bias", "edge_source.weight", "weights.0", "output_norm.bias"])
def test_a_parameter_without_gradient_is_seen(name, reference):
    def prepare(net: Net) -> None:
        dict(net.graph.named_parameters())[name].register_hook(torch.zeros_like)

    assert difference(train("native", 0, prepare), reference(0)) is not None
