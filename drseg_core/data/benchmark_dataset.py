# SPDX-License-Identifier: Apache-2.0
"""The one reader of all benchmark sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from drseg_core.data.benchmarks import ALL, SPLITS, Benchmark, get_benchmark
from drseg_core.data.dataset import IGNORE, Sample, SegmentationDataset, check_class_names
from drseg_core.data.images import MAX_PIXELS
from drseg_core.data.pairs import SUFFIXES, PairDataset, PairFolder, is_folder
from drseg_core.errors import DatasetError


def split_folders(benchmark: Benchmark, root: Path, split: str) -> list[PairFolder]:
    """Where the files of a split are; ``all`` without a folder of its own is every split that is there.

    Raises:
        ConfigError: no such split.
        DatasetError: the folder is missing; the message names the splits that are there.
    """
    own = _pair_folder(benchmark, root, split)
    if is_folder(own.images):
        return [own]
    there = present_splits(benchmark, root)
    if split == ALL and there:
        return [_pair_folder(benchmark, root, name) for name in there]
    raise DatasetError(
        f"{benchmark.name}: {root} has no split {split}; expected {_layout(benchmark, split)}, "
        f"got {', '.join(there) or 'nothing'}"
    )


def present_splits(benchmark: Benchmark, root: Path) -> list[str]:
    """Which splits have a folder of images under ``root``: train, val, test, and all where it has its own."""
    return [split for split in (*SPLITS, ALL) if is_folder(_pair_folder(benchmark, root, split).images)]


def _pair_folder(benchmark: Benchmark, root: Path, split: str) -> PairFolder:
    name = benchmark.folder(split)
    home = root / name.split("/")[0]
    return PairFolder(root / name / benchmark.images, root / name / benchmark.masks, home)


def _layout(benchmark: Benchmark, split: str) -> str:
    folder = benchmark.folder(split)
    return f"{folder}/{benchmark.images}/* and {folder}/{benchmark.masks}/* of {', '.join(SUFFIXES)}"


class BenchmarkDataset(PairDataset):
    """A set of :mod:`drseg_core.data.benchmarks` in the release's folders (see :class:`PairDataset`).

    The manifest that counts is that of the first folder below the root, such as ``ROOT/DLRSD_split/manifest.sha256``.

    Args:
        name: the set.
        root: the folder that holds ``DLRSD``, ``iSAID_split``, ``LoveDA`` and so on.
        split: ``train``, ``val``, ``test`` or ``all``.
        max_pixels: larger files are refused before they are decoded.

    Raises:
        ConfigError: no such set or split.
        DatasetError: the split is missing, and what :class:`PairDataset` refuses.
    """

    def __init__(self, name: str, root: str | Path, split: str = "train", *, max_pixels: int = MAX_PIXELS) -> None:
        self.benchmark = get_benchmark(name)
        self.split = split
        folder, layout = Path(root), _layout(self.benchmark, split)
        if not str(root) or not is_folder(folder):
            raise DatasetError(f"{name}: {folder} is not a folder; expected {layout} in it")
        folders = split_folders(self.benchmark, folder, split)
        super().__init__(folder, self.benchmark.class_names, folders, layout=layout, max_pixels=max_pixels)


class RelabelledDataset(SegmentationDataset):
    """Another data set under other class names: ids merged, moved or ignored.

    Args:
        base: the samples.
        class_names: the new names in id order.
        new_id: new id by old id; old ids that are left out become 255, and 255 itself may be given one.
        image_side: side in pixels that every image must have; None takes any.

    Raises:
        DatasetError: unusable class names; on reading, an image of another size.
    """

    def __init__(
        self,
        base: SegmentationDataset,
        class_names: tuple[str, ...],
        new_id: Mapping[int, int],
        *,
        image_side: int | None = None,
    ) -> None:
        self.base = base
        self.class_names = check_class_names(class_names, "RelabelledDataset")
        self.image_side = image_side
        self._table = np.full(256, IGNORE, np.uint8)
        for old, new in new_id.items():
            self._table[old] = new

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Sample:
        sample = self.base[index]
        height, width = sample.mask.shape
        if self.image_side is not None and (height, width) != (self.image_side, self.image_side):
            raise DatasetError(
                f"{sample.name} has another size than the protocol; expected {self.image_side} x {self.image_side}, "
                f"got {height} x {width} (see drseg data prepare --patch)"
            )
        return sample._replace(mask=sample.mask.new_tensor(self._table[sample.mask.numpy()]))

    def sample_name(self, index: int) -> str:
        return self.base.sample_name(index)

    def fingerprint(self) -> str:
        """That of the files, with the new names and ids."""
        content = "\n".join((self.base.fingerprint(), *self.class_names)).encode() + self._table.tobytes()
        return hashlib.sha256(content).hexdigest()
