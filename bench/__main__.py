# SPDX-License-Identifier: Apache-2.0
"""``python -m bench COMMAND ...``: each command is a module of this package and is imported when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": "time the engine beside other contenders, or this checkout against another version (--base REF --gate)",
    "profile": "microseconds of each kernel of a step of PDGR",
    "probe": "what a card does with products, copies, a gather, a sort, and kernels that do nothing",
    "compare": "stored rows of two runs",
    "report": "the tables of README and docs, from stored rows",
    "plot": "pictures of stored rows",
    "model": "the whole model, and what each of its parts takes",
    "lposs": "label propagation on a k-NN graph beside faiss and scipy",
    "busy": "the tiny model alone and beside a busy process, by how threads wait",
    "long": "hours of training, maps and graphs: whether memory, open files or caches grow",
    "presets": "a training step and a scored image of every set under both presets",
    "scenes": "a whole map beside the model's own forward passes, with threads that read and write and without",
    "tune": "find the fastest launch sizes on a GPU and write its tables",
    "host": "host time and launches of PDGR on the Triton backend, without a card",
    "place": "what a machine has for measurements",
    "rank": "launch sizes in the order of their predicted time, without a GPU",
    "aot": "compile every Triton kernel for every GPU in view, without one",
    "carry": "compile what PDGR launches into a folder for a machine with a GPU",
}
_USAGE = "usage: python -m bench COMMAND ... (COMMAND --help says what it takes)"


def main(arguments: Sequence[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ("--help",)
    if command in ("-h", "--help"):
        print(_USAGE, *(f"  {name:9}{words}" for name, words in COMMANDS.items()), sep="\n")
        return 0
    if command not in COMMANDS:
        print(f"bench: command is unknown; expected one of {', '.join(COMMANDS)}, got {command}", file=sys.stderr)
        return 2
    try:
        code: int = importlib.import_module(f"bench.{command}").main(rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read, such as head, has enough; the interpreter would complain when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


if __name__ == "__main__":
    raise SystemExit(main())
