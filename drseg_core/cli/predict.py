# SPDX-License-Identifier: Apache-2.0
"""``drseg predict``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from drseg_core.cli.evaluate import add_tile_arguments
from drseg_core.cli.parsers import Parser, add_reading_arguments, check_output, given_reading
from drseg_core.config.reading import parse_bands

USAGE = 'drseg predict RUN IMAGE --out map.tif [--classes "building; field"] [options]'
EPILOG = """\
examples:
  drseg predict run scene.tif --classes "building; field; pavement" --out map.tif
  drseg predict run scene.tif --classes "road, parking lot#808080; roof#c83232" --threshold 0.3 --out map.tif
  drseg predict run scene.tif --classes @classes.txt --out map.tif
  drseg predict run photo.jpg --out map.tif --tile-size 256 --overlap 64

Written: the class raster --out with CRS, transform, colour table and class names; an overlay with a legend
(map_overlay.png); the uncertainty of each pixel (map_uncertainty.tif).
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument("run", type=str, metavar="RUN", help="run, checkpoint or model folder, or a name on the hub")
    parser.add_argument("image", type=str, metavar="IMAGE", help="GeoTIFF, PNG or JPEG of any size")
    parser.add_argument("--out", required=True, type=str, metavar="FILE", help="class raster to write (.tif)")
    parser.add_argument(
        "--classes",
        type=str | None,
        metavar="NAMES|@FILE",
        help='"building; field", "road, parking lot#808080; roof" (synonyms, colour) or @classes.txt; '
        "the run's by default",
    )
    parser.add_argument(
        "--threshold", type=float | None, metavar="T", help='pixels whose best score is below T become "other"'
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument(
        "--mode", type=Literal["whole", "tile"], default="tile", help="tiles at native resolution, or the whole image"
    )
    add_tile_arguments(parser)
    add_reading_arguments(parser, default="what the run was trained with by default")
    parser.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda or cuda:N")


def run(args: Any) -> None:
    out, image = Path(args.out), Path(args.image)
    reading = given_reading(args)
    check_output(out, overwrite=args.overwrite, inputs=[image])
    from drseg_core.data.vocabulary import parse_classes
    from drseg_core.scenes.predict import predict

    classes = None if args.classes is None else parse_classes(args.classes)
    if classes is not None:
        print(f"classes: {classes.text()}")

    for path in predict(
        args.run,
        image,
        classes=classes,
        threshold=args.threshold,
        out=out,
        overwrite=args.overwrite,
        bands=None if reading.bands is None else parse_bands(reading.bands),
        nodata=reading.nodata,
        scale=reading.scale,
        mode=args.mode,
        tile_size=args.tile_size,
        overlap=args.overlap,
        batch_size=args.batch_size,
        device=args.device,
    ):
        print(f"written: {path}")
