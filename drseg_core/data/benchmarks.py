# SPDX-License-Identifier: Apache-2.0
"""The eight benchmark sets: class names, colours and folders, as the benchmark's release has them.

Sources: the registration files and prompt lists of RSKT-Seg, whose protocol the paper follows. Masks hold ids 0 to
T - 1 in the order of the class names, 255 = ignore. The release calls such folders ``D2masks``. A sibling folder
``OVS_label`` holds ids that are one higher, and cannot be used. Names are prompts: their wording is part of a result.

Two readings are this project's own. The release has training and validation parts only of DLRSD and iSAID. For the
other sets the split folder has a name after theirs, and ``drseg data prepare`` fills it. And if the folder of all
images is missing, ``all`` is the union of the split folders.
"""

from __future__ import annotations

from dataclasses import dataclass

from drseg_core.errors import ConfigError

Color = tuple[int, int, int]

ALL = "all"
SPLITS = ("train", "val", "test")
"""Parts of a set; not every set has each."""


@dataclass(frozen=True)
class Benchmark:
    """One set.

    Args:
        name: its name in ``NAME:ROOT`` and in commands.
        title: its name in the paper.
        class_names: prompts in id order.
        palette: RGB of each class, in the same order.
        all_folder: folder with every image, below the common root.
        split_folder: folder of one split; ``{}`` is its name.
        images: name of the folder of images in both.
        masks: name of the folder of masks in both.
        image_side: side in pixels of the square images; None if they are not all of one size.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    all_folder: str
    split_folder: str
    images: str = "imgs"
    masks: str = "D2masks"
    image_side: int | None = None

    def folder(self, split: str) -> str:
        """The folder of a split below the common root, such as ``DLRSD_split/train``.

        Raises:
            ConfigError: no such split.
        """
        if split == ALL:
            return self.all_folder
        if split not in SPLITS:
            raise ConfigError(
                f"{self.name}: split is unknown; expected one of {', '.join((ALL, *SPLITS))}, got {split!r}"
            )
        return self.split_folder.format(split)


_ISPRS_NAMES = ("Impervious surfaces", "Building", "Low vegetation", "Tree", "Car", "Clutter/background")
_ISPRS_PALETTE = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))

_ALL = (
    Benchmark(
        "dlrsd",
        "DLRSD",
        (
            "airplane", "bare soil", "buildings", "cars", "chaparral", "court", "dock", "field", "grass", "mobile home",
            "pavement", "sand", "sea", "ship", "tanks", "trees", "water",
        ),
        (
            (166, 202, 240), (128, 128, 0), (0, 0, 128), (255, 0, 0), (0, 128, 0), (128, 0, 0), (255, 233, 233),
            (160, 160, 164), (0, 128, 128), (90, 87, 255), (255, 255, 0), (255, 192, 0), (0, 0, 255), (255, 0, 192),
            (128, 0, 128), (0, 255, 0), (0, 255, 255),
        ),
        "DLRSD",
        "DLRSD_split/{}",
        image_side=256,
    ),
    Benchmark(
        "isaid",
        "iSAID",
        (
            "ship", "storage tank", "baseball diamond", "tennis court", "basketball court", "ground track field",
            "bridge", "large vehicle", "small vehicle", "helicopter", "swimming pool", "roundabout",
            "soccer ball field", "plane", "harbor",
        ),
        (
            (0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255), (0, 127, 63), (0, 127, 127),
            (0, 0, 127), (0, 0, 191), (0, 0, 255), (0, 191, 127), (0, 127, 191), (0, 127, 255), (0, 100, 155),
        ),
        "iSAID",
        "iSAID_split/{}",
        image_side=256,
    ),
    Benchmark(
        "potsdam", "Potsdam", _ISPRS_NAMES, _ISPRS_PALETTE, "Potsdam", "Potsdam_split/{}", image_side=256,
    ),
    Benchmark(
        "vaihingen", "Vaihingen", _ISPRS_NAMES, _ISPRS_PALETTE, "Vaihingen", "Vaihingen_split/{}", image_side=256,
    ),
    Benchmark(
        "loveda",
        "LoveDA",
        ("no-data", "Background", "Building", "Road", "Water", "Barren", "Forest", "Agriculture"),
        (
            (255, 255, 255), (255, 248, 220), (100, 149, 237), (102, 205, 170), (205, 133, 63), (160, 32, 240),
            (255, 64, 64), (139, 69, 19),
        ),
        "LoveDA",
        "LoveDA_split/{}",
        "images_png",
        "masks_png",
        image_side=1024,
    ),
    Benchmark(
        "uavid",
        "UAVid",
        ("Background clutter", "Building", "Road", "Tree", "Low vegetation", "Moving car", "Static car", "Human"),
        (
            (0, 0, 0), (128, 0, 0), (128, 64, 128), (0, 128, 0), (128, 128, 0), (64, 0, 128), (192, 0, 192),
            (64, 64, 0),
        ),
        "uavid",
        "uavid_split/{}",
        "Images",
        "Labels",
    ),
    Benchmark(
        "udd5",
        "UDD5",
        ("Vegetation", "Building", "Road", "Vehicle", "Other"),
        ((107, 142, 35), (102, 102, 156), (128, 64, 128), (0, 0, 142), (0, 0, 0)),
        "UDD5/all",
        "UDD5/{}",
        "src",
        "gt",
    ),
    Benchmark(
        "vdd",
        "VDD",
        ("Other", "Wall", "Road", "Vegetation", "Vehicle", "Roof", "Water"),
        ((0, 0, 0), (128, 0, 0), (128, 64, 128), (0, 128, 0), (64, 0, 128), (192, 192, 128), (0, 0, 128)),
        "VDD",
        "VDD/{}",
        "src",
        "gt",
    ),
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
"""The sets by name."""


def get_benchmark(name: str) -> Benchmark:
    """A set by name.

    Raises:
        ConfigError: no such set.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"get_benchmark: name is unknown; expected one of {', '.join(BENCHMARKS)}, got {name!r}")
    return BENCHMARKS[name]
