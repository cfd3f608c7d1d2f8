# SPDX-License-Identifier: Apache-2.0
"""What the engine is compared with: PDGR and its selection in other hands, and the products no one can leave out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench.timing import seconds_of
from drseg_core.nn import PDGR
from drseg_core.testing import Case

# Largest result of one product of the lower bound; longer ones are computed by row blocks into the same memory.
_BLOCK_BYTES = 64 << 20


def grid_distance(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(N, N) float32 distances of two cells over the longest on the grid."""
    cell = torch.stack(
        torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij"), -1
    ).view(-1, 2)
    return (torch.cdist(cell, cell) / max(math.hypot(grid[0] - 1, grid[1] - 1), 1.0)).to(device)


def _rows_at(value: Tensor, index: Tensor) -> Tensor:
    """(B, N, F) and (B, M, K) to (B, M, K, F); of torch's gathers the one that is fastest forward and backward."""
    batch, nodes, width = value.shape
    first = torch.arange(0, batch * nodes, nodes, device=index.device)[:, None, None]
    return value.reshape(-1, width).index_select(0, (index + first).view(-1)).view(*index.shape, width)


class FactoredPDGR(nn.Module):
    """The default options of :class:`drseg_core.nn.PDGR` in eager torch, the edge MLP's first layer split per node.

    Shares the weights of ``engine``. What remains of a naive module: the N x N scores, E x hidden activations and
    E x C messages.

    Args:
        engine: the module whose parameters are used.
        row_block: rows whose edges are computed at once, and once more in the backward pass, so that any size fits;
            None computes all of them at once, as one would.
    """

    def __init__(self, engine: PDGR, row_block: int | None = None) -> None:
        super().__init__()
        if (engine.affinity, engine.self_loop, engine.norm) != ("exp", "in_topk", "sym_row"):
            raise ValueError("FactoredPDGR: engine has other options; expected the defaults of Eq. 7 and 9")
        self.engine = engine
        self.row_block = row_block

    def _by_rows(self, compute: Callable[..., Tensor], table: Tensor, *by_row: Tensor) -> Tensor:
        """``compute(table, *by_row)``, in row blocks of the (B, N, ...) tensors ``by_row`` where there are any."""
        if self.row_block is None:
            return compute(table, *by_row)
        blocks = zip(*(value.split(self.row_block, dim=1) for value in by_row), strict=True)
        return torch.cat([checkpoint(compute, table, *block, use_reentrant=False) for block in blocks], dim=1)

    def _edge_weight(self, target: Tensor, source: Tensor, index: Tensor) -> Tensor:
        hidden = (source[:, :, None] + _rows_at(target, index)).relu()
        return F.softplus(hidden @ self.engine.edge_vector + self.engine.edge_bias)

    @staticmethod
    def _aggregate(x: Tensor, coefficient: Tensor, index: Tensor) -> Tensor:
        return (coefficient[..., None] * _rows_at(x, index)).sum(2)

    def select(self, unit: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) unit rows to (B, N, K) neighbours; exp does not change the order and is left out."""
        decay = self.engine.decay / self.engine.gamma * grid_distance(grid, unit.device)
        return (
            (unit @ unit.mT - decay)
            .topk(min(self.engine.neighbour_count(unit.shape[1]), unit.shape[1]), dim=-1, sorted=False)
            .indices
        )

    def forward(self, features: Tensor, prior: Tensor, index: Tensor | None = None) -> Tensor:
        """(B, C, h, w) and (B, D, h, w) to (B, C, h, w); ``index`` (B, N, K) takes the place of the selection."""
        m = self.engine
        unit = F.normalize(prior.detach().flatten(2).transpose(1, 2), dim=-1)
        index = self.select(unit, (prior.shape[2], prior.shape[3])) if index is None else index.long()

        weight = self._by_rows(self._edge_weight, m.edge_target(unit), m.edge_source(unit), index)
        degree = weight.sum(-1) + 1e-6
        coefficient = weight / (degree[..., None] * _rows_at(degree[..., None], index)[..., 0]).sqrt()

        x = features.flatten(2).transpose(1, 2)
        for layer, matrix in enumerate(m.weights):
            x = self._by_rows(self._aggregate, F.linear(x, matrix), coefficient, index)
            if m.biases is not None:
                x = x + m.biases[layer]
            if layer < len(m.weights) - 1:
                x = x.relu()
        return m.output_norm(x).transpose(1, 2).unflatten(2, features.shape[2:])


class ScatteredPDGR(FactoredPDGR):
    """The same with the messages of every edge added up by PyG's ``scatter``, as its GATv2 layer does.

    Raises:
        ImportError: torch_geometric is not installed.
    """

    def __init__(self, engine: PDGR) -> None:
        super().__init__(engine)
        self._scatter: Any = importlib.import_module("torch_geometric.utils").scatter

    def _aggregate(self, x: Tensor, coefficient: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        batch, nodes, _ = index.shape
        message = (coefficient[..., None] * _rows_at(x, index)).flatten(0, 2)
        end = torch.arange(batch * nodes, device=x.device).repeat_interleave(index.shape[2])
        added: Tensor = self._scatter(message, end, dim=0, dim_size=batch * nodes, reduce="sum")
        return added.view(batch, nodes, -1)


def _naive_rows(unit: Tensor, distance: Tensor, decay: float, k: int, first: int, last: int) -> Tensor:
    score = (unit[:, first:last] @ unit.mT).sub_(distance[first:last], alpha=decay)
    return score.topk(k, dim=-1, sorted=False).indices


def naive_selection(prior: Tensor, distance: Tensor, decay: float, k: int, block: int) -> Tensor:
    """Plain torch: (B, N, D) and (N, N) distances to (B, N, k) neighbours in no order, ``block`` rows at a time."""
    unit = F.normalize(prior, dim=-1)
    nodes = unit.shape[1]
    return torch.cat(
        [_naive_rows(unit, distance, decay, k, first, first + block) for first in range(0, nodes, block)], dim=1
    )


def best_block(prior: Tensor, distance: Tensor, decay: float, k: int, part: int = 4096) -> int:
    """The row block at which ``naive_selection`` is fastest here, tried on the first ``part`` rows."""
    unit = F.normalize(prior, dim=-1)
    part = min(unit.shape[1], part)

    def seconds(block: int) -> float:
        def run() -> None:
            for first in range(0, part, block):
                _naive_rows(unit, distance, decay, k, first, min(first + block, part))

        return min(seconds_of(run, prior.device.type) for _ in range(2))

    return min([block for block in (64, 128, 256, 512, 1024, 2048) if block < part] + [part], key=seconds)


def faiss_selection(prior: Tensor, k: int) -> Callable[[], Tensor]:
    """Exact inner-product search of faiss on normalised features: no decay, so an easier problem.

    Raises:
        ImportError: faiss is not installed.
    """
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())

    def run() -> Tensor:
        unit = F.normalize(prior, dim=-1)
        found = [faiss.knn(one, one, k, metric=faiss.METRIC_INNER_PRODUCT)[1] for one in unit.numpy()]
        return torch.stack([torch.from_numpy(index) for index in found])

    return run


def sklearn_selection(prior: Tensor, k: int) -> Callable[[], Tensor]:
    """Brute-force cosine search of scikit-learn. No decay.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    neighbors: Any = importlib.import_module("sklearn.neighbors")

    def run() -> Tensor:
        found = []
        for one in prior.numpy():
            search = neighbors.NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(one)
            found.append(torch.from_numpy(search.kneighbors(one, return_distance=False)))
        return torch.stack(found)

    return run


