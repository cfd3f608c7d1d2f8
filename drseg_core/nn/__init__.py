# SPDX-License-Identifier: Apache-2.0
"""The paper's blocks as drop-in modules (SPSD, PDGR, UGAF), and label propagation, which needs no training."""

from drseg_core.nn.label_propagation import LabelPropagation, propagate_labels, propagation_graph, solve_labels
from drseg_core.nn.pdgr import PDGR
from drseg_core.nn.pixel_propagation import propagate_pixels
from drseg_core.nn.spsd import SPSD, rank_by_prototypes
from drseg_core.nn.ugaf import UGAF, build_fusion

__all__ = [
    "PDGR",
    "SPSD",
    "UGAF",
    "LabelPropagation",
    "build_fusion",
    "propagate_labels",
    "propagate_pixels",
    "propagation_graph",
    "rank_by_prototypes",
    "solve_labels",
]
