# SPDX-License-Identifier: Apache-2.0
"""``drseg evaluate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from drseg_core.cli.parsers import DATA_HELP, Parser, check_output
from drseg_core.errors import ConfigError

USAGE = "drseg evaluate RUN --data DATA --out metrics.json [--split val] [options]"
EPILOG = """\
examples:
  drseg evaluate run --data folder:tiles --split val --out metrics.json
  drseg evaluate run --data folder:scenes --out metrics.json --mode tile --tile-size 384 --overlap 128
  drseg evaluate run --data loveda:datasets --protocol clean --out metrics.json

The class names of the data set are the prompts; they need not be those of the training. A protocol fixes split,
classes, ignored labels, windows and the mean by name: rskt (the benchmark of the paper), clean (held-out images,
no "no-data" class), ovrs, segearth.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument("run", type=str, metavar="RUN", help="run folder, or one of its checkpoint folders")
    parser.add_argument("--data", required=True, type=str, metavar="DATA", help=DATA_HELP)
    parser.add_argument("--split", type=str | None, metavar="SPLIT", help="part of the data; val by default")
    parser.add_argument("--protocol", type=str | None, metavar="NAME", help="rskt, clean, ovrs or segearth")
    parser.add_argument("--out", required=True, type=str, metavar="FILE", help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument(
        "--mode",
        type=Literal["whole", "tile"] | None,
        help="whole image, or tiles at native resolution; the run's by default",
    )
    add_tile_arguments(parser)
    parser.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda or cuda:N")


def add_tile_arguments(parser: Parser) -> None:
    """Options that override those of the run's configuration."""
    for name, text in (
        ("tile-size", "side of a tile in pixels; the run's by default"),
        ("overlap", "pixels shared by neighbouring tiles; the run's by default"),
        ("batch-size", "images or tiles per forward pass; the run's by default"),
    ):
        parser.add_argument(f"--{name}", type=int | None, metavar="N", help=text)


def evaluation_options(config: Any, args: Any) -> Any:
    """The run's evaluation options with those of the command line on top."""
    names = ("mode", "tile_size", "overlap", "batch_size")
    given = {name: getattr(args, name, None) for name in names}
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


def chosen_protocol(args: Any) -> Any:
    """The protocol of the command line, or None.

    Raises:
        ConfigError: no such protocol, or options beside it that it fixes.
    """
    if args.protocol is None:
        return None
    from drseg_core.data.protocols import get_protocol

    fixed = [name for name in ("split", "mode", "tile_size", "overlap") if getattr(args, name) is not None]
    if fixed:
        option = fixed[0].replace("_", "-")
        raise ConfigError(f"--{option} is fixed by --protocol {args.protocol}; expected one of the two options")
    return get_protocol(args.protocol)


def run(args: Any) -> None:
    out = Path(args.out)
    check_output(out, overwrite=args.overwrite)
    protocol = chosen_protocol(args)
    from drseg_core.data import open_dataset
    from drseg_core.data.protocols import check_held_out, open_protocol
    from drseg_core.evaluation.evaluate import evaluate
    from drseg_core.files import write_text_atomic
    from drseg_core.training.distributed import select_device
    from drseg_core.training.run import check_class_names, load_run, training_data
    from drseg_core.training.versions import git_revision, library_versions

    device = select_device(args.device)
    split = args.split or "val"
    if protocol is not None:
        split = protocol.view(args.data.partition(":")[0]).split
    dataset = open_dataset(args.data, split) if protocol is None else open_protocol(protocol, args.data)
    loaded = load_run(args.run)
    trained_on = training_data(loaded)
    if protocol is not None and trained_on is not None:
        check_held_out(protocol, args.data, trained_on)
    check_class_names(loaded.model, dataset.class_names)
    options = evaluation_options(loaded.config.evaluation, args)
    views = None if protocol is None else protocol.views
    scores = evaluate(loaded.model, dataset.class_names, dataset, options, views=views, device=device)
    convention = "present" if protocol is None else protocol.convention
    scores["mIoU"] = scores["mIoU_conventions"][convention]
    result = {
        **scores,
        "mIoU_convention": convention,
        "protocol": None if protocol is None else {"name": protocol.name, "views": dataclasses.asdict(protocol.views)},
        "run": str(args.run),
        "step": loaded.step,
        "evaluation": dataclasses.asdict(options),
        "trained_on": trained_on,
        "data": {"spec": args.data, "split": split, "sha256": dataset.fingerprint()},
        "versions": library_versions(),
        "git": git_revision(),
        "command": sys.argv,
    }
    write_text_atomic(out, json.dumps(result, indent=1) + "\n")
    for name in ("mIoU", "mACC", "fwIoU", "pACC"):
        value = scores[name]
        print(f"{name:>6} {'-' if value is None else f'{value:.2f} %'}")
    if protocol is not None:
        print(f"protocol {protocol.name}: split {split}, mean over classes: {convention}, {len(dataset)} images")
    print(f"written: {out}")
