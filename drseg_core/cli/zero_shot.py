# SPDX-License-Identifier: Apache-2.0
"""``drseg predict zero-shot``: a map from words alone."""

from __future__ import annotations

import functools
import os
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from drseg_core.cli.parsers import Parser, given_reading
from drseg_core.cli.scenes import IMAGE_HELP, check_scenes, given_scenes, map_and_say
from drseg_core.config.reading import parse_bands
from drseg_core.errors import ConfigError

NAME = "zero-shot"
USAGE = 'drseg predict zero-shot[:b|:l|:tiny|:FILE] IMAGE [IMAGE ...] --classes "road; tree" --out map.tif [options]'
EPILOG = """\
examples:
  drseg predict zero-shot scene.tif --classes "building; road; tree" --out map.tif
  drseg predict zero-shot:l scene.tif --classes "roof; car, lorry; tree" --background "sky; wall" --out map.tif
  drseg predict zero-shot scene.tif --classes @classes.txt --clip clip.safetensors --prior none --out map.tif --offline
  drseg predict zero-shot scene.tif --classes "building; road" --out map.tif --dry-run

Nothing is trained. zero-shot is zero-shot:b, CLIP ViT-B/16 with a DINOv3 ViT-B/16 prior; zero-shot:l has ViT-L/14 at
336 pixels and the satellite DINOv3 ViT-L/16; zero-shot:FILE reads a preset of your own. The prior's cells of all
windows make one graph, over which CLIP's logits spread. Weights come from the hub's cache, else from the hub, or from
files. Written is what drseg predict RUN writes; hashes of the weights and all options are in the map's metadata.
"""
# options of the configuration by the same name
_OPTIONS = (
    *("variant", "rotations", "window", "overlap", "batch_size"),
    *("k", "gamma", "decay", "decay_per_metre", "radius", "radius_metres", "select", "alpha", "steps", "logit_scale"),
    *("max_cells", "super_tile", "refine"),
)


def asked_for(words: Sequence[str]) -> bool:
    """Whether a command line is one of this module's."""
    return any(word == NAME or word.startswith(f"{NAME}:") for word in words)


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    from drseg_core.cli.predict import add_map_arguments
    from drseg_core.config.zero_shot import VARIANTS

    parser.usage, parser.epilog = USAGE, EPILOG
    parser.add_argument(
        "run",
        type=str,
        metavar="PRESET",
        help="zero-shot, zero-shot:b, zero-shot:l or zero-shot:FILE; zero-shot:tiny only tries the command",
    )
    parser.add_argument("image", type=str, nargs="+", metavar="IMAGE", help=IMAGE_HELP)
    classes = parser.add_argument_group("classes")
    classes.add_argument(
        "--classes",
        required=True,
        type=str,
        metavar="NAMES|@FILE",
        help='"building; field", "road, parking lot#808080; roof" (synonyms, colour) or @classes.txt',
    )
    classes.add_argument(
        "--background",
        type=str | None,
        metavar="WORDS|@FILE",
        help='words of one more class, called "background", such as "sky; wall"',
    )
    classes.add_argument(
        "--templates",
        type=str | None,
        metavar="TEXTS|@FILE",
        help='sentences with {} in place of a word, such as "a photo of a {}; a {} from above"; ten by default',
    )
    classes.add_argument(
        "--threshold", type=float | None, metavar="T", help='pixels whose best score is below T become "other"'
    )
    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--clip",
        type=str | None,
        metavar="FILE|NAME",
        help="a file, hub:owner/name/file, a tag or architecture of open_clip, ARCHITECTURE:FILE, or random (only to "
        "try the command: the map means nothing)",
    )
    weights.add_argument(
        "--prior",
        type=str | None,
        metavar="FILE|NAME",
        help="a file, hub:owner/name/file, an architecture of timm, ARCHITECTURE:FILE, none (no graph), or random",
    )
    weights.add_argument(
        "--prior-layer",
        type=int | None,
        metavar="N",
        help="block, from 0, whose features are taken; last by default",
    )
    weights.add_argument("--offline", action="store_true", help="never connect to a network")
    add_map_arguments(parser, default="by default 8-bit values stay, and others are as with auto")
    running = parser.add_argument_group("how it runs (the preset's by default)")
    running.add_argument("--variant", type=str | None, metavar="NAME", help=f"dense features: {', '.join(VARIANTS)}")
    running.add_argument("--rotations", type=int | None, metavar="N", help="1, or 4 for the mean over quarter turns")
    running.add_argument("--window", type=int | None, metavar="N", help="side of a window in pixels")
    running.add_argument("--overlap", type=int | None, metavar="N", help="pixels shared by neighbouring windows")
    running.add_argument("--batch-size", type=int | None, metavar="N", help="windows per forward pass")
    running.add_argument("--device", type=str | None, metavar="DEVICE", help="cpu, cuda, cuda:N or mps")
    running.add_argument("--dry-run", action="store_true", help="print cells, memory and time, and write nothing")
    graph = parser.add_argument_group("graph of the scene (the preset's by default)")
    graph.add_argument("--k", type=int | None, metavar="N", help="neighbours of a cell")
    graph.add_argument("--gamma", type=float | None, metavar="V", help="exponent of the prior's cosine")
    graph.add_argument("--decay", type=float | None, metavar="V", help="spatial decay for each cell of distance")
    graph.add_argument("--decay-per-metre", type=float | None, metavar="V", help="decay for each metre")
    graph.add_argument("--radius", type=float | None, metavar="V", help="largest distance of neighbours in cells")
    graph.add_argument("--radius-metres", type=float | None, metavar="V", help="the radius in metres")
    graph.add_argument(
        "--select",
        type=Literal["affinity", "cosine"] | None,
        metavar="WORD",
        help="choose neighbours by the whole weight (affinity), or by the cosine alone",
    )
    graph.add_argument("--alpha", type=float | None, metavar="V", help="share of the neighbours, below 1")
    graph.add_argument(
        "--steps",
        type=int | None,
        metavar="N",
        help="steps of propagation; 0 for no graph; by default it is solved to the end",
    )
    graph.add_argument(
        "--refine",
        action=BooleanOptionalAction,
        default=None,
        help="also spread the logits over pixels of like colour; off by default",
    )
    graph.add_argument("--logit-scale", type=float | None, metavar="V", help="factor of the cosines in scores")
    graph.add_argument("--max-cells", type=int | None, metavar="N", help="most cells of one graph; more are refused")
    graph.add_argument(
        "--super-tile",
        type=int | None,
        metavar="CELLS",
        help="with --radius and --steps, a larger scene is mapped in overlapping parts of at most CELLS, and the map "
        "is the same; 262144 by default, about 2 GB",
    )


