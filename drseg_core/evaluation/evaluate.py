# SPDX-License-Identifier: Apache-2.0
"""Scores of a model on a data set."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from drseg_core.config.schema import EvaluationConfig
from drseg_core.data.dataset import IGNORE, Sample, SegmentationDataset, class_names_hash
from drseg_core.data.protocols import Views
from drseg_core.device import PrecisionName
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.evaluation.boundary import BoundaryCounts
from drseg_core.evaluation.calibration import Calibration
from drseg_core.evaluation.inference import Predictor
from drseg_core.evaluation.metrics import CONVENTIONS, ConfusionMatrix
from drseg_core.evaluation.views import ViewPredictor
from drseg_core.extras import require
from drseg_core.models.prior_cache import CACHE_BYTES
from drseg_core.models.prior_cache import prior_cache as kept_features

__all__ = ["evaluate"]

_log = logging.getLogger(__name__)


class Processes(Protocol):
    """This process among those that share an evaluation; :mod:`drseg_core.training.distributed` has one."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def sum(self, value: Tensor) -> Tensor: ...


def evaluate(
    model: Any,
    class_names: Sequence[str],
    dataset: SegmentationDataset,
    evaluation: EvaluationConfig | None = None,
    *,
    views: Views | None = None,
    subsets: Mapping[str, Sequence[int]] | None = None,
    device: torch.device | str | None = None,
    processes: Processes | None = None,
    boundary: bool = False,
    prior_cache: str | Path | None = None,
    prior_cache_bytes: int = CACHE_BYTES,
    precision: PrecisionName = "float32",
    compiled: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Predict every image of a data set and score all pixels together.

    Several processes take turns with whole batches, and sum their counts. Counts are integers. So on machines of one
    kind the result is that of a single process, to the last bit. All processes get it.

    Args:
        model: see :class:`Predictor`.
        class_names: the prompts; name ``c`` stands for mask id ``c``. They may be worded differently from the data
            set's own names. Further names are distractors, which can only lower the score.
        dataset: images and masks.
        evaluation: mode, tiles and batch size.
        views: how a protocol shows images to the model; replaces mode and tiles.
        subsets: named lists of class ids to be averaged on their own, such as held-out classes.
        device: where to run; by default where the model is.
        processes: the processes that share the work; by default only this one.
        boundary: also score the outlines (see :mod:`drseg_core.evaluation.boundary`), which takes time.
        prior_cache: folder that keeps the features of the frozen prior for other vocabularies and other checkpoints
            (see :class:`drseg_core.models.prior_cache.PriorCache`). The scores are the same to the last bit.
        prior_cache_bytes: bound on that folder.
        precision: ``float32``, ``bfloat16`` or ``auto``, see :class:`Predictor`.
        compiled: run the model compiled, see :class:`Predictor`.
        progress: show a progress bar, in the first process.

    Returns:
        A dictionary that JSON can hold (a mean over nothing is None).

        * In percent: ``mIoU`` (convention ``present``), ``mACC``, ``fwIoU``, ``pACC``, ``mIoU_conventions``,
          ``per_class`` {name: iou, accuracy, pixels}, ``subsets`` {name: mIoU, mACC, classes}.
        * Counts: ``confusion`` (rows = truth), ``images``, ``ignored_pixels``, ``images_all_ignored``.
        * ``calibration`` {error, bins, error_auroc}, and if asked for ``boundary`` {mIoU, share, per_class}.
        * The setting: ``class_names_sha256`` (the names are part of the model's input), ``precision``, ``compiled``.

    Raises:
        ConfigError: fewer names than the data set has classes, an unknown id in ``subsets``, a ``prior_cache`` that is
            no folder, or one for a model without a prior.
        BackendUnavailableError: bfloat16 on a device without it, or a model that cannot be compiled.
        DatasetError: the data set is empty or a sample cannot be read.
        ResourceError: ``prior_cache`` cannot be written.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.data import open_dataset
        >>> from drseg_core.evaluation.evaluate import evaluate
        >>> data = open_dataset("folder:data", "val")
        >>> scores = evaluate(drseg.load("run").model, data.class_names, data, progress=False)
        >>> 0 <= scores["mIoU"] <= 100, list(scores["per_class"])
        (True, ['bare soil', 'red roof', 'blue pond'])
    """
    require("evaluate", "tqdm")
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
    how: dict[str, Any] = {"device": device, "precision": precision, "compiled": compiled}
    predictor = (
        ViewPredictor(model, class_names, views, batch_size=evaluation.batch_size, **how)
        if views is not None
        else Predictor(
            model,
            class_names,
            mode=evaluation.mode,
            tile_size=evaluation.tile_size,
            overlap=evaluation.overlap,
            batch_size=evaluation.batch_size,
            **how,
        )
    )
    if predictor.arithmetic != "float32" or precision == "auto":
        _log.info("precision: %s", predictor.arithmetic)
    rank, world_size = (0, 1) if processes is None else (processes.rank, processes.world_size)
    confusion = ConfusionMatrix(len(class_names))
    outlines = BoundaryCounts(len(class_names)) if boundary else None
    calibration = Calibration()
    all_ignored = 0
    own = range(rank * evaluation.batch_size, len(dataset), world_size * evaluation.batch_size)
    batches = [range(first, min(first + evaluation.batch_size, len(dataset))) for first in own]
    count = sum(map(len, batches))
    with contextlib.ExitStack() as stack:
        cache = None
        if prior_cache is not None:
            cache = stack.enter_context(kept_features(predictor.model, prior_cache, prior_cache_bytes))
        bar = stack.enter_context(tqdm(total=count, desc="evaluate", unit="image", disable=not progress or rank > 0))
        for batch in batches:
            large = [i for i in batch if outlines is None and predictor.mode == "tile" and dataset.large(i) is not None]
            samples = [dataset[i] for i in batch if i not in large]
            all_ignored += _score(predictor, samples, confusion, outlines, calibration)
            all_ignored += sum(_score_in_parts(predictor, dataset, i, confusion, calibration) for i in large)
            bar.update(len(batch))
    if cache is not None:
        _log.info("prior cache: %d batches of images read, %d computed", cache.found, cache.computed)
    if processes is not None:
        all_ignored = _summed(confusion, outlines, calibration, all_ignored, processes)
    return {
        **summary(confusion, class_names, subsets=subsets),
        "class_names_sha256": class_names_hash(class_names),
        "images": len(dataset),
        "images_all_ignored": all_ignored,
        "calibration": calibration.as_dict(),
        "precision": str(predictor.precision).removeprefix("torch."),
        "compiled": compiled,
        **({} if outlines is None else {"boundary": _boundary_summary(outlines, class_names)}),
    }


def _score(
    predictor: Predictor,
    samples: Sequence[Sample],
    confusion: ConfusionMatrix,
    outlines: BoundaryCounts | None,
    calibration: Calibration,
) -> int:
    """Count the samples; returns how many have no pixel to score."""
    for sample, prediction in zip(samples, predictor.many([s.image for s in samples]), strict=True):
        confusion.update(prediction.class_index, sample.mask)
        calibration.update(prediction.class_index, prediction.score, prediction.uncertainty, sample.mask)
        if outlines is not None:
            outlines.update(prediction.class_index, sample.mask)
    return sum(bool((s.mask == IGNORE).all()) for s in samples)


def _score_in_parts(
    predictor: Predictor, dataset: SegmentationDataset, index: int, confusion: ConfusionMatrix, calibration: Calibration
) -> bool:
    """Count a sample that is read as it is needed; returns whether it has no pixel to score."""
    height, width = dataset.large(index) or (0, 0)
    truth: dict[str, Any] = {}

    def read(top: int, bottom: int, left: int, right: int) -> tuple[Tensor, None]:
        image, truth["mask"] = dataset.part(index, (top, bottom, left, right))
        truth["origin"] = top, left
        return image, None

    ignored = confusion.ignored
    for piece in predictor.pieces(read, height, width):
        found = piece.prediction
        rows, columns = found.class_index.shape
        top, left = piece.top - truth["origin"][0], piece.left - truth["origin"][1]
        mask = truth["mask"][top : top + rows, left : left + columns]
        confusion.update(found.class_index, mask)
        calibration.update(found.class_index, found.score, found.uncertainty, mask)
    return confusion.ignored - ignored == height * width


def _summed(
    confusion: ConfusionMatrix,
    outlines: BoundaryCounts | None,
    calibration: Calibration,
    all_ignored: int,
    processes: Processes,
) -> int:
    """Bring the counts of all processes together in what holds them; returns the sum of ``all_ignored``."""
    own = [np.array([confusion.ignored, all_ignored]), confusion.matrix, calibration.counts]
    if outlines is not None:
        own += [outlines.counts, outlines.truth_pixels]
    flat = torch.cat([torch.from_numpy(part).flatten() for part in own]).to(processes.device)
    sums = processes.sum(flat).cpu().split([part.size for part in own])
    total = [part.numpy().reshape(like.shape) for part, like in zip(sums, own, strict=True)]
    confusion.matrix, calibration.counts = total[1:3]
    if outlines is not None:
        outlines.counts, outlines.truth_pixels = total[3:]
    confusion.ignored, all_ignored = total[0].tolist()
    return all_ignored


def _boundary_summary(outlines: BoundaryCounts, class_names: Sequence[str]) -> dict[str, Any]:
    per_class = {name: _number(value) for name, value in zip(class_names, outlines.iou(), strict=True)}
    return {"mIoU": _number(outlines.mean_iou()), "share": outlines.share, "per_class": per_class}


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
