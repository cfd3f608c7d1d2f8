# SPDX-License-Identifier: Apache-2.0
"""PDGR as the paper writes it beside PDGR on the engine: the same numbers, their time and their memory.

The outputs must agree before a time counts.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from drseg_core.nn import PDGR
from drseg_core.ops import last_backend
from drseg_core.testing import LiteralPDGR, high_water

OPS = ("knn_graph", "edge_weight", "degree_normalize", "edge_coefficient", "graph_propagate", "graph_layer")


def _setup(batch: int, side: int, prior_dim: int, channels: int) -> tuple[PDGR, Tensor, Tensor]:
    torch.manual_seed(0)
    module = PDGR(channels, prior_dim, keep_format=False)
    features = torch.randn(batch, channels, side, side).requires_grad_()
    return module, features, torch.randn(batch, prior_dim, side, side)


def _step(module: nn.Module, features: Tensor, prior: Tensor, backward: bool) -> None:
    if backward:
        module(features, prior).sum().backward()
    else:
        with torch.no_grad():
            module(features, prior)


def _print_peak(variant: str, sizes: tuple[int, int, int, int], backward: bool) -> None:
    """Peak memory of one step above that of the loaded program and its inputs."""
    _step(*_setup(1, 4, *sizes[2:]), backward=True)
    module, features, prior = _setup(*sizes)
    before = high_water()
    _step(module if variant == "engine" else LiteralPDGR(module), features, prior, backward)
    print(high_water() - before)


def _peak_bytes(variant: str, sizes: tuple[int, int, int, int], backward: bool) -> int:
    """The same, in a process of its own: the high-water mark of this one is already up."""
    code = f"from {__name__} import _print_peak; _print_peak({variant!r}, {sizes!r}, {backward})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def compare(
    *, batch: int = 1, side: int = 24, prior_dim: int = 1024, channels: int = 384, repeats: int = 3
) -> list[dict[str, Any]]:
    """Time and memory of both on the CPU, interleaved, at the paper's size for ViT-L.

    Args:
        batch: B. side: h = w. prior_dim: D. channels: C.
        repeats: timed runs of each; the median counts.

    Returns:
        A row for ``forward`` and one for ``forward + backward``: ``literal_ms``, ``engine_ms``, ``speedup``,
        ``literal_mb``, ``engine_mb``, ``max_difference`` and the backends that ran.

    Raises:
        RuntimeError: the two do not agree, so that no time means anything.
    """
    sizes = (batch, side, prior_dim, channels)
    module, features, prior = _setup(*sizes)
    literal = LiteralPDGR(module)
    with torch.no_grad():
        difference = float((module(features, prior) - literal(features, prior)).abs().max())
    if not difference < 1e-3:
        raise RuntimeError(
            f"pdgr_speed: the engine differs from the equations by {difference:.3g}; expected below 1e-3"
        )
    hidden = len(module.edge_vector)
    rows = []
    for backward in (False, True):
        seconds: dict[str, list[float]] = {"literal": [], "engine": []}
        for _ in range(repeats):
            for name, chosen in (("literal", literal), ("engine", module)):
                begin = time.perf_counter()
                _step(chosen, features, prior, backward)
                seconds[name].append(time.perf_counter() - begin)
        median = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {
                "pass": "forward + backward" if backward else "forward",
                "size": f"{batch} x {side}x{side}, D {prior_dim}, E {hidden}, C {channels}, K {module.k}",
                "literal_ms": median["literal"],
                "engine_ms": median["engine"],
                "speedup": median["literal"] / median["engine"],
                "literal_mb": _peak_bytes("literal", sizes, backward) / 2**20,
                "engine_mb": _peak_bytes("engine", sizes, backward) / 2**20,
                "max_difference": difference,
                "backends": {op: ran for op in OPS if (ran := last_backend(op)) is not None},
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    return rows
