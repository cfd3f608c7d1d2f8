# SPDX-License-Identifier: Apache-2.0
"""Tiny fakes of the eight benchmark sets: as their release lays them out, and as their makers publish them."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drseg_core.data.benchmarks import BENCHMARKS

NAMES = tuple(BENCHMARKS)
SUFFIX = {"dlrsd": ".jpg", "udd5": ".JPG", "vdd": ".JPG"}
"""Suffix of the images; PNG elsewhere."""

Ids = NDArray[np.uint8]


def random_ids(rng: np.random.Generator, num_classes: int, size: tuple[int, int], *, ignored: bool = True) -> Ids:
    """Blocks of 8 x 8 pixels of every class, the first block 255 where asked."""
    height, width = size
    blocks = np.resize(rng.permutation(num_classes), (-(-height // 8), -(-width // 8))).astype(np.uint8)
    if ignored:
        blocks[0, 0] = 255
    return np.kron(blocks, np.ones((8, 8), np.uint8))[:height, :width]


def color_image(rng: np.random.Generator, ids: Ids, name: str) -> NDArray[np.uint8]:
    """The classes' colours with some noise."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(BENCHMARKS[name].palette)] = BENCHMARKS[name].palette
    return np.clip(table[ids].astype(int) + rng.integers(-20, 20, (*ids.shape, 3)), 0, 255).astype(np.uint8)


def save(path: Path, value: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(value).save(path)


def write_release(
    name: str,
    root: Path,
    *,
    splits: Sequence[str] = ("train", "val", "test", "all"),
    count: int = 2,
    size: tuple[int, int] = (32, 40),
) -> Path:
    """A set in the layout of the benchmark's release; returns ``root``.

    Args:
        name: the set.
        root: the common root.
        splits: which; each has images of its own.
        count: images of each.
        size: height and width in pixels.
    """
    benchmark = BENCHMARKS[name]
    rng = np.random.default_rng(len(name))
    for split in splits:
        folder = root / benchmark.folder(split)
        for index in range(count):
            ids = random_ids(rng, len(benchmark.class_names), size)
            stem = f"{split}_{index}"
            save(folder / benchmark.images / f"{stem}{SUFFIX.get(name, '.png')}", color_image(rng, ids, name))
            save(folder / benchmark.masks / f"{stem}.png", ids)
    return root


# where the makers put an image and its label, with the split and the name they belong to
_RAW = {
    "dlrsd": [
        ("Images/airplane/airplane00.tif", "Labels/airplane/airplane00.png", "train", "airplane00"),
        ("Images/river/river04.tif", "Labels/river/river04.png", "val", "river04"),
    ],
    "isaid": [
        ("train/images/P0000.png", "train/Semantic_masks/images/P0000_instance_color_RGB.png", "train", "P0000"),
        ("val/images/P0003.png", "val/Semantic_masks/images/P0003_instance_color_RGB.png", "val", "P0003"),
    ],
    "potsdam": [
        ("2_Ortho_RGB/top_potsdam_2_10_RGB.tif", "5_Labels_all/top_potsdam_2_10_label.tif", "train", "potsdam_2_10"),
        ("2_Ortho_RGB/top_potsdam_2_13_RGB.tif", "5_Labels_all/top_potsdam_2_13_label.tif", "val", "potsdam_2_13"),
    ],
    "vaihingen": [
        (
            f"top/top_mosaic_09cm_area{area}.tif",
            f"ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE/top_mosaic_09cm_area{area}.tif",
            split,
            f"vaihingen_area{area}",
        )
        for area, split in ((1, "train"), (38, "val"))
    ],
    "loveda": [
        ("Train/Rural/images_png/0.png", "Train/Rural/masks_png/0.png", "train", "0"),
        ("Val/Urban/images_png/3514.png", "Val/Urban/masks_png/3514.png", "val", "3514"),
    ],
    "uavid": [
        ("uavid_train/seq1/Images/000000.png", "uavid_train/seq1/Labels/000000.png", "train", "seq1_000000"),
        ("uavid_val/seq16/Images/000100.png", "uavid_val/seq16/Labels/000100.png", "val", "seq16_000100"),
    ],
    "udd5": [
        ("UDD5/train/src/DJI_0285.JPG", "UDD5/train/gt/DJI_0285.png", "train", "DJI_0285"),
        ("UDD5/val/src/000008.JPG", "UDD5/val/gt/000008.png", "val", "000008"),
    ],
    "vdd": [
        ("VDD/train/src/DJI_0001.JPG", "VDD/train/gt/DJI_0001.png", "train", "DJI_0001"),
        ("VDD/test/src/DJI_0003.JPG", "VDD/test/gt/DJI_0003.png", "test", "DJI_0003"),
    ],
}
PATCHED = ("isaid", "potsdam", "vaihingen")
"""Sets that are cut into patches."""

CODED_BY_COLOR = (*PATCHED, "uavid")


def write_raw(name: str, raw: Path, *, size: tuple[int, int] | None = None) -> dict[tuple[str, str], Ids]:
    """A set as its makers publish it, unpacked.

    Returns:
        the ids that the label of (split, name) stands for.
    """
    benchmark = BENCHMARKS[name]
    rng = np.random.default_rng(3)
    size = size or ((300, 530) if name in PATCHED else (40, 48))
    truth = {}
    for image_path, label_path, split, key in _RAW[name]:
        # black is a class of UAVid, and 0 the first id of the others: only these have a code for ignore
        ignored = name in (*PATCHED, "dlrsd")
        ids = random_ids(rng, len(benchmark.class_names), size, ignored=ignored)
        save(raw / image_path, color_image(rng, ids, name))
        save(raw / label_path, label_code(name, ids))
        truth[split, key] = ids
    return truth


def label_code(name: str, ids: Ids) -> NDArray[np.uint8]:
    """Ids as the makers' label files hold them."""
    if name in CODED_BY_COLOR:
        table = np.zeros((256, 3), np.uint8)
        table[: len(BENCHMARKS[name].palette)] = BENCHMARKS[name].palette
        return table[ids]
    return np.where(ids == 255, 0, ids + 1).astype(np.uint8) if name == "dlrsd" else ids


def pack(folder: Path, archive: Path) -> Path:
    """Everything in a folder as a zip or tar.gz, by the suffix."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in files:
                file.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz") as tar:
            for path in files:
                tar.add(path, path.relative_to(folder))
    return archive
