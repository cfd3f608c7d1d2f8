# SPDX-License-Identifier: Apache-2.0
"""``drseg predict``."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from drseg_core.cli import zero_shot
from drseg_core.cli.evaluate import add_speed_arguments, add_tile_arguments
from drseg_core.cli.parsers import Parser, add_reading_arguments, given_reading
from drseg_core.cli.scenes import IMAGE_HELP, OUT_HELP, add_many_arguments, check_scenes, given_scenes, map_and_say
from drseg_core.config.reading import parse_bands
from drseg_core.errors import ConfigError

USAGE = 'drseg predict RUN IMAGE [IMAGE ...] --out map.tif [--classes "building; field"] [options]'
EPILOG = """\
examples:
  drseg predict zero-shot scene.tif --classes "building; road; tree" --out map.tif
  drseg predict run scene.tif --classes "building; field; pavement" --out map.tif
  drseg predict run scene.tif --classes "road, parking lot#808080; roof#c83232" --threshold 0.3 --out map.tif
  drseg predict run scene.tif --classes @classes.txt --out map.tif
  drseg predict run scene.tif --out map.tif --scores --polygons map.gpkg --min-area 20
  drseg predict run photo.jpg --out map.tif --tile-size 256 --overlap 64
  drseg predict run scene.tif --out map.tif --precision auto --compile
  drseg predict run scenes/ "more/*.tif" @list.txt --out maps/{name}.tif --keep-going --report report.json
  torchrun --nproc-per-node 4 -m drseg_core predict run scenes/ --out maps/
  drseg predict run scenes/ --out maps/ --shard 3/20        # in a job array; then once without --shard

The first example maps without a trained run. drseg predict zero-shot --help lists its options.

Files written:
  map.tif              class raster (Cloud Optimized GeoTIFF) with a colour table
  map.tif.aux.xml      category names and attribute table
  map.qml              style for QGIS
  map_areas.csv        area of each class
  map_overlay.png      overlay with a legend
  map_uncertainty.tif  uncertainty of each pixel; scale and offset of its 8-bit values are in its metadata

An interrupted call goes on where it stopped. Finished blocks are kept in map.tif.work until all is written.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    if zero_shot.asked_for(argv):
        zero_shot.add_arguments(parser, argv)
        return
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument("run", type=str, metavar="RUN", help="run, checkpoint or model folder, or a name on the hub")
    parser.add_argument("image", type=str, nargs="+", metavar="IMAGE", help=IMAGE_HELP)
    classes = parser.add_argument_group("classes")
    classes.add_argument(
        "--classes",
        type=str | None,
        metavar="NAMES|@FILE",
        help='"building; field", "road, parking lot#808080; roof" (synonyms, colour) or @classes.txt; '
        "by default those of the run",
    )
    classes.add_argument(
        "--threshold", type=float | None, metavar="T", help='pixels whose best score is below T become "other"'
    )
    add_map_arguments(parser, default="by default as in training")
    _add_running_arguments(parser)


def add_map_arguments(parser: Parser, *, default: str) -> None:
    """What is written, and how scenes are read; ``default`` says where the scale comes from."""
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, type=str, metavar="FILE", help=OUT_HELP)
    output.add_argument(
        "--overwrite", action="store_true", help="replace existing outputs, and remove other files of that map"
    )
    output.add_argument("--scores", action="store_true", help="also write the score of the best class of each pixel")
    output.add_argument("--probabilities", action="store_true", help="also write the scores of all classes")
    output.add_argument(
        "--polygons", type=str | None, metavar="FILE", help="also write polygons (.gpkg, .geojson or .parquet)"
    )
    output.add_argument(
        "--min-area", type=float, default=0.0, metavar="M2", help="smaller areas join a neighbour in the polygons"
    )
    output.add_argument(
        "--view", action="store_true", help="also write a web page of the map (.html); takes about as long again"
    )
    reading = add_reading_arguments(parser, default=default)
    reading.add_argument(
        "--gsd", type=float | None, metavar="M", help="pixel size in metres for reading and mapping; by default its own"
    )
    reading.add_argument("--aoi", type=str | None, metavar="FILE", help="map only the part inside these polygons")
    add_many_arguments(parser)


def _add_running_arguments(parser: Parser) -> None:
    running = parser.add_argument_group("how it runs")
    running.add_argument(
        "--mode", type=Literal["whole", "tile"], default="tile", help="tiles at native resolution, or the whole image"
    )
    add_tile_arguments(running)
    add_speed_arguments(running)
    running.add_argument(
        "--dry-run", action="store_true", help="print size, tiles, bands, memory and time, and write nothing"
    )
    running.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda, cuda:N or mps")


def run(args: Any) -> None:
    if zero_shot.asked_for([args.run]):
        zero_shot.run(args)
        return
    if re.sub("[-_ ]", "", args.run.casefold()).startswith("zeroshot") and not Path(args.run).exists():
        known = "zero-shot, zero-shot:b, :l, :tiny or :FILE"
        raise ConfigError(f"predict: RUN is no folder; expected {known}, got {args.run!r}")
    reading = given_reading(args)
    scenes = given_scenes(args)
    from drseg_core.checkpoints.pretrained import load
    from drseg_core.data.vocabulary import class_files, parse_classes
    from drseg_core.scenes.predict import plan, run_mapper

    if not args.dry_run:
        check_scenes(args, scenes, [args.aoi, *class_files(args.classes or "")])
    classes = None if args.classes is None else parse_classes(args.classes)
    if classes is not None:
        print(f"classes: {classes.text()}")

    options = {
        "classes": classes,
        "bands": None if reading.bands is None else parse_bands(reading.bands),
        "nodata": reading.nodata,
        "scale": reading.scale,
        "gsd": args.gsd,
        "aoi": args.aoi,
        "mode": args.mode,
        "tile_size": args.tile_size,
        "overlap": args.overlap,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "compiled": args.compile,
        "scores": args.scores,
        "probabilities": args.probabilities,
    }
    if args.dry_run:
        model = args.run if len(scenes) == 1 else load(args.run)
        for scene in scenes:
            if len(scenes) > 1:
                print(f"{scene.image}:")
            print(plan(model, scene.image, polygons=scene.polygons, device=args.device, **options).text())
        return
    options |= {"threshold": args.threshold, "min_area": args.min_area}
    map_and_say(args, scenes, functools.partial(run_mapper, args.run, **options))


def areas_text(table: str) -> str:
    """The table of areas as text."""
    rows = list(csv.DictReader(io.StringIO(table)))
    present = [row for row in rows if int(row["pixels"])]
    absent = [row["class"] for row in rows if not int(row["pixels"])]
    width = max((len(row["class"]) for row in present), default=5)
    known = any(row["area_m2"] for row in present)
    lines = [f"area of each class ({present[0]['method']}):" if known else "share of each class:"] if present else []
    for row in present:
        area = f" {float(row['area_m2']):>16,.1f} m2" if row["area_m2"] else f" {int(row['pixels']):>12,} pixels"
        lines.append(f"  {row['class']:<{width}}{area} {float(row['percent']):6.2f} %")
    if present and absent:
        lines.append(f"  no pixel: {'; '.join(absent)}")
    return "\n".join(lines) or "no pixel has a class"
