# SPDX-License-Identifier: Apache-2.0
"""Times the engine beside other contenders at named cases; prints a table, writes JSON lines.

    python -m bench run --list                                  what there is to measure
    python -m bench run --dry-run                               which backends run here, and why the others do not
    python -m bench run --op pdgr --case paper_vitl_24x24_e256 --out bench/results/cpu/pdgr.jsonl
    python -m bench run --op knn_graph --case grid_64x64 --data dino
    python -m bench run --op graph_propagate --case paper_vitl_24x24 --mode fwd+bwd --dtype bfloat16
    python -m bench run --base HEAD~1 --gate                    this checkout against another version

``pdgr`` compares the whole module with the module as the paper writes it, factored, compiled, and with its matrix
products alone. ``knn_graph`` compares the selection with plain torch and faiss. Both run at the large cases, with a
random and with a DINO-like prior. ``--data case`` times the backends of one op on its own inputs. The edge MLP is 256
wide in cases ``*_e256``, and has PDGR's default width in all others. ``--dtype`` of ``pdgr`` is ``float32``,
``autocast`` (bfloat16 autocast, both maps in float32) or ``bfloat16`` (the same with both maps in bfloat16).

All contenders are interleaved in one process, and the median counts. On a GPU that is the median of a CUDA graph with a
cold cache. Beside it stand the medians with a warm cache (``warm_p50_ms``), of calls launched one by one
(``eager_p50_ms``), and of the time that such a call holds the host (``host_p50_ms``). A row is written only if its
result passed the gate. If one did not, the exit code is 1.

With ``--base`` the engine races itself at a git ref, which is checked out and built in a throw-away folder. Two
processes take turns, and the ratio of their pairs counts (see paired.py). With ``--gate`` the exit code is 1 after a
slowdown beyond noise, more memory, or a case that is lost or wrong. It is 2 for a version that has none of the cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence

import torch

from bench import jobs, one_op, paired, record, source
from bench.command import command_parser, positive, rows_file
from bench.precision import PRECISIONS
from drseg_core.errors import BackendUnavailableError
from drseg_core.ops import backend_report

_DEFAULT_CASES = ("paper_vitl_24x24", "paper_vitl_24x24_e256")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected 0 < tolerance < 1")
    return value


def _ref(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; expected a branch, tag or commit")
    return text


def _parser() -> argparse.ArgumentParser:
    # what is refused is said below one line, not below all options
    usage = "python -m bench run [--op OP] [--case CASE] [--out FILE] [options]; --help has all, --list the cases"
    parser = command_parser("run", __doc__, usage)
    contenders = (*jobs.CONTENDERS.items(), ("nothing", "only the engine"))
    parser.epilog = "what --beside names:\n" + "\n".join(f"  {name:<20}{text}" for name, text in contenders)
    parser.add_argument("--op", choices=("pdgr", *one_op.OPS), action="append", help="what to measure; all by default")
    parser.add_argument(
        "--case", action="append", help=f"named case; {', '.join(_DEFAULT_CASES)} by default, quicker ones with --base"
    )
    parser.add_argument("--mode", choices=jobs.MODES, action="append", help="both by default")
    parser.add_argument("--data", choices=jobs.DATA, action="append", help="all that there are by default")
    dtypes = tuple(dict.fromkeys((*PRECISIONS, *jobs.DTYPES)))
    parser.add_argument(
        "--dtype", choices=dtypes, default="float32", help=f"of the tensors; of pdgr one of {', '.join(PRECISIONS)}"
    )
    parser.add_argument("--backend", choices=one_op.backends(), help="the best that runs, by default")
    parser.add_argument(
        "--beside",
        action="append",
        choices=(*jobs.BESIDE, "nothing"),
        help="what the engine stands beside, see below; all by default",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=positive, default=7, help="timed calls")
    parser.add_argument("--slow-repeats", type=positive, default=2, help="of the literal module and the largest cases")
    parser.add_argument("--threads", type=positive, help="torch's threads; one with --base on a CPU")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="peaks beside times of pdgr"
    )
    parser.add_argument("--out", type=rows_file, help="JSON-lines file to add the rows to")
    parser.add_argument("--list", action="store_true", help="print the cases and what can be measured there, and end")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs and what can run them, and end")
    parser.add_argument("--base", type=_ref, metavar="REF", help="race this checkout against a git ref")
    parser.add_argument("--gate", action="store_true", help="with --base: exit code 1 if it got worse")
    parser.add_argument("--rounds", type=positive, default=61, help="with --base: pairs at most")
    parser.add_argument("--tolerance", type=_share, default=paired.TOLERANCE, help="with --base: slowdown that is none")
    return parser


def _chosen(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[jobs.Job]:
    for name in args.case or ():
        if name not in jobs.CASES:
            parser.error(f"unknown case {name}; expected one of {', '.join(jobs.CASES)}")
    ops = args.op or ("pdgr", *one_op.OPS)
    how = (args.mode or jobs.MODES, args.data or jobs.DATA, args.dtype, args.backend)
    if args.base and not args.case and not args.list:
        chosen = jobs.quick_jobs(ops, *how)
    else:
        cases = args.case or (jobs.CASES if args.list else _DEFAULT_CASES)
        chosen = [job for case in cases for op in ops for job in jobs.jobs_of(op, case, *how)]
    if args.op and "pdgr" in args.op and args.dtype not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        print(f"bench: pdgr is measured in {known} and left out; got --dtype {args.dtype}", file=sys.stderr)
    if not chosen:
        where = "" if not args.case else f" at {', '.join(args.case)}"
        parser.error(
            f"nothing to measure of {', '.join(ops)}{where}; expected a line of --list (pdgr has large cases only)"
        )
    if args.out is not None and args.out.is_file() and (lines := len(args.out.read_bytes().splitlines())):
        print(f"bench: rows are added to {args.out}, which has {lines}", file=sys.stderr)
    if args.gate and args.base is None:
        parser.error("--gate has nothing to compare with; expected --base REF beside it")
    return chosen


def _print_cases(chosen: Sequence[jobs.Job], args: argparse.Namespace) -> None:
    """The sizes of each case, and what can be measured there."""
    print("B images, h x w nodes, D channels of the prior, E units of the edge MLP, C channels, K neighbours")
    for case in dict.fromkeys(job.case for job in chosen):
        sizes = f"B {case.batch}, {case.height} x {case.width}, D {case.prior}, E {case.hidden}"
        print(f"\n--case {case.name}: {sizes}, C {case.channels}, K {case.neighbours}")
        own = [job for job in chosen if job.case == case]
        kinds: dict[str, list[str]] = {}
        for data in dict.fromkeys(job.data for job in own):
            kinds.setdefault(", ".join(dict.fromkeys(job.op for job in own if job.data == data)), []).append(data)
        for ops, data_kinds in kinds.items():
            print(f"  --data {' or '.join(data_kinds)}: {ops}")
    modes = ", ".join(dict.fromkeys(job.mode for job in chosen))
    print(f"\n--mode {modes} (knn_graph has fwd alone), --dtype {args.dtype}")


def _print_dry_run(chosen: Sequence[jobs.Job], args: argparse.Namespace) -> None:
    """Every job, and what can run it."""
    print("op case mode data dtype")
    for job in chosen:
        print(job)
    for row in backend_report():
        if row["device"] == args.device:
            able = "runs" if row["available"] else f"no: {row['reason']}"
            print(f"{row['op']} on {args.device}: {row['backend']} {able}")
    if not torch.cuda.is_available():
        print("cuda: torch sees no CUDA device")


def _measure(chosen: Sequence[jobs.Job], args: argparse.Namespace) -> int:
    failed = missing = explained = False
    for number, job in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {job}", file=sys.stderr, flush=True)
        try:
            rows, refused = jobs.measure(
                job, repeats=args.repeats, slow=args.slow_repeats, with_memory=args.memory, device=args.device,
                beside=args.beside or jobs.BESIDE,
            )  # fmt: skip
        except BackendUnavailableError as error:
            print(f"{job}: left out: {error}", file=sys.stderr)
            missing = True
            continue
        except torch.OutOfMemoryError as error:
            print(f"{job}: left out: {str(error).splitlines()[0]}", file=sys.stderr)
            failed = True
            continue
        for problem in refused:
            print(f"{job}: refused: {problem}", file=sys.stderr)
        failed |= bool(refused)
        if rows:
            print(record.table(rows) + ("" if explained else f"\n{record.COLUMNS_EXPLAINED}"), flush=True)
            explained = True
            if args.out:
                record.append(args.out, rows)
    # what was asked for and cannot run here has a code of its own
    return 1 if failed else 5 if missing else 0


def _race(chosen: Sequence[jobs.Job], args: argparse.Namespace) -> int:
    # a stop from outside ends the program by the way that takes the worktree and the processes along
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Where the threads of a process lie is luck that lasts as long as the process. Of two processes with two threads
    # each, one took 2.1 ms and the other 7.9 for the same call (2 cores of an Intel Xeon, 2026-11).
    threads = args.threads or (1 if args.device == "cpu" else None)
    try:
        # a wrong one is known before minutes of building
        source.commit_of(args.base)
        new = source.working_tree()
        with source.checkout(args.base) as base:
            verdicts = []
            for job in chosen:
                verdict = paired.judge(
                    base, new, job, rounds=args.rounds, tolerance=args.tolerance, device=args.device,
                    threads=threads,
                )  # fmt: skip
                verdicts.append((job, verdict))
                print(f"{job}: {verdict.verdict}", file=sys.stderr, flush=True)
    except source.SourceError as error:
        print(f"bench: --base {args.base} cannot be measured: {error}", file=sys.stderr)
        return 2
    print(paired.table(verdicts))
    if args.out:
        common = {"base": base.commit, "rounds_at_most": args.rounds, "tolerance": args.tolerance}
        place = record.environment(args.device)
        record.append(
            args.out,
            [
                {
                    **dataclasses.asdict(job),
                    "case": job.case.name,
                    "sizes": one_op.sizes_of(job.case),
                    **dataclasses.asdict(v),
                    **common,
                    **place,
                }
                for job, v in verdicts
            ],
        )
    worse = [str(job) for job, verdict in verdicts if verdict.fails]
    if all(verdict.verdict == "new" for _, verdict in verdicts):
        # nothing was compared: neither better nor worse
        print(f"bench: --base {args.base} has none of these jobs; expected one that it can do", file=sys.stderr)
        return 2
    if args.gate:
        print(f"gate: {len(worse)} of {len(verdicts)} got worse: {'; '.join(worse)}" if worse else "gate: passed")
        return int(bool(worse))
    return int(any(verdict.verdict == "wrong" for _, verdict in verdicts))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = _chosen(parser, args)
    if args.list or args.dry_run:
        (_print_dry_run if args.dry_run else _print_cases)(chosen, args)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda cannot be used; expected a CUDA device, got a torch without", file=sys.stderr)
        return 5
    busy = os.getloadavg()[0]
    if args.device == "cpu" and args.threads != 1 and busy > (os.cpu_count() or 1) / 2:
        # a thread that waits for one without a core makes a call many times as long
        words = f"load is {busy:.1f}: others are at work, so times of several threads mislead; try --threads 1"
        print(f"bench: {words}", file=sys.stderr)
    return _race(chosen, args) if args.base else _measure(chosen, args)
