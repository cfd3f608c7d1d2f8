# SPDX-License-Identifier: Apache-2.0
"""The paper's blocks as drop-in modules: SPSD, PDGR and UGAF."""

from drseg_core.nn.pdgr import PDGR

__all__ = ["PDGR"]
