# SPDX-License-Identifier: Apache-2.0
"""A look at every file of a data set: its contents, and all of its faults, not only the first one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from drseg_core.config.reading import Reading, parse_reading
from drseg_core.config.schema import ReadingConfig
from drseg_core.data.benchmark_dataset import present_splits, split_folders
from drseg_core.data.benchmarks import ALL, BENCHMARKS
from drseg_core.data.dataset import IGNORE, class_names_hash
from drseg_core.data.folder import read_class_names
from drseg_core.data.images import FORMATS, MAX_PIXELS, image_size, read_image, read_mask
from drseg_core.data.manifest import MANIFEST, manifest_problem, printable, read_manifest
from drseg_core.data.own_images import read_rgb, settle
from drseg_core.data.pairs import LISTED, SUFFIXES, PairFolder, find_files, some, unknown_ids, unread, without_partner
from drseg_core.data.palette import Image8, overlay, with_legend
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.extras import require

FOLDER = "folder"
"""Kind of a user's own set; the other kinds are names of benchmark sets."""

FEW_IDS = 3
"""Masks of a split that hold fewer ids than this, of five classes or more, look collapsed."""

TRAINED = ("train", ALL)
"""Splits that a model may be trained on; to score one, a class is enough."""

MOSTLY = 0.5
"""Share of pixels without a known class from which on there is a warning."""


class Finding(NamedTuple):
    """Something wrong or odd: ``kind`` such as ``ids``, and one line that names the file."""

    kind: str
    message: str


@dataclass
class SplitReport:
    """What is in one split: counts of files, pixels by id (256,), image sizes, masks with a palette."""

    images: int = 0
    masks: int = 0
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    sizes: Counter[str] = field(default_factory=Counter)
    palette_masks: int = 0
    readable: list[tuple[Path, Path]] = field(default_factory=list)


@dataclass
class CheckReport:
    """The result: ``problems`` make the set unusable, ``warnings`` should be looked at."""

    kind: str
    root: Path
    class_names: tuple[str, ...]
    palette: Sequence[tuple[int, int, int]] | None
    splits: dict[str, SplitReport] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    reading: Reading | None = None
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def read_image(self, path: Path, *, max_pixels: int = MAX_PIXELS) -> Image8:
        """An image as the set's commands read it."""
        if self.reading is None:
            return read_image(path, max_pixels=max_pixels)
        return read_rgb(path, self.reading, max_pixels=max_pixels).image

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = self.class_names
        return {
            "set": self.kind,
            "root": str(self.root),
            "class_names": list(names),
            "class_names_sha256": class_names_hash(names),
            "splits": {
                name: {
                    "images": split.images,
                    "masks": split.masks,
                    "readable": len(split.readable),
                    "sizes": dict(split.sizes.most_common(LISTED)),
                    "palette_masks": split.palette_masks,
                    "pixels": {label: int(split.pixels[i]) for i, label in enumerate(names)},
                    "ignored_pixels": int(split.pixels[IGNORE]),
                    "other_ids": {str(i): int(split.pixels[i]) for i in _other_ids(split, len(names))},
                }
                for name, split in self.splits.items()
            },
            "manifests": self.manifests,
            "problems": [finding._asdict() for finding in self.problems],
            "warnings": [finding._asdict() for finding in self.warnings],
        }


def _other_ids(split: SplitReport, num_classes: int) -> list[int]:
    return [int(i) for i in np.flatnonzero(split.pixels) if i >= num_classes and i != IGNORE]


def check_data(
    kind: str,
    root: str | Path,
    *,
    splits: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
    reading: ReadingConfig | None = None,
    progress: bool = False,
) -> CheckReport:
    """Decode every file and collect what is found.

    Args:
        kind: a benchmark set, or ``folder`` for a folder with ``classes.txt``.
        root: as in ``NAME:ROOT`` or ``folder:ROOT``.
        splits: which; all that are there by default.
        max_pixels: bound on the pixels of a file.
        reading: scale, nodata and bands of the images of a folder.
        progress: show a progress bar.

    Raises:
        ConfigError: unknown kind or split.
        DatasetError: there is nothing to look at.
    """
    require("check_data", "maps")
    from tqdm import tqdm

    folders, report = _begin(kind, Path(root), splits)
    if kind == FOLDER:
        report.reading = _settled(report, folders, reading or ReadingConfig(), max_pixels)
    for split, places in folders.items():
        found = report.splits[split] = SplitReport()
        for place in places:
            pairs = _pairs(report, found, place)
            for pair in tqdm(pairs, desc=split, unit="image", disable=None if progress else True):
                _look(report, found, *pair, max_pixels)
        _judge(report, split, found)
    homes = sorted({place.home for places in folders.values() for place in places})
    for home in homes:
        _verify(report, home, [part for places in folders.values() for place in places for part in place[:2]])
    return report


