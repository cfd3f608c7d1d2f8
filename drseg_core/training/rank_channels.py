# SPDX-License-Identifier: Apache-2.0
"""Offline SPSD calibration: score CLIP's channels once per backbone and training set (Eq. 1-5)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.checkpoints.channels import FORMAT_VERSION, ChannelFile
from drseg_core.config.schema import SPSDConfig
from drseg_core.data import IGNORE, Sample, SegmentationDataset
from drseg_core.errors import DatasetError
from drseg_core.nn.spsd import rank_by_prototypes, split_by_score

__all__ = ["rank_channels"]

_log = logging.getLogger(__name__)


class DenseEncoder(Protocol):
    """The part of a model that the calibration needs."""

    def dense_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, C, h, w)."""


def rank_channels(
    model: DenseEncoder,
    dataset: SegmentationDataset,
    options: SPSDConfig,
    *,
    backbone: str,
    weights_hash: str,
    seed: int = 0,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ChannelFile:
    """Sample class prototypes on a training set and rank the channels by them.

    Every image is seen once, unrotated and whole. The mask is brought to the feature grid, and each pixel feature is
    L2-normalised. A uniform sample of at most ``options.prototypes_per_class`` features is kept per class, so memory
    does not grow with the data. For k-means the sample is ten times as large, and is reduced to that many centroids.
    The norm of the features is measured on all places, labelled or not.

    Args:
        model: gives dense CLIP features; its weights are not changed.
        dataset: training split.
        options: ranking options and the share of semantic channels.
        backbone: name of the image encoder, written into the result.
        weights_hash: hash of its weights, written into the result.
        seed: seed of the sample; the result does not depend on ``batch_size`` beyond rounding.
        batch_size: images per forward pass (of equal size).
        device: where the model is.
        progress: called with images done and their number.

    Raises:
        DatasetError: fewer than two classes have labelled pixels.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.data import open_dataset
        >>> from drseg_core.training.rank_channels import rank_channels
        >>> run = drseg.load("run")
        >>> data, options = open_dataset("folder:data"), run.config.model.spsd
        >>> found = rank_channels(run.model, data, options, backbone="drseg-tiny", weights_hash="")
        >>> found.score.shape, len(found.semantic_index)
        (torch.Size([64]), 32)
    """
    classes = len(dataset.class_names)
    kept = options.prototypes_per_class * (10 if options.sampling == "kmeans" else 1)
    reservoir = Reservoir(classes, kept, seed)
    done, square, places = 0, torch.zeros(0), 0
    seen: set[int] = set()
    for samples in _equal_sized(dataset, batch_size):
        feature = dense_features(model, torch.stack([sample.image for sample in samples]).to(device)).cpu()
        mask = torch.stack([sample.mask for sample in samples])
        seen.update(mask.unique().tolist())
        own_square = feature.double().square().sum(dim=(0, 2, 3))
        square = own_square if not places else square + own_square
        places += feature.shape[0] * feature.shape[2] * feature.shape[3]
        label = label_on_grid(mask, (feature.shape[-2], feature.shape[-1]), options.label_to_grid)
        for one_feature, one_label in zip(feature, label, strict=True):
            row, own = one_feature.flatten(1).T, one_label.flatten()
            if options.sampling == "image_mean":
                row, own = class_means(row, own)
            reservoir.add(row, own)
        done += len(samples)
        if progress is not None:
            progress(done, len(dataset))
    prototype, label = reservoir.content()
    if options.sampling == "kmeans":
        prototype, label = class_centroids(prototype, label, options.prototypes_per_class)
    present = label.unique()
    if len(present) < 2:
        found = [dataset.class_names[index] for index in present]
        raise DatasetError(f"rank: {_too_few(getattr(dataset, 'split', 'the data set'), seen - {IGNORE}, found)}")
    if len(present) < classes:
        missing = [name for index, name in enumerate(dataset.class_names) if index not in present]
        _log.warning(
            "rank: %d of %d classes have no labelled pixel: %s", len(missing), classes, ", ".join(missing[:10])
        )
    ranking = rank_by_prototypes(prototype, label, classes, options=options)
    semantic, structural = split_by_score(ranking.score, options.semantic_ratio)
    return ChannelFile(
        score=ranking.score,
        semantic_index=semantic,
        structural_index=structural,
        entropy=ranking.entropy,
        similarity=ranking.similarity,
        metadata={
            "format_version": FORMAT_VERSION,
            "backbone": backbone,
            "weights_sha256": weights_hash,
            "dataset_sha256": dataset.fingerprint(),
            "class_names": list(dataset.class_names),
            "prototypes": len(label),
            "seed": seed,
            "alpha": options.alpha,
            "semantic_ratio": options.semantic_ratio,
            "prototypes_per_class": options.prototypes_per_class,
            "sampling": options.sampling,
            "label_to_grid": options.label_to_grid,
            "entropy_activation": options.entropy_activation,
            "dead_channel_entropy": options.dead_channel_entropy,
            "similarity": options.similarity,
            "rank_ties": options.rank_ties,
        },
        energy=square / max(places, 1),
    )


def _too_few(split: str, seen: set[int], found: Sequence[str]) -> str:
    """Why channels cannot be ranked by masks with ``seen`` ids, of which classes ``found`` came to the grid."""
    expected = "expected labelled pixels of at least 2 classes"
    if not seen:
        return f"no mask of {split} has a labelled pixel; {expected}"
    few = "one class" if len(seen) == 1 else "too few pixels for the grid of the features"
    got = f"got those of {', '.join(found) or 'none'}"
    return f"masks of {split} have {few}; {expected}, or model.spsd.semantic_ratio 0, {got}"


class Reservoir:
    """A uniform sample, without replacement, of at most ``size`` rows per class of a stream of unknown length.

    Every row gets a random key and the ``size`` smallest keys of each class stay, so the sample depends on the
    order of the stream and the seed alone.
    """

    def __init__(self, classes: int, size: int, seed: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._row: list[Tensor | None] = [None] * classes
        self._key: list[Tensor] = [torch.empty(0, dtype=torch.float64)] * classes

    def add(self, feature: Tensor, label: Tensor) -> None:
        """Offer (n, C) rows with their (n,) labels; rows labelled 255 are passed over. Rows are L2-normalised."""
        key = torch.rand(len(label), dtype=torch.float64, generator=self._generator)
        for index in label.unique().tolist():
            if index == IGNORE:
                continue
            own = (label == index).nonzero().squeeze(1)
            own = own[key[own].argsort()[: self.size]]
            row, kept = F.normalize(feature[own].float(), dim=1), key[own]
            before = self._row[index]
            if before is not None:
                row, kept = torch.cat((before, row)), torch.cat((self._key[index], kept))
            order = kept.argsort()[: self.size]
            self._row[index], self._key[index] = row[order], kept[order]

    def content(self) -> tuple[Tensor, Tensor]:
        """The kept rows (M, C) in class order, and their labels (M,)."""
        kept = [(index, row) for index, row in enumerate(self._row) if row is not None]
        if not kept:
            return torch.empty(0, 0), torch.empty(0, dtype=torch.long)
        return torch.cat([row for _, row in kept]), torch.cat([torch.full((len(row),), index) for index, row in kept])


@torch.no_grad()
def dense_features(model: DenseEncoder, image: Tensor) -> Tensor:
    """Dense CLIP features (B, C, h, w) of (B, 3, H, W) uint8 images, the model in evaluation mode meanwhile."""
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        return model.dense_features(image.float() / 255.0)
    finally:
        if training and isinstance(model, nn.Module):
            model.train()


def label_on_grid(mask: Tensor, grid: tuple[int, int], rule: Literal["nearest", "majority"] = "nearest") -> Tensor:
    """(B, H, W) mask to the class of each of (B, h, w) grid cells: at its centre, or of more than half of it."""
    if rule == "nearest":
        return F.interpolate(mask[:, None].float(), size=grid, mode="nearest-exact")[:, 0].long()
    label = torch.full((mask.shape[0], *grid), IGNORE)
    for index in mask.unique().tolist():
        share = F.adaptive_avg_pool2d((mask == index).float(), grid)
        label = torch.where(share > 0.5, index, label)
    return label


def class_means(row: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the L2-normalised rows (n, C) of each class in an image, and the classes."""
    present = label[label != IGNORE].unique()
    unit = F.normalize(row.float(), dim=1)
    means = [unit[label == index].mean(0) for index in present]
    return (torch.stack(means) if means else unit[:0]), present


def class_centroids(row: Tensor, label: Tensor, count: int, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Spherical k-means (Lloyd) in each class: at most ``count`` L2-normalised centroids of the rows, and their class.

    The first ``count`` rows of a class start; the rows are a random sample already.
    """
    rows, labels = [], []
    for index in label.unique():
        own = row[label == index]
        centre = own[:count]
        for _ in range(rounds if len(own) > count else 0):
            nearest = (own @ centre.T).argmax(1)
            total = torch.zeros_like(centre).index_add_(0, nearest, own)
            empty = total.norm(dim=1, keepdim=True) == 0
            centre = torch.where(empty, centre, F.normalize(total, dim=1))
        rows.append(centre)
        labels.append(index.repeat(len(centre)))
    return (torch.cat(rows), torch.cat(labels)) if rows else (row, label)


def _equal_sized(dataset: SegmentationDataset, batch_size: int) -> Iterator[list[Sample]]:
    """Samples in order, in groups of one image size."""
    group: list[Sample] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        if group and (len(group) == batch_size or group[0].image.shape != sample.image.shape):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
