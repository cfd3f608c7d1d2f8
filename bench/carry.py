# SPDX-License-Identifier: Apache-2.0
"""Compiles what PDGR launches on a GPU into a folder, without the GPU: a machine that is lent need not compile it.

    python -m bench carry build/carried --arch 90                      steps of PDGR, every precision
    python -m bench carry build/carried --arch 90 --tune 5             and the first five candidates of every table
    TRITON_CACHE_DIR=build/carried python -m bench profile             there

The folder is Triton's own cache. Its names are made of the kernel's source, its arguments' types and Triton itself. So
it must be filled for the versions of Triton and Python that will read it (``carried.json`` says which). Kernels of
other versions lie there unused. The launchers run on CPU tensors with the sizes of the device. Kernels are compiled and
not called, and results are ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from bench.aot_build import TARGETS, Target
from bench.command import command_parser
from bench.stub import card

NOTE = "carried.json"
DEFAULT_CASES = ("paper_vitl_24x24_e256", "grid_64x64_e256")


@contextlib.contextmanager
def compiling(target: Target) -> Iterator[None]:
    """Within the block launchers take CPU tensors as if they lay on ``target``, and kernels are compiled only."""
    from drseg_kernels import knn_graph, knn_rounded
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *given, grid=grid, warmup=True, **options)

    with (
        card(target),
        mock.patch.object(JITFunction, "run", compile_only),
        # the library's products are not looked at either
        mock.patch.object(knn_graph, "multiply", lambda left, right, out: None),
        mock.patch.object(knn_rounded, "multiply", lambda left, right, out: None),
    ):
        yield


def step_of(case: Any, mode: str, dtype: str) -> None:
    """Compile a step of PDGR."""
    from bench import whole_pdgr
    from drseg_core.ops import use_backend

    problem = whole_pdgr.make(case, "random", dtype=dtype)
    with use_backend("triton"):
        whole_pdgr.step(problem.engine, problem, mode == "fwd+bwd")


def candidates_of(case: Any, dtype: str, target: Target, most: int) -> None:
    """Compile the tuner's first candidates of every table."""
    import torch

    from bench.tune_candidates import TABLES, candidates, decides
    from bench.tune_runs import make

    for table in (table for table in sum(TABLES.values(), ()) if decides(table, case)):
        run, _ = make(table, case, getattr(torch, dtype), "cpu")
        for option in candidates(table, target.device, case)[:most]:
            run(option)


def count(folder: Path) -> int:
    return len(list(folder.glob("*/*.cubin")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("carry", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, default=90, choices=[target.arch for target in TARGETS])
    parser.add_argument("--case", action="append", metavar="NAME", help=f"{', '.join(DEFAULT_CASES)} by default")
    parser.add_argument("--dtype", action="append", help="as of python -m bench run --op pdgr; all by default")
    parser.add_argument("--tune", type=int, default=0, metavar="N", help="the first candidates of every table, too")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set; expected a Triton that compiles")
    # before Triton is imported
    os.environ["TRITON_CACHE_DIR"] = str(args.folder.resolve())
    import triton

    from bench import jobs
    from bench.precision import PRECISIONS

    unknown = sorted({*(args.case or ())} - {*jobs.CASES}) + sorted({*(args.dtype or ())} - {*PRECISIONS})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; python -m bench run --list has them")
    target = next(target for target in TARGETS if target.arch == args.arch)
    before = count(args.folder)
    with compiling(target):
        for case in (jobs.CASES[name] for name in args.case or DEFAULT_CASES):
            for dtype in args.dtype or PRECISIONS:
                for mode in jobs.MODES:
                    step_of(case, mode, dtype)
                print(f"sm_{args.arch} {case.name} {dtype}: {count(args.folder)} kernels", flush=True)
            for dtype in ("float32", "bfloat16") if args.tune else ():
                candidates_of(case, dtype, target, args.tune)
                print(f"sm_{args.arch} {case.name} candidates {dtype}: {count(args.folder)} kernels", flush=True)
    note = {"triton": triton.__version__, "python": platform.python_version(), "arch": args.arch}
    (args.folder / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"carry: {count(args.folder) - before} kernels compiled, {count(args.folder)} there, {size / 2**20:.1f} MiB")
    return 0
