# SPDX-License-Identifier: Apache-2.0
"""CLIP's own segmentation with some of its channels: the class of highest cosine at every token, nothing trained.

Channels are taken from image and text vectors alike, and both are normalised again. Every token is scored against the
pixels below it, so there is no interpolation, and all subsets of channels are scored in one pass over the images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.checkpoints.run import load_run, model_of
from drseg_core.config.load import override
from drseg_core.data import IGNORE, SegmentationDataset
from drseg_core.device import select_device
from drseg_core.evaluation.metrics import ConfusionMatrix
from drseg_core.models.segmenter import Segmenter
from drseg_core.models.weights import load_into, load_weights
from drseg_core.studies.plan import PlannedVariant
from drseg_core.studies.runner import train_start
from drseg_core.studies.setting import BARE
from drseg_core.training.rank_channels import dense_features


def clip_model(planned: PlannedVariant) -> Segmenter:
    """CLIP as it is before any adaptation: published weights, or the dual encoder of the seed."""
    device = select_device(planned.setting.device)
    start = train_start(planned)
    if start is not None and start.is_dir():
        return load_run(start).model.eval().to(device)
    bare = override(planned.setting.config, {**BARE, "seed": planned.seed})
    torch.manual_seed(planned.seed)
    model = model_of(bare)
    if start is not None:
        load_into(model, load_weights(start)[0], name=str(start))
    return model.eval().to(device)


def sampled(dataset: SegmentationDataset, images: int) -> list[int]:
    """Up to ``images`` of a data set, drawn at random, always the same: files that lie side by side are alike."""
    generator = torch.Generator().manual_seed(0)
    return sorted(torch.randperm(len(dataset), generator=generator)[:images].tolist())


@torch.no_grad()
def token_features(model: Segmenter, dataset: SegmentationDataset, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of up to ``images`` images: features (C, hw) float32 and pixels of every class below each token (hw, T) float64.

    Pixels of id 255 count nowhere.
    """
    classes = len(dataset.class_names)
    device = next(model.parameters()).device
    for place in sampled(dataset, images):
        sample = dataset[place]
        feature = dense_features(model, sample.image[None].to(device))[0].float().cpu()
        yield feature.flatten(1), pixels_below(sample.mask, (feature.shape[1], feature.shape[2]), classes)


def pixels_below(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """(hw, T) float64: how many pixels of each class of a (H, W) mask lie below each token of the grid."""
    height, width = mask.shape
    row = torch.arange(height) * grid[0] // height
    column = torch.arange(width) * grid[1] // width
    token = row[:, None] * grid[1] + column
    known = mask != IGNORE
    place = token[known] * classes + mask[known].long()
    return torch.bincount(place, minlength=grid[0] * grid[1] * classes).view(-1, classes).double()


class SubsetScores:
    """Confusion matrices of many subsets of channels, filled together.

    Args:
        subsets: (S, C) bool, the channels of each.
        text: (T, C) class embeddings.
    """

    def __init__(self, subsets: Tensor, text: Tensor) -> None:
        self.subsets, self.text = subsets.to(text.dtype), text
        self.text_norm = (self.subsets @ text.T.square()).sqrt()
        classes = len(text)
        self.counts = torch.zeros(len(subsets), classes, classes, dtype=torch.float64)

    def update(self, feature: Tensor, pixels: Tensor) -> None:
        """Add an image: (C, hw) features and (hw, T) pixels below them."""
        classes = len(self.text)
        # a token's own norm is the same for all classes and changes no maximum
        for subset, channels in enumerate(self.subsets):
            cosine = (self.text * channels) @ feature / self.text_norm[subset][:, None].clamp_min(1e-12)
            self.counts[subset].T.index_add_(0, cosine.argmax(dim=0), pixels[:, :classes])

    def mean_iou(self) -> list[float]:
        """Mean IoU of each subset in percent, over the classes in the truth."""
        found = []
        for counts in self.counts:
            confusion = ConfusionMatrix(len(self.text))
            confusion.matrix = counts.round().long().numpy()
            found.append(confusion.mean_iou())
        return found


@torch.no_grad()
def class_text(model: Segmenter, names: tuple[str, ...]) -> Tensor:
    """(T, C) float32 class embeddings on the CPU."""
    return F.normalize(model.encode_text(model.tokenize(names)).float(), dim=-1).cpu()
