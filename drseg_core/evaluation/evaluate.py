# SPDX-License-Identifier: Apache-2.0
"""Scores of a model on a data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from drseg_core.config.schema import EvaluationConfig
from drseg_core.data.dataset import IGNORE, Sample, SegmentationDataset, class_names_hash
from drseg_core.data.protocols import Views
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.evaluation.inference import Predictor
from drseg_core.evaluation.metrics import CONVENTIONS, ConfusionMatrix
from drseg_core.evaluation.views import ViewPredictor


def evaluate(
    model: Any,
    class_names: Sequence[str],
    dataset: SegmentationDataset,
    evaluation: EvaluationConfig | None = None,
    *,
    views: Views | None = None,
    subsets: Mapping[str, Sequence[int]] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Predict every image of a data set and score all pixels together.

    Args:
        model: see :class:`Predictor`.
        class_names: the prompts; name ``c`` stands for mask id ``c``. They may be worded differently from the data
            set's own names, and names beyond those are distractors that only cost.
        dataset: images and masks.
        evaluation: mode, tiles and batch size.
        views: how a protocol shows images to the model; takes the place of mode and tiles.
        subsets: named lists of class ids to be averaged on their own, such as held-out classes.
        device: where to run; by default where the model is.
        progress: show a progress bar.

    Returns:
        a dictionary that JSON can hold (a mean over nothing is None). In percent: ``mIoU`` (convention ``present``),
        ``mACC``, ``fwIoU``, ``pACC``, ``mIoU_conventions``, ``per_class`` {name: iou, accuracy, pixels}, ``subsets``
        {name: mIoU, mACC, classes}; further ``confusion`` (rows = truth), ``images``, ``ignored_pixels``,
        ``images_all_ignored`` and ``class_names_sha256`` (the names are part of the model's input).

    Raises:
        ConfigError: fewer names than the data set has classes, or an unknown id in ``subsets``.
        DatasetError: the data set is empty or a sample cannot be read.
    """
    from tqdm import tqdm

    evaluation = evaluation or EvaluationConfig()
    if len(class_names) < len(dataset.class_names):
        raise ConfigError(
            f"evaluate: class_names are too few; expected a name for each of {len(dataset.class_names)} mask ids, "
            f"got {len(class_names)}"
        )
    for name, ids in (subsets or {}).items():
        if any(not 0 <= i < len(class_names) for i in ids):
            raise ConfigError(f"evaluate: subset {name!r} holds unknown ids; expected 0 to {len(class_names) - 1}")
    if not len(dataset):
        raise DatasetError("evaluate: dataset is empty; expected at least one image")
    predictor = (
        ViewPredictor(model, class_names, views, batch_size=evaluation.batch_size, device=device)
        if views is not None
        else Predictor(
            model,
            class_names,
            mode=evaluation.mode,
            tile_size=evaluation.tile_size,
            overlap=evaluation.overlap,
            batch_size=evaluation.batch_size,
            device=device,
        )
    )
    confusion = ConfusionMatrix(len(class_names))
    all_ignored = 0
    with tqdm(total=len(dataset), desc="evaluate", unit="image", disable=not progress) as bar:
        for first in range(0, len(dataset), evaluation.batch_size):
            samples = [dataset[i] for i in range(first, min(first + evaluation.batch_size, len(dataset)))]
            all_ignored += _score(predictor, samples, confusion)
            bar.update(len(samples))
    return {
        **summary(confusion, class_names, subsets=subsets),
        "class_names_sha256": class_names_hash(class_names),
        "images": len(dataset),
        "images_all_ignored": all_ignored,
    }


def _score(predictor: Predictor, samples: Sequence[Sample], confusion: ConfusionMatrix) -> int:
    """Count the samples; returns how many have no pixel to score."""
    for sample, prediction in zip(samples, predictor.many([s.image for s in samples]), strict=True):
        confusion.update(prediction.class_index, sample.mask)
    return sum(bool((s.mask == IGNORE).all()) for s in samples)


def summary(
    confusion: ConfusionMatrix, class_names: Sequence[str], *, subsets: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """The scores of :func:`evaluate` from counts."""
    iou, accuracy, pixels = confusion.iou(), confusion.accuracy(), confusion.truth_pixels()
    return {
        "mIoU": _number(confusion.mean_iou()),
        "mACC": _number(confusion.mean_accuracy()),
        "fwIoU": _number(confusion.frequency_weighted_iou()),
        "pACC": _number(confusion.pixel_accuracy()),
        "mIoU_conventions": {c: _number(confusion.mean_iou(c)) for c in CONVENTIONS},
        "per_class": {
            name: {"iou": _number(iou[i]), "accuracy": _number(accuracy[i]), "pixels": int(pixels[i])}
            for i, name in enumerate(class_names)
        },
        "subsets": {
            name: {
                "mIoU": _number(confusion.mean_iou(classes=ids)),
                "mACC": _number(confusion.mean_accuracy(classes=ids)),
                "classes": [class_names[i] for i in ids],
            }
            for name, ids in (subsets or {}).items()
        },
        "confusion": confusion.matrix.tolist(),
        "ignored_pixels": confusion.ignored,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
