# SPDX-License-Identifier: Apache-2.0
"""Times the engine beside its baselines at named cases; prints a table, writes JSON lines.

    python bench/run.py --op pdgr --case pdgr_8x576 --out bench/results/cpu/pdgr.jsonl
    python bench/run.py --op knn_graph --case knn_4096 --data dino
    python bench/run.py --op graph_propagate --case paper_vitl_24x24 --mode fwd+bwd

Cases ``pdgr_*`` are the whole module beside the module as the paper writes it, factored, compiled, and the floor of its
matrix products; ``knn_*`` are the selection beside plain torch and faiss; every other case times the backends of one
op. All that is compared is interleaved in one process and the median counts. A row is written only where its result
passed the gate; where one did not, the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path[:0] = [
    str(path) for path in (Path(__file__).parent, *(Path(__file__).parents[1] / n for n in ("", "kernels")))
]

import ops  # noqa: E402
import pdgr  # noqa: E402
import record  # noqa: E402
import selection  # noqa: E402
import torch  # noqa: E402

from drseg_core.ops._cases import CASES  # noqa: E402

Measurement = Callable[[], tuple[list[record.Row], list[str]]]
PDGR_CASES = {case.name: case for case in pdgr.CASES}
SELECTION_CASES = {what.case.name: what for what in selection.CASES}
OP_CASES = {case.name: case for case in CASES}


def _jobs(op: str, case: str, args: argparse.Namespace) -> Iterator[tuple[str, Measurement]]:
    """(label, measurement) of everything asked for at one case; nothing where the op has no such case."""
    common = {"repeats": args.repeats, "device": args.device}
    for mode in args.mode or pdgr.MODES:
        forward_only = op == "knn_graph" and mode != "fwd"
        for data in args.data or pdgr.DATA:
            label = f"{op} {case} {mode} {data}"
            if op == "pdgr" and case in PDGR_CASES:
                yield (
                    label,
                    partial(
                        pdgr.measure,
                        PDGR_CASES[case],
                        data,
                        mode,
                        slow=args.slow_repeats,
                        with_memory=args.memory,
                        **common,
                    ),
                )
            elif op == "knn_graph" and case in SELECTION_CASES and not forward_only:
                yield label, partial(selection.measure, SELECTION_CASES[case], data, slow=args.slow_repeats, **common)
        if op in ops.OPS and case in OP_CASES and not forward_only:
            yield f"{op} {case} {mode}", partial(ops.measure, op, OP_CASES[case], mode, **common)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected a number >= 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=("pdgr", *ops.OPS), action="append", help="what to measure; all by default")
    parser.add_argument("--case", action="append", help="named case; paper_vitl_24x24 and pdgr_8x576 by default")
    parser.add_argument("--mode", choices=pdgr.MODES, action="append", help="both by default")
    parser.add_argument("--data", choices=pdgr.DATA, action="append", help="of pdgr_* and knn_*; both by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=_positive, default=7, help="timed calls")
    parser.add_argument("--slow-repeats", type=_positive, default=2, help="of the literal module and the largest cases")
    parser.add_argument("--threads", type=_positive, help="torch's threads")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peaks of pdgr_* cases")
    parser.add_argument("--out", type=Path, help="JSON-lines file to add the rows to")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    known = {**OP_CASES, **PDGR_CASES, **SELECTION_CASES}
    for name in args.case or ():
        if name not in known:
            parser.error(f"unknown case {name}; expected one of {', '.join(known)}")
    jobs = [
        job
        for case in args.case or ("paper_vitl_24x24", "pdgr_8x576")
        for op in args.op or ("pdgr", *ops.OPS)
        for job in _jobs(op, case, args)
    ]
    if not jobs:
        parser.error("no such op has such a case; expected pdgr with pdgr_*, knn_graph with knn_*, or an op's own case")
    failed = False
    for label, measurement in jobs:
        rows, refused = measurement()
        for problem in refused:
            print(f"{label}: refused: {problem}", file=sys.stderr)
        failed |= bool(refused)
        if rows:
            print(record.table(rows), flush=True)
            if args.out:
                record.append(args.out, rows)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
