# SPDX-License-Identifier: Apache-2.0
"""What a call has to compute and to move, counted from its sizes alone, and the rates this machine reaches at best."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.contenders import pdgr_products
from bench.timing import seconds_of
from drseg_core.testing import Case


@dataclass(frozen=True)
class Work:
    """Of one call.

    Args:
        flop: additions and multiplications of the whole problem, before anything is skipped.
        byte: compulsory traffic: inputs and outputs once.
    """

    flop: int
    byte: int

    def seconds(self, gemm_flops: float, copy_bytes: float) -> float:
        """No less at these rates: the roofline."""
        return max(self.flop / gemm_flops, self.byte / copy_bytes)


def work(op: str, case: Case, mode: str, element: int = 4) -> Work:
    """Counts of an op, or of whole PDGR (``pdgr``), with elements of so many bytes; indices and weights have four."""
    nodes = case.batch * case.nodes
    edges = nodes * case.neighbours
    backward = mode == "fwd+bwd"
    if op == "knn_graph":
        return Work(2 * nodes * case.nodes * case.prior, nodes * case.prior * element + 4 * edges)
    if op == "edge_weight":
        # forward: add, max, multiply, add; backward: the first two again, and two products with a sum each
        halves = 2 * nodes * case.hidden * element
        return Work((10 if backward else 4) * edges * case.hidden, (3 if backward else 1) * halves + 8 * edges)
    if op == "degree_normalize":
        return Work((14 if backward else 4) * edges, (28 if backward else 12) * edges)
    if op == "graph_propagate":
        rows = nodes * case.channels * element
        return Work((6 if backward else 2) * edges * case.channels, (5 if backward else 2) * rows + 8 * edges)
    if op == "edge_coefficient":
        # the weights do not go to memory and come back
        parts = [work(name, case, mode, element) for name in ("edge_weight", "degree_normalize")]
        return Work(sum(part.flop for part in parts), parts[0].byte)
    if op == "graph_layer":
        # LayerNorm: mean, deviation, weight and bias; backward: two more means and as many products
        one, values = work("graph_propagate", case, mode, element), nodes * case.channels
        return Work(one.flop + (20 if backward else 8) * values, one.byte)
    if op != "pdgr":
        raise ValueError(f"counts: op is unknown; expected pdgr or one of the ops, got {op}")
    parts = [work(name, case, mode, element) for name in ("edge_weight", "degree_normalize")]
    parts += [work("graph_propagate", case, mode, element)] * 2
    maps = nodes * (case.prior + (4 if backward else 2) * case.channels) * element
    flop = sum(product.flops for product in pdgr_products(case, backward)) + sum(part.flop for part in parts)
    return Work(flop, maps + 8 * edges)


def _rate(run: Callable[[], object], amount: float, device: str) -> float:
    run()
    return amount / statistics.median(seconds_of(run, device) for _ in range(5))


@functools.cache
def ceilings(device: str, dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """FLOP/s of this machine's library product and bytes/s of its copy (read and written both counted).

    Measured once per process; ``threads`` only keeps measurements of different thread counts apart.
    """
    side = 8192 if device == "cuda" else 1536
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    gemm = _rate(lambda: left @ right, 2 * side**3, device)
    # larger than any cache
    source = torch.randn((1 << 30 if device == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    return gemm, _rate(lambda: target.copy_(source), 2 * source.nbytes, device)
