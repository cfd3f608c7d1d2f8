# SPDX-License-Identifier: Apache-2.0
"""Data sets, augmentation and the training stream; synthetic/ draws scenes, prepare/ makes sets of archives."""

from drseg_core.data.dataset import IGNORE, Sample, SegmentationDataset
from drseg_core.data.open import open_dataset

__all__ = ["IGNORE", "Sample", "SegmentationDataset", "open_dataset"]
