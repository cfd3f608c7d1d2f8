# SPDX-License-Identifier: Apache-2.0
"""Where images and labels are in the original archives of each set, and how the labels are coded.

Files are found by the end of their path, whatever the case, so it does not matter how the archives are nested or
where they are unpacked. Of several label patterns the first that finds anything counts. A split whose labels are not
public is left out.

What is written, and where it comes from:

* DLRSD: the 2,100 photographs of UC Merced, ids 1 to 17 turned into 0 to 16. The makers published no split, and the
  benchmark's is only in its release: here every fifth photograph of a scene class is ``val``.
* iSAID: DOTA's images with iSAID's colour masks, 256 x 256 patches. What has no class (black) is 255; patches without
  any class are left out. The release leaves out more, by a rule that was never published.
* Potsdam, Vaihingen: 256 x 256 patches side by side, what remains at the edges left out: 38 tiles of 6000 x 6000 give
  20,102, the number the release is said to have. ``val`` is the contest's test areas. Eroded borders (black) are 255.
* LoveDA, UDD5, VDD: ids as they are. UAVid: colours turned into ids. Their images stay whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from drseg_core.data.benchmarks import Color
from drseg_core.data.manifest import printable
from drseg_core.data.pairs import some
from drseg_core.errors import DatasetError

Groups = Mapping[str, str]

_POTSDAM_TEST = frozenset("2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13".split())
_VAIHINGEN_TEST = frozenset("2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38".split())


def _named_split(groups: Groups) -> str:
    return groups["split"].lower()


@dataclass(frozen=True)
class Recipe:
    """How to find and read the original files of one set.

    Args:
        image: pattern of an image's relative path; its named groups make ``key`` and the split.
        labels: patterns of a label's path, the preferred first.
        key: name of the pair, a format of the groups.
        coding: labels hold ``ids`` (one band) or ``colors`` (the set's palette); ``either`` goes by the bands.
        split: split from the groups of an image.
        first_id: id of the first class.
        ignored_ids: further ids that mean ignore, besides 255.
        ignored_colors: colours that mean ignore.
        patch: side of the patches that images are cut into; None leaves them whole.
        keep_unlabelled: keep patches without any class.
    """

    image: str
    labels: tuple[str, ...]
    key: str = "{key}"
    coding: Literal["ids", "colors", "either"] = "ids"
    split: Callable[[Groups], str] = _named_split
    first_id: int = 0
    ignored_ids: tuple[int, ...] = ()
    ignored_colors: tuple[Color, ...] = ()
    patch: int | None = None
    keep_unlabelled: bool = True


RECIPES: dict[str, Recipe] = {
    "dlrsd": Recipe(
        r"(^|/)images/[a-z]+/(?P<key>[a-z]+(?P<number>\d+))\.(tif|png|jpg)$",
        (r"(^|/)labels/[a-z]+/(?P<key>[a-z]+\d+)\.png$",),
        split=lambda groups: "val" if int(groups["number"]) % 5 == 4 else "train",
        first_id=1,
        ignored_ids=(0,),
    ),
    "isaid": Recipe(
        r"(^|/)(?P<split>train|val)/([^/]+/)*(?P<key>p\d+)\.png$",
        (r"(^|/)(?P<split>train|val)/([^/]+/)*(?P<key>p\d+)_instance_color_rgb\.png$",),
        coding="colors",
        ignored_colors=((0, 0, 0),),
        patch=256,
        keep_unlabelled=False,
    ),
    "potsdam": Recipe(
        r"(^|/)top_potsdam_(?P<key>\d+_\d+)_rgb\.tif$",
        (r"(^|/)top_potsdam_(?P<key>\d+_\d+)_label\.tif$", r"(^|/)top_potsdam_(?P<key>\d+_\d+)_label_noboundary\.tif$"),
        key="potsdam_{key}",
        coding="colors",
        split=lambda groups: "val" if groups["key"] in _POTSDAM_TEST else "train",
        ignored_colors=((0, 0, 0),),
        patch=256,
    ),
    "vaihingen": Recipe(
        r"(^|/)top/top_mosaic_09cm_area(?P<key>\d+)\.tif$",
        (
            r"(^|/)[^/]*ground_truth_complete/([^/]+/)*top_mosaic_09cm_area(?P<key>\d+)\.tif$",
            r"(^|/)gts[^/]*/top_mosaic_09cm_area(?P<key>\d+)\.tif$",
            r"(^|/)top_mosaic_09cm_area(?P<key>\d+)_noboundary\.tif$",
        ),
        key="vaihingen_area{key}",
        coding="colors",
        split=lambda groups: "val" if groups["key"] in _VAIHINGEN_TEST else "train",
        ignored_colors=((0, 0, 0),),
        patch=256,
    ),
    "loveda": Recipe(
        r"(^|/)(?P<split>train|val)/(rural|urban)/images_png/(?P<key>\d+)\.png$",
        (r"(^|/)(?P<split>train|val)/(rural|urban)/masks_png/(?P<key>\d+)\.png$",),
    ),
    "uavid": Recipe(
        r"(^|/)(uavid_)?(?P<split>train|val|test)/(?P<sequence>seq\d+)/images/(?P<frame>\d+)\.png$",
        (r"(^|/)(uavid_)?(?P<split>train|val|test)/(?P<sequence>seq\d+)/labels/(?P<frame>\d+)\.png$",),
        key="{sequence}_{frame}",
        coding="colors",
    ),
    "udd5": Recipe(
        r"^(?!.*(udd-?6|vdd))(.*/)?(?P<split>train|val)/src/(?P<key>[^/]+)\.(jpg|jpeg)$",
        (r"^(?!.*(udd-?6|vdd))(.*/)?(?P<split>train|val)/gt/(?P<key>[^/]+)\.png$",),
        coding="either",
    ),
    "vdd": Recipe(
        r"^(?!.*udd)(.*/)?(?P<split>train|val|test)/src/(?P<key>[^/]+)\.(jpg|jpeg)$",
        (r"^(?!.*udd)(.*/)?(?P<split>train|val|test)/gt/(?P<key>[^/]+)\.png$",),
        coding="either",
    ),
}
"""How each set's original files are read."""


class RawPair(NamedTuple):
    """An image, its label, the split they belong to and the name they get."""

    split: str
    key: str
    image: Path
    label: Path


def list_tree(folder: Path, *, skip: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Every file below a folder with its path relative to it, in order; linked folders are not entered.

    Args:
        folder: where to look.
        skip: a folder to leave out.
    """
    for place, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if skip is None or Path(place, name) != skip)
        for name in sorted(files):
            path = Path(place, name)
            yield path.relative_to(folder).as_posix(), path


def find_raw_pairs(recipe: Recipe, files: list[tuple[str, Path]], where: Path) -> tuple[list[RawPair], list[str]]:
    """The pairs of a set among its original files, and the splits that have images but no labels.

    Args:
        recipe: the set's.
        files: relative and real paths.
        where: the folder, for errors.

    Raises:
        DatasetError: nothing found, an image without label or the reverse, two files of one name.
    """
    images = _matches(recipe, recipe.image, files)
    labels = next(filter(None, (_matches(recipe, pattern, files, images) for pattern in recipe.labels)), {})
    if not images or not labels:
        missing = "image" if not images else "label"
        pattern = recipe.image if not images else " or ".join(recipe.labels)
        raise DatasetError(f"data prepare: {where} has no {missing} of this set; expected files such as {pattern}")
    labelled = {split for split, _ in labels}
    unlabelled = sorted({split for split, _ in images} - labelled)
    wanted = {key: path for key, path in images.items() if key[0] in labelled}
    lonely = [f"{printable(wanted[key])} has no label" for key in sorted(wanted.keys() - labels.keys())]
    lonely += [f"{printable(labels[key])} has no image" for key in sorted(labels.keys() - images.keys())]
    if lonely:
        raise DatasetError(f"data prepare: {len(lonely)} files have no partner: {some(lonely)}")
    return [RawPair(*key, wanted[key], labels[key]) for key in sorted(wanted)], unlabelled


def _matches(
    recipe: Recipe, pattern: str, files: list[tuple[str, Path]], images: Mapping[tuple[str, str], Path] | None = None
) -> dict[tuple[str, str], Path]:
    """Files by (split, name). Labels take the split of the image of their name where their path does not tell."""
    expression = re.compile(pattern, re.IGNORECASE)
    splits = {key: split for split, key in images or {}}
    found: dict[tuple[str, str], Path] = {}
    for name, path in files:
        match = expression.search(name)
        if not match:
            continue
        groups = match.groupdict()
        stem = recipe.key.format(**groups)
        split = recipe.split(groups) if images is None or "split" in groups else splits.get(stem, "train")
        if (split, stem) in found:
            other = printable(found[split, stem])
            raise DatasetError(f"data prepare: {printable(path)} and {other} are both {stem}; expected one")
        found[split, stem] = path
    return found