def keops_selection(prior: Tensor, k: int) -> Callable[[], Tensor]:
    """Symbolic matrix of KeOps, whose reduction keeps the k best of a row; compiled at the first call. No decay.

    Raises:
        ImportError: pykeops is not installed.
    """
    lazy: Any = importlib.import_module("pykeops.torch").LazyTensor

    def run() -> Tensor:
        unit = F.normalize(prior, dim=-1).contiguous()
        found: Tensor = (-(lazy(unit[:, :, None]) | lazy(unit[:, None]))).argKmin(k, dim=2)
        return found

    return run


def flashlib_selection(prior: Tensor, k: int) -> Callable[[], Tensor]:
    """``flash_knn`` of FlashLib, on a GPU. No decay. Its distances are Euclidean: one more channel makes all rows
    that are searched equally long, so that zero rows do not come first.

    Raises:
        ImportError: flashlib is not installed.
    """
    search: Any = importlib.import_module("flashlib").flash_knn

    def run() -> Tensor:
        unit = F.normalize(prior, dim=-1)
        missing = (1 - unit.square().sum(-1, keepdim=True)).clamp_min(0).sqrt()
        found: Tensor = search(F.pad(unit, (0, 1)), torch.cat([unit, missing], dim=-1), k)[1]
        return found

    return run


