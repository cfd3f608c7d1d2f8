# SPDX-License-Identifier: Apache-2.0
"""PDGR as the paper writes it, Eq. 7-9 in plain PyTorch: edge by edge as one would, and dense with every option."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drseg_core.nn import PDGR


class LiteralPDGR(nn.Module):
    """The default options of :class:`drseg_core.nn.PDGR` edge by edge: the N x N affinity, the concatenation of every
    edge, and ``index_add``. It shares the weights of ``engine`` and is what every speed-up is over.

    Args:
        engine: the module whose parameters are used.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import PDGR
        >>> from drseg_core.testing import LiteralPDGR
        >>> engine = PDGR(channels=4, prior_dim=6, k=3)
        >>> features, prior = torch.randn(1, 4, 5, 5), torch.randn(1, 6, 5, 5)
        >>> torch.allclose(LiteralPDGR(engine)(features, prior), engine(features, prior), atol=1e-4)
        True
    """

    def __init__(self, engine: PDGR) -> None:
        super().__init__()
        given = (engine.affinity, engine.self_loop, engine.norm, engine.edge_temperature, engine.edge_decay)
        if given != ("exp", "in_topk", "sym_row", None, None):
            raise ValueError("LiteralPDGR: engine has other options; expected the defaults of Eq. 7 to 9")
        self.engine = engine

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """(B, C, h, w) and (B, D, h, w) to (B, C, h, w)."""
        m = self.engine
        batch, _, h, w = features.shape
        nodes = h * w
        k = min(m.neighbour_count(nodes), nodes)
        unit = F.normalize(prior.detach().flatten(2).transpose(1, 2), dim=-1)
        cell = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).view(-1, 2)
        distance = torch.cdist(cell.to(unit), cell.to(unit))
        affinity = torch.exp(m.gamma * unit @ unit.mT) * torch.exp(-m.decay * distance / distance.max().clamp_min(1))
        index = affinity.topk(k, dim=-1).indices

        start = torch.arange(nodes, device=index.device)[:, None].expand(nodes, k)
        pair = torch.cat([unit[:, start], torch.stack([unit[b][index[b]] for b in range(batch)])], dim=-1)
        first = torch.cat([m.edge_source.weight, m.edge_target.weight], dim=1)
        hidden = F.linear(pair, first, m.edge_source.bias).relu()
        weight = F.softplus(hidden @ m.edge_vector + m.edge_bias)

        degree = weight.sum(-1) + 1e-6
        far = torch.stack([degree[b][index[b]] for b in range(batch)])
        coefficient = weight / (degree[..., None] * far).sqrt()
        x = features.flatten(2).transpose(1, 2)
        for layer, matrix in enumerate(m.weights):
            x = F.linear(x, matrix)
            message = coefficient[..., None] * torch.stack([x[b][index[b]] for b in range(batch)])
            target = start.reshape(-1)
            x = torch.stack(
                [message.new_zeros(x[b].shape).index_add(0, target, message[b].flatten(0, 1)) for b in range(batch)]
            )
            if m.biases is not None:
                x = x + m.biases[layer]
            if layer < len(m.weights) - 1:
                x = x.relu()
        return m.output_norm(x).transpose(1, 2).unflatten(2, (h, w))


def _pairs(prior: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, float]:
    """Cosines (B, N, N), distances in cells (N, N), and the longest distance on the grid."""
    length = prior.norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, prior / length, 0)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    cell = torch.stack([y.flatten(), x.flatten()], -1).double()
    delta = (cell[:, None] - cell).norm(dim=-1)
    return unit @ unit.mT, delta, max(((h - 1) ** 2 + (w - 1) ** 2) ** 0.5, 1.0)


def dense_affinity(module: PDGR, prior: Tensor, h: int, w: int) -> Tensor:
    """Eq. 7 as printed, in the module's reading, for every pair: (B, N, D) in float64 to (B, N, N).

    Examples:
        >>> import torch
        >>> from drseg_core.nn import PDGR
        >>> from drseg_core.testing import dense_affinity
        >>> dense_affinity(PDGR(channels=4, prior_dim=6, decay=0.0), torch.zeros(1, 4, 6).double(), 2, 2)[0, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    cosine, delta, longest = _pairs(prior, h, w)
    gamma, decay = module.gamma, module.decay
    if module.affinity == "exp":
        return torch.exp(gamma * cosine) * torch.exp(-decay * delta / longest)
    if module.affinity == "linear":
        return gamma * cosine - decay * delta / longest
    if module.affinity == "power":
        return cosine.clamp_min(0) ** gamma * torch.exp(-decay * delta / longest)
    if module.affinity == "product":
        return gamma * cosine * torch.exp(-decay * delta / longest)
    return torch.exp(gamma * cosine) * torch.exp(-decay * delta**2 / longest**2)


def dense_neighbours(module: PDGR, affinity: Tensor, excluded: Tensor | None = None) -> Tensor:
    """N(i) as a bool matrix (B, N, N): the k largest of each row, ties to the lowest index, the node itself by rule.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import PDGR
        >>> from drseg_core.testing import dense_neighbours
        >>> dense_neighbours(PDGR(channels=4, prior_dim=6, k=2), torch.ones(1, 3, 3).double())[0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 0, 1]]
    """
    key = affinity.clone()
    if excluded is not None:
        key[:, :, excluded] = -torch.inf
        key[:, excluded] = -torch.inf
    inside = module.self_loop == "in_topk"
    key.diagonal(dim1=1, dim2=2).fill_(torch.inf if inside else -torch.inf)
    best = key.sort(dim=2, descending=True, stable=True).indices[..., : module.neighbour_count(key.shape[2])]
    return torch.zeros_like(key).scatter(2, best, 1.0).bool() & (key > -torch.inf)


def dense_pdgr(module: PDGR, features: Tensor, prior: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Eq. 7-9 with every option of the module and its float64 parameters, one dense matrix after the other.

    Args:
        module: whose parameters and options are used.
        features: (B, C, h, w). prior: (B, D, h, w).
        excluded: nodes that choose no other and that no other chooses.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import PDGR
        >>> from drseg_core.testing import dense_pdgr
        >>> module = PDGR(channels=4, prior_dim=6, k=3, affinity="gauss", norm="sym_undirected").double()
        >>> features, prior = torch.randn(1, 4, 5, 5).double(), torch.randn(1, 6, 5, 5).double()
        >>> torch.allclose(dense_pdgr(module, features, prior), module(features, prior))
        True
    """
    batch, _, h, w = prior.shape
    nodes = h * w
    d = prior.detach().double().flatten(2).transpose(1, 2)
    affinity = dense_affinity(module, d, h, w)
    neighbours = dense_neighbours(module, affinity, excluded)

    # Eq. 8 on the concatenation of every pair
    length = d.norm(dim=-1, keepdim=True)
    given = torch.where(length > 0, d / length, 0) if module.normalize_prior else d
    pair = torch.cat([given[:, :, None].expand(-1, -1, nodes, -1), given[:, None].expand(-1, nodes, -1, -1)], dim=-1)
    first = torch.cat([module.edge_source.weight, module.edge_target.weight], dim=1)
    hidden = F.linear(pair, first, module.edge_source.bias).relu()
    # the threshold takes torch's switch to a linear function out of sight
    weight = F.softplus(hidden @ module.edge_vector + module.edge_bias, threshold=700) * neighbours
    cosine, delta, longest = _pairs(d, h, w)
    if module.edge_log_temperature is not None:
        weight = weight * torch.exp((cosine - 1) / module.edge_log_temperature.exp())
    if module.edge_log_decay is not None:
        weight = weight * torch.exp(-module.edge_log_decay.exp() * delta / longest)
    if module.use_affinity_as_weight:
        weight = weight * affinity.clamp_min(0)
    if module.self_loop == "extra":
        weight = weight + torch.eye(nodes, dtype=torch.float64)
        neighbours = neighbours | torch.eye(nodes, dtype=torch.bool)

    # the coefficients of Eq. 9
    eps = 1e-6
    row, column = weight.sum(2), weight.sum(1)
    if module.norm == "sym_row":
        matrix = weight / torch.sqrt((row + eps)[:, :, None] * (row + eps)[:, None, :])
    elif module.norm == "sym_count":
        size = neighbours.sum(2).clamp_min(1).double()
        matrix = weight / torch.sqrt(size[:, :, None] * size[:, None, :])
    elif module.norm == "sym_inout":
        matrix = weight / torch.sqrt((row + eps)[:, :, None] * (column + eps)[:, None, :])
    elif module.norm == "row":
        matrix = weight / (row + eps)[:, :, None]
    else:
        both = (weight + weight.mT) / 2
        degree = both.sum(2) + eps
        matrix = both / torch.sqrt(degree[:, :, None] * degree[:, None, :])

    x = features.flatten(2).transpose(1, 2)
    last = len(module.weights) - 1
    for layer, linear in enumerate(module.weights):
        x = matrix @ (x @ linear.T)
        if module.biases is not None:
            x = x + module.biases[layer]
        if layer < last:
            x = x.relu()
    x = F.layer_norm(x, (module.channels,), module.output_norm.weight, module.output_norm.bias)
    x = x.transpose(1, 2).reshape(batch, module.channels, h, w)
    return features + x if module.residual else x
