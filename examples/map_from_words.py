# SPDX-License-Identifier: Apache-2.0
"""A map of an aerial image from class names, without training.

    python examples/map_from_words.py scene.tif "building; road; tree" map.tif --preset b

Preset ``b`` is CLIP ViT-B/16 with DINOv3 for the graph; their weights are fetched once. Without arguments a scene is
drawn and mapped with ``tiny``, whose random weights need no network and mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import drseg_core as drseg
from drseg_core.scenes.synthetic import write_synthetic_scene


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", nargs="?", help="GeoTIFF, PNG or JPEG; drawn if there is none")
    parser.add_argument("classes", nargs="?", default="building, roof; road; tree", help="names; commas part synonyms")
    parser.add_argument("out", nargs="?", help="class raster to write; a temporary one by default")
    parser.add_argument("--preset", default="tiny", help="b, l or tiny")
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="map_from_words_"))
    scene = args.scene or write_synthetic_scene(folder / "scene.tif", width=160, height=120)
    found = drseg.zero_shot(args.preset).predict(scene, args.classes, out=args.out or folder / "map.tif")
    print(f"{found.class_index.shape[1]} x {found.class_index.shape[0]} pixels")
    print(found.files.areas.read_text(encoding="utf-8"))
    print("written:", *found.files.present())
    return found.files.classes


if __name__ == "__main__":
    main()
