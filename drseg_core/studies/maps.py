# SPDX-License-Identifier: Apache-2.0
"""Fig. 7: the original and the refined correlation of a trained DR-Seg, what it makes of them, and its uncertainty."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.config.schema import EvaluationConfig
from drseg_core.data import IGNORE, Sample, SegmentationDataset
from drseg_core.data.palette import colorize
from drseg_core.data.protocols import Protocol
from drseg_core.device import select_device
from drseg_core.evaluation.evaluate import evaluate
from drseg_core.evaluation.report import heat
from drseg_core.studies.output import mean_text, write_study
from drseg_core.studies.plan import PlannedVariant, plan
from drseg_core.studies.runner import load_variant, run_variant, train_priors
from drseg_core.studies.seeds import measure_seeds
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import DRSEG
from drseg_core.studies.zero_shot import sampled

IMAGES, SHOWN = 60, 4
MAPS = ("original", "refined", "logits")
RELIANCE = ("mIoU", "mIoU without refined", "mIoU without original")


def correlation_maps(setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """How well each map tells a class's places from all others, and a sheet of examples.

    The measure is the area under the ROC curve of each map as a detector of each class of an image, over all images of
    each test set: 50 % tells nothing, 100 % everything, and it does not depend on a map's scale.
    """
    planned = plan(setting, [DRSEG], out)
    train_priors(planned)
    measured = measure_seeds("correlation-maps", _measured_maps, planned, jobs)
    found = measured.found
    first = next(iter(next(iter(found.values()))))
    rows = [
        {"test set": name, **{key: mean_text([row[key] for row in by_seed.values()]) for key in (*MAPS, *RELIANCE)}}
        for name, by_seed in found.items()
    ]
    explained = (
        "Area under the ROC curve, percent, of each map as a detector of each class of an image: 50 tells nothing, "
        "100 everything. The refined map is trained through fusion and decoder alone. Then mIoU, and what "
        "is left of it where the fusion gets zeros for one of the two maps."
    )

    def draw(plt: Any) -> Any:
        # its folder may be gone
        model = _trained(next(item for item in planned if item.seed == first))
        sets = [setting.open_test(test)[0] for test in setting.tests]
        examples = [_example(*maps) for dataset in sets for maps in islice(_maps(model, dataset), SHOWN)]
        figure, axes = plt.subplots(len(examples), 6, figsize=(11, 1.9 * len(examples)), squeeze=False)
        for row, (title, pictures) in zip(axes, examples, strict=True):
            for axis, picture in zip(row, pictures, strict=True):
                axis.imshow(picture, interpolation="nearest")
                axis.set_axis_off()
            row[2].set_title(title, fontsize=8)
        for axis, title in zip(axes[0], ("image", "truth", *MAPS, "uncertainty"), strict=True):
            axis.set_title(f"{title}\n{axis.get_title()}", fontsize=9)
        return figure

    title = "Correlation maps (Fig. 7)"
    return write_study("correlation-maps", title, explained, rows, measured, setting, out, command, draw)


def _measured_maps(planned: PlannedVariant) -> dict[str, Any]:
    setting, model = planned.setting, _trained(planned)
    found: dict[str, dict[str, float | None]] = {}
    for test in setting.tests:
        dataset, protocol = setting.open_test(test)
        areas: dict[str, list[float]] = {name: [] for name in MAPS}
        for sample, _, maps, _ in _maps(model, dataset):
            for label in sample.mask[sample.mask != IGNORE].unique().tolist():
                for name, value in maps.items():
                    area = roc_area(value[0, label], sample.mask, label)
                    if area is not None:
                        areas[name].append(area)
        found[test.name] = {name: statistics.fmean(area) for name, area in areas.items()}
        found[test.name].update(reliance(model, dataset, setting.config.evaluation, protocol))
    return found


def _trained(planned: PlannedVariant) -> Any:
    run_variant(planned)
    return load_variant(planned).model.eval().to(select_device(planned.setting.device))


@torch.no_grad()
def _maps(
    model: Any, dataset: SegmentationDataset
) -> Iterator[tuple[Sample, Sequence[str], dict[str, Tensor], Tensor]]:
    """Images of a test set, its class names, their maps (1, T, h, w) by name, and uncertainty (h, w), on the CPU."""
    text = model.encode_text(model.tokenize(dataset.class_names))
    device = next(model.parameters()).device
    for place in sampled(dataset, IMAGES):
        sample = dataset[place]
        output = model(sample.image[None].to(device).float() / 255, text)
        maps = (output.original, output.refined, output.logits)
        named = {name: value.cpu() for name, value in zip(MAPS, maps, strict=True)}
        yield sample, dataset.class_names, named, output.uncertainty[0, 0].cpu()


def reliance(
    model: Any, dataset: SegmentationDataset, evaluation: EvaluationConfig, protocol: Protocol | None = None
) -> dict[str, float | None]:
    """The mIoU of a trained DR-Seg, and with either map set to zero before the fusion: how much it leans on each."""
    found = {}
    for name, left_out in zip(RELIANCE, (None, 1, 0), strict=True):

        def silenced(module: Any, maps: tuple[Tensor, ...], left_out: int | None = left_out) -> tuple[Tensor, ...]:
            return tuple(torch.zeros_like(value) if place == left_out else value for place, value in enumerate(maps))

        handle = model.fusion.register_forward_pre_hook(silenced)
        try:
            views = None if protocol is None else protocol.views
            result = evaluate(model, dataset.class_names, dataset, evaluation, views=views, progress=False)
        finally:
            handle.remove()
        found[name] = result["mIoU_conventions"]["present" if protocol is None else protocol.convention]
    return found


def roc_area(value: Tensor, mask: Tensor, label: int) -> float | None:
    """Area under the ROC curve in percent of a map (h, w) for the pixels of a class; ties count half.

    The map is enlarged to the mask (bilinear). None where the class, or every other one, has no pixel.
    """
    size = (mask.shape[0], mask.shape[1])
    score = F.interpolate(value[None, None].float(), size=size, mode="bilinear", align_corners=False)[0, 0]
    known = mask != IGNORE
    inside = (mask == label)[known]
    positive, total = int(inside.sum()), int(known.sum())
    if positive in (0, total):
        return None
    unique, place, count = torch.unique(score[known], return_inverse=True, return_counts=True)
    # mean rank of equal scores
    rank = (count.cumsum(0) - (count - 1) / 2).double()[place]
    return 100 * float((rank[inside].sum() - positive * (positive + 1) / 2) / (positive * (total - positive)))


def _example(sample: Sample, names: Sequence[str], maps: dict[str, Tensor], u: Tensor) -> tuple[str, list[Any]]:
    """The second largest class of an image: the largest is ground in most."""
    labels, count = sample.mask[sample.mask != IGNORE].unique(return_counts=True)
    label = int(labels[count.argsort(descending=True)[min(1, len(labels) - 1)]])
    pictures: list[Any] = [sample.image.permute(1, 2, 0).numpy(), colorize(sample.mask.numpy(), len(names))]
    pictures += [_stretched(value[0, label]) for value in maps.values()]
    return names[label], [*pictures, _stretched(u)]


def _stretched(value: Tensor) -> Any:
    array = value.float().cpu().numpy()
    low, high = float(np.min(array)), float(np.max(array))
    return heat((array - low) / max(high - low, 1e-6))
