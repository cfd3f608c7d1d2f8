# SPDX-License-Identifier: Apache-2.0
"""A user's own data set in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drseg_core.config.schema import ReadingConfig
from drseg_core.data.dataset import check_class_names
from drseg_core.data.images import MAX_PIXELS
from drseg_core.data.pairs import SUFFIXES, PairDataset, PairFolder, is_folder
from drseg_core.errors import DatasetError


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


def check_class_lines(class_names: Sequence[str], origin: str) -> tuple[str, ...]:
    """The names, each of which is read back from a line of its own.

    Raises:
        DatasetError: what :func:`check_class_names` refuses, a name that begins with ``#``, as what is left out does,
            or one with blanks around it.
    """
    names = check_class_names(class_names, origin)
    for name in names:
        if name != name.strip() or name.startswith(("#", "\ufeff")):
            raise DatasetError(
                f"{origin}: class name cannot be a line of classes.txt; expected one that does not begin with # and "
                f"has no blanks around it, got {ascii(name)}"
            )
    return names


class FolderDataset(PairDataset):
    """``ROOT/classes.txt`` and ``ROOT/{split}/{images,masks}/*`` (see :class:`PairDataset`).

    ``ROOT/manifest.sha256`` is checked where present.

    Args:
        root: the folder.
        split: name of the folder below it.
        max_pixels: larger files are refused before they are decoded.
        reading: scale, nodata and bands of the images.
        window: side of the windows in which large images are read, each a sample of its own.

    Raises:
        ConfigError: ``reading`` cannot be understood.
        DatasetError: folder missing or empty, unusable class names, and what :class:`PairDataset` refuses.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        max_pixels: int = MAX_PIXELS,
        reading: ReadingConfig | None = None,
        window: int | None = None,
    ) -> None:
        folder, reading = Path(root), reading or ReadingConfig()
        layout = f"{split}/images/* and {split}/masks/* of {', '.join(SUFFIXES)} beside classes.txt"
        if not str(root) or not is_folder(folder):
            raise DatasetError(f"FolderDataset: {folder} is not a folder; expected {layout}")
        if split in ("", ".", "..") or Path(split).name != split:
            raise DatasetError(
                f"FolderDataset: split {split!r} is not a folder name; expected for example train or val"
            )
        self.split = split
        names = read_class_names(folder / "classes.txt")
        parts = PairFolder(folder / split / "images", folder / split / "masks", folder)
        super().__init__(folder, names, [parts], layout=layout, max_pixels=max_pixels, reading=reading, window=window)
