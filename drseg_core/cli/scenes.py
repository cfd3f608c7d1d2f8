# SPDX-License-Identifier: Apache-2.0
"""What ``drseg predict`` says and does about one scene or many, whatever the model."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drseg_core.cli.failures import failure
from drseg_core.cli.parsers import check_output
from drseg_core.cli.view import check_page, write_pages
from drseg_core.errors import ConfigError, DRSegError, RasterError

if TYPE_CHECKING:
    from drseg_core.scenes.many import Outcome, Shard
    from drseg_core.scenes.predict import Mapper
    from drseg_core.scenes.sources import Scene

IMAGE_HELP = (
    "GeoTIFF, PNG or JPEG of any size, VRT, folder, glob, STAC items (.json), or @FILE (one of these a line); one or "
    "several"
)
OUT_HELP = "class raster to write (.tif); for several scenes a folder, or a pattern with {name}, {number} or {folder}"


def add_many_arguments(parser: Any) -> None:
    """Options of calls over many scenes, or by many processes."""
    many = parser.add_argument_group("many scenes, many processes")
    many.add_argument("--keep-going", action="store_true", help="list scenes that fail (exit code 8), map the others")
    many.add_argument("--report", type=str | None, metavar="FILE", help="JSON file with the outcome of each scene")
    many.add_argument(
        "--shard",
        type=str | None,
        metavar="I/N",
        help="make only part I of N of the blocks, for job arrays; a last call without it writes the maps",
    )
    many.add_argument(
        "--cluster",
        type=str | None,
        metavar="ADDRESS|N",
        help="make the blocks on the workers of a Dask scheduler (tcp://HOST:PORT), or in N processes here",
    )
    many.add_argument(
        "--mosaic",
        type=Literal["blend", "apart"],
        default="blend",
        help="blend maps of scenes that overlap on one grid, so that they agree there, or leave each as it is",
    )
    many.add_argument("--asset", type=str | None, metavar="KEY", help="key of the image in STAC items")
    many.add_argument(
        "--remote",
        action="store_true",
        help="allow scenes on a network: addresses that begin with https://, http:// or s3://",
    )


def given_scenes(args: Any) -> list[Scene]:
    """The scenes of the command line, each with the place of its map.

    Raises:
        ConfigError: they cannot be shared out as asked, or have no place for their maps.
    """
    from drseg_core.scenes.polygons import check_min_area
    from drseg_core.scenes.sources import list_scenes, with_outputs

    given_shard(args)
    if args.cluster is not None and (args.shard is not None or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise ConfigError("--cluster makes all blocks; expected neither --shard nor torchrun beside it")
    check_min_area("predict", args.min_area, args.polygons)
    scenes = list_scenes(args.image, asset=args.asset, remote=args.remote)
    return with_outputs(scenes, args.out, args.polygons)


def given_shard(args: Any) -> Shard | None:
    """The part of ``--shard``, if there is one."""
    from drseg_core.scenes.many import Shard

    return None if args.shard is None else Shard.of(args.shard)


def check_scenes(args: Any, scenes: Sequence[Scene], inputs: Sequence[str | Path | None]) -> None:
    """Refuse what cannot be written, before any work is done; with ``--keep-going`` it is listed with other failures.

    Raises:
        ConfigError: an output exists or cannot be written.
        RasterError: one of several scenes is not a file.
    """
    from drseg_core.scenes.block_store import is_complete, work_folder
    from drseg_core.scenes.files import check_input_stays, check_outputs, scene_files
    from drseg_core.view.page import page_path

    report = None if args.report is None else Path(args.report)
    if report is not None:
        if report.is_dir() or not report.absolute().parent.is_dir():
            raise ConfigError(f"--report is not writable; expected a file in a folder that exists, got {report}")
        also = {"scores": args.scores, "probabilities": args.probabilities}
        outputs = [scene_files(str(scene.out), polygons=scene.polygons, **also).present() for scene in scenes]
        pages = [page_path(str(scene.out)) for scene in scenes if args.view]
        taken = [*(scene.image for scene in scenes), *inputs, *itertools.chain(*outputs), *pages]
        check_input_stays(report, taken, "--report is an input or a map")

    def overwrites(scene: Scene) -> bool:
        # an interrupted call goes on; its blocks tell later whether these are its files
        out = Path(str(scene.out))
        return args.overwrite or work_folder(out).is_dir() or is_complete(work_folder(str(scenes[0].out)), out)

    for scene in scenes if args.view else ():
        check_page(page_path(str(scene.out)), overwrite=overwrites(scene), inputs=[scene.image, *inputs])
    if args.keep_going:
        return
    for scene in scenes:
        if len(scenes) > 1 and not scene.image.startswith("/vsi") and not Path(scene.image).is_file():
            raise RasterError(f"predict: {scene.image} is not a file; expected an image (--keep-going maps the others)")
        out = Path(str(scene.out))
        overwrite = overwrites(scene)
        check_output(out, overwrite=overwrite, inputs=[Path(scene.image)])
        check_outputs(
            scene.image,
            out,
            overwrite=overwrite,
            inputs=inputs,
            scores=args.scores,
            probabilities=args.probabilities,
            polygons=scene.polygons,
        )


def map_and_say(args: Any, scenes: Sequence[Scene], recipe: Callable[..., Mapper]) -> Mapper:
    """Map the scenes with the mapper that ``recipe(device=)`` makes, say what became of them, and return it.

    Raises:
        DRSegError: some scenes failed (exit code 8).
    """
    from drseg_core.scenes.cluster import open_cluster
    from drseg_core.scenes.many import map_scenes
    from drseg_core.training.distributed import process_group

    with contextlib.ExitStack() as stack:
        group = stack.enter_context(process_group(args.device, patient=True))
        cluster = None
        if args.cluster is not None:
            workers = functools.partial(recipe, device=args.device)
            cluster = stack.enter_context(open_cluster(args.cluster, workers))
        together = group.world_size > 1
        many, unpaged = len(scenes) > 1, list[str]()

        def done(outcome: Outcome) -> None:
            if many and not together:
                _say(outcome)

        def finish(outcomes: Sequence[Outcome]) -> None:
            for outcome in outcomes if many and together else ():
                _say(outcome)
            if not many and outcomes[0].error is None:
                _say_one(outcomes[0])
            if args.view:
                mapped = [outcome for outcome in outcomes if outcome.state == "mapped"]
                unpaged.extend(write_pages(mapper, mapped, keep_going=args.keep_going))

        mapper = recipe(device=str(group.device) if together else args.device)
        outcomes = map_scenes(
            mapper,
            scenes,
            explain=lambda error: failure(error, "predict"),
            processes=group,
            shard=given_shard(args),
            cluster=cluster,
            mosaic=args.mosaic == "blend",
            keep_going=args.keep_going,
            overwrite=args.overwrite,
            report=None if args.report is None else Path(args.report),
            done=done,
            finish=finish,
            progress=group.is_main,
        )
        if not group.is_main:
            return mapper
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if many:
        word = "mapped" if args.shard is None else f"shard {args.shard} made of"
        print(f"{word}: {len(outcomes) - len(failed)} of {len(outcomes)} scenes")
    if args.report is not None:
        print(f"written: {args.report}")
    for words in unpaged:
        print(f"failed: {words}", file=sys.stderr)
    if failed:
        if not many:
            _say(failed[0])
        error = DRSegError(f"predict: {len(failed)} of {len(outcomes)} scenes failed: {failed[0].image}, ...")
        error.exit_code = 8
        raise error
    if unpaged:
        error = DRSegError(f"predict: {len(unpaged)} pages of {len(outcomes)} maps failed; {unpaged[0]}")
        error.exit_code = 8
        raise error
    return mapper


def _say(outcome: Outcome) -> None:
    if outcome.error is not None:
        print(f"failed: {outcome.image}: {outcome.error.removeprefix('drseg: error: ')}", file=sys.stderr)
    elif outcome.state == "mapped":
        print(f"mapped: {outcome.image} -> {outcome.out}", flush=True)


def _say_one(outcome: Outcome) -> None:
    from drseg_core.cli.predict import areas_text

    if outcome.state != "mapped":
        print(f"made: blocks beside {outcome.out}")
        return
    areas = next(name for name in outcome.files if name.endswith("_areas.csv"))
    print(areas_text(Path(areas).read_text(encoding="utf-8")))
    for name in outcome.files:
        print(f"written: {name}")
