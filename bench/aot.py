# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel in every shipped configuration for every GPU in view, without a GPU.

    python -m bench aot              # check against bench/aot_baseline.json
    python -m bench aot --all        # also what is as it was when the baseline was written
    python -m bench aot --update     # write the figures there

A row of the baseline names what it was built from: the kernel's source and all that it calls, its compile-time
arguments, and these checks. Where nothing of that has changed the compiler is not asked again; limits are held all the
same.

Shared memory, registers, stack and spills are read from the compiler and held to each device's limits. None may grow by
more than a tenth over the baseline of the same Triton version. The same holds for the instructions that a program
issues (``issue``, from the machine code and the trips of the kernel's loops at one fixed size). The PTX must keep
float32 products in float32, use no local arrays, fuse nothing and form no address from a 32-bit product.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench import sass
from bench.aot_build import TARGETS, Target, build, ptx_problems
from bench.aot_variants import Variant, variants
from bench.command import command_parser
from bench.work import NOMINAL, work_of

BASELINE = Path(__file__).parent / "aot_baseline.json"
GROWTH = 1.1
REGISTERS_PER_THREAD = 255
REGISTERS_PER_BLOCK = 65_536


def key_of(variant: Variant, target: Target) -> str:
    """Names what a build comes from: as Triton's own cache does, and what reads its figures besides."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas_version

    named = [sorted(given.items()) for given in (variant.types, variant.constants, variant.options)]
    tools = (
        get_ptxas_version(target.arch),
        sorted(get_cache_invalidating_env_vars().items()),
        sass.disassembler() is None,
    )
    work = work_of(variant, NOMINAL)
    given = (variant.kernel.cache_key, named, sorted(variant.even), variant.bounded, target.machine)
    return hashlib.sha256(repr((given, tools, work and work.loops, _checks())).encode()).hexdigest()[:16]


@functools.cache
def _checks() -> str:
    text = b"".join((Path(__file__).parent / name).read_bytes() for name in ("aot_build.py", "sass.py"))
    return hashlib.sha256(text).hexdigest()


def limit_problems(figures: dict[str, int], target: Target, num_warps: int, expected_shared: int) -> list[str]:
    """What a forward kernel takes beyond a device's limits, or beyond what the launcher expects."""
    found = []
    # the hardware hands out registers by the eight
    block = -(-figures["registers"] // 8) * 8 * 32 * num_warps
    for name, value, most in (
        ("shared memory", figures["shared"], target.shared_bytes),
        ("shared memory expected by the launcher", figures["shared"], expected_shared),
        ("registers", figures["registers"], REGISTERS_PER_THREAD),
        ("registers of a block", block, REGISTERS_PER_BLOCK),
        ("spill stores", figures["spill_stores"], 0),
        ("spill loads", figures["spill_loads"], 0),
    ):
        if value > most:
            found.append(f"{name}: expected at most {most}, got {value}")
    return found


def growth_problems(figures: dict[str, int], before: dict[str, int]) -> list[str]:
    return [
        f"{name} grew: expected at most {GROWTH:g} x {before[name]}, got {value}"
        for name, value in figures.items()
        # a baseline without the figure has nothing to hold it to
        if value > GROWTH * before.get(name, value)
    ]


def baseline_problems(figures: dict[str, int], before: dict[str, int] | None) -> list[str]:
    """What is beyond the baseline's row, which every kernel has."""
    if before is None:
        return ["not in the baseline; expected a row, got none: run python -m bench aot --update"]
    found = growth_problems(figures, before)
    if "issue" in before and "issue" not in figures and sass.disassembler() is not None:
        found.append("issue is not known: expected the kernel's loops in bench/work.py, got none")
    return found


@functools.cache
def _variants(arch: int) -> dict[str, Variant]:
    target = next(target for target in TARGETS if target.arch == arch)
    return {variant.name: variant for variant in variants(target)}


def _found(arch: int, name: str) -> tuple[Variant, Target]:
    return _variants(arch)[name], next(target for target in TARGETS if target.arch == arch)


def report(arch: int, name: str) -> tuple[dict[str, int], list[str], float]:
    """Figures of a variant, what is wrong in its PTX, and the seconds that it took."""
    begin = time.perf_counter()
    variant, target = _found(arch, name)
    ptx, figures = build(variant, target)
    problems = ptx_problems(ptx, variant.options["enable_fp_fusion"], variant.bounded)
    return figures, problems, time.perf_counter() - begin


def _reports(asked: Sequence[tuple[int, str]], stack: contextlib.ExitStack) -> Iterator[Any]:
    """``report`` of each, in order. Triton compiles in Python, one kernel at a time: of many, a process per core."""
    workers = min(os.cpu_count() or 1, len(asked) // 8)
    if workers < 2:
        return (report(*one) for one in asked)
    pool = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")))
    return pool.map(report, *zip(*asked, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("aot", __doc__)
    parser.add_argument("--update", action="store_true", help="write the figures to the baseline")
    parser.add_argument("--all", action="store_true", help="build what has not changed, too")
    parser.add_argument("--arch", type=int, action="append", choices=[target.arch for target in TARGETS])
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name has this in it")
    args = parser.parse_args(arguments)
    archs = [target.arch for target in TARGETS if not args.arch or target.arch in args.arch]
    asked = {f"sm_{arch} {name}": (arch, name) for arch in archs for name in _variants(arch) if args.only in name}
    if not asked:
        # a name begins with the kernel's, and goes on with its options
        kernels = dict.fromkeys(name.partition("=")[0].rpartition(" ")[0] for name in _variants(archs[0]))
        parser.error(f"--only {args.only} names no kernel; expected part of one of {', '.join(kernels)}")
    import triton

    baseline = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    before: dict[str, dict[str, Any]] = baseline.get(triton.__version__, {})
    if not before and not args.update:
        print(f"aot: the baseline has no figures of Triton {triton.__version__}: limits only")
    if sass.disassembler() is None:
        print("aot: Triton has no nvdisasm here: issued instructions are not counted")
    keys = {row: key_of(*_found(*one)) for row, one in asked.items()}
    figures_of = {row: {**known} for row, known in before.items()}
    old = {row for row, known in figures_of.items() if known.pop("key", "") == keys.get(row) and not args.all}
    rows: dict[str, dict[str, Any]] = {}
    failed = 0
    with contextlib.ExitStack() as stack:
        built = iter(_reports([one for row, one in asked.items() if row not in old], stack))
        for row, one in asked.items():
            variant, target = _found(*one)
            figures, problems, seconds = (figures_of[row], [], 0.0) if row in old else next(built)
            problems += limit_problems(figures, target, variant.options["num_warps"], variant.shared_bytes)
            if before and not args.update:
                problems += baseline_problems(figures, figures_of.get(row))
            rows[row] = {"key": keys[row], **figures}
            if row not in old or problems:
                words = " ".join(f"{name}={value}" for name, value in figures.items())
                print(f"{row}: {words} ({seconds:.1f} s)", flush=True)
            for problem in problems:
                print(f"  FAILED {problem}", flush=True)
            failed += bool(problems)
    if args.update and rows and not failed:
        # what was not asked for now
        kept = {
            row: known
            for row, known in before.items()
            if args.only not in row.partition(" ")[2] or int(row[3:].split()[0]) not in archs
        }
        baseline[triton.__version__] = dict(sorted({**kept, **rows}.items()))
        BASELINE.write_text(json.dumps(baseline, indent=1) + "\n", encoding="utf-8")
    unchanged = f", {len(old)} as in the baseline" if old else ""
    print(f"aot: {len(rows) - len(old)} kernels built with Triton {triton.__version__}{unchanged}, {failed} failed")
    return 1 if failed or not rows else 0
