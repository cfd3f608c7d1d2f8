# SPDX-License-Identifier: Apache-2.0
"""Launch sizes in the order in which their time is predicted from the compiled code, without a GPU.

    python -m bench rank edge_weight --case paper_vitl_24x24 --target 90
    python -m bench rank --target 120 --write kernels/drseg_kernels/tuned    # tables where nobody has timed one
    python -m bench rank --against bench/results/nvidia_h100_80gb_hbm3/tune.log    # how well it orders what was timed

The predicted time is a sum over the kernels that the tuner times with a table's sizes. One part is the instructions
that a warp issues (``sass.py``) times its warps, over all schedulers of the device. It takes longer if registers,
shared memory or the number of programs leave a scheduler too few warps to take turns. The other part is the bytes
gathered by index, at the rate of an H100's caches. Nothing is fitted. What the code does not show is left out:
launches, sorts, products of the library, waiting for memory. So it is an order, not a time.

``--write`` puts the first of each table into the tables of an architecture. It leaves out timed tables, and
``knn_graph`` and ``knn_live``, most of whose time is products. Exit codes: 0, 1 (no nvdisasm, or a log without anything
that can be compared), 2 (usage).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from drseg_kernels import _launch

from bench import sass
from bench.aot import REGISTERS_PER_BLOCK
from bench.aot_build import TARGETS, Target, compiled_for
from bench.aot_variants import Variant
from bench.command import command_parser
from bench.launches import launched
from bench.tables import is_timed, write_entry
from bench.tune_candidates import DEFAULT_CASES, TABLES, candidates, decides, width_of
from bench.work import work_of
from drseg_core.testing import CASES, Case

# of each processor
SCHEDULERS = 4
# Gathered bytes per processor and clock: 8.2 TB/s over the 132 processors of an H100 at 1.98 GHz, where the times of
# graph_propagate level off (2026-11). No other device has been measured; the same is taken for all.
GATHERED_PER_CLOCK = 8.2e12 / (132 * 1.98e9)
# Clocks between an instruction and one that needs its result: so many warps keep a scheduler busy.
DEPENDENT_ISSUE = 4
# shared memory that every block takes beside its own, bytes
BLOCK_SHARED = 1024

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Prediction:
    """Sizes and their predicted parts.

    Args:
        sizes: of the table.
        issue: time to issue all instructions, microseconds.
        gathered: time to read what is gathered, microseconds.
    """

    sizes: Any
    issue: float
    gathered: float

    @property
    def total(self) -> float:
        """As if nothing overlapped: the gathered bytes are the same for all sizes of a table, and a maximum would make
        sizes equal that are not."""
        return self.issue + self.gathered


@dataclass(frozen=True)
class Binary:
    """What a prediction needs of a compiled kernel: its loops, registers of a thread, shared memory in bytes."""

    loop: sass.Loop
    registers: int
    shared: int


def _read(cubin: bytes, shared: int) -> Binary:
    text = sass.disassemble(cubin)
    return Binary(sass.loops(text), sass.registers(text), shared)


def resident_warps(target: Target, binary: Binary, num_warps: int, programs: int) -> int:
    """Warps that a processor holds at a time."""
    # the hardware hands out registers by the eight
    registers = -(-binary.registers // 8) * 8 * 32 * num_warps
    blocks = min(
        target.blocks,
        target.warps // num_warps,
        REGISTERS_PER_BLOCK // registers,
        (target.shared_bytes + BLOCK_SHARED) // (binary.shared + BLOCK_SHARED),
        -(-programs // target.processors),
    )
    return max(1, blocks) * num_warps


class Predictor:
    """Predictions for one device; a kernel is compiled and read once.

    Args:
        target: the device.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.device = target.device
        self._binaries: dict[str, Binary] = {}

    def _prepare(self, variants: Iterable[Variant]) -> None:
        new = {variant.name: variant for variant in variants if variant.name not in self._binaries}
        # one kernel is taken apart while the next is compiled
        with ThreadPoolExecutor() as pool:
            read = {}
            for name, variant in new.items():
                compiled = compiled_for(variant, self.target.arch)
                read[name] = pool.submit(_read, compiled.asm["cubin"], compiled.metadata.shared)
            self._binaries.update({name: binary.result() for name, binary in read.items()})

    def predict(self, table: str, case: Case, sizes: Any, dtype: str = "float32") -> Prediction:
        """Of one call as the tuner times it.

        Args:
            table: of the tuner. case: the size. sizes: of the table. dtype: of the features.
        """
        # of the whole device in a microsecond
        clocks = self.target.processors * self.target.clock_mhz
        issue = gathered = 0.0
        variants = launched(table, self.device, case, sizes, DTYPES[dtype])
        self._prepare(variants)
        for variant in variants:
            work, binary, warps = work_of(variant, case), self._binaries[variant.name], variant.options["num_warps"]
            if work is None:
                raise RuntimeError(f"rank: {variant.name} is unknown; expected its loops in bench/work.py, got none")
            slots = sass.issued(binary.loop, work.loops) * warps * work.programs
            taking_turns = resident_warps(self.target, binary, warps, work.programs) / SCHEDULERS
            issue += slots / (SCHEDULERS * clocks) * max(1.0, DEPENDENT_ISSUE / taking_turns)
            gathered += work.gathered / (GATHERED_PER_CLOCK * clocks)
        return Prediction(sizes, issue, gathered)

    def rank(self, table: str, case: Case, options: Iterable[Any], dtype: str = "float32") -> list[Prediction]:
        """The fastest first; equal ones stay in their order."""
        known = list(options)
        self._prepare(
            variant for option in known for variant in launched(table, self.device, case, option, DTYPES[dtype])
        )
        return sorted((self.predict(table, case, option, dtype) for option in known), key=lambda found: found.total)


