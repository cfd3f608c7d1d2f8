# SPDX-License-Identifier: Apache-2.0
"""What a card does with the pieces that PDGR is made of, or could be: rates to plan kernels by.

    python -m bench probe --out probe.jsonl
    python -m bench probe --device cpu --only product           # tiny sizes: shows that it runs

Products of the library in three dtypes, linear maps by float16 parts, layers by gathered rows and by a dense matrix, a
sort, copies, a gather, a scatter, and a chain of kernels that do nothing. On a GPU each is a CUDA graph. It is timed
with a cold cache (read over), with a warm one, and with one that was written over, which shows the cost of dirty lines.
``amount`` is the FLOP of a product, and the bytes moved by everything else. A chain has none. Its time per kernel is
the gap between two nodes of a graph.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import record
from bench.command import command_parser, positive, rows_file
from bench.timing import GraphSampler, gpu_state, seconds_of, settle_clocks
from drseg_core.ops import csc, graph_layer, linear_map, prepare_prior
from drseg_core.testing import Case

# sizes of the paper's batch, and what a CPU goes through in no time
SIZES = {
    "cuda": Case("probe", 8, 24, 24, prior=1024, hidden=256, channels=384, neighbours=75),
    "cpu": Case("probe_tiny", 2, 4, 4, prior=32, hidden=16, channels=24, neighbours=5),
}
_CHAIN = (64, 128)


@dataclass(frozen=True)
class Probe:
    """Something to time.

    Args:
        name: what it is, its kind first. run: one call. dtype: of what it reads. amount: FLOP, or bytes.
        shape: of the operands, for a reader.
    """

    name: str
    run: Callable[[], object]
    dtype: torch.dtype
    amount: int
    shape: str


def _random(*shape: int, like: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(like)


def _products(case: Case, device: str) -> Iterator[Probe]:
    """The scores, the projections, the layers, and a layer as a product with a dense matrix of coefficients."""
    rows = case.batch * case.nodes
    shapes = {
        "scores": (case.batch, case.nodes, case.prior, case.nodes),
        "scores in three parts": (case.batch, case.nodes, 3 * case.prior, case.nodes),
        "projection": (1, rows, case.prior, case.hidden),
        "both projections": (1, rows, case.prior, 2 * case.hidden),
        "projections in three parts": (1, rows, 3 * case.prior, 2 * case.hidden),
        "layer": (1, rows, case.channels, case.channels),
        "layer weights": (1, case.channels, rows, case.channels),
        "dense aggregation": (case.batch, case.nodes, case.nodes, case.channels),
    }
    for name, (batch, m, k, n) in shapes.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            lead = (batch,) if batch > 1 else ()
            left = _random(*lead, m, k, like=dtype, device=device)
            right = _random(*lead, n, k, like=dtype, device=device).mT
            shape, flop = f"{batch}x{m}x{k}x{n}", 2 * batch * m * k * n
            out = torch.empty(*lead, m, n, dtype=dtype, device=device)
            yield Probe(f"product: {name}", partial(torch.matmul, left, right, out=out), dtype, flop, shape)
            # the CPU has no product that widens
            if device == "cuda" and dtype != torch.float32:
                wide, multiply = torch.empty_like(out, dtype=torch.float32), torch.bmm if lead else torch.mm
                run: Any = partial(multiply, left, right, out_dtype=torch.float32, out=wide)
                yield Probe(f"product to float32: {name}", run, dtype, flop, shape)


@contextlib.contextmanager
def _rounded() -> Iterator[None]:
    """Within the block the library may multiply float32 as TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _maps(case: Case, device: str) -> Iterator[Probe]:
    """Linear maps by float16 parts, forward and both gradients, and the library's as TF32.

    Those in float32 and in float16 are among the products.
    """
    dtype, backend = torch.float32, "triton" if device == "cuda" else "reference"
    for name, channels, width in (
        ("both projections", case.prior, 2 * case.hidden),
        ("layer", case.channels, case.channels),
    ):
        x = _random(case.batch, case.nodes, channels, like=dtype, device=device)
        grad = _random(case.batch, case.nodes, width, like=dtype, device=device)
        weight = _random(width, channels, like=dtype, device=device)
        rows = case.batch * case.nodes
        shape, flop = f"1x{rows}x{channels}x{width}", 2 * rows * channels * width
        as_map = x.mT.contiguous().mT
        yield Probe(f"linear_map: {name}", partial(linear_map, x, weight, backend=backend), dtype, flop, shape)
        yield Probe(
            f"linear_map: {name}, a map", partial(linear_map, as_map, weight, backend=backend), dtype, flop, shape
        )
        for of, mask in (("features", [True, False]), ("weight", [False, True])):
            back = partial(torch.ops.drseg.linear_map_backward, grad, x, weight, mask, backend)
            yield Probe(f"linear_map: {name}, to the {of}", back, dtype, flop, shape)

        def rounded(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            with _rounded():
                return F.linear(x, weight)

        yield Probe(f"product as TF32: {name}", rounded, dtype, flop, shape)


def _layers(case: Case, device: str) -> Iterator[Probe]:
    """A layer by gathered rows and by a dense matrix; the bytes are those that are gathered."""
    edges = case.batch * case.nodes * case.neighbours
    random = torch.rand(case.batch, case.nodes, case.nodes, device=device)
    index = random.topk(case.neighbours).indices.sort().values.int()
    coefficient = torch.rand(index.shape, device=device) / case.neighbours
    one = torch.ones(case.channels, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        x = _random(case.batch, case.nodes, case.channels, like=dtype, device=device)
        for activation, parameters in (("relu", (one, None, None)), ("layer_norm", (one, one, one))):
            given: tuple[Any, ...] = (x, index, coefficient, *parameters)
            moved = edges * case.channels * x.element_size()
            for way in ("gathered", "dense"):
                # a CPU has neither, and runs the same twice
                run: Any = partial(graph_layer, *given, activation=activation, backend="reference")
                if device == "cuda":
                    from drseg_kernels.graph_layer import graph_layer as launch

                    kernel: Any = launch
                    run = partial(kernel, *given, activation, 1e-5, False, False, dense=way == "dense")
                yield Probe(f"graph_layer: {activation}, {way}", run, dtype, moved, f"{edges} rows")


def _moves(case: Case, device: str) -> Iterator[Probe]:
    rows, edges = case.batch * case.nodes, case.batch * case.nodes * case.neighbours
    near = torch.randint(0, case.nodes, (case.batch, case.nodes, case.neighbours), device=device)
    first = torch.arange(case.batch, device=device)[:, None, None] * case.nodes
    index = (near + first).view(rows, case.neighbours)
    for dtype in (torch.float32, torch.bfloat16):
        maps = _random(case.batch, case.prior, case.nodes, like=dtype, device=device)
        same, turned = torch.empty_like(maps), torch.empty_like(maps.mT, memory_format=torch.contiguous_format)
        shape, moved = f"{case.batch}x{case.prior}x{case.nodes}", 2 * maps.nbytes
        yield Probe("copy", partial(same.copy_, maps), dtype, moved, shape)
        yield Probe("copy: transposing", partial(turned.copy_, maps.mT), dtype, moved, shape)
        # what both kernels of ours read and write is the map
        yield Probe("prepare_prior: of a map", partial(prepare_prior, maps.mT), dtype, moved, shape)
        yield Probe("prepare_prior: of rows", partial(prepare_prior, turned), dtype, moved, shape)
        x, weight = (_random(*s, like=dtype, device=device) for s in ((rows, case.channels), index.shape))
        gather = partial(F.embedding_bag, index, x, mode="sum", per_sample_weights=weight)
        yield Probe("gather and sum", gather, dtype, edges * case.channels * x.element_size(), f"{edges} rows")
        # gradients of a propagation: by one gather, and by one for each
        grad, features = (_random(*near.shape[:2], case.channels, like=dtype, device=device) for _ in range(2))
        given = (grad, features, near.int(), weight.view(near.shape).float(), False)
        columns, both = csc(near.int()), 2 * edges * case.channels * x.element_size()

        def gradients(*masks: list[bool], given: Any = given, columns: Any = columns) -> None:
            for mask in masks:
                torch.ops.drseg.graph_propagate_backward(*given, mask, *columns, "auto")

        yield Probe("gradients: in one", partial(gradients, [True, True]), dtype, both // 2, f"{edges} rows")
        apart = partial(gradients, [True, False], [False, True])
        yield Probe("gradients: one by one", apart, dtype, both, f"{edges} rows")
        dense = torch.zeros(case.batch, case.nodes, case.nodes, dtype=dtype, device=device)
        scatter = partial(dense.scatter_, 2, near, weight.view(near.shape))
        yield Probe("scatter to dense", scatter, dtype, edges * (8 + 2 * x.element_size()), f"{edges} edges")
    for dtype in (torch.int32, torch.int64):
        ends = index.flatten().to(dtype)
        sort = partial(torch.sort, ends, stable=True)
        # in the place of which there is a kernel that counts
        yield Probe("csc", partial(csc, near.to(dtype)), dtype, edges * (ends.element_size() + 4), f"{edges} edges")
        yield Probe("sort", sort, dtype, edges * (2 * ends.element_size() + 8), f"{edges} keys")


def _chains(device: str) -> Iterator[Probe]:
    one = torch.zeros(1, device=device)

    def chain(length: int) -> None:
        for _ in range(length):
            one.add_(1)

    for length in _CHAIN:
        yield Probe("chain", partial(chain, length), one.dtype, 0, f"{length} kernels")


def probes(device: str) -> Iterator[Probe]:
    case = SIZES[device]
    yield from _products(case, device)
    yield from _maps(case, device)
    yield from _layers(case, device)
    yield from _moves(case, device)
    yield from _chains(device)


def measure(probe: Probe, device: str, repeats: int) -> dict[str, Any]:
    """Medians in microseconds, and the rate that the cold one is."""
    samples: dict[str, Callable[[], float]] = {"cold": lambda: seconds_of(probe.run, device)}
    row: dict[str, Any] = {"probe": probe.name, "dtype": str(probe.dtype)[6:], "shape": probe.shape}
    if device == "cuda":
        sampler = GraphSampler(probe.run)

        def written() -> float:
            sampler.flush.zero_()
            return sampler.warm()

        samples = {"cold": sampler, "warm": sampler.warm, "written": written}
        row["cuda_graph"] = sampler.captured
    taken: dict[str, list[float]] = {name: [] for name in samples}
    for _ in range(repeats):
        for name, sample in samples.items():
            taken[name].append(sample())
    row |= {f"{name}_us": 1e6 * statistics.median(seconds) for name, seconds in taken.items()}
    return row | {"amount": probe.amount, "per_second": 1e6 * probe.amount / row["cold_us"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("probe", __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", metavar="TEXT", help="probes whose name has this in it")
    parser.add_argument("--repeats", type=positive, default=11, help="timed calls of each")
    parser.add_argument("--out", type=rows_file, help="JSON-lines file to add the rows to")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats is out of range; expected >= 1, got {args.repeats}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("probe: --device cuda cannot be used; expected a CUDA device, got a torch without", file=sys.stderr)
        return 5
    if args.device == "cuda":
        square = torch.randn(4096, 4096, device="cuda")
        settle_clocks(lambda: square @ square)
    place, chains = record.environment(args.device), []
    for probe in probes(args.device):
        if args.only not in probe.name:
            continue
        try:
            row = measure(probe, args.device, args.repeats)
        except (RuntimeError, TypeError) as error:
            # what this torch or this card does not have
            print(f"{probe.name} {str(probe.dtype)[6:]}: left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        times = " ".join(f"{name[:-3]} {row[name]:.1f}" for name in ("cold_us", "warm_us", "written_us") if name in row)
        rate = f" us, {row['per_second'] / 1e9:.0f} G/s" if probe.amount else " us"
        print(f"{probe.name} {row['dtype']} {probe.shape}: {times}{rate}", flush=True)
        chains += [row] if probe.name == "chain" else []
        if args.out:
            record.append(args.out, [row | place | ({"gpu": gpu_state()} if args.device == "cuda" else {})])
    if len(chains) == len(_CHAIN):
        gap = (chains[1]["cold_us"] - chains[0]["cold_us"]) / (_CHAIN[1] - _CHAIN[0])
        print(f"chain: {gap:.2f} us per kernel")
    return 0
