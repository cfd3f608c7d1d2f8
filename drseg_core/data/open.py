# SPDX-License-Identifier: Apache-2.0
"""Data sets by their specification; only the kind that is asked for is imported."""

from __future__ import annotations

from drseg_core.config.schema import ReadingConfig
from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.data.dataset import SegmentationDataset
from drseg_core.errors import ConfigError


def open_dataset(
    spec: str, split: str = "train", *, reading: ReadingConfig | None = None, window: int | None = None
) -> SegmentationDataset:
    """Open a data set by its specification.

    * ``folder:PATH``: ``PATH/classes.txt`` and ``PATH/{split}/{images,masks}/*`` (see :class:`FolderDataset`).
    * ``synthetic:seed=0,scenes=400,size=128,vocabulary=seen``: procedural scenes, made while they are read; every
      option may be left out (see :class:`SyntheticDataset`).
    * ``NAME:ROOT``: a benchmark set, such as ``dlrsd:datasets``, in the release's folders (see
      :class:`BenchmarkDataset`).

    Args:
        spec: the specification.
        split: ``train``, ``val`` or, for folders, any other folder of that layout; ``all`` for benchmark sets.
        reading: scale, nodata and bands of the images of a folder; other sets have theirs.
        window: side of the windows in which large images of a folder are read, each a sample of its own.

    Raises:
        ConfigError: unknown kind, option or value.
        DatasetError: the data set cannot be used.

    Examples:
        >>> from drseg_core.data import open_dataset
        >>> open_dataset("folder:data", "val").class_names
        ('bare soil', 'red roof', 'blue pond')
        >>> len(open_dataset("synthetic:scenes=5,size=64"))
        5
    """
    kind, separator, rest = spec.partition(":")
    if separator and kind == "folder":
        from drseg_core.data.folder import FolderDataset

        return FolderDataset(rest, split, reading=reading, window=window)
    if kind == "synthetic":
        from drseg_core.data.synthetic import SyntheticDataset

        return SyntheticDataset.from_spec(rest, split)
    if separator and kind in BENCHMARKS:
        from drseg_core.data.benchmark_dataset import BenchmarkDataset

        return BenchmarkDataset(kind, rest, split)
    raise ConfigError(
        "open_dataset: spec is unknown; expected folder:PATH, synthetic:seed=0,... or NAME:ROOT with NAME one of "
        f"{', '.join(BENCHMARKS)}, got {spec!r}"
    )
