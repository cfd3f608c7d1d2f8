# SPDX-License-Identifier: Apache-2.0
"""Real labelled pieces for studies, and how they are parted into what a classifier is fitted on and what is scored.

A folder has one folder for each data set, with pairs ``NAME_image.png`` and ``NAME_mask.png``; in a mask 0 is
unlabelled and 1, 2, ... are the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drseg_core.data import IGNORE, open_dataset
from drseg_core.data.images import read_image, read_mask
from drseg_core.errors import ConfigError, DatasetError


class Piece(NamedTuple):
    """An image (3, H, W) uint8 and its mask (H, W) uint8, 255 where it has no label."""

    name: str
    image: Tensor
    mask: Tensor


class Fold(NamedTuple):
    """``test`` is scored, with a classifier that saw ``train`` alone; ids of classes are below ``classes``."""

    dataset: str
    train: tuple[Piece, ...]
    test: Piece
    classes: int


def read_pieces(folder: str | None) -> dict[str, list[Piece]]:
    """All pieces by data set.

    Raises:
        ConfigError: no folder is named.
        DatasetError: there are none, or one cannot be read or has a mask of another size.
    """
    if folder is None:
        raise ConfigError(
            "propagation: pieces are missing; expected --pieces DIR or DRSEG_PIECES, a folder such as "
            "DIR/loveda/0_image.png with 0_mask.png (0 unlabelled, then the classes)"
        )
    found: dict[str, list[Piece]] = {}
    for path in sorted(Path(folder).glob("*/*_image.png")):
        name = path.name.removesuffix("_image.png")
        image = torch.from_numpy(np.ascontiguousarray(read_image(path).transpose(2, 0, 1)))
        mask = torch.from_numpy(read_mask(path.with_name(f"{name}_mask.png")).copy())
        if mask.shape != image.shape[1:]:
            raise DatasetError(
                f"propagation: the mask of {path} has another size; expected {tuple(image.shape[1:])}, "
                f"got {tuple(mask.shape)}"
            )
        # an unsigned 0 becomes 255
        found.setdefault(path.parent.name, []).append(Piece(name, image, mask - 1))
    if not found:
        raise DatasetError(f"propagation: {folder} has no pieces; expected DATASET/NAME_image.png and NAME_mask.png")
    return found


def synthetic_pieces() -> dict[str, list[Piece]]:
    """Small ones that only show that a study runs: two images, and one that is halved."""
    dataset = open_dataset("synthetic:world=landscape,scenes=3,size=64,vocabulary=full", "val")
    drawn = [Piece(str(place), dataset[place].image, dataset[place].mask) for place in range(3)]
    return {"several": drawn[:2], "single": drawn[2:]}


def folds(pieces: Mapping[str, Sequence[Piece]]) -> list[Fold]:
    """Of several images each is scored once, with a classifier of the others; a single one is cut into a left and a
    right half, each for the other. A half is an image of its own: no encoder, window or graph sees the other one.

    Raises:
        DatasetError: nothing of a data set is labelled.
    """
    found = []
    for dataset, own in pieces.items():
        known = torch.cat([piece.mask[piece.mask != IGNORE] for piece in own])
        if not len(known):
            raise DatasetError(f"propagation: {dataset} has no labels; expected classes from 1 on in its masks")
        parts = list(own) if len(own) > 1 else _halves(own[0])
        for place, test in enumerate(parts):
            train = (*parts[:place], *parts[place + 1 :])
            found.append(Fold(dataset, train, test, int(known.max()) + 1))
    return found


def _halves(piece: Piece) -> list[Piece]:
    middle = piece.mask.shape[1] // 2
    return [
        Piece(f"{piece.name}, {side}", piece.image[..., part].contiguous(), piece.mask[..., part].contiguous())
        for side, part in (("left", slice(middle)), ("right", slice(middle, None)))
    ]
