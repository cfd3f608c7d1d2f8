# SPDX-License-Identifier: Apache-2.0
"""Times candidate launch configurations on a CUDA device and writes the fastest into its architecture's tables.

    python -m bench tune --op knn_graph --case grid_64x64        # one op at one size; both may be repeated
    python -m bench tune --dry-run --target 120                  # what would be timed, without a GPU

Two kinds of candidates are timed: the rule's own choice, and the five that ``rank.py`` predicts to be fastest
(``--candidates N``, ``--all``). Of all candidates timed on an H100, the best of these five took 1.00 times the fastest.

The tables are ``kernels/drseg_kernels/tuned/<architecture>/<table>.json``, read by ``drseg_kernels._launch``. Entries
of another device, dtype, width or size stay. A candidate must fit the device's shared memory and agree with the
reference before it is timed. All that pass are timed in turns, as CUDA graphs if they can be captured, and the lowest
median is kept. Exit codes: 0, 1 (no candidate passed), 2 (usage), 5 (no CUDA device).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from drseg_kernels import _launch
from drseg_kernels._launch import Device

from bench import sass
from bench.aot_build import TARGETS, Target
from bench.command import command_parser, positive
from bench.rank import Predictor
from bench.tables import write_entry
from bench.timing import Contender, interleave
from bench.tune_candidates import DEFAULT_CASES, TABLES, candidates, decides, width_of
from drseg_core.testing import CASES, Case

NO_DEVICE = 5

Sample = Callable[[Sequence[Contender]], list[list[float]]]


def median_seconds(contenders: Sequence[Contender]) -> list[list[float]]:
    return interleave(contenders, "cuda", beside=False)


def _refusals() -> tuple[type[Exception], ...]:
    """What a candidate may fail with: the compiler and the driver refuse in ways of their own."""
    from triton.errors import TritonError

    return RuntimeError, ValueError, TritonError


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def fastest(
    run: Callable[[Any], object],
    wrong: Callable[[object], str | None],
    options: Sequence[Any],
    repeats: int,
    sample: Sample = median_seconds,
    say: Callable[[str], None] = print,
) -> tuple[Any, float] | None:
    """The candidate with the lowest median and its seconds; None where none passed the gate.

    Args:
        run: one call with a candidate. wrong: why its result must not be timed, None where it is right.
        options: candidates. repeats: timed calls of each. sample: seconds of every call of every contender.
        say: told of each refused candidate and each median.
    """
    contenders, kept = [], []
    for option in options:
        try:
            problem = wrong(run(option))
        # one refusal must not end the tuning
        except _refusals() as error:
            problem = _line(error)
        if problem is not None:
            say(f"  refused {option}: {problem}")
            continue
        contenders.append(Contender(str(option), partial(run, option), repeats, {}))
        kept.append(option)
    if not kept:
        return None
    medians = [statistics.median(seconds) for seconds in sample(contenders)]
    for option, median in zip(kept, medians, strict=True):
        say(f"  {1e6 * median:.1f} us {option}")
    best = min(range(len(kept)), key=lambda n: medians[n])
    return kept[best], medians[best]


def target_of(device: Device, arch: int, processors: int) -> Target:
    """What the predictions need of a device: the nearest of those in view with what is known of this one.

    Args:
        device: as the launchers see it. arch: compute capability, ten times the major number and the minor one.
        processors: of the device.
    """
    nearest = [target for target in TARGETS if target.arch <= arch][-1:] or TARGETS[:1]
    return dataclasses.replace(
        nearest[0],
        arch=arch,
        name=device.name,
        l2_bytes=device.l2_bytes,
        shared_bytes=device.shared_bytes,
        processors=processors,
    )


def selected(options: Sequence[Any], ranked: Sequence[Any], count: int) -> list[Any]:
    """What is timed: the rule's own choice, which is the first of ``options``, and the first ``count`` others of
    ``ranked``."""
    return [options[0], *[option for option in ranked if option != options[0]][:count]]


def tune(
    table: str,
    case: Case,
    dtype: str,
    device: Device,
    repeats: int,
    tuned: Path,
    predictor: Predictor | None = None,
    count: int = 0,
) -> str | None:
    """Time a table's candidates at a case and write the best; one line on what went wrong, or None.

    Args:
        table: of ``TABLES``. case: the size. dtype: of the features. device: the launchers' view of it.
        repeats: timed calls of each. tuned: folder of the tables.
        predictor: with one, only the rule's choice and the ``count`` that it puts first are timed.
    """
    import torch
    import triton

    from bench.tune_runs import make

    run, wrong = make(table, case, getattr(torch, dtype), "cuda")
    options = candidates(table, device, case)
    known = len(options)
    if predictor is not None:
        try:
            ranked = predictor.rank(table, case, options, dtype)
            options = selected(options, [found.sizes for found in ranked], count)
        except _refusals() as error:
            print(f"{table} {case.name}: nothing is predicted, so all candidates are timed: {_line(error)}")
    of = f" of {known}" if len(options) < known else ""
    print(f"{table} {case.name} {dtype}: {len(options)} candidates{of}", flush=True)
    found = fastest(run, wrong, options, repeats)
    if found is None:
        return f"{table} {case.name}: no candidate passed the gate"
    chosen, seconds = found
    key = {"dtype": dtype, "channels": width_of(table, case), "nodes": case.nodes, "k": case.neighbours}
    notes = {"case": case.name, "seconds": seconds, "torch": torch.__version__, "triton": triton.__version__}
    write_entry(tuned / device.arch / f"{table}.json", key | {"device": device.name}, chosen, **notes)
    print(f"{table} {case.name}: {1e6 * seconds:.1f} us {chosen}", flush=True)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("tune", __doc__)
    parser.add_argument("--op", action="append", choices=sorted(TABLES), help="all by default")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="the large ones")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=positive, default=30, help="timed calls of each candidate")
    parser.add_argument(
        "--candidates", type=int, default=5, metavar="N", help="time so many beside the rule's, by prediction"
    )
    parser.add_argument("--all", action="store_true", help="time every candidate")
    parser.add_argument("--out", type=Path, default=_launch.TUNED, help="folder of the tables")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates, time nothing")
    parser.add_argument("--target", type=int, default=120, choices=[target.arch for target in TARGETS])
    args = parser.parse_args(arguments)
    import torch

    if args.repeats < 1:
        parser.error(f"--repeats is out of range; expected >= 1, got {args.repeats}")
    if args.candidates < 0:
        parser.error(f"--candidates is out of range; expected >= 0, got {args.candidates}")
    present = torch.cuda.is_available()
    if not present and not args.dry_run:
        print("tune: no CUDA device to time on; expected one, got a torch without (--dry-run lists the candidates)")
        return NO_DEVICE
    if present:
        device = _launch.device_of(torch.device("cuda"))
        major, minor = torch.cuda.get_device_capability()
        processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        target = target_of(device, 10 * major + minor, processors)
    else:
        target = next(target for target in TARGETS if target.arch == args.target)
        device = target.device
    predictor = None
    if not args.dry_run and not args.all:
        if sass.disassembler() is None:
            print("tune: Triton has no nvdisasm here, so nothing is predicted: all candidates are timed")
        else:
            predictor = Predictor(target)
    failed = 0
    for op in args.op or sorted(TABLES):
        for case in (case for case in CASES if case.name in (args.case or DEFAULT_CASES)):
            for table in (table for table in TABLES[op] if decides(table, case)):
                if args.dry_run:
                    for option in candidates(table, device, case):
                        print(f"{device.name} {table} {case.name}: {option}")
                else:
                    problem = tune(table, case, args.dtype, device, args.repeats, args.out, predictor, args.candidates)
                    if problem is not None:
                        print(f"tune: {problem}", flush=True)
                    failed += problem is not None
    return 1 if failed else 0


__all__ = ["TABLES", "candidates", "fastest", "main"]
