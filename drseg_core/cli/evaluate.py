# SPDX-License-Identifier: Apache-2.0
"""``drseg evaluate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from drseg_core.cli.parsers import DATA_HELP, Parser, add_reading_arguments, check_output, given_reading
from drseg_core.errors import ConfigError, DatasetError

OWN = ("folder:", "synthetic")
"""Specifications of sets that have no protocol."""

USAGE = "drseg evaluate RUN --data DATA --out metrics.json [--split val] [options]"
EPILOG = """\
examples:
  drseg evaluate run --data folder:tiles --split val --out metrics.json
  drseg evaluate run --data folder:scenes --out metrics.json --mode tile --tile-size 384 --overlap 128
  drseg evaluate run --data loveda:datasets --protocol clean --out metrics.json
  drseg evaluate run --data folder:tiles --out metrics.json --prior-cache features
  drseg evaluate run --data folder:tiles --out metrics.json --precision auto --compile
  torchrun --nproc-per-node 2 -m drseg_core evaluate run --data loveda:datasets --protocol rskt --out metrics.json

The output says what gave the scores: hashes of weights, class names and data, protocol, options, command, versions.
Images of a set of your own are scored as drseg predict maps them: tiles at native resolution. There --mode alone
decides, and the run's evaluation.mode counts for benchmark sets without a protocol.
The class names of the data set are the prompts; they need not be those of the training. A protocol fixes split,
classes, ignored labels, windows and the mean by name: rskt (the benchmark of the paper), clean (held-out images,
no "no-data" class), ovrs, segearth.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument("run", type=str, metavar="RUN", help="run, checkpoint or model folder, or a name on the hub")
    parser.add_argument("--data", required=True, type=str, metavar="DATA", help=DATA_HELP)
    parser.add_argument("--split", type=str | None, metavar="SPLIT", help="part of the data; val by default")
    parser.add_argument("--protocol", type=str | None, metavar="NAME", help="rskt, clean, ovrs or segearth")
    parser.add_argument("--out", required=True, type=str, metavar="FILE", help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument(
        "--mode",
        type=Literal["whole", "tile"] | None,
        help="tiles at native resolution, as in drseg predict (the default for a set of your own), or the whole image "
        "(for a benchmark set the run's evaluation.mode is the default)",
    )
    add_tile_arguments(parser)
    add_reading_arguments(parser, default="by default as in training")
    parser.add_argument("--boundary", action="store_true", help="also score the outlines (boundary IoU); slower")
    parser.add_argument(
        "--prior-cache",
        type=str | None,
        metavar="DIR",
        help="folder that keeps the frozen prior's features for other vocabularies and checkpoints; same scores",
    )
    parser.add_argument(
        "--prior-cache-gb",
        type=float | None,
        metavar="GB",
        help="largest size of that folder, 20 by default; the files unused for longest are removed first",
    )
    add_speed_arguments(parser)
    parser.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda, cuda:N or mps")


def add_speed_arguments(parser: Any) -> None:
    """In which precision the model computes, and whether it is compiled."""
    parser.add_argument(
        "--precision",
        type=Literal["float32", "bfloat16", "auto"],
        default="float32",
        help="dtype of linear maps and convolutions; bfloat16 takes 0.6 of the time on a CPU with units for it, and "
        "auto chooses it there; docs/speed.md says what it changes",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model first; pays off for many tiles or images, takes minutes, needs a C++ compiler on a CPU",
    )


def add_tile_arguments(parser: Any) -> None:
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


def _as_predicted(args: Any, protocol: Any) -> bool:
    """Whether the images are cut into tiles, for the map that ``drseg predict`` makes.

    The run's ``mode`` is not asked: every run has one, and it does not tell a choice from the default.
    """
    return args.mode is None and protocol is None and args.data.startswith(OWN)


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
    if args.prior_cache_gb is not None:
        if args.prior_cache is None:
            raise ConfigError("--prior-cache-gb has no folder; expected --prior-cache DIR beside it")
        if args.prior_cache_gb < 0:
            raise ConfigError(f"--prior-cache-gb is out of range; expected a number >= 0, got {args.prior_cache_gb}")
    protocol = chosen_protocol(args)
    from drseg_core.training.distributed import process_group

    with process_group(args.device) as group:
        result = _scores(args, protocol, group)
        # the others have passed their check of --out once the scores are summed
        if not group.is_main:
            return
        if result["mIoU"] is None:
            split = result["data"]["split"]
            raise DatasetError(
                f"evaluate: no mask of {split} of {args.data} has a labelled pixel; expected class ids, got 255 alone"
            )
        from drseg_core.files import write_text_atomic

        write_text_atomic(out, json.dumps(result, indent=1) + "\n")
    for name in ("mIoU", "mACC", "fwIoU", "pACC"):
        value = result[name]
        print(f"{name:>6} {'-' if value is None else f'{value:.2f} %'}")
    if "boundary" in result and result["boundary"]["mIoU"] is not None:
        print(f"boundary mIoU {result['boundary']['mIoU']:.2f} %")
    if protocol is not None:
        split, mean = result["data"]["split"], result["mIoU_convention"]
        print(f"protocol {protocol.name}: split {split}, mean over classes: {mean}, {result['images']} images")
    else:
        options = result["evaluation"]
        how = f"tiles of {options['tile_size']} pixels, overlap {options['overlap']}, at native resolution"
        print(f"mode {options['mode']}: {how if options['mode'] == 'tile' else 'each image in one piece'}")
        if _as_predicted(args, protocol):
            print("of a set of your own --mode alone decides this, whatever evaluation.mode of the run is")
    _print_calibration(result["calibration"])
    print(f"weights {result['weights_sha256'][:12]}, class names {result['class_names_sha256'][:12]}")
    print(f"written: {out}")


def _print_calibration(found: dict[str, Any]) -> None:
    if found["error"] is not None:
        print(f"calibration error of the score {found['error']:.2f} %")
    areas = [f"{name} {area:.3f}" for name, area in found["error_auroc"].items() if area is not None]
    if areas:
        print(f"signs of errors (area under ROC): {', '.join(areas)}")


def _scores(args: Any, protocol: Any, group: Any) -> dict[str, Any]:
    """The scores with their run card: what gave them, on what, by which protocol, command and versions."""
    from drseg_core.checkpoints.pretrained import load
    from drseg_core.checkpoints.run import check_class_names, plain_config, training_data
    from drseg_core.checkpoints.versions import git_revision, library_versions
    from drseg_core.config.reading import choose_reading
    from drseg_core.data import open_dataset
    from drseg_core.data.dataset import class_names_hash
    from drseg_core.data.protocols import check_held_out, open_protocol
    from drseg_core.evaluation.evaluate import evaluate
    from drseg_core.models.weights import weights_hash
    from drseg_core.ops import backend_report

    split = args.split or "val"
    if protocol is not None:
        split = protocol.view(args.data.partition(":")[0]).split
    given = given_reading(args, args.data)
    loaded = None
    folder = args.data.partition("folder:")[2]
    # what is not there is said before the run is read
    if folder and Path(folder).is_dir():
        loaded = load(args.run)
        reading = choose_reading(loaded.config.reading, given)
        dataset = open_dataset(args.data, split, reading=reading)
    else:
        dataset = open_dataset(args.data, split) if protocol is None else open_protocol(protocol, args.data)
    loaded = loaded or load(args.run)
    trained_on = training_data(loaded)
    if protocol is not None and trained_on is not None:
        check_held_out(protocol, args.data, trained_on)
    check_class_names(loaded.model, dataset.class_names)
    options = evaluation_options(loaded.config.evaluation, args)
    if _as_predicted(args, protocol):
        options = dataclasses.replace(options, mode="tile")
    views = None if protocol is None else protocol.views
    # of the weights as they were read: also those of frozen parts that the run's folder does not hold
    weights = weights_hash(loaded.model)
    names = dataset.class_names
    room = {} if args.prior_cache_gb is None else {"prior_cache_bytes": round(1e9 * args.prior_cache_gb)}
    scores = evaluate(
        loaded.model,
        names,
        dataset,
        options,
        views=views,
        device=group.device,
        processes=group,
        boundary=args.boundary,
        prior_cache=args.prior_cache,
        precision=args.precision,
        compiled=args.compile,
        **room,
    )
    convention = "present" if protocol is None else protocol.convention
    return {
        **scores,
        "mIoU": scores["mIoU_conventions"][convention],
        "mIoU_convention": convention,
        "protocol": None if protocol is None else {"name": protocol.name, "views": dataclasses.asdict(protocol.views)},
        "run": str(args.run),
        "step": loaded.step,
        "weights_sha256": weights,
        "model": plain_config(loaded.config)["model"],
        "evaluation": dataclasses.asdict(options),
        "reading": None if dataset.reading is None else dataclasses.asdict(dataset.reading),
        "trained_on": trained_on,
        "training_class_names_sha256": class_names_hash(loaded.class_names),
        "data": {"spec": args.data, "split": split, "sha256": dataset.fingerprint()},
        "device": str(group.device),
        "processes": group.world_size,
        "backends": backend_report(),
        "versions": library_versions(),
        "git": git_revision(),
        "command": sys.argv,
    }
