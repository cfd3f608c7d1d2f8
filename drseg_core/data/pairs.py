# SPDX-License-Identifier: Apache-2.0
"""Folders of images beside folders of masks of the same names."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.config.reading import Reading, parse_reading
from drseg_core.config.schema import ReadingConfig
from drseg_core.data.dataset import IGNORE, Sample, SegmentationDataset
from drseg_core.data.images import MAX_PIXELS, image_size, read_image, read_mask
from drseg_core.data.manifest import MANIFEST, manifest_problem, printable, read_manifest
from drseg_core.data.own_images import (
    Rgb,
    invalid_is_ignored,
    own_size,
    read_part,
    read_rgb,
    readable_in_parts,
    settle,
)
from drseg_core.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
UNREAD = (".bmp", ".gif", ".img", ".j2k", ".jfif", ".jp2", ".jpe", ".pgm", ".ppm", ".tga", ".vrt", ".webp")
"""Suffixes of images that are not read, and are said so."""

LARGE_PIXELS = 4_000_000
"""Images of a user's own set with more pixels are read in parts."""

LISTED = 10
"""How many offending files an error names."""


_log = logging.getLogger(__name__)
# pictures that other programs made of those beside them
_THUMBNAILS = ("@eadir", "thumbnails", "thumbs")


class PairFolder(NamedTuple):
    """A folder of images, that of their masks, and the folder that no link may leave and whose manifest counts."""

    images: Path
    masks: Path
    home: Path


class Pair(NamedTuple):
    """An image file, its mask file, and their sizes in bytes when they were listed."""

    image: Path
    mask: Path
    image_bytes: int
    mask_bytes: int


