# SPDX-License-Identifier: Apache-2.0
"""From the label codes of original archives to class ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from drseg_core.data.benchmarks import Benchmark, Color
from drseg_core.data.dataset import IGNORE
from drseg_core.data.prepare.raw import Recipe
from drseg_core.errors import DatasetError

TOLERANCE = 8
"""Largest difference of a channel at which a colour is still that of a class: some tiles were painted a little off.
Colours of two classes differ by far more (a test holds them to it)."""

UNKNOWN_SHARE = 1e-3
"""Largest share of pixels in other colours, such as those of blurred borders; they become 255."""


def label_ids(codes: NDArray[np.uint8], benchmark: Benchmark, recipe: Recipe, name: str) -> NDArray[np.uint8]:
    """Ids 0 to T - 1, or 255, of label codes.

    Args:
        codes: (bands, H, W) uint8 as the file stores them.
        benchmark: class names and colours.
        recipe: coding of the labels.
        name: the file, for errors.

    Returns:
        (H, W) uint8.

    Raises:
        DatasetError: another number of bands than the coding has, an unknown id, or too many unknown colours.
    """
    bands = len(codes)
    wanted = {"ids": (1,), "colors": (3, 4), "either": (1, 3, 4)}[recipe.coding]
    if bands not in wanted:
        raise DatasetError(
            f"label_ids: {name} has {bands} bands; expected {' or '.join(map(str, wanted))} for labels of "
            f"{benchmark.title}"
        )
    if bands == 1:
        return _from_numbers(codes[0], len(benchmark.class_names), recipe, name)
    return _from_colors(codes[:3], benchmark.palette, recipe.ignored_colors, name)


def _from_numbers(code: NDArray[np.uint8], num_classes: int, recipe: Recipe, name: str) -> NDArray[np.uint8]:
    table = np.full(256, IGNORE, np.uint8)
    known = np.zeros(256, bool)
    classes = np.arange(num_classes) + recipe.first_id
    table[classes] = np.arange(num_classes)
    known[[*classes, *recipe.ignored_ids, IGNORE]] = True
    wrong = np.flatnonzero(~known & (np.bincount(code.ravel(), minlength=256) > 0))
    if len(wrong):
        raise DatasetError(
            f"label_ids: {name} holds ids that are no class; expected {classes[0]} to {classes[-1]} or {IGNORE}, "
            f"got {', '.join(map(str, wrong[:10]))}"
        )
    return table[code]


def _from_colors(
    code: NDArray[np.uint8], palette: Sequence[Color], ignored: Sequence[Color], name: str
) -> NDArray[np.uint8]:
    packed = code[0].astype(np.int32) << 16 | code[1].astype(np.int32) << 8 | code[2]
    present, place, count = np.unique(packed, return_inverse=True, return_counts=True)
    color = np.stack([present >> 16, present >> 8 & 255, present & 255], axis=1)
    meaning = [*enumerate(palette), *((IGNORE, value) for value in ignored)]
    ids = np.full(len(present), IGNORE, np.uint8)
    known = np.zeros(len(present), bool)
    for number, value in meaning:
        near = np.abs(color - np.array(value)).max(axis=1) <= TOLERANCE
        ids[near], known[near] = number, True
    unknown = int(count[~known].sum())
    if unknown > UNKNOWN_SHARE * packed.size:
        often = color[~known][np.argmax(count[~known])]
        raise DatasetError(
            f"label_ids: {name} holds colours that are no class; expected at most {UNKNOWN_SHARE:.1%} of a strip, "
            f"got {unknown / packed.size:.1%}, most often ({', '.join(map(str, often))})"
        )
    return ids[place].reshape(packed.shape)
