# SPDX-License-Identifier: Apache-2.0
"""The paper's blocks as drop-in modules: SPSD, PDGR and UGAF."""

from drseg_core.nn.pdgr import PDGR
from drseg_core.nn.spsd import SPSD, rank_by_prototypes
from drseg_core.nn.ugaf import UGAF, build_fusion

__all__ = ["PDGR", "SPSD", "UGAF", "build_fusion", "rank_by_prototypes"]
