# SPDX-License-Identifier: Apache-2.0
"""A user's own data set in folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from drseg_core.data.dataset import IGNORE, Sample, SegmentationDataset, check_class_names
from drseg_core.data.images import MAX_PIXELS, image_size, read_image, read_mask
from drseg_core.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MANIFEST = "manifest.sha256"
LISTED = 10
"""How many offending files an error names."""


class Pair(NamedTuple):
    """An image file, its mask file, and their sizes in bytes when they were listed."""

    image: Path
    mask: Path
    image_bytes: int
    mask_bytes: int


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Class names, one per line in id order; blank lines and lines that begin with ``#`` are left out.

    Raises:
        DatasetError: no such file, not UTF-8, no name, more than 255, or one name twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DatasetError(f"read_class_names: {path} does not exist; expected one class name per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"read_class_names: {path} cannot be read as UTF-8 text: {error}") from None
    names = [line.strip() for line in lines]
    return check_class_names([n for n in names if n and not n.startswith("#")], f"read_class_names: {path}")


class FolderDataset(SegmentationDataset):
    """``ROOT/classes.txt`` and ``ROOT/{split}/{images,masks}/*``; a mask has the name of its image, any suffix.

    Files are paired by name without suffix and ordered by it. Making the data set reads every header (sizes must
    agree, a mask must be one) and no pixels. :mod:`drseg_core.data.images` says which formats are converted and which
    refused.

    Decoders do not notice a flipped bit in a JPEG or raw TIFF. Where the folder holds ``manifest.sha256`` (lines of
    ``sha256sum``, paths relative to the folder), every file of the split is read once and held to it.

    Args:
        root: the folder.
        split: name of the folder below it.
        max_pixels: larger files are refused before they are decoded.

    Raises:
        DatasetError: folder missing or empty, files without partner, sizes that differ (the first ten are named), no
            image, a link that leaves the folder, unusable class names, a file that is not what the manifest says.
    """

    def __init__(self, root: str | Path, split: str = "train", *, max_pixels: int = MAX_PIXELS) -> None:
        self.root = Path(root)
        self.split = split
        self.max_pixels = max_pixels
        if not str(root) or not _is_folder(self.root):
            raise DatasetError(f"FolderDataset: {self.root} is not a folder; expected {_layout(split)}")
        if split in ("", ".", "..") or Path(split).name != split:
            raise DatasetError(f"FolderDataset: split {split!r} is not a folder name; expected such as train or val")
        self.class_names = read_class_names(self.root / "classes.txt")
        self.pairs = self._find_pairs()
        self._check_sizes()
        self._check_manifest()
        self._fingerprint: str | None = None

    def _find_pairs(self) -> tuple[Pair, ...]:
        images, masks = self._list("images"), self._list("masks")
        if not images and not masks:
            raise DatasetError(f"FolderDataset: {self.root / self.split} has no image; expected {_layout(self.split)}")
        lonely = [f"{_printable(images[stem])} has no mask" for stem in sorted(images.keys() - masks.keys())]
        lonely += [f"{_printable(masks[stem])} has no image" for stem in sorted(masks.keys() - images.keys())]
        if lonely:
            raise DatasetError(f"FolderDataset: {len(lonely)} files have no partner of the same name: {_some(lonely)}")
        pairs = []
        for stem in sorted(images):
            image, mask = images[stem], masks[stem]
            pairs.append(Pair(image, mask, _bytes(image), _bytes(mask)))
        return tuple(pairs)

    def _list(self, part: str) -> dict[str, Path]:
        """Files by name without suffix."""
        folder = self.root / self.split / part
        if not _is_folder(folder):
            raise DatasetError(f"FolderDataset: {folder} is not a folder; expected {_layout(self.split)}")
        home = self.root.resolve()
        found: dict[str, Path] = {}
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            raise DatasetError(f"FolderDataset: {_printable(folder)} cannot be listed: {error.strerror}") from None
        for name in names:
            path = folder / name
            if path.suffix.lower() not in SUFFIXES:
                continue
            try:
                target = path.resolve(strict=True)
            except PermissionError as error:
                raise DatasetError(f"FolderDataset: {_printable(path)} cannot be read: {error.strerror}") from None
            except (OSError, RuntimeError):
                raise DatasetError(f"FolderDataset: {_printable(path)} is a broken link; expected a file") from None
            if not target.is_relative_to(home):
                raise DatasetError(f"FolderDataset: {_printable(path)} is a link out of {self.root}; expected a file")
            if not target.is_file():
                raise DatasetError(f"FolderDataset: {_printable(path)} is not a file; expected an image")
            if path.stem in found:
                other = _printable(found[path.stem])
                raise DatasetError(f"FolderDataset: {_printable(path)} and {other} share a name; expected one file")
            found[path.stem] = path
        return found

    def _check_sizes(self) -> None:
        wrong = []
        for pair in self.pairs:
            image = image_size(pair.image, max_pixels=self.max_pixels)
            mask = image_size(pair.mask, max_pixels=self.max_pixels, mask=True)
            if image != mask:
                wrong.append(f"{_printable(pair.image)} {image[0]} x {image[1]}, its mask {mask[0]} x {mask[1]}")
        if wrong:
            raise DatasetError(f"FolderDataset: {len(wrong)} masks differ from their image in size: {_some(wrong)}")

    def _check_manifest(self) -> None:
        manifest = self.root / MANIFEST
        if not manifest.is_file():
            return
        try:
            lines = manifest.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"FolderDataset: {manifest} cannot be read as UTF-8 text: {error}") from None
        # "<hex>  path", with "*" before the path where sha256sum read in binary mode
        expected = {os.path.normpath(line[66:]): line[:64].lower() for line in lines if len(line) > 66}
        for path in (path for pair in self.pairs for path in (pair.image, pair.mask)):
            name = os.path.relpath(path, self.root)
            if name not in expected:
                raise DatasetError(f"FolderDataset: {_printable(path)} is not in {MANIFEST}; expected every file")
            try:
                found = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise DatasetError(f"FolderDataset: {_printable(path)} cannot be read: {error.strerror}") from None
            if found != expected[name]:
                raise DatasetError(
                    f"FolderDataset: {_printable(path)} has changed; expected SHA-256 {expected[name][:12]}... of "
                    f"{MANIFEST}, got {found[:12]}..."
                )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read one pair.

        Raises:
            DatasetError: a file vanished, changed since it was listed, is damaged or refused, or the mask holds an id
                that is neither a class nor 255.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"FolderDataset: index {index} is out of range; expected 0 to {len(self) - 1}")
        pair = self.pairs[index]
        _check_unchanged(pair.image, pair.image_bytes)
        _check_unchanged(pair.mask, pair.mask_bytes)
        image = read_image(pair.image, max_pixels=self.max_pixels)
        mask = read_mask(pair.mask, max_pixels=self.max_pixels)
        if image.shape[:2] != mask.shape:
            raise DatasetError(
                f"FolderDataset: {_printable(pair.mask)} differs from its image in size; "
                f"expected {image.shape[0]} x {image.shape[1]}, got {mask.shape[0]} x {mask.shape[1]}"
            )
        self._check_ids(pair.mask, mask)
        chw = np.ascontiguousarray(image.transpose(2, 0, 1))
        return Sample(torch.from_numpy(chw), torch.from_numpy(mask), _printable(pair.image))

    def _check_ids(self, path: Path, mask: NDArray[np.uint8]) -> None:
        count = np.bincount(mask.ravel(), minlength=256)
        wrong = [int(i) for i in np.flatnonzero(count) if i >= len(self.class_names) and i != IGNORE]
        if wrong:
            raise DatasetError(
                f"FolderDataset: {_printable(path)} holds ids that are no class; "
                f"expected 0 to {len(self.class_names) - 1} or {IGNORE}, got {_some(wrong)}"
            )

    def sample_name(self, index: int) -> str:
        return _printable(self.pairs[index].image)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over class names, file names, sizes and contents.

        Reads every file once, at the speed of the disk, and keeps the answer: decoders do not notice a flipped bit in
        a JPEG or an uncompressed TIFF, so nothing less tells whether two runs saw the same data.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            digest.update("\n".join(self.class_names).encode())
            for pair in self.pairs:
                for path, size in ((pair.image, pair.image_bytes), (pair.mask, pair.mask_bytes)):
                    _check_unchanged(path, size)
                    name = os.fsencode(path.relative_to(self.root))
                    digest.update(b"\0%d %d\0" % (len(name), size) + name)
                    try:
                        with open(path, "rb") as file:
                            while block := file.read(1 << 20):
                                digest.update(block)
                    except OSError as error:
                        reason = f"cannot be read: {error.strerror}"
                        raise DatasetError(f"FolderDataset: {_printable(path)} {reason}") from None
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise DatasetError(f"FolderDataset: {_printable(path)} cannot be opened: {error.strerror}") from None


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise DatasetError(f"FolderDataset: {_printable(path)} vanished; expected the file that was listed") from None
    except OSError as error:
        raise DatasetError(f"FolderDataset: {_printable(path)} cannot be read: {error.strerror}") from None


def _check_unchanged(path: Path, size: int) -> None:
    now = _bytes(path)
    if now != size:
        raise DatasetError(
            f"FolderDataset: {_printable(path)} changed after it was listed; expected {size} bytes, got {now}"
        )


def _layout(split: str) -> str:
    return f"{split}/images/* and {split}/masks/* of {', '.join(SUFFIXES)} beside classes.txt"


def _printable(path: Path) -> str:
    """A name fit for one line of output: no line breaks, no undecodable bytes."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _some(items: Iterable[object]) -> str:
    every = [str(item) for item in items]
    more = f", and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return "; ".join(every[:LISTED]) + more
