# SPDX-License-Identifier: Apache-2.0
"""``drseg train``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drseg_core.cli.parsers import (
    DATA_HELP,
    Parser,
    add_config_arguments,
    add_reading_arguments,
    chosen_config,
)
from drseg_core.config.load import to_yaml
from drseg_core.errors import ConfigError

USAGE = "drseg train --config PRESET|FILE --data DATA --out RUN [options]"
EPILOG = """\
examples:
  drseg train --config tiny --data folder:tiles --out run
  drseg train --config tiny --data folder:tiles --out run --train.iterations 500 --seed 1
  drseg train --config tiny --data folder:tiles --out run --train.seconds 300
  drseg train --data folder:tiles --out run --resume
  drseg train --config vitl --data dlrsd:datasets --out paper
  drseg train --config vitb --data folder:tiles --out big --model.clip.weights clip.safetensors
  torchrun --nproc-per-node 2 -m drseg_core train --config vitl --data folder:tiles --out big

A folder of data holds classes.txt (one name per line) and {train,val}/{images,masks}/*; masks are
8-bit class numbers in the order of classes.txt, 255 where nothing is known.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    needed = "--print_config" not in argv
    parser.add_argument("--data", required=needed, type=str, metavar="DATA", help=DATA_HELP)
    parser.add_argument("--out", required=needed, type=str, metavar="RUN", help="run folder to write; new or empty")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly where it stopped")
    parser.add_argument("--init", type=str | None, metavar="RUN", help="start from the weights of another run")
    add_reading_arguments(parser, default="by default measured on all images, unless they are 8-bit")
    parser.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda, cuda:N or mps")
    out = _value(argv, "--out")
    add_config_arguments(parser, argv, fallback=Path(out) / "config.yaml" if out and "--resume" in argv else None)


def run(args: Any) -> None:
    config = chosen_config(args)
    if args.print_config:
        print(to_yaml(config), end="")
        return
    if args.resume and args.init:
        raise ConfigError("--resume and --init exclude each other; a resumed run goes on with its own weights")
    from drseg_core.checkpoints.checkpoint import generations
    from drseg_core.training.logs import read_log
    from drseg_core.training.loop import train

    run = train(config, args.data, args.out, resume=args.resume, init=args.init, device=args.device)
    if os.environ.get("RANK", "0") != "0":
        return
    records = read_log(run)
    print(f"run: {run}")
    if records:
        last = records[-1]
        print(f"steps: {last['step']}, loss: {_number(last['loss'], 4)}, training mIoU: {_number(last['miou'], 1)} %")
    if generations(run):
        print(_next(run, args.data))


def _next(run: Path, data: str) -> str:
    folder = data.partition("folder:")[2]
    if folder and not (Path(folder) / "val" / "images").is_dir():
        return f"next: drseg predict {run} scene.tif --out map.tif ({folder} has no val, so nothing to score)"
    return f"next: drseg evaluate {run} --data {data} --split val --out metrics.json"


def _value(argv: Sequence[str], option: str) -> str | None:
    for place, word in enumerate(argv):
        if word == option and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
