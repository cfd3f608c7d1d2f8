# SPDX-License-Identifier: Apache-2.0
"""The tiny model alone and beside a busy process, as OpenMP's threads wait by default and as commands let them wait.

    python -m bench busy
    python -m bench busy --rounds 5 --out bench/results/FOLDER/busy.jsonl

A forward, a training step, and a short ``drseg train`` from the start of its interpreter to its end, which is most of
what ``drseg demo`` does. Beside means: with as many Python processes that count for ever as ``--busy`` says. Rounds are
interleaved, each in processes of its own; a machine that others use too says so in its load, which the rows keep.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import memory, record
from bench.command import command_parser, positive, rows_file
from bench.model import Job
from bench.presets import measured
from drseg_core.data.synthetic import write_scenes
from drseg_core.processor import WAITING, WAITING_OF_USERS

WAITS: dict[str, dict[str, str]] = {"openmp": {}, "drseg": WAITING}
"""What is set in the environment: nothing, or what commands set."""
STEPS = 20


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that each keep a core busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextlib.contextmanager
def waiting(settings: dict[str, str]) -> Iterator[None]:
    """The environment of child processes with these settings of waiting and no other."""
    kept = {name: os.environ.pop(name) for name in WAITING_OF_USERS if name in os.environ}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]
        os.environ.update(kept)


def milliseconds(what: str, repeats: int) -> float:
    """Of a call of the tiny model (``inference`` or ``training``), in a process of its own."""
    job = Job(
        "tiny", {}, what, "float32", False, "inductor", None, False, 4 if what == "training" else 1, repeats, "cpu"
    )
    return float(memory.in_child("bench.model", "measure", asdict(job))["p50_ms"])


def command_milliseconds(data: Path) -> float:
    """Of a short training by the command, which chooses how its threads wait."""
    with tempfile.TemporaryDirectory(prefix="drseg-busy-") as folder:
        words = ["train", "--config", "tiny", "--data", f"folder:{data}", "--out", f"{folder}/run"]
        return 1000 * measured([*words, "--train.iterations", str(STEPS)], Path(folder) / "output")["s"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser("busy", __doc__)
    parser.add_argument("--busy", type=positive, default=1, help="processes beside the measured one")
    parser.add_argument("--rounds", type=positive, default=3, help="processes of each kind, in turns")
    parser.add_argument("--repeats", type=positive, default=7, help="timed calls of a round")
    parser.add_argument("--out", type=rows_file, help="JSON-lines file to add the rows to")
    args = parser.parse_args(arguments)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    loads: list[float] = []
    with tempfile.TemporaryDirectory(prefix="drseg-busy-") as folder:
        data = write_scenes(Path(folder) / "scenes", splits={"train": 40}, seed=0)
        for _ in range(args.rounds):
            for place, count in (("alone", 0), ("beside", args.busy)):
                loads.append(os.getloadavg()[0])
                print(f"{place}: load {loads[-1]:.1f}", file=sys.stderr, flush=True)
                with neighbours(count):
                    for name, settings in WAITS.items():
                        with waiting(settings):
                            for what in ("inference", "training"):
                                times = found.setdefault((what, name), {"alone": [], "beside": []})
                                times[place].append(milliseconds(what, args.repeats))
                    with waiting({}):
                        times = found.setdefault(("drseg train", "drseg"), {"alone": [], "beside": []})
                        times[place].append(command_milliseconds(data))
    for (what, name), times in found.items():
        alone, beside = (statistics.median(times[place]) for place in ("alone", "beside"))
        row = {
            "op": "busy", "case": "tiny", "mode": what, "name": name, "p50_ms": alone, "beside_p50_ms": beside,
            "ratio": beside / alone, "beside": args.busy, "rounds": args.rounds, "loads": loads,
            **record.environment("cpu"),
        }  # fmt: skip
        print(f"{what:12} {name:7} alone {alone:8.1f} ms, beside {beside:8.1f} ms, {beside / alone:5.2f} times as long")
        if args.out:
            record.append(args.out, [row])
    return 0
