# SPDX-License-Identifier: Apache-2.0
"""PDGR as the paper writes it beside PDGR on the engine: the same numbers, their time and their memory.

``LiteralPDGR`` is Eq. 7-9 in plain PyTorch: the N x N affinity, the concatenation of every edge, and ``index_add``.
It is the baseline of every speed figure, and its outputs must agree with the engine's before a time counts.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drseg_core.nn import PDGR
from drseg_core.ops import last_backend

OPS = ("knn_graph", "edge_weight", "degree_normalize", "edge_coefficient", "graph_propagate", "graph_layer")


class LiteralPDGR(nn.Module):
    """The default options of :class:`drseg_core.nn.PDGR` with nothing factored; shares the weights of ``engine``.

    Args:
        engine: the module whose parameters are used.
    """

    def __init__(self, engine: PDGR) -> None:
        super().__init__()
        if (engine.affinity, engine.self_loop, engine.norm) != ("exp", "in_topk", "sym_row"):
            raise ValueError("LiteralPDGR: engine has other options; expected the defaults of Eq. 7 and 9")
        self.engine = engine

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """(B, C, h, w) and (B, D, h, w) to (B, C, h, w)."""
        m = self.engine
        batch, _, h, w = features.shape
        nodes = h * w
        k = min(m.k, nodes)
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
                [torch.zeros_like(x[b]).index_add(0, target, message[b].flatten(0, 1)) for b in range(batch)]
            )
            if m.biases is not None:
                x = x + m.biases[layer]
            if layer < len(m.weights) - 1:
                x = x.relu()
        return m.output_norm(x).transpose(1, 2).unflatten(2, (h, w))


def _setup(batch: int, side: int, prior_dim: int, channels: int) -> tuple[PDGR, Tensor, Tensor]:
    torch.manual_seed(0)
    module = PDGR(channels, prior_dim)
    features = torch.randn(batch, channels, side, side).requires_grad_()
    return module, features, torch.randn(batch, prior_dim, side, side)


def _step(module: nn.Module, features: Tensor, prior: Tensor, backward: bool) -> None:
    if backward:
        module(features, prior).sum().backward()
    else:
        with torch.no_grad():
            module(features, prior)


def _high_water() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent process held when it started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _print_peak(variant: str, sizes: tuple[int, int, int, int], backward: bool) -> None:
    """Peak memory of one step above that of the loaded program and its inputs."""
    _step(*_setup(1, 4, *sizes[2:]), backward=True)
    module, features, prior = _setup(*sizes)
    before = _high_water()
    _step(module if variant == "engine" else LiteralPDGR(module), features, prior, backward)
    print(_high_water() - before)


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
                "size": f"{batch} x {side}x{side}, D {prior_dim}, C {channels}, K {module.k}",
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
