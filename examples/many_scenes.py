# SPDX-License-Identifier: Apache-2.0
"""Maps of many scenes in one call that can be stopped and goes on where it was, the bad ones listed at the end.

    python examples/many_scenes.py scenes/ maps/ --classes "building; road; tree" --preset b

What ``drseg predict zero-shot scenes/ --out maps/ --keep-going`` does, in Python. Without arguments three scenes are
drawn, one of them no image, and mapped with random weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import drseg_core as drseg
from drseg_core.scenes.many import Outcome, map_scenes
from drseg_core.scenes.sources import list_scenes, with_outputs
from drseg_core.scenes.synthetic import write_synthetic_scene


def draw(folder: Path) -> str:
    """A folder of two scenes and a file that is none."""
    for seed in range(2):
        write_synthetic_scene(folder / f"{seed}.tif", width=120, height=90, seed=seed)
    (folder / "broken.tif").write_text("no image")
    return str(folder)


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="?", help="a folder, a pattern or @list.txt; drawn if there is none")
    parser.add_argument("out", nargs="?", help="folder of the maps; a temporary one by default")
    parser.add_argument("--classes", default="building; road; tree")
    parser.add_argument("--preset", default="tiny", help="b, l or tiny")
    args = parser.parse_args(arguments)
    scenes = args.scenes or draw(Path(tempfile.mkdtemp(prefix="scenes_")))
    out = args.out or tempfile.mkdtemp(prefix="maps_")
    # the model is read once; blocks of each scene are kept beside its map until all are done
    outcomes = map_scenes(
        drseg.zero_shot(args.preset).mapper(args.classes),
        with_outputs(list_scenes([scenes]), f"{out}/{{name}}.tif"),
        explain=lambda error: (str(error), 1),
        keep_going=True,
        progress=False,
    )
    for outcome in outcomes:
        print(f"{outcome.state}: {outcome.image}: {outcome.error or outcome.out}")
    return outcomes


if __name__ == "__main__":
    main()
