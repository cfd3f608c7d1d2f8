# SPDX-License-Identifier: Apache-2.0
"""LPOSS's graph and propagation (arXiv 2503.19777): the engine beside the same on faiss and scipy, on the CPU.

    python -m bench lposs
    python -m bench lposs --rounds 5 --out bench/results/FOLDER/lposs.jsonl

The algorithm is restated from the paper and from what its code does. There are 400 neighbours by cosine, the node
itself among them. Weights are ``cos**3 * exp(-0.16 * distance)``, without loops. ``W + W^T`` is normalised by its
degrees. ``(I - 0.95 S) x = y`` is solved by ten steps of conjugate gradients, one class after another. The two sides
are measured in turns, in seconds of the clock and of the processor, which a busy machine changes less. Needs faiss-cpu
and scipy (extra bench).
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import record
from bench.command import command_parser, positive, rows_file
from drseg_core.nn.label_propagation import LPOSS_GRAPH, propagation_graph, solve_labels
from drseg_core.testing import dino_like_prior

ALPHA, STEPS = 0.95, 10


def peer_graph(prior: Tensor, width: int) -> Any:
    """``S`` (N, N) of a prior (N, D) as a scipy matrix."""
    faiss: Any = importlib.import_module("faiss")
    sparse: Any = importlib.import_module("scipy.sparse")
    faiss.omp_set_num_threads(torch.get_num_threads())
    count, k = len(prior), LPOSS_GRAPH["k"] + 1
    row = torch.nn.functional.normalize(prior).numpy()
    search = faiss.IndexFlatIP(row.shape[1])
    search.add(row)
    cosine, index = search.search(row, k)
    own = np.arange(count)[:, None]
    away = np.hypot(index // width - own // width, index % width - own % width)
    weight = np.maximum(cosine, 0) ** LPOSS_GRAPH["gamma"] * np.exp(-LPOSS_GRAPH["decay"] * away)
    weight[index == own] = 0
    matrix = sparse.csr_matrix(
        (weight.astype(np.float32).ravel(), index.ravel(), np.arange(0, count * k + 1, k)), shape=(count, count)
    )
    matrix = (matrix + matrix.T).tocsr()
    scale = sparse.diags((1 / np.sqrt(np.asarray(matrix.sum(1)).ravel())).astype(np.float32))
    return (scale @ matrix @ scale).tocsr()


def peer_solve(graph: Any, labels: Tensor) -> Tensor:
    """Labels (N, T) after ten steps for each column."""
    sparse: Any = importlib.import_module("scipy.sparse")
    linalg: Any = importlib.import_module("scipy.sparse.linalg")
    matrix = (sparse.identity(graph.shape[0], dtype=np.float32) - ALPHA * graph).tocsr()
    solved = [linalg.cg(matrix, column, maxiter=STEPS, rtol=1e-6)[0] for column in labels.numpy().T]
    return torch.from_numpy(np.stack(solved, axis=1))


def engine_solve(graph: Any, labels: Tensor) -> Tensor:
    return solve_labels(labels, graph, alpha=ALPHA, scaled=False, max_iterations=STEPS, must_converge=False)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds of the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - clock, time.process_time() - processor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("lposs", __doc__)
    parser.add_argument("--side", type=positive, default=128, help="cells of the grid's side")
    parser.add_argument("--channels", type=positive, default=768, help="of the prior")
    parser.add_argument("--classes", type=positive, default=21)
    parser.add_argument("--rounds", type=positive, default=3, help="measurements of each, in turns")
    parser.add_argument("--threads", type=positive, help="of both sides")
    parser.add_argument("--out", type=rows_file, help="JSON-lines file to add the rows to")
    args = parser.parse_args(arguments)
    missing = [name for name in ("faiss", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"lposs: {missing[0]} is not installed; expected faiss-cpu and scipy (extra bench)", file=sys.stderr)
        return 5
    if args.threads:
        torch.set_num_threads(args.threads)
    random = torch.Generator().manual_seed(0)
    side, grid = args.side, (args.side, args.side)
    prior = dino_like_prior(1, side, side, args.channels, random)[0].contiguous()
    labels = torch.rand(side * side, args.classes, generator=random)
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        results = {}
        for name, graph_of, solve in (
            ("engine", lambda: propagation_graph(prior, grid, **LPOSS_GRAPH), engine_solve),
            ("faiss and scipy", lambda: peer_graph(prior, side), peer_solve),
        ):
            graph, *graph_seconds = timed(graph_of)
            results[name], *solve_seconds = timed(lambda graph=graph, solve=solve: solve(graph, labels))  # type: ignore[misc]
            taken.setdefault(("graph", name), []).append((graph_seconds[0], graph_seconds[1]))
            taken.setdefault(("propagation", name), []).append((solve_seconds[0], solve_seconds[1]))
        one, other = results.values()
        # where two cosines are the same but for their rounding, one side may choose another neighbour
        apart = float((one - other).abs().mean() / other.abs().mean())
        if not apart <= 1e-4:
            print(f"lposs: results differ; expected at most 1e-4 of the mean label, got {apart:.2g}", file=sys.stderr)
            return 1
    for part in ("graph", "propagation"):
        middle = {
            name: [statistics.median(each[n] for each in taken[part, name]) for n in (0, 1)]
            for name in ("engine", "faiss and scipy")
        }
        for name, (clock, processor) in middle.items():
            row = {
                "op": "lposs", "case": f"{side}x{side}", "mode": part, "name": name, "p50_ms": 1000 * clock,
                "processor_p50_ms": 1000 * processor, "ratio_to_engine": clock / middle["engine"][0],
                "processor_ratio_to_engine": processor / middle["engine"][1], "rounds": args.rounds,
                "sizes": {"k": LPOSS_GRAPH["k"] + 1, "channels": args.channels, "classes": args.classes},
                **record.environment("cpu"),
            }  # fmt: skip
            print(
                f"{part:12} {name:16} {clock:8.3f} s, {processor:8.3f} s of the processor; "
                f"{row['ratio_to_engine']:.2f} and {row['processor_ratio_to_engine']:.2f} times the engine's"
            )
            if args.out:
                record.append(args.out, [row])
    return 0
