# SPDX-License-Identifier: Apache-2.0
"""``drseg study``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drseg_core.cli.parsers import DATA_HELP, Parser
from drseg_core.errors import ConfigError, DRSegError

USAGE = "drseg study NAME --out DIR [options]; drseg study list"
EPILOG = """\
examples:
  drseg study list
  drseg study table2 --out studies --quick
  drseg study table2 --out studies --jobs 2
  drseg study table1 --config vitl --data dlrsd:datasets --protocol rskt --out studies \\
      --prior-v1 RSIB.pth --remote-clip RemoteCLIP-ViT-B-32.pt \\
      --test potsdam:datasets --test vdd:datasets --test uavid:datasets --test udd5:datasets

Without --data a study trains and scores the tiny preset on synthetic landscapes. It writes NAME.json, NAME.md and
NAME.png into --out, goes on where it stopped, and shares trained variants with the other studies there; index.md has a
line for each of them.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    listing = "list" in argv
    parser.add_argument("name", type=str, metavar="NAME", help="study, or list")
    parser.add_argument("--out", required=not listing, type=str | None, metavar="DIR", help="folder of the studies")
    parser.add_argument("--config", type=str, default="tiny", metavar="PRESET|FILE", help="configuration to study")
    parser.add_argument("--data", type=str | None, metavar="DATA", help=f"training data: {DATA_HELP}")
    parser.add_argument(
        "--test", action="append", type=str, metavar="[NAME=]DATA", help="what is scored; may be given several times"
    )
    parser.add_argument("--protocol", type=str | None, metavar="NAME", help="rskt, clean, ovrs or segearth")
    parser.add_argument(
        "--seeds", type=str | None, metavar="N,N", help="one training of every variant for each; 0,1,2 by default"
    )
    parser.add_argument("--steps", type=int | None, metavar="N", help="training steps of a variant")
    parser.add_argument(
        "--start-steps", type=int | None, metavar="N", help="steps of the dual encoder where CLIP has random weights"
    )
    parser.add_argument(
        "--prior-v1", type=str | None, metavar="FILE", help="weights of RS-DINOv1, for table1 and table3"
    )
    parser.add_argument("--remote-clip", type=str | None, metavar="FILE", help="weights of RemoteCLIP, for table1")
    parser.add_argument(
        "--matched",
        action="store_true",
        help="table1: all methods with the configuration's prior, layers, heads and MLPs instead of each with its own; "
        "files are then named table1-matched",
    )
    parser.add_argument(
        "--released",
        action="store_true",
        help="table1: RSKT-Seg with the layers of its released weights (5 on DLRSD) instead of those of its files; the "
        "study's files are then named table1-released",
    )
    parser.add_argument(
        "--prior-steps",
        type=int,
        default=0,
        metavar="N",
        help="teach the random prior for N steps on labelled scenes of its own; files are then named NAME-taught",
    )
    parser.add_argument(
        "--pieces",
        type=str | None,
        metavar="DIR",
        help="folder of real labelled pieces, for propagation; DRSEG_PIECES in the environment by default",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="variants that are trained at a time")
    parser.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda, cuda:N or mps")
    parser.add_argument("--quick", action="store_true", help="a few scenes and steps: shows that it runs, nothing else")


def run(args: Any) -> None:
    from drseg_core.studies.index import write_index
    from drseg_core.studies.registry import find_study, studies
    from drseg_core.studies.setting import make_setting

    if args.name == "list":
        width = max(map(len, studies()))
        for name, study in studies().items():
            print(f"{name:<{width}}  {study.title}")
        return
    study = find_study(args.name)
    if args.jobs < 1:
        raise ConfigError(f"study: jobs is out of range; expected at least 1, got {args.jobs}")
    if args.prior_steps < 0:
        raise ConfigError(f"study: prior-steps is out of range; expected at least 0, got {args.prior_steps}")
    if args.matched and study.name != "table1":
        raise ConfigError(f"study: matched does not belong to {study.name}; expected --matched with table1 alone")
    if args.released and (study.name != "table1" or args.matched):
        got = f"{study.name}{' --matched' if args.matched else ''}"
        raise ConfigError(f"study: released does not belong to {got}; expected --released with table1 alone")
    for name in ("steps", "start_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ConfigError(f"study: {option} is out of range; expected at least 1, got {getattr(args, name)}")
    setting = make_setting(
        args.config,
        data=args.data,
        tests=args.test or (),
        seeds=None if args.seeds is None else _seeds(args.seeds),
        steps=args.steps,
        start_steps=args.start_steps,
        protocol=args.protocol,
        prior_v1=args.prior_v1,
        prior_steps=args.prior_steps,
        device=args.device,
        pieces=args.pieces or os.environ.get("DRSEG_PIECES"),
        quick=args.quick,
        remote_clip=args.remote_clip,
        matched=args.matched,
        released=args.released,
    )
    for test in setting.tests:
        # before hours of training, not after
        setting.open_test(test)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"study: --out cannot be made; expected a folder, got {out} ({problem.strerror})") from None
    command = "drseg " + shlex.join(sys.argv[1:])
    problems = study.run(setting, out, jobs=args.jobs, command=command)
    write_index(out)
    name = study.name + setting.suffix
    print((out / f"{name}.md").read_text(encoding="utf-8"))
    print(f"written to {out}: {', '.join(path.name for path in sorted(out.glob(f'{name}.*')))}")
    if problems:
        error = DRSegError(
            f"study: {len(problems)} variants failed: {', '.join(problems)}; {next(iter(problems.values()))}"
        )
        error.exit_code = 8
        raise error


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"study: seeds are not numbers; expected such as 0,1,2, got {text!r}") from None
