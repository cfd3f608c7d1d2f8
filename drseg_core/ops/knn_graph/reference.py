# SPDX-License-Identifier: Apache-2.0
"""What ``knn_graph`` means, in plain PyTorch: any float dtype, blockwise, never N x N."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of one block of scores; a few buffers of this size live at a time.
_BLOCK_BYTES = 32 << 20

ACROSS = "across"
"""A form of a grid of two rows, for ``knn_between``: the cosine, less what puts a node's own row behind the other."""
# cosines differ by two at most
_BEHIND = 4.0


def decay_table(
    grid: tuple[int, int],
    decay: float,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    radius: float | None = None,
) -> Tensor:
    """Spatial term of Eq. 7 over (|dy|, |dx|), shape (h, w): subtracted (additive, gauss) or multiplied.

    NaN beyond ``radius`` cells: such a score is NaN, and such a pair is no candidate. Computed in float64 and rounded
    once, so that every backend reads the same numbers.
    """
    h, w = grid
    if form == ACROSS:
        return torch.tensor([_BEHIND, 0.0], dtype=dtype, device=device)[:, None].repeat(1, w)
    dy = torch.arange(h, dtype=torch.float64, device=device)[:, None]
    dx = torch.arange(w, dtype=torch.float64, device=device)[None, :]
    longest = ((h - 1) ** 2 + (w - 1) ** 2) ** 0.5
    distance = (dy.square() + dx.square()).sqrt()
    relative = distance / max(longest, 1.0)
    if form == "gauss":
        relative = relative.square()
    table = decay * relative
    table = (torch.exp(-table) if form in ("multiplicative", "product") else table).to(dtype)
    return table if radius is None else table.masked_fill(distance > radius, torch.nan)


def combine(cosine: Tensor, decay: Tensor, form: str) -> Tensor:
    """Order score of Eq. 7 from the cosine and the entry of the decay table."""
    if form == "multiplicative":
        return cosine.clamp_min(0) * decay
    return cosine * decay if form == "product" else cosine - decay