@dataclass(frozen=True)
class Peer:
    """Another project's search.

    Args:
        make: of prior and k, one call. package: what to install. most_nodes: with more it takes minutes.
        device: where it runs.
    """

    make: Callable[[Tensor, int], Callable[[], Tensor]]
    package: str
    most_nodes: int
    device: str = "cpu"


# none of them has a spatial decay: they solve an easier problem
PEERS = {
    "faiss": Peer(faiss_selection, "faiss-cpu", 16384),
    "sklearn": Peer(sklearn_selection, "scikit-learn", 16384),
    "keops": Peer(keops_selection, "pykeops", 1024),
    "flashlib": Peer(flashlib_selection, "flashlib", 65536, device="cuda"),
}


@dataclass(frozen=True)
class Product:
    """One matrix product, (batch, rows, inner) x (batch, inner, columns).

    Args:
        name: what it is part of.
        transposed: of the two factors, which are stored the other way round.
    """

    name: str
    batch: int
    rows: int
    inner: int
    columns: int
    transposed: tuple[bool, bool] = (False, True)

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns


def scores_product(case: Case) -> Product:
    return Product("scores", case.batch, case.nodes, case.prior, case.nodes)


def pdgr_products(case: Case, backward: bool, layers: int = 2) -> list[Product]:
    """The products without which PDGR cannot be computed; backward also those of the gradients.

    The prior has no gradient: its two projections have that of their weights alone.
    """
    nodes = case.batch * case.nodes
    products = [scores_product(case), Product("projections", 1, nodes, case.prior, 2 * case.hidden)]
    products += [Product("layer", 1, nodes, case.channels, case.channels)] * layers
    if backward:
        products.append(Product("projection weights", 1, 2 * case.hidden, nodes, case.prior, (True, False)))
        products += [Product("layer weights", 1, case.channels, nodes, case.channels, (True, False))] * layers
        products += [Product("layer inputs", 1, nodes, case.channels, case.channels, (False, False))] * layers
    return products


class MatmulLowerBound:
    """Runs products on operands of their shapes, results in memory that is already there.

    Args:
        products: what to multiply. dtype: of the operands and the results.
    """

    def __init__(self, products: Sequence[Product], device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []
        operands: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        for p in products:
            if p not in operands:
                # a batch of one as plain matrices: torch takes another path for batches
                batch = (p.batch,) if p.batch > 1 else ()
                shapes = ((p.rows, p.inner), (p.inner, p.columns))
                left, right = (
                    torch.randn(*batch, *(shape[::-1] if flip else shape), device=device).to(dtype)
                    for shape, flip in zip(shapes, p.transposed, strict=True)
                )
                block = min(p.rows, max(1, _BLOCK_BYTES // (4 * p.batch * p.columns)))
                operands[p] = (
                    left.mT if p.transposed[0] else left,
                    right.mT if p.transposed[1] else right,
                    torch.empty(*batch, block, p.columns, device=device, dtype=dtype),
                )
            self._steps.append(operands[p])

    def __call__(self) -> None:
        with torch.no_grad():
            for left, right, out in self._steps:
                for part in left.split(out.shape[-2], dim=-2):
                    torch.matmul(part, right, out=out[..., : part.shape[-2], :])