def run(args: Any) -> None:
    reading = given_reading(args)
    if args.run != NAME and not args.run.startswith(f"{NAME}:"):
        raise ConfigError(f"predict: PRESET comes first; expected zero-shot, :b, :l or :FILE, got {args.run!r}")
    scenes = given_scenes(args)
    from drseg_core.data.vocabulary import class_files, parse_classes
    from drseg_core.models.prompts import AERIAL_TEMPLATES
    from drseg_core.scenes.polygons import check_degrees
    from drseg_core.scenes.predict import check_threshold
    from drseg_core.scenes.reader import open_scene
    from drseg_core.scenes.zero_shot import check_metres, check_words, configured, zero_shot

    if not args.dry_run:
        # before gigabytes are fetched for nothing
        check_scenes(args, scenes, [args.aoi, *class_files(args.classes)])
    classes = parse_classes(args.classes)
    print(f"classes: {classes.text()}")
    options: dict[str, Any] = {
        "bands": None if reading.bands is None else parse_bands(reading.bands),
        "nodata": reading.nodata,
        "scale": reading.scale,
        "gsd": args.gsd,
        "aoi": args.aoi,
    }
    options["background"] = listed("--background", args.background)
    options["templates"] = AERIAL_TEMPLATES if args.templates is None else listed("--templates", args.templates)
    preset = args.run.partition(":")[2] or "b"
    chosen = {name: getattr(args, name) for name in ("clip", "prior", "prior_layer", *_OPTIONS)}
    # what cannot be mapped needs no weights
    check_threshold("predict", args.threshold)
    check_words(classes, options["background"], options["templates"])
    config = configured(preset, **chosen)
    for scene in () if args.keep_going else scenes:
        with open_scene(scene.image, gsd=args.gsd, aoi=args.aoi) as opened:
            check_metres(config, opened)
            if scene.polygons is not None:
                check_degrees(scene.polygons, opened)

    loaded = functools.partial(zero_shot, preset, offline=args.offline, **chosen)
    if args.dry_run:
        mapper = loaded(device=args.device)
        _say_facts(mapper.facts)
        for scene in scenes:
            if len(scenes) > 1:
                print(f"{scene.image}:")
            print(mapper.plan(scene.image, classes, **options).text())
        return
    options |= {"scores": args.scores, "probabilities": args.probabilities}
    options |= {"threshold": args.threshold, "min_area": args.min_area}
    facts = map_and_say(args, scenes, functools.partial(_words_mapper, loaded, classes, options)).facts
    if "random weights" in facts["clip"]:
        print("CLIP has random weights: this map means nothing")


def _words_mapper(loaded: Callable[..., Any], classes: Any, options: dict[str, Any], *, device: str | None) -> Any:
    found = loaded(device=device)
    if os.environ.get("RANK", "0") == "0":
        _say_facts(found.facts)
    return found.mapper(classes, **options)


def _say_facts(facts: dict[str, str]) -> None:
    for name, text in facts.items():
        print(f"{name}: {text}")


def listed(option: str, text: str | None) -> list[str]:
    """Items of ``"a; b"``, or the lines of ``@FILE`` but for those that begin with ``#``.

    Raises:
        ConfigError: no item, or a file that cannot be read.
    """
    if text is None:
        return []
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{option} names no file of UTF-8 text; expected one item a line: {reason}") from None
        text = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))
    found = [" ".join(item.split()) for item in text.replace("\n", ";").split(";") if item.strip()]
    if not found:
        raise ConfigError(f"{option} is empty; expected items with ; between them")
    return found