def _settled(
    report: CheckReport, folders: Mapping[str, list[PairFolder]], reading: ReadingConfig, max_pixels: int
) -> Reading:
    """How the images are read, by those that can be."""
    paths = []
    for place in (place for places in folders.values() for place in places):
        files: dict[str, Path] = {}
        with contextlib.suppress(DatasetError):
            files, _ = find_files(place.images, place.home, "images")
        for path in files.values():
            with contextlib.suppress(DatasetError):
                image_size(path, max_pixels=max_pixels)
                paths.append(path)
    try:
        return parse_reading(settle(reading, paths, max_pixels=max_pixels, name="data check"))
    except DatasetError as error:
        report.problems.append(Finding("type", str(error)))
        return parse_reading(reading)


def _begin(kind: str, root: Path, splits: Sequence[str]) -> tuple[Mapping[str, list[PairFolder]], CheckReport]:
    if kind != FOLDER and kind not in BENCHMARKS:
        raise ConfigError(f"data check: set is unknown; expected {', '.join((FOLDER, *BENCHMARKS))}, got {kind!r}")
    if not root.is_dir():
        raise DatasetError(f"data check: {root} is not a folder")
    if kind == FOLDER:
        names = read_class_names(root / "classes.txt")
        chosen = list(splits) or sorted(path.parent.name for path in root.glob("*/images") if path.is_dir())
        folders = {split: [PairFolder(root / split / "images", root / split / "masks", root)] for split in chosen}
        expected = "train/images and train/masks"
        report = CheckReport(kind, root, names, None)
    else:
        benchmark = BENCHMARKS[kind]
        folders = {split: split_folders(benchmark, root, split) for split in splits or present_splits(benchmark, root)}
        expected = f"{benchmark.folder('train')}/{benchmark.images} or {benchmark.folder(ALL)}/{benchmark.images}"
        report = CheckReport(kind, root, benchmark.class_names, benchmark.palette)
    if not folders:
        raise DatasetError(f"data check: {root} has no split; expected {expected}")
    return folders, report


