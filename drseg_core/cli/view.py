# SPDX-License-Identifier: Apache-2.0
"""``drseg view``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drseg_core.cli.evaluate import add_tile_arguments
from drseg_core.cli.parsers import Parser, add_reading_arguments, check_output, given_reading
from drseg_core.config.reading import choose_reading, parse_reading
from drseg_core.errors import ConfigError, DRSegError

if TYPE_CHECKING:
    from drseg_core.scenes.many import Outcome
    from drseg_core.scenes.predict import Mapper
    from drseg_core.view.page import Page

USAGE = "drseg view MAP [--image IMAGE] [--run RUN] [--out map.html] [options]"
EPILOG = """\
examples:
  drseg view map.tif --image scene.tif
  drseg view map.tif --image scene.tif --run run --out map.html

Written: one HTML file with everything in it, which opens without a server or a network: the image, the classes with the
area of each, uncertainty, scores and probabilities where they lie beside the map, down to native pixels. With --run the
model looks at the scene once more, and the page has the original and the refined correlation of each class, and of a
pixel that is clicked the neighbours in the graph with their weights and coefficients. What does not fit into --max-mb
is sampled, and that is said. drseg predict --view writes such a page too, also of a map from words.
"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument("map", type=str, metavar="MAP", help="class raster of drseg predict")
    parser.add_argument("--image", type=str | None, metavar="IMAGE", help="the scene of the map")
    parser.add_argument(
        "--run",
        type=str | None,
        metavar="RUN",
        help="the run of the map, for graph and correlations; needs --image",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=str | None, metavar="FILE", help="page to write (.html); beside the map by default"
    )
    output.add_argument("--overwrite", action="store_true", help="replace a page that exists")
    output.add_argument("--max-mb", type=float, default=60.0, metavar="N", help="size of the page in millions of bytes")
    add_reading_arguments(parser, default="by default as in training, or auto")
    running = parser.add_argument_group("how the run looks at the scene (as it made the map)")
    running.add_argument(
        "--mode", type=Literal["whole", "tile"], default="tile", help="tiles at native resolution, or the whole image"
    )
    add_tile_arguments(running)
    running.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda, cuda:N or mps")


def run(args: Any) -> None:
    from drseg_core.cli.zero_shot import asked_for
    from drseg_core.view.page import page_path

    out = check_page(args.out or page_path(args.map), overwrite=args.overwrite, inputs=[args.map, args.image])
    if args.run is not None and args.image is None:
        raise ConfigError("view: --run needs the scene; expected --image too")
    if args.run is not None and asked_for([args.run]):
        raise ConfigError(
            f"view: --run is not a run; expected one, got {args.run}: drseg predict {args.run} --view has it"
        )
    if args.max_mb <= 0:
        raise ConfigError(f"view: --max-mb is out of range; expected more than 0, got {args.max_mb}")
    given, beneath = given_reading(args), None
    from drseg_core.view.page import write_page

    if args.run is not None:
        from drseg_core.extras import require

        require("view", "model")
        from drseg_core.checkpoints.pretrained import load
        from drseg_core.view.of_run import of_run

        loaded = load(args.run)
        given = choose_reading(loaded.config.reading, given)
        tiles = {name: getattr(args, name) for name in ("mode", "tile_size", "overlap", "batch_size")}
        beneath = of_run(loaded, device=args.device, **tiles)
    place = {"image": args.image, "reading": parse_reading(given)}
    say_page(write_page(args.map, out, beneath=beneath, max_mb=args.max_mb, **place))


def check_page(out: str | Path, *, overwrite: bool, inputs: Sequence[str | Path | None]) -> Path:
    """The path of a page, if it may be written.

    Raises:
        ConfigError: it may not.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out has a wrong suffix; expected a path ending in .html, got {path}")
    check_output(path, overwrite=overwrite, inputs=[Path(name) for name in inputs if name is not None])
    return path


def write_pages(mapper: Mapper, outcomes: Sequence[Outcome], *, keep_going: bool = False) -> list[str]:
    """The page of each map that a call has made, beside it; with ``keep_going`` returns why some are missing."""
    from drseg_core.view.beneath import beneath_of
    from drseg_core.view.page import write_page

    failed = []
    for outcome in outcomes:
        beneath = beneath_of(mapper.predictor)
        try:
            say_page(write_page(outcome.out, image=outcome.image, beneath=beneath, **mapper.reading))
        except DRSegError as error:
            if not keep_going:
                raise
            failed.append(f"the page of {outcome.out}: {error}")
    return failed


def say_page(page: Page) -> None:
    """What was sampled, and where the page is."""
    for note in page.notes:
        print(note)
    print(f"written: {page.path} ({page.size / 1e6:.1f} MB)")