_HEADER = re.compile(r"(\w+) (\w+) (\w+): \d+ candidates")
_TIMED = re.compile(r"  ([\d.]+) us \w+\((.*)\)")
# fields that had other names, and those of strategies that are gone: 0 where the strategy was today's
_RENAMED = {"columns": "block_n", "rows": "block_m", "rows_per_program": "block_m"}
_GONE = ("sources", "patch")


def read_log(text: str) -> dict[tuple[str, str, str], dict[Any, float]]:
    """What the tuner printed: microseconds by sizes, by (table, case, dtype). Tables and strategies that are no more
    are left out."""
    tables = {table for group in TABLES.values() for table in group}
    cases = {case.name for case in CASES}
    found: dict[tuple[str, str, str], dict[Any, float]] = {}
    current: tuple[str, str, str] | None = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = (header[1], header[2], header[3])
            if header[1] not in tables or header[2] not in cases:
                current = None
        elif current is not None and (timed := _TIMED.match(line)):
            fields = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", timed[2])}
            if not any(fields.pop(name, 0) for name in _GONE):
                sizes = _launch.kind_of(current[0])(**{_RENAMED.get(name, name): n for name, n in fields.items()})
                found.setdefault(current, {})[sizes] = float(timed[1])
    return found


def _ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the mean of theirs."""
    return [sum(o < value for o in values) + (sum(o == value for o in values) - 1) / 2 for value in values]


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's; 0 where all values of one are equal."""
    try:
        return statistics.correlation(_ranks(left), _ranks(right))
    except statistics.StatisticsError:
        return 0.0


@dataclass(frozen=True)
class Agreement:
    """How well a prediction orders what was timed.

    Args:
        count: timed sizes. correlation: Spearman's.
        fastest, first, five: microseconds of the fastest, of what is predicted to be fastest, and of the best of the
            five that are.
    """

    count: int
    correlation: float
    fastest: float
    first: float
    five: float


def compare(predictor: Predictor, table: str, case: Case, timed: dict[Any, float], dtype: str) -> Agreement:
    """The prediction beside a log's times (microseconds by sizes)."""
    ranked = predictor.rank(table, case, timed, dtype)
    times = [timed[prediction.sizes] for prediction in ranked]
    correlation = rank_correlation([prediction.total for prediction in ranked], times)
    return Agreement(len(times), correlation, min(times), times[0], min(times[:5]))


def _print_ranking(predictor: Predictor, table: str, case: Case, dtype: str) -> None:
    options = candidates(table, predictor.device, case)
    print(f"{table} {case.name} {dtype} {predictor.target.name}: {len(options)} candidates, us", flush=True)
    for prediction in predictor.rank(table, case, options, dtype):
        print(
            f"  {prediction.total:8.1f} (issue {prediction.issue:.1f}, gathered {prediction.gathered:.1f}) "
            f"{prediction.sizes}{' (the rule)' if prediction.sizes == options[0] else ''}"
        )


def _write(predictor: Predictor, table: str, case: Case, dtype: str, folder: Path) -> None:
    """The first of a table's ranking becomes an entry of the architecture, unless there is one that was timed."""
    path = folder / predictor.device.arch / f"{table}.json"
    key = {"dtype": dtype, "channels": width_of(table, case), "nodes": case.nodes, "k": case.neighbours}
    if table in ("knn_graph", "knn_live") or is_timed(path, key):
        print(f"{table} {case.name} {dtype}: left as it is")
        return
    best = predictor.rank(table, case, candidates(table, predictor.device, case), dtype)[0]
    write_entry(path, key, best.sizes, case=case.name, predicted_us=round(best.total, 2), triton=triton.__version__)
    print(f"{table} {case.name} {dtype}: {best.sizes}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("rank", __doc__)
    parser.add_argument("op", nargs="?", choices=sorted(TABLES), help="all by default")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="the large ones")
    parser.add_argument("--target", type=int, default=90, choices=[target.arch for target in TARGETS])
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--against", type=Path, metavar="LOG", help="compare with what the tuner printed on a device")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="put the first of each into the tables there")
    args = parser.parse_args(arguments)
    if sass.disassembler() is None:
        print("rank: Triton has no nvdisasm here; expected it in its package, got none")
        return 1
    predictor = Predictor(next(target for target in TARGETS if target.arch == args.target))
    tables = [table for op in ([args.op] if args.op else sorted(TABLES)) for table in TABLES[op]]
    chosen = [case for case in CASES if case.name in (args.case or DEFAULT_CASES)]
    log = read_log(args.against.read_text(encoding="utf-8")) if args.against else {}
    compared = 0
    for table in tables:
        for case in (case for case in chosen if decides(table, case)):
            if args.write:
                _write(predictor, table, case, args.dtype, args.write)
            elif not args.against:
                _print_ranking(predictor, table, case, args.dtype)
            elif timed := log.get((table, case.name, args.dtype)):
                found = compare(predictor, table, case, timed, args.dtype)
                compared += 1
                print(
                    f"{table} {case.name}: {found.count} timed, rank correlation {found.correlation:.2f}; "
                    f"fastest {found.fastest:.1f} us, predicted first {found.first:.1f} us "
                    f"({found.first / found.fastest:.2f} x), best of the first five {found.five:.1f} us "
                    f"({found.five / found.fastest:.2f} x)",
                    flush=True,
                )
    if args.against and not compared:
        print(f"rank: nothing to compare; expected {', '.join(tables)} at {args.dtype} in {args.against}, got none")
        return 1
    return 0