def _pairs(report: CheckReport, found: SplitReport, place: PairFolder) -> list[tuple[Path, Path]]:
    try:
        (images, lost), (masks, lost_masks) = (find_files(part, place.home, "images and masks") for part in place[:2])
    except DatasetError as error:
        report.problems.append(Finding("layout", str(error)))
        return []
    faults = lost | lost_masks
    report.problems += [Finding("layout", message) for message in faults.values()]
    report.warnings += [Finding("unread", message) for part in place[:2] for message in unread(part)]
    found.images += len(images)
    found.masks += len(masks)
    if not images and not masks and not faults:
        report.problems.append(Finding("layout", f"{printable(place.images)} has no image"))
    # the partner of a file with a fault has one
    named = {path.stem for path in faults}
    lonely = [{stem: part[stem] for stem in part.keys() - named} for part in (images, masks)]
    report.problems += [Finding("pair", message) for message in without_partner(*lonely)]
    return [(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]


def _look(report: CheckReport, found: SplitReport, image_path: Path, mask_path: Path, max_pixels: int) -> None:
    values = []
    for read, path in ((report.read_image, image_path), (read_mask, mask_path)):
        try:
            values.append(read(path, max_pixels=max_pixels))
        except DatasetError as error:
            report.problems.append(Finding("file", str(error)))
    if len(values) < 2:
        return
    image, mask = values
    found.sizes[f"{image.shape[0]} x {image.shape[1]}"] += 1
    if image.shape[:2] != mask.shape:
        report.problems.append(
            Finding(
                "size",
                f"{printable(mask_path)} differs from its image in size; expected {image.shape[0]} x "
                f"{image.shape[1]}, got {mask.shape[0]} x {mask.shape[1]}",
            )
        )
        return
    found.pixels += np.bincount(mask.ravel(), minlength=256)
    found.palette_masks += _has_palette(mask_path)
    wrong = unknown_ids(mask, len(report.class_names))
    if wrong:
        expected = f"expected 0 to {len(report.class_names) - 1} or {IGNORE}"
        report.problems.append(
            Finding("ids", f"{printable(mask_path)} holds ids that are no class; {expected}, got {some(wrong)}")
        )
        return
    found.readable.append((image_path, mask_path))


def _has_palette(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode == "P"
    except OSError:
        # a TIFF that only rasterio reads has none
        return False


def _judge(report: CheckReport, split: str, found: SplitReport) -> None:
    """Findings from the histogram of a whole split."""
    names = report.class_names
    present = [int(i) for i in np.flatnonzero(found.pixels) if i != IGNORE]
    if present and 0 not in present and _other_ids(found, len(names)) == [len(names)]:
        report.problems.append(
            Finding(
                "shifted",
                f"{split}: ids are one too high; expected 0 to {len(names) - 1}, got {present[0]} to {present[-1]} "
                "and never 0 (the release's OVS_label folders are so; D2masks are not)",
            )
        )
    if found.pixels.any() and not present:
        message = f"{split}: no mask has a labelled pixel; expected class ids, got {IGNORE} alone, which means unknown"
        report.problems.append(Finding("unlabelled", message))
    if split in TRAINED and len(present) == 1 and present[0] < len(names):
        message = (
            f"{split}: masks hold one class, {names[present[0]]}; training needs at least 2 to rank channels, or "
            "model.spsd.semantic_ratio 0"
        )
        report.warnings.append(Finding("one", message))
    report.warnings += _unknown(found, present, split, len(names))
    extra = _other_ids(found, len(names))
    if extra and len(present) <= len(names) and present != list(range(present[0], present[0] + len(present))):
        message = (
            f"{split}: the numbers have gaps ({some(present)}); expected 0 to {len(names) - 1} in the order of "
            "classes.txt (drseg data tile renumbers them)"
        )
        report.warnings.append(Finding("gaps", message))
    collapsed = found.masks > 1 and len(names) >= 5 and 0 < len(present) < FEW_IDS
    if collapsed:
        message = f"{split}: masks hold only ids {some(present)} of {len(names)} classes; were they converted?"
        (report.problems if found.palette_masks else report.warnings).append(Finding("collapsed", message))
    if found.palette_masks:
        message = f"{split}: {found.palette_masks} masks have a palette; expected gray, as indices are read as ids"
        report.warnings.append(Finding("palette", message))
    if present and not collapsed:
        absent = [name for i, name in enumerate(names) if i not in present]
        if absent:
            report.warnings.append(Finding("absent", f"{split}: no pixel of {some(absent)}"))
    side = BENCHMARKS[report.kind].image_side if report.kind in BENCHMARKS else None
    odd = [size for size in found.sizes if side is not None and size != f"{side} x {side}"]
    if odd:
        message = f"{split}: images of other sizes than the benchmark's; expected {side} x {side}, got {some(odd)}"
        report.warnings.append(Finding("size", message))


def _unknown(found: SplitReport, present: Sequence[int], split: str, classes: int) -> list[Finding]:
    """Findings from the pixels of 255, whose class is unknown."""
    ignored, total = int(found.pixels[IGNORE]), int(found.pixels.sum())
    if not present or not ignored:
        return []
    share = 100 * ignored / total
    if list(present) == [0] and classes > 1:
        message = (
            f"{split}: masks hold 0 and 255 alone, 255 in {share:.0f} % of the pixels; 255 means unknown, so a class "
            "that is stored as 255 is not learned; expected 0 and 1"
        )
        return [Finding("255", message)]
    if share > 100 * MOSTLY:
        return [Finding("255", f"{split}: {share:.0f} % of the pixels are 255, which means unknown; is that meant?")]
    return []


def _verify(report: CheckReport, home: Path, parts: Sequence[Path]) -> None:
    if not (home / MANIFEST).is_file():
        report.manifests[str(home)] = "none"
        return
    try:
        expected = read_manifest(home / MANIFEST)
    except DatasetError as error:
        report.problems.append(Finding("manifest", str(error)))
        return
    inside = [part for part in parts if part.is_relative_to(home) and part.is_dir()]
    files = {path for part in inside for path in part.glob("[!.]*") if path.suffix.lower() in SUFFIXES}
    listed = {home / name for name in expected if (home / name).parent in parts}
    problems = [f"{printable(path)} is missing; expected every file of {MANIFEST}" for path in sorted(listed - files)]
    for path in sorted(files):
        try:
            problem = manifest_problem(path, home, expected)
        except DatasetError as error:
            problem = str(error)
        if problem:
            problems.append(problem)
    report.problems += [Finding("manifest", message) for message in problems]
    report.manifests[str(home)] = f"{len(problems)} problems" if problems else f"{len(files)} files verified"


def overlay_sheet(report: CheckReport, *, samples: int = 16, cell: int = 160) -> Image8:
    """Images, each beside a copy with its mask on it, evenly drawn from all splits, with a legend.

    Colours are those of the benchmark set. So a shifted mask, or one of other classes, is seen at a glance.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DatasetError: no pair can be read.
    """
    from PIL import Image

    pairs = [pair for split in report.splits.values() for pair in split.readable]
    if not pairs:
        raise DatasetError(f"data check: {report.root} has no pair that can be read; expected one for a sheet")
    chosen = [pairs[round(i)] for i in np.linspace(0, len(pairs) - 1, min(samples, len(pairs)))]
    columns, gap = min(4, len(chosen)), 4
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (2 * cell + gap) + gap, rows * (cell + gap) + gap), "white")
    present: set[int] = set()
    for number, (image_path, mask_path) in enumerate(chosen):
        image, mask = report.read_image(image_path), read_mask(mask_path)
        mixed = overlay(image.transpose(2, 0, 1), mask, len(report.class_names), colors=report.palette)
        present |= {int(i) for i in np.unique(mask) if i != IGNORE}
        left = gap + number % columns * (2 * cell + gap)
        top = gap + number // columns * (cell + gap)
        for place, picture in enumerate((image, mixed)):
            tile = Image.fromarray(picture).resize((cell, cell), Image.Resampling.BILINEAR)
            sheet.paste(tile, (left + place * cell, top))
    return with_legend(np.array(sheet), report.class_names, sorted(present), colors=report.palette)
