# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step of PDGR goes: microseconds of every kernel, beside what bytes and operations allow.

    python -m bench profile                                     two cases, both modes, every precision
    python -m bench profile --case grid_64x64_e256 --mode fwd --dtype bfloat16 --out profile.jsonl

The steps are launched one by one under ``torch.profiler``, with a warm cache; times of the same step without the
profiler, as ``python -m bench run`` takes them, stand above. On a CPU there are no kernels: the operators that torch
knows are listed, each without those that it calls. The last table is the least that the parts take at the rates of
this machine's library product and copy (``counts.py``): a kernel may do more than one of them, or part of one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import counts, jobs, record, whole_pdgr
from bench.command import command_parser, positive, rows_file
from bench.contenders import pdgr_products
from bench.one_op import sizes_of
from bench.precision import PRECISIONS
from bench.timing import Contender, interleave
from drseg_core.testing import Case

DEFAULT_CASES = ("paper_vitl_24x24_e256", "grid_64x64_e256")


@dataclass(frozen=True)
class Kernel:
    """A kernel's part of a step: how often it runs, its microseconds, and their share of all kernels'."""

    name: str
    calls: float
    us: float
    share: float


@dataclass(frozen=True)
class Part:
    """What a part of a step has to do, and the microseconds that it takes at best."""

    name: str
    flop: int
    byte: int
    least_us: float


def kernels_of(run: Callable[[], object], device: str, steps: int) -> list[Kernel]:
    """The kernels of one call, on a CPU the operators; the longest first."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    # the first use sets the profiler up
    for count in (1, steps):
        with profile(activities=activities) as taken:
            for _ in range(count):
                run()
            if on_gpu:
                torch.cuda.synchronize()
    found = []
    for event in taken.key_averages():
        if on_gpu == (event.device_type == DeviceType.CUDA):
            us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found.append((str(event.key), event.count / steps, us / steps))
    # what the profiler does for itself
    found = [row for row in found if row[2] > 0 and not row[0].startswith(("ProfilerStep", "Activity Buffer"))]
    whole = sum(us for _, _, us in found)
    return [Kernel(*row, row[2] / whole) for row in sorted(found, key=lambda row: -row[2])]


def parts_of(case: Case, mode: str, dtype: str, gemm: float, copy: float) -> list[Part]:
    """The products and the ops of a step, and the step itself: what each takes at these rates (FLOP/s, bytes/s)."""
    kinds, amounts = PRECISIONS[dtype], []
    for p in pdgr_products(case, mode == "fwd+bwd"):
        numbers = p.batch * (p.rows * p.inner + p.inner * p.columns + p.rows * p.columns)
        amounts.append((f"product: {p.name}", counts.Work(p.flops, numbers * kinds.products.itemsize)))
    for op in ("edge_coefficient", "graph_layer", "graph_layer"):
        amounts.append((op, counts.work(op, case, mode, kinds.products.itemsize)))
    amounts.append(("the whole step", counts.work("pdgr", case, mode, kinds.maps.itemsize)))
    return [Part(name, work.flop, work.byte, 1e6 * work.seconds(gemm, copy)) for name, work in amounts]


def measure(
    case: Case, data: str, mode: str, dtype: str, device: str, steps: int
) -> tuple[dict[str, Any] | None, str | None]:
    """The profile of a step, or why there is none."""
    run, wrong, backends = whole_pdgr.engine(case, data, mode, device, dtype)
    if wrong is not None:
        return None, wrong
    contender = Contender("engine", run, steps, {})
    common = {"op": "pdgr", "case": case.name, "sizes": sizes_of(case), "mode": mode, "dtype": dtype, "data": data}
    (row,) = record.rows_of([contender], interleave([contender], device), common, case, device)
    ceiling = row["ceiling"]
    kernels = kernels_of(run, device, steps)
    parts = parts_of(case, mode, dtype, 1e9 * ceiling["gflops"], 1e9 * ceiling["copy_gbs"])
    row |= {
        "backends": backends,
        "kernels_us": sum(kernel.us for kernel in kernels),
        "launches": sum(kernel.calls for kernel in kernels),
        "kernels": [asdict(kernel) for kernel in kernels],
        "parts": [asdict(part) for part in parts],
    }
    return row, None


def text_of(row: dict[str, Any], most: int) -> str:
    """A profile for a reader, the ``most`` longest kernels of it."""
    names = {"p50_ms": "a step", "warm_p50_ms": "warm", "eager_p50_ms": "eager", "host_p50_ms": "host"}
    times = [f"{name} {row[key]:.3f} ms" for key, name in names.items() if key in row]
    lines = [f"{row['case']} {row['mode']} {row['dtype']} on {row['device']}: {', '.join(times)}"]
    lines += [f"{'us':>10} {'share':>6} {'calls':>6}  kernel"]
    for one in row["kernels"][:most]:
        lines.append(f"{one['us']:10.1f} {100 * one['share']:5.1f}% {one['calls']:6.1f}  {one['name'][:100]}")
    lines.append(f"{row['kernels_us']:10.1f} {'':6} {row['launches']:6.1f}  all {len(row['kernels'])}")
    lines.append(f"{'least us':>10} {'MFLOP':>9} {'MB':>8}  part")
    for part in row["parts"]:
        lines.append(f"{part['least_us']:10.1f} {part['flop'] / 1e6:9.0f} {part['byte'] / 1e6:8.1f}  {part['name']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("profile", __doc__)
    parser.add_argument("--case", action="append", choices=tuple(jobs.CASES), metavar="NAME", help="a named case")
    parser.add_argument("--mode", action="append", choices=jobs.MODES, help="both by default")
    parser.add_argument("--dtype", action="append", choices=tuple(PRECISIONS), help="all by default")
    parser.add_argument("--data", default="dino", choices=whole_pdgr.DATA, help="the prior")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=positive, default=10, help="that are profiled")
    parser.add_argument("--most", type=positive, default=40, help="kernels that are printed; the file has all")
    parser.add_argument("--out", type=rows_file, help="JSON-lines file to add the profiles to")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps is out of range; expected >= 1, got {args.steps}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("profile: --device cuda cannot be used; expected a CUDA device, got a torch without", file=sys.stderr)
        return 5
    failed = False
    for case in args.case or DEFAULT_CASES:
        for dtype in args.dtype or PRECISIONS:
            for mode in args.mode or jobs.MODES:
                row, wrong = measure(jobs.CASES[case], args.data, mode, dtype, args.device, args.steps)
                if row is None:
                    print(f"profile: {case} {mode} {dtype}: refused: {wrong}", file=sys.stderr)
                    failed = True
                    continue
                print(text_of(row, args.most), end="\n\n", flush=True)
                if args.out:
                    record.append(args.out, [row])
    return int(failed)