class PairDataset(SegmentationDataset):
    """Images and masks in folders; a mask has the name of its image, any suffix.

    Files are paired by name without suffix and ordered by it, folder after folder. Making the data set reads every
    header (sizes must agree, a mask must be one) and no pixels. :mod:`drseg_core.data.images` says which formats are
    converted and which refused.

    Decoders do not notice a flipped bit in a JPEG or raw TIFF. If a folder's ``home`` holds ``manifest.sha256`` (lines
    of ``sha256sum``, paths relative to it), every file of the split is read once and compared with it.

    Args:
        root: the folder that names are relative to.
        class_names: names in id order.
        folders: where the files are.
        layout: what is expected below ``root``, for errors.
        max_pixels: larger files are refused before they are decoded.
        reading: how the images of a user's own set are read; None takes only 8-bit RGB, as in benchmark sets.
        window: side of the windows in which large images of such a set are read. Each window is a sample of its own.
            None takes every image as a whole.

    Raises:
        DatasetError: no image, files without partner, sizes that differ (the first ten are named), a link that leaves
            its home, a file that is not what the manifest says.
    """

    def __init__(
        self,
        root: Path,
        class_names: Sequence[str],
        folders: Sequence[PairFolder],
        *,
        layout: str,
        max_pixels: int = MAX_PIXELS,
        reading: ReadingConfig | None = None,
        window: int | None = None,
    ) -> None:
        self.root = root
        self.class_names = tuple(class_names)
        self.layout = layout
        self.max_pixels = max_pixels
        self.pairs = tuple(pair for folder in folders for pair in self._find_pairs(folder))
        self._check_sizes(reading is not None)
        self._check_manifests({folder.home for folder in folders})
        self.reading = reading
        self._reading: Reading | None = None
        if reading is not None:
            paths = [pair.image for pair in self.pairs]
            limit = sys.maxsize if max_pixels >= MAX_PIXELS else max_pixels
            self.reading = settle(reading, paths, max_pixels=limit, name=self._name)
            self._reading = parse_reading(self.reading)
        self._parts = self._cut(window) if reading is not None and window is not None else None
        self._fingerprint: str | None = None

    def _find_pairs(self, folder: PairFolder) -> list[Pair]:
        images, masks = (list_files(part, folder.home, self.layout) for part in (folder.images, folder.masks))
        for message in unread(folder.images) + unread(folder.masks):
            _log.warning("%s: %s", self._name, message)
        if not images and not masks:
            raise DatasetError(f"{self._name}: {folder.images.parent} has no image; expected {self.layout}")
        lonely = without_partner(images, masks)
        if lonely:
            raise DatasetError(f"{self._name}: {len(lonely)} files have no partner of the same name: {some(lonely)}")
        pairs = [(images[stem], masks[stem]) for stem in sorted(images)]
        return [Pair(image, mask, _bytes(image), _bytes(mask)) for image, mask in pairs]

    def _check_sizes(self, own: bool) -> None:
        size_of = own_size if own else image_size
        self.sizes: list[tuple[int, int]] = []
        wrong = []
        for pair in self.pairs:
            image = size_of(pair.image, max_pixels=self.max_pixels)
            mask = size_of(pair.mask, max_pixels=self.max_pixels, mask=True)
            self.sizes.append(image)
            if image != mask:
                wrong.append(f"{printable(pair.image)} {image[0]} x {image[1]}, its mask {mask[0]} x {mask[1]}")
        if wrong:
            raise DatasetError(f"{self._name}: {len(wrong)} masks differ from their image in size: {some(wrong)}")

    def _check_manifests(self, homes: set[Path]) -> None:
        for home in sorted(homes):
            if not (home / MANIFEST).is_file():
                continue
            expected = read_manifest(home / MANIFEST)
            for path in (path for pair in self.pairs for path in (pair.image, pair.mask)):
                problem = manifest_problem(path, home, expected) if path.is_relative_to(home) else None
                if problem:
                    raise DatasetError(f"{self._name}: {problem}")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _cut(self, side: int) -> list[tuple[int, tuple[int, int, int, int] | None]]:
        """Samples as the number of their pair, with a window if the pair is large."""
        parts: list[tuple[int, tuple[int, int, int, int] | None]] = []
        large = 0
        for number, (height, width) in enumerate(self.sizes):
            if height * width <= LARGE_PIXELS or not readable_in_parts(self.pairs[number].image):
                parts.append((number, None))
                continue
            large += 1
            parts += [
                (number, (top, min(top + side, height), left, min(left + side, width)))
                for top in range(0, max(height - side // 2, 1), side)
                for left in range(0, max(width - side // 2, 1), side)
            ]
        if large:
            _log.info(
                "%s: %d images are large and are read in %d windows of %d pixels (drseg data tile makes files of them)",
                self._name, large, len(parts) - len(self.pairs) + large, side,
            )  # fmt: skip
        return parts

    def large(self, index: int) -> tuple[int, int] | None:
        """(height, width) of an image that is better read by :meth:`part` than as a whole; None for all others."""
        if self._reading is None or self._parts is not None:
            return None
        height, width = self.sizes[index]
        fitting = height * width <= LARGE_PIXELS or not readable_in_parts(self.pairs[index].image)
        return None if fitting else (height, width)

    def part(self, index: int, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """Image and ids of a part (top, bottom, left, right) of an image.

        Raises:
            DatasetError: as when the whole is read.
        """
        pair = self.pairs[index]
        self._check_unchanged(pair.image, pair.image_bytes)
        self._check_unchanged(pair.mask, pair.mask_bytes)
        image, mask = read_part(pair.image, pair.mask, self._reading or Reading(), box)
        self._check_ids(pair, mask.numpy())
        return image, mask

    def __len__(self) -> int:
        return len(self.pairs) if self._parts is None else len(self._parts)

    def __getitem__(self, index: int) -> Sample:
        """Read one pair.

        Raises:
            DatasetError: a file vanished, changed since it was listed, is damaged or refused, or the mask holds an id
                that is neither a class nor 255.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self._name}: index {index} is out of range; expected 0 to {len(self) - 1}")
        number, box = (index, None) if self._parts is None else self._parts[index]
        if box is not None:
            return Sample(*self.part(number, box), self.sample_name(index))
        pair = self.pairs[number]
        self._check_unchanged(pair.image, pair.image_bytes)
        self._check_unchanged(pair.mask, pair.mask_bytes)
        image, valid = self._read_image(pair.image)
        mask = read_mask(pair.mask, max_pixels=self.max_pixels)
        if image.shape[:2] != mask.shape:
            raise DatasetError(
                f"{self._name}: {printable(pair.mask)} differs from its image in size; "
                f"expected {image.shape[0]} x {image.shape[1]}, got {mask.shape[0]} x {mask.shape[1]}"
            )
        self._check_ids(pair, mask)
        chw = np.ascontiguousarray(image.transpose(2, 0, 1))
        labels = invalid_is_ignored(torch.from_numpy(mask), valid, IGNORE)
        return Sample(torch.from_numpy(chw), labels, printable(pair.image))

    def _check_ids(self, pair: Pair, mask: NDArray[np.uint8]) -> None:
        wrong = unknown_ids(mask, len(self.class_names))
        if wrong:
            raise DatasetError(
                f"{self._name}: {printable(pair.mask)} holds ids that are no class; "
                f"expected 0 to {len(self.class_names) - 1} or {IGNORE}, got {some(wrong)}"
            )

    def _read_image(self, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        if self._reading is None:
            return read_image(path, max_pixels=self.max_pixels), None
        found: Rgb = read_rgb(path, self._reading, max_pixels=self.max_pixels)
        return found.image, found.valid

    def sample_name(self, index: int) -> str:
        number, box = (index, None) if self._parts is None else self._parts[index]
        name = printable(self.pairs[number].image)
        return name if box is None else f"{name} rows {box[0]} to {box[1]}, columns {box[2]} to {box[3]}"

    def fingerprint(self) -> str:
        """SHA-256 of class names, file names and file contents.

        Reads every file once, at the speed of the disk, and keeps the answer. Decoders do not notice a flipped bit in a
        JPEG or an uncompressed TIFF. So only the contents tell whether two runs saw the same data.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            digest.update("\n".join(self.class_names).encode())
            if self._parts is not None and len(self._parts) > len(self.pairs):
                # how large images are cut decides what a sample is
                digest.update(repr(self._parts).encode())
            for pair in self.pairs:
                for path, size in ((pair.image, pair.image_bytes), (pair.mask, pair.mask_bytes)):
                    self._check_unchanged(path, size)
                    name = os.fsencode(path.relative_to(self.root))
                    digest.update(b"\0%d %d\0" % (len(name), size) + name)
                    try:
                        with open(path, "rb") as file:
                            while block := file.read(1 << 20):
                                digest.update(block)
                    except OSError as error:
                        reason = f"cannot be read: {error.strerror}"
                        raise DatasetError(f"{self._name}: {printable(path)} {reason}") from None
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _check_unchanged(self, path: Path, size: int) -> None:
        now = _bytes(path)
        if now != size:
            raise DatasetError(
                f"{self._name}: {printable(path)} changed after it was listed; expected {size} bytes, got {now}"
            )


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder.

    Raises:
        DatasetError: it cannot be told, for want of permission or because the name is too long.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise DatasetError(f"data set: {printable(path)} cannot be opened: {error.strerror}") from None


def list_files(folder: Path, home: Path, layout: str) -> dict[str, Path]:
    """Image files of a folder by name without suffix; hidden files and other suffixes are left out.

    Raises:
        DatasetError: no such folder, a link that is broken or leaves ``home``, two files of one name.
    """
    found, faults = find_files(folder, home, layout)
    if faults:
        raise DatasetError(f"data set: {next(iter(faults.values()))}")
    return found


def find_files(folder: Path, home: Path, layout: str) -> tuple[dict[str, Path], dict[Path, str]]:
    """As :func:`list_files`, but with what is wrong with a file in place of an error, for each of them.

    Raises:
        DatasetError: no such folder.
    """
    if not is_folder(folder):
        raise DatasetError(f"data set: {folder} is not a folder; expected {layout}")
    inside = home.resolve()
    found: dict[str, Path] = {}
    faults: dict[Path, str] = {}
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DatasetError(f"data set: {printable(folder)} cannot be listed: {error.strerror}") from None
    for path in (folder / name for name in names if _suffix(name) in SUFFIXES):
        fault = _fault(path, inside, home)
        if fault is None and path.stem in found:
            fault = f"{printable(path)} and {printable(found[path.stem])} share a name; expected one file"
        if fault is None:
            found[path.stem] = path
        else:
            faults[path] = fault
    return found, faults


def _fault(path: Path, inside: Path, home: Path) -> str | None:
    """Why a file must not be read."""
    try:
        target = path.resolve(strict=True)
    except PermissionError as error:
        return f"{printable(path)} cannot be read: {error.strerror}"
    except (OSError, RuntimeError):
        return f"{printable(path)} is a broken link; expected a file"
    if not target.is_relative_to(inside):
        return f"{printable(path)} is a link out of {home}; expected a file"
    return None if target.is_file() else f"{printable(path)} is not a file; expected an image"


def unread(folder: Path) -> list[str]:
    """What to say of images in a folder that :func:`list_files` leaves out: in sub-folders, or of other suffixes."""
    with os.scandir(folder) as entries:
        seen = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    inner, other = [], []
    read = {Path(entry.name).stem for entry in seen if _suffix(entry.name) in SUFFIXES}
    for entry in seen:
        # the names in a folder behind a link may never end
        if entry.is_dir(follow_symlinks=False) and entry.name.lower() not in _THUMBNAILS:
            if count := _count(entry.path):
                inner.append(f"{printable(Path(entry.name))} ({count} image{'s' if count > 1 else ''})")
        elif _suffix(entry.name) in UNREAD and Path(entry.name).stem not in read:
            other.append(printable(Path(entry.name)))
    said = [f"sub-folders of {printable(folder)} are not read: {some(inner)}"] if inner else []
    if other:
        verb = "has" if len(other) == 1 else "have"
        expected = f"expected one of {', '.join(SUFFIXES)}"
        said.append(f"{printable(folder)}: {some(other)} {verb} a suffix that is not read; {expected}")
    return said


def _count(folder: str) -> int:
    """Images in a folder and those below it."""
    names = [name for _, _, files in os.walk(folder) for name in files if not name.startswith(".")]
    return sum(_suffix(name) in SUFFIXES for name in names)


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def without_partner(images: dict[str, Path], masks: dict[str, Path]) -> list[str]:
    """What to say of images without mask and masks without image, in order."""
    lonely = [f"{printable(images[stem])} has no mask" for stem in sorted(images.keys() - masks.keys())]
    return lonely + [f"{printable(masks[stem])} has no image" for stem in sorted(masks.keys() - images.keys())]


def unknown_ids(mask: NDArray[np.uint8], num_classes: int) -> list[int]:
    """Ids of a mask that are neither a class nor 255."""
    count = np.bincount(mask.ravel(), minlength=256)
    return [int(i) for i in np.flatnonzero(count) if i >= num_classes and i != IGNORE]


def some(items: Iterable[object]) -> str:
    """The first ten items in one line, and how many more there are."""
    every = [str(item) for item in items]
    more = f", and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return "; ".join(every[:LISTED]) + more


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise DatasetError(f"data set: {printable(path)} vanished; expected the file that was listed") from None
    except OSError as error:
        raise DatasetError(f"data set: {printable(path)} cannot be read: {error.strerror}") from None
