# SPDX-License-Identifier: Apache-2.0
"""``drseg data prepare``, ``drseg data check`` and ``drseg data tile``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from drseg_core.cli.parsers import Parser, add_reading_arguments, check_output, given_reading
from drseg_core.errors import ConfigError, DatasetError

USAGE = "drseg data prepare|check|tile [options]"
EPILOG = """\
examples:
  drseg data prepare potsdam --raw downloads --out datasets
  drseg data check potsdam datasets --sheet potsdam.png
  drseg data check folder tiles --out report.json
  drseg data tile scene.tif labels.gpkg --out tiles --field class

drseg data prepare --help, drseg data check --help and drseg data tile --help tell more.
"""
PREPARE_USAGE = "drseg data prepare SET --raw DIR --out ROOT [options]"
PREPARE_EPILOG = """\
examples:
  drseg data prepare potsdam --raw downloads --out datasets
  drseg data prepare potsdam --raw downloads --out crops512 --patch 512 --edges shift

DIR holds the original archives (zip, tar) of this set or what is in them; ROOT gets one folder per set. A preparation
that was stopped goes on where it was. Then: drseg data check SET ROOT, and --data SET:ROOT wherever a command takes
data. Every set has its own licence; most are for research only.
"""
CHECK_USAGE = "drseg data check SET|folder ROOT [options]"
CHECK_EPILOG = """\
examples:
  drseg data check dlrsd datasets --sheet dlrsd.png
  drseg data check folder tiles --split val --out report.json

Exits with 3 where something is wrong; the report and the sheet are written all the same.
"""
TILE_USAGE = "drseg data tile SCENE LABELS --out DATA [options]"
TILE_EPILOG = """\
examples:
  drseg data tile scene.tif labels.tif --out tiles --classes "building; field; road"
  drseg data tile scene.tif labels.gpkg --out tiles --field class --background other

LABELS is a raster of class numbers, or polygons (GeoPackage, GeoJSON, Shapefile) with a column of class names; both may
be in another CRS. Tiles for validation are one strip of ground that touches no tile for training.
Then: drseg data check folder DATA, and drseg train --data folder:DATA.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    from drseg_core.data.benchmarks import BENCHMARKS

    parser.usage, parser.epilog = USAGE, EPILOG
    names = ", ".join(BENCHMARKS)
    commands = parser.add_subcommands(required=True, dest="action", metavar="prepare|check|tile", title="commands")
    prepare, check, tile = Parser(), Parser(), Parser()
    for name, command, summary in (
        ("prepare", prepare, "write a benchmark set in the layout of its release, from the original archives"),
        ("check", check, "look at every file of a data set and say all that is wrong with it"),
        ("tile", tile, "cut a scene and its labels into a set for training"),
    ):
        command.description = f"{summary[0].upper()}{summary[1:]}."
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        commands.add_subcommand(name, command, help=summary)
        command.prog = f"drseg data {name}"
        if argv and argv[0] == name:
            parser.chosen = command
    prepare.usage, prepare.epilog = PREPARE_USAGE, PREPARE_EPILOG
    prepare.add_argument("set", type=str, metavar="SET", help=names)
    prepare.add_argument("--raw", required=True, type=str, metavar="DIR", help="folder with the set's archives")
    prepare.add_argument("--out", required=True, type=str, metavar="ROOT", help="common root of the sets")
    prepare.add_argument("--patch", type=int | None, metavar="N", help="side of the patches; the set's by default")
    prepare.add_argument("--stride", type=int | None, metavar="N", help="pixels between patches; --patch by default")
    prepare.add_argument(
        "--edges",
        type=Literal["drop", "shift"],
        default="drop",
        help="leave out the rest at the edges, or move the last patch back so that it fits",
    )
    check.usage, check.epilog = CHECK_USAGE, CHECK_EPILOG
    check.add_argument("set", type=str, metavar="SET", help=f"folder, {names}")
    check.add_argument("root", type=str, metavar="ROOT", help="the set's root folder")
    check.add_argument("--split", type=str | None, metavar="SPLIT", help="one part; all by default")
    add_reading_arguments(check, default="by default measured on all images, unless they are 8-bit")
    check.add_argument("--out", type=str | None, metavar="FILE", help="JSON report to write")
    check.add_argument("--sheet", type=str | None, metavar="FILE", help="PNG to write: 16 images with their masks")
    check.add_argument("--overwrite", action="store_true", help="replace --out and --sheet if they exist")
    tile.usage, tile.epilog = TILE_USAGE, TILE_EPILOG
    tile.add_argument("scene", type=str, metavar="SCENE", help="image of any size that GDAL reads")
    tile.add_argument("labels", type=str, metavar="LABELS", help="raster of class numbers, or polygons")
    tile.add_argument("--out", required=True, type=str, metavar="DATA", help="folder to write; new or empty")
    tile.add_argument(
        "--field", type=str | None, metavar="COLUMN", help="column of the polygons' class; class by default"
    )
    tile.add_argument(
        "--classes",
        type=str | None,
        metavar="NAMES",
        help='names of the numbers of a raster, or those of the polygons in order: "building; field"',
    )
    tile.add_argument("--background", type=str | None, metavar="NAME", help="class outside all polygons; else unknown")
    tile.add_argument("--size", type=int, default=512, metavar="N", help="side of a tile in pixels")
    tile.add_argument("--val-share", type=float, default=0.2, metavar="S", help="share of the ground for validation")
    tile.add_argument(
        "--nodata", type=float | None, metavar="V", help="value of pixels without data, besides what the file declares"
    )


