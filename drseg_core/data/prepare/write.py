# SPDX-License-Identifier: Apache-2.0
"""From the original archives of a benchmark set to the folders that ``NAME:ROOT`` reads.

Archives below the given folder are unpacked inside the output folder and removed at the end. Images that are cut into
patches are read a strip at a time. Every file appears complete or not at all, and one that is there is not written
again, so a stopped preparation goes on where it was. ``manifest.sha256`` comes last: a folder that has one is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.benchmarks import Benchmark, get_benchmark
from drseg_core.data.dataset import IGNORE
from drseg_core.data.images import read_image
from drseg_core.data.manifest import MANIFEST, printable, write_manifest
from drseg_core.data.prepare.archives import Limits, archive_stem, unpack
from drseg_core.data.prepare.labels import label_ids
from drseg_core.data.prepare.raw import RECIPES, RawPair, Recipe, find_raw_pairs, list_tree
from drseg_core.data.prepare.strips import Strips, open_strips
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.extras import require
from drseg_core.files import atomic_path, parse_json, write_text_atomic

MARKER = "prepare.json"
MAX_RAW_PIXELS = 400_000_000
"""Bound on an original image; iSAID's largest has 120 million."""
ROWS = 256
"""Rows of the labels of a whole image that are decoded together."""

Edges = Literal["drop", "shift"]


@dataclass(frozen=True)
class Options:
    """How images are cut.

    Args:
        patch: side of the square patches in pixels; None leaves images whole.
        stride: pixels from one patch to the next; ``patch`` where None.
        edges: what remains at the right and at the bottom is left out (``drop``), or covered by a last patch that is
            moved back (``shift``).

    Examples:
        >>> from drseg_core.data.prepare import Options
        >>> Options(patch=512, edges="shift")
        Options(patch=512, stride=None, edges='shift')
    """

    patch: int | None = None
    stride: int | None = None
    edges: Edges = "drop"


@dataclass
class Prepared:
    """What was done: the set's folder, pairs by split, and counts of what was left out.

    Examples:
        >>> from drseg_core.data.prepare import prepare
        >>> done = prepare("udd5", "raw", "sets")
        >>> done.folder.as_posix(), done.written == sum(done.pairs.values())
        ('sets/UDD5', True)
    """

    folder: Path
    pairs: dict[str, int] = field(default_factory=dict)
    written: int = 0
    too_small: int = 0
    unlabelled_patches: int = 0
    unlabelled_splits: list[str] = field(default_factory=list)


def patch_starts(length: int, patch: int, stride: int, edges: Edges) -> list[int]:
    """First pixel of every patch along one axis; none where the image is smaller than a patch.

    Examples:
        >>> from drseg_core.data.prepare import patch_starts
        >>> patch_starts(600, 256, 256, "drop"), patch_starts(600, 256, 256, "shift")
        ([0, 256], [0, 256, 344])
    """
    starts = list(range(0, length - patch + 1, stride))
    if edges == "shift" and starts and starts[-1] + patch < length:
        starts.append(length - patch)
    return starts


