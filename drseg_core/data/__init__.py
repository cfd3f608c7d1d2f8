# SPDX-License-Identifier: Apache-2.0
"""Data sets, augmentation and the training stream."""

from drseg_core.data.dataset import IGNORE, Sample, SegmentationDataset, open_dataset

__all__ = ["IGNORE", "Sample", "SegmentationDataset", "open_dataset"]