def run(args: Any) -> None:
    {"prepare": _prepare, "check": _check, "tile": _tile}[args.action](args[args.action])


def _tile(args: Any) -> None:
    from drseg_core.data.tile import TileOptions, tile_scene
    from drseg_core.data.vocabulary import parse_classes, plain_classes

    classes = None if args.classes is None else parse_classes(args.classes)
    names = None if classes is None else classes.names
    if classes is not None and classes != plain_classes(names or ()):
        raise ConfigError(f"--classes has synonyms or colours; expected one name for each class, got {args.classes!r}")
    options = TileOptions(args.size, args.field, names, args.background, args.val_share, args.nodata)
    done = tile_scene(args.scene, args.labels, args.out, options)
    print(f"classes: {'; '.join(done.class_names)}")
    for split, count in done.tiles.items():
        print(f"{split:>6} {count} tiles")
    if done.between or done.unlabelled:
        print(f"left out: {done.between} tiles between train and val, {done.unlabelled} without label or data")
    if "val" not in done.tiles:
        print("no tile is for validation: the scene is too small to split; --size makes smaller tiles")
    print(f"written: {done.folder}")
    print(f"next: drseg data check folder {args.out} --sheet {Path(args.out).name}.png")


def _prepare(args: Any) -> None:
    from drseg_core.data.prepare import Options, prepare

    options = Options(args.patch, args.stride, args.edges)
    done = prepare(args.set, args.raw, args.out, options=options, progress=True)
    for split, count in sorted(done.pairs.items()):
        print(f"{split:>6} {count} pairs")
    if done.unlabelled_splits:
        print(f"left out, no labels: {', '.join(done.unlabelled_splits)}")
    if done.too_small or done.unlabelled_patches:
        print(f"left out: {done.too_small} images too small, {done.unlabelled_patches} patches without a class")
    print(f"written: {done.folder} ({done.written} new pairs)")
    print(f"next: drseg data check {args.set} {args.out} --sheet {args.set}.png")


def _check(args: Any) -> None:
    from drseg_core.data.check import check_data, overlay_sheet
    from drseg_core.data.palette import save_png
    from drseg_core.files import write_text_atomic

    for path in (args.out, args.sheet):
        if path is not None:
            check_output(Path(path), overwrite=args.overwrite)
    if None not in (args.out, args.sheet) and Path(args.out).resolve() == Path(args.sheet).resolve():
        raise ConfigError(f"--sheet and --out are the same file; expected two files, got {args.sheet}")
    splits = [args.split] if args.split else ()
    report = check_data(args.set, args.root, splits=splits, reading=_reading(args), progress=True)
    content = report.as_dict()
    if args.out is not None:
        write_text_atomic(args.out, json.dumps(content, indent=1) + "\n")
    if args.sheet is not None and any(split.readable for split in report.splits.values()):
        save_png(args.sheet, overlay_sheet(report))
    _print(content)
    if report.problems:
        first = report.problems[0].message
        raise DatasetError(f"data check: {args.root} has {len(report.problems)} problems; the first: {first}")


def _reading(args: Any) -> Any:
    return given_reading(args, f"{args.set}:{args.root}")


def _print(content: dict[str, Any]) -> None:
    for name, split in content["splits"].items():
        sizes = ", ".join(f"{count} of {size}" for size, count in split["sizes"].items())
        print(f"{name}: {split['images']} images, {split['masks']} masks; {sizes or 'none readable'}")
        total = sum(split["pixels"].values()) + split["ignored_pixels"] + sum(split["other_ids"].values())
        rows = [*split["pixels"].items(), ("(ignored)", split["ignored_pixels"])]
        rows += [(f"(id {number}: no class)", count) for number, count in split["other_ids"].items()]
        for label, count in rows:
            print(f"  {label:<24} {100 * count / max(total, 1):6.2f} %")
    for home, state in content["manifests"].items():
        print(f"manifest of {home}: {state}")
    for word in ("problems", "warnings"):
        findings = content[word]
        for finding in findings[:20]:
            print(f"{word[:-1]}: {finding['kind']}: {finding['message']}")
        if len(findings) > 20:
            print(f"{word}: {len(findings) - 20} more (see --out)")