def prepare(
    name: str,
    raw: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    limits: Limits | None = None,
    max_pixels: int = MAX_RAW_PIXELS,
    progress: bool = False,
) -> Prepared:
    """Write a set in the benchmark's layout.

    Args:
        name: the set.
        raw: folder with the original archives, or with their contents.
        out: the common root of the sets; the set gets its own folder in it.
        options: how images are cut; by default as in the benchmark.
        limits: bounds on an archive.
        max_pixels: larger originals are refused.
        progress: show a progress bar.

    Raises:
        ConfigError: the set is unknown, an option is out of range, or ``out`` is inside ``raw``. Or the folder of the
            set is not from this function, or was begun with other options.
        ArchiveError: an archive is refused.
        DatasetError: files missing, damaged, or with unknown labels.
        ResourceError: too little room on the disk.

    Examples:
        >>> from drseg_core.data import open_dataset
        >>> from drseg_core.data.prepare import prepare
        >>> done = prepare("udd5", "raw", "sets")
        >>> len(open_dataset("udd5:sets", "train")) == done.pairs["train"]
        True
    """
    require("prepare", "maps")
    from tqdm import tqdm

    benchmark, recipe = get_benchmark(name), RECIPES[name]
    options = _completed(options or Options(recipe.patch), recipe)
    raw, out = Path(raw), Path(out)
    if not raw.is_dir():
        raise DatasetError(f"data prepare: {raw} is not a folder; expected one with the archives of {benchmark.title}")
    if out.resolve().is_relative_to(raw.resolve()):
        raise ConfigError(f"data prepare: --out is inside --raw; expected another place, got {out}")
    home = out / benchmark.split_folder.split("/")[0]
    pairs_before = _check_home(home, name, options)
    if (home / MANIFEST).is_file():
        return Prepared(home, pairs_before)
    unpacked = out / f".{name}-unpacked"
    files = [*list_tree(raw), *_unpack_all(raw, unpacked, limits)]
    pairs, unlabelled = find_raw_pairs(recipe, files, raw)
    write_text_atomic(home / MARKER, _marker(name, options))
    done = Prepared(home, unlabelled_splits=unlabelled)
    writer = _Writer(benchmark, recipe, out, done)
    for pair in tqdm(pairs, desc=name, unit="image", disable=None if progress else True):
        with _opened(pair, max_pixels) as (image, label):
            if options.patch is None:
                writer.whole(pair, label, max_pixels)
            else:
                writer.patches(pair, image, label, options)
    if not done.pairs:
        raise DatasetError(f"data prepare: {raw} gave no patch; expected images of at least {options.patch} pixels")
    write_text_atomic(home / MARKER, _marker(name, options, pairs=done.pairs))
    write_manifest(home, _result_files(benchmark, out, done))
    if unpacked.exists():
        shutil.rmtree(unpacked)
    return done


def _completed(options: Options, recipe: Recipe) -> Options:
    patch, stride = recipe.patch if options.patch is None else options.patch, options.stride
    if patch is None and (stride is not None or options.edges != "drop"):
        raise ConfigError("data prepare: --stride and --edges belong to --patch; expected it too")
    if patch is None:
        return options
    stride = patch if stride is None else stride
    if patch < 16 or not 1 <= stride <= patch:
        raise ConfigError(
            "data prepare: --patch or --stride is out of range; expected patch >= 16, 1 <= stride <= patch, "
            f"got {patch}, {stride}"
        )
    return Options(patch, stride, options.edges)


def _marker(name: str, options: Options, **more: Any) -> str:
    return json.dumps({"set": name, **asdict(options), **more}, indent=1) + "\n"


def _check_home(home: Path, name: str, options: Options) -> dict[str, int]:
    """Refuse a folder that neither is new nor was begun with the same options; returns the pairs of a finished one."""
    marker = home / MARKER
    if home.exists() and not marker.is_file() and (not home.is_dir() or any(home.iterdir())):
        raise ConfigError(f"data prepare: {home} exists; expected a new folder, or one that the command began")
    if not marker.is_file():
        return {}
    try:
        content = parse_json(marker.read_text(encoding="utf-8"))
        begun = {key: content[key] for key in ("set", "patch", "stride", "edges")}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"data prepare: {marker} cannot be read; expected the file the command wrote") from None
    wanted = json.loads(_marker(name, options))
    if begun != wanted:
        raise ConfigError(f"data prepare: {home} was begun otherwise; expected {begun}, got {wanted}")
    return dict(content.get("pairs", {}))


def _result_files(benchmark: Benchmark, out: Path, done: Prepared) -> Iterator[Path]:
    for split in done.pairs:
        for part in (benchmark.images, benchmark.masks):
            yield from (out / benchmark.folder(split) / part).glob("[!.]*.*")


def _unpack_all(raw: Path, unpacked: Path, limits: Limits | None) -> list[tuple[str, Path]]:
    """Unpack every archive below ``raw`` and, once, the archives in those; lists the files under their archives' names.

    An archive that was unpacked earlier is not again, as long as its size and time are the same.
    """
    found: list[tuple[str, Path]] = []
    waiting = [(name, path, 0) for name, path in list_tree(raw)]
    while waiting:
        name, path, depth = waiting.pop()
        stem = archive_stem(name)
        if stem is None or depth == 2:
            continue
        state = path.stat()
        target = unpacked / f"{stem.replace('/', '-')[-150:]}-{state.st_size}-{state.st_mtime_ns}"
        if not target.is_dir():
            unpack(path, target, limits)
        inner = [(f"{stem}/{inside}", file) for inside, file in list_tree(target)]
        waiting += [(inside, file, depth + 1) for inside, file in inner]
        found += [(inside, file) for inside, file in inner if archive_stem(inside) is None]
    return found


