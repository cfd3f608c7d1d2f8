# SPDX-License-Identifier: Apache-2.0
"""What every data set here is: numbered samples, class names in id order, and a fingerprint."""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drseg_core.config.schema import ReadingConfig
from drseg_core.errors import DatasetError

IGNORE = 255
"""Mask value of pixels that are neither trained on nor scored."""


class Sample(NamedTuple):
    """One image with its mask.

    ``image`` is (3, H, W) uint8 RGB, ``mask`` (H, W) uint8 class ids with 255 = ignore, ``name`` a path or scene name.

    Examples:
        >>> from drseg_core.data import open_dataset
        >>> image, mask, name = open_dataset("folder:data", "train")[0]
        >>> image.dtype, image.shape[0], mask.shape == image.shape[1:]
        (torch.uint8, 3, True)
    """

    image: Tensor
    mask: Tensor
    name: str


class SegmentationDataset(torch.utils.data.Dataset[Sample], ABC):
    """A numbered set of samples whose mask value ``c`` means ``class_names[c]``.

    Examples:
        >>> import torch
        >>> from drseg_core.data import Sample, SegmentationDataset
        >>> class Night(SegmentationDataset):
        ...     class_names = ("darkness",)
        ...     def __len__(self): return 2
        ...     def __getitem__(self, index):
        ...         pixels = torch.zeros(4, 8, 8, dtype=torch.uint8)
        ...         return Sample(pixels[:3], pixels[3], f"night {index}")
        ...     def fingerprint(self): return "0" * 64
        >>> len(Night()), Night()[1].name
        (2, 'night 1')
    """

    class_names: tuple[str, ...]
    reading: ReadingConfig | None = None
    """How the images are read, with what was measured on them; None where there is nothing to choose."""

    def large(self, index: int) -> tuple[int, int] | None:
        """(height, width) of a sample that is better read by :meth:`part` than as a whole; None of all others."""
        return None

    def part(self, index: int, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """Image (3, n, m) and ids (n, m) of a part (top, bottom, left, right) of a large sample."""
        raise NotImplementedError

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides the content."""

    def sample_name(self, index: int) -> str:
        """Name of a sample without reading it, for error messages."""
        return f"sample {index}"


def check_class_names(class_names: Sequence[str], origin: str) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        DatasetError: a text in place of a list, no name, more than 255 names (id 255 means ignore), an empty or a
            repeated name, or one with control characters, which no XML and no terminal takes for text.
    """
    if isinstance(class_names, str):
        raise DatasetError(f"{origin}: class names are no list; expected a list of names, got the text {class_names!r}")
    names = tuple(class_names)
    if not 1 <= len(names) <= IGNORE:
        raise DatasetError(f"{origin}: class names out of range; expected 1 to {IGNORE} names, got {len(names)}")
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if not name.strip():
            raise DatasetError(f"{origin}: class name {index} is empty; expected text")
        if has_control(name):
            raise DatasetError(
                f"{origin}: class name {index} has a control character; expected text, got {ascii(name)}"
            )
        if name in seen:
            raise DatasetError(
                f"{origin}: class name {name!r} repeats; expected it once, got ids {seen[name]} and {index}"
            )
        seen[name] = index
    return names


_NO_XML = "\ufffe\uffff"
"""Of all that are no control characters, XML 1.0 forbids these two."""


def has_control(text: str) -> bool:
    """Whether it has a control character, half a pair, the end of a line or paragraph, or what XML forbids."""
    return any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _NO_XML for letter in text)


def class_names_hash(class_names: Sequence[str]) -> str:
    """SHA-256 (hex) of the names in order; names are part of an open-vocabulary model's input."""
    return hashlib.sha256("\n".join(class_names).encode()).hexdigest()
