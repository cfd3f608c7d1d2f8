# SPDX-License-Identifier: Apache-2.0
"""Selection with spatial decay: the engine's ``knn_graph`` beside plain torch, faiss (no decay) and its product."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import gate, memory
from bench.contenders import PEERS, MatmulLowerBound, best_block, grid_distance, naive_selection, scores_product
from bench.one_op import forget_launches, last_launches
from bench.record import Row, rows_of
from bench.timing import Contender, interleave
from drseg_core.ops import knn_graph, last_backend
from drseg_core.testing import Case, dino_like_prior, generator

BESIDE = ("naive", *PEERS, "matmul_lower_bound")
# with more nodes only the engine runs; up to the second, plain torch takes all rows at once
_MOST_NODES, _MOST_AT_ONCE = 16384, 4096
# strength by case; 1 at the others
DECAY = {"grid_64x64": 2.0, "grid_128x128": 4.0, "grid_256x256": 4.0}


def make_prior(case: Case, data: str, device: str = "cpu") -> Tensor:
    """(B, N, D) seeded prior; ``data`` is ``random`` or ``dino``."""
    random = generator(case)
    if data == "dino":
        return dino_like_prior(case.batch, case.height, case.width, case.prior, random).to(device)
    return torch.randn(case.batch, case.nodes, case.prior, generator=random).to(device)


def decay_of(case: Case) -> float:
    return DECAY.get(case.name, 1.0)


def _engine(case: Case, prior: Tensor) -> tuple[Callable[[], Tensor], str | None]:
    """One call, and what is wrong with its result."""
    grid, decay = (case.height, case.width), decay_of(case)
    run = partial(knn_graph, prior, grid, case.neighbours, decay=decay)
    chosen = run()
    wrong = gate.selection(chosen, prior, grid, decay)
    if wrong is None and bool((chosen.diff(dim=-1) <= 0).any()):
        wrong = "a row is not strictly ascending"
    return run, wrong


def engine(
    case: Case, data: str, dtype: torch.dtype, device: str
) -> tuple[Callable[[], Tensor], str | None, dict[str, str | None]]:
    """(one call, what is wrong with it, backends)."""
    run, wrong = _engine(case, make_prior(case, data, device).to(dtype))
    return run, wrong, {"knn_graph": last_backend("knn_graph")}


def measure(
    case: Case,
    data: str,
    *,
    repeats: int = 7,
    slow: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    beside: Sequence[str] = BESIDE,
) -> tuple[list[Row], list[str]]:
    """The rows of one size, and what was refused.

    ``slow``: timed calls at the largest size. ``beside``: what the engine is compared with, of ``BESIDE``.
    """
    grid, k, decay = (case.height, case.width), case.neighbours, decay_of(case)
    prior = make_prior(case, data, device).to(dtype)
    small = case.nodes <= _MOST_NODES
    forget_launches()
    run_engine, wrong = _engine(case, prior)
    if wrong is not None:
        return [], [f"engine: {wrong}"]
    backends = {"knn_graph": last_backend("knn_graph")}
    launch = last_launches(backends)
    fields: dict[str, Any] = {"backends": backends, "launch": launch, "peak_mb": memory.rise(run_engine, device)}
    contenders = [Contender("engine", run_engine, repeats if small else slow, fields)]
    refused = []
    candidates: list[tuple[str, Callable[[], Tensor], float, dict[str, Any]]] = []
    if small and "naive" in beside:
        distance = grid_distance(grid, prior.device)
        at_once = case.nodes <= _MOST_AT_ONCE
        block = case.nodes if at_once else best_block(prior, distance, decay, k)
        naive: Callable[[], Tensor] = partial(naive_selection, prior, distance, decay, k, block)
        note = "N x N at once" if at_once else f"fastest row block of those tried: {block}"
        candidates.append(("naive", naive, decay, {"note": note, "row_block": block}))
    for name, peer in PEERS.items():
        if not small or name not in beside or device != peer.device or dtype != torch.float32:
            continue
        if case.nodes > peer.most_nodes:
            continue
        try:
            candidates.append((name, peer.make(prior, k), 0.0, {"note": "no decay: an easier problem"}))
        except ImportError:
            print(
                f"selection: {name} is not installed, its row is left out; pip install {peer.package}", file=sys.stderr
            )
    for name, run, strength, said in candidates:
        # without decay, or for a zero feature, a node need not be among its own
        wrong = gate.selection(run(), prior, grid, strength, include_self=False)
        if wrong is None:
            contenders.append(Contender(name, run, repeats, {**said, "peak_mb": memory.rise(run, device)}))
        else:
            refused.append(f"{name}: {wrong}")
    if small and "matmul_lower_bound" in beside:
        bound = MatmulLowerBound([scores_product(case)], device)
        bound()
        contenders.append(
            Contender("matmul_lower_bound", bound, repeats, {"note": "matrix product of the scores only"})
        )
    common = {
        "op": "knn_graph",
        "case": case.name,
        "sizes": {"B": case.batch, "h": case.height, "w": case.width, "D": case.prior, "K": k, "decay": decay},
        "mode": "fwd",
        "dtype": str(dtype).removeprefix("torch."),
        "data": data,
    }
    return rows_of(contenders, interleave(contenders, device), common, case, device), refused