@contextlib.contextmanager
def _opened(pair: RawPair, max_pixels: int) -> Iterator[tuple[Strips, Strips]]:
    """Image and label of a pair, of one size."""
    with (
        open_strips(pair.image, max_pixels=max_pixels) as image,
        open_strips(pair.label, max_pixels=max_pixels) as label,
    ):
        if (image.height, image.width) != (label.height, label.width):
            raise DatasetError(
                f"data prepare: {printable(pair.label)} differs from its image in size; "
                f"expected {image.height} x {image.width}, got {label.height} x {label.width}"
            )
        yield image, label


class _Writer:
    """Writes the pairs of one set and counts them."""

    def __init__(self, benchmark: Benchmark, recipe: Recipe, out: Path, done: Prepared) -> None:
        self.benchmark, self.recipe, self.out, self.done = benchmark, recipe, out, done

    def whole(self, pair: RawPair, label: Strips, max_pixels: int) -> None:
        """The image as it is (TIFF as PNG), and its ids."""
        keep = pair.image.suffix.lower() in (".png", ".jpg", ".jpeg")
        image_path, mask_path = self._paths(pair, pair.key, pair.image.suffix if keep else ".png")
        if not (image_path.is_file() and mask_path.is_file()):
            # decoded in any case: a copy of a damaged file would be found only later
            value = read_image(pair.image, max_pixels=max_pixels)
            name = printable(pair.label)
            strips = (label.read(row, min(row + ROWS, label.height)) for row in range(0, label.height, ROWS))
            _save(mask_path, np.concatenate([label_ids(s, self.benchmark, self.recipe, name) for s in strips]))
            if keep:
                with atomic_path(image_path) as temporary:
                    shutil.copyfile(pair.image, temporary)
            else:
                _save(image_path, value)
            self.done.written += 1
        self._count(pair)

    def patches(self, pair: RawPair, image: Strips, label: Strips, options: Options) -> None:
        """Patches named by their first row and column."""
        side = options.patch or 0
        grid = [
            patch_starts(length, side, options.stride or side, options.edges) for length in (image.height, image.width)
        ]
        if not grid[0] or not grid[1]:
            self.done.too_small += 1
            return
        for top in grid[0]:
            paths = {left: self._paths(pair, f"{pair.key}_{top}_{left}", ".png") for left in grid[1]}
            missing = [left for left, both in paths.items() if not (both[0].is_file() and both[1].is_file())]
            for _ in range(len(paths) - len(missing)):
                self._count(pair)
            if not missing:
                continue
            codes = label.read(top, top + side)
            ids = label_ids(codes, self.benchmark, self.recipe, printable(pair.label))
            colors = _rgb(image.read(top, top + side), image, pair.image)
            for left in missing:
                mask = ids[:, left : left + side]
                if not self.recipe.keep_unlabelled and (mask == IGNORE).all():
                    self.done.unlabelled_patches += 1
                    continue
                _save(paths[left][1], mask)
                _save(paths[left][0], colors[:, left : left + side])
                self.done.written += 1
                self._count(pair)

    def _paths(self, pair: RawPair, stem: str, suffix: str) -> tuple[Path, Path]:
        folder = self.out / self.benchmark.folder(pair.split)
        return folder / self.benchmark.images / f"{stem}{suffix}", folder / self.benchmark.masks / f"{stem}.png"

    def _count(self, pair: RawPair) -> None:
        self.done.pairs[pair.split] = self.done.pairs.get(pair.split, 0) + 1


def _rgb(value: NDArray[np.uint8], strips: Strips, path: Path) -> NDArray[np.uint8]:
    """(bands, h, W) as (h, W, 3): gray repeated, further bands left out."""
    if strips.has_palette or strips.bands == 2:
        kind = "a palette" if strips.has_palette else "2 bands"
        raise DatasetError(f"data prepare: {printable(path)} has {kind}; expected RGB or gray")
    return (np.repeat(value, 3, axis=0) if len(value) == 1 else value[:3]).transpose(1, 2, 0)


def _save(path: Path, value: NDArray[np.uint8]) -> None:
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(value)).save(temporary, format="PNG")
