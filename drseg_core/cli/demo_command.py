# SPDX-License-Identifier: Apache-2.0
"""Arguments of ``drseg demo``; the demo itself is in ``demo.py`` and is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drseg_core.cli.parsers import Parser

USAGE = "drseg demo --out DIR [--seed SEED]"
EPILOG = """\
example:
  drseg demo --out demo
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument("--out", required=True, type=str, metavar="DIR", help="folder for everything the demo makes")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="seed of scenes and training")


def run(args: Any) -> None:
    from drseg_core.cli.demo import run as run_demo

    run_demo(Path(args.out), seed=args.seed)