def select(score: Tensor, own: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row by (score descending, index ascending), in ascending index.

    Args:
        score: (rows, N); ``-inf`` marks columns that may not be chosen, ``+inf`` one that must be.
        own: (rows,) index put into slots for which there is no candidate.
        k: slots.

    Returns:
        ``index`` (rows, k) int64 and ``found`` (rows, k) bool, False in the slots without a candidate (the last ones).
    """
    columns = torch.arange(score.shape[1], device=score.device)
    threshold = score.topk(torch.sym_min(k, score.shape[1]), dim=1).values[:, -1:]
    above = score > threshold
    tied = (score == threshold) & (score > -torch.inf)
    room = k - above.sum(1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(1) <= room))
    # slot number of every chosen column; the others go to a spare last slot
    slot = torch.where(chosen, chosen.cumsum(1) - 1, k)
    index = own[:, None].repeat(1, k + 1)
    index = index.scatter(1, slot, columns.expand_as(slot))
    found = torch.arange(k, device=score.device) < chosen.sum(1, keepdim=True)
    return torch.where(found, index[:, :k], own[:, None]), found


def knn_graph(
    prior: Tensor,
    inverse_norm: Tensor,
    table: Tensor,
    k: int,
    form: str,
    include_self: bool,
    *,
    block: int | None = None,
    rows: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Neighbours and scores of prepared features.

    Args:
        prior: (B, N, D).
        inverse_norm: (B, N), NaN for a node that no other may choose.
        table: (h, w) decay table, h * w = N, NaN where a pair is no candidate.
        k: neighbours per node.
        form: ``additive``, ``gauss`` (both subtract the table), ``multiplicative`` or ``product``.
        include_self: the node itself is always, or never, among its neighbours.
        block: rows of scores computed at once; by default as many as take 32 MB.
        rows: first and end of the n nodes whose neighbours are wanted; by default all.

    Returns:
        ``index`` (B, n, k) int32 and ``score`` (B, n, k); see ``drseg_core.ops.knn_graph``.
    """
    batch, nodes, _ = prior.shape
    w = table.shape[1]
    wide = torch.float64 if prior.dtype == torch.float64 else torch.float32
    begin, end = rows or (0, nodes)
    index = torch.empty(batch, end - begin, k, dtype=torch.int32, device=prior.device)
    score = torch.empty(batch, end - begin, k, dtype=wide, device=prior.device)
    if index.numel() == 0:
        return index, score
    block = block or max(1, _BLOCK_BYTES // (nodes * 8))
    everyone = torch.arange(nodes, device=prior.device)
    y, x = everyone // w, everyone % w
    for b in range(batch):
        # of float32 the library might multiply less than its digits, as the process is set
        feature, inverse = prior[b].double(), inverse_norm[b]
        bad = inverse.isnan()
        for first in range(begin, end, block):
            own = everyone[first : min(first + block, end)]
            cosine = (feature[own] @ feature.T).to(wide) * inverse[own, None] * inverse
            decay = table[(y[own, None] - y).abs(), (x[own, None] - x).abs()]
            value = combine(cosine, decay, form)
            # NaN of cells that are too far apart
            key = value.masked_fill(bad | bad[own, None] | value.isnan(), -torch.inf)
            diagonal = own[:, None] == everyone
            key = key.masked_fill(diagonal, torch.inf if include_self else -torch.inf)
            # a bad node keeps to itself: it has no neighbour but its own index in every slot
            key = key.masked_fill(bad[own, None] & ~diagonal, -torch.inf)
            chosen, found = select(key, own, k)
            index[b, own - begin] = chosen.int()
            picked = value.gather(1, chosen).masked_fill(~found, -torch.inf)
            score[b, own - begin] = picked.masked_fill(bad[own, None], torch.nan)
    return index, score


def knn_graph_at_once(
    prior: Tensor,
    inverse_norm: Tensor,
    height: int,
    width: int,
    k: int,
    decay: float,
    form: str,
    include_self: bool,
    radius: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same without a loop or a question about sizes, all N x N scores at once: what a traced program is given."""
    batch, nodes, _ = prior.shape
    wide = torch.float64 if prior.dtype == torch.float64 else torch.float32
    everyone = torch.arange(nodes, device=prior.device)
    y, x = everyone // width, everyone % width
    down, right = (y[:, None] - y).abs().double(), (x[:, None] - x).abs().double()
    distance = (down.square() + right.square()).sqrt()
    relative = distance / distance.amax().clamp_min(1.0)
    if form == "gauss":
        relative = relative.square()
    term = _BEHIND * (down == 0) if form == ACROSS else decay * relative
    term = (torch.exp(-term) if form in ("multiplicative", "product") else term).to(wide)
    rows, bad = prior.double(), inverse_norm.isnan()
    cosine = (rows @ rows.mT).to(wide) * inverse_norm[:, :, None] * inverse_norm[:, None]
    value = combine(cosine, term, form)
    if radius is not None:
        value = value.masked_fill(distance > radius, torch.nan)
    diagonal = everyone[:, None] == everyone
    key = value.masked_fill(value.isnan(), -torch.inf).masked_fill(bad[:, None] | bad[:, :, None], -torch.inf)
    key = key.masked_fill(diagonal, torch.inf if include_self else -torch.inf)
    key = key.masked_fill(bad[:, :, None] & ~diagonal, -torch.inf)
    own = everyone.repeat(batch)
    chosen, found = select(key.flatten(0, 1), own, k)
    picked = value.flatten(0, 1).gather(1, chosen).masked_fill(~found, -torch.inf)
    picked = picked.masked_fill(bad.flatten()[:, None], torch.nan)
    return chosen.int().view(batch, nodes, k), picked.view(batch, nodes, k)
