# SPDX-License-Identifier: Apache-2.0
"""The paper's numbers (arXiv 2604.02010), for the tables that studies print beside their own.

Percent: mean over test sets of mIoU, fwIoU and mACC. Tables 2, 3, 5 and 6: trained on DLRSD, ViT-L, mean over Potsdam,
VDD, UAVid and UDD5. Table 1: mean over all eight sets.
"""

from __future__ import annotations

from typing import NamedTuple


class PaperRow(NamedTuple):
    """One row of a table; None where the paper has no such number."""

    miou: float | None = None
    fwiou: float | None = None
    macc: float | None = None


# DLRSD, ViT-L; of the other methods only what is known of the table
TABLE1 = {"rskt": PaperRow(46.18), "drseg": PaperRow(49.01, None, 64.90)}
TABLE2 = {
    "baseline": PaperRow(34.15, 44.56, 50.48),
    "pdgr": PaperRow(36.76, 47.88, 51.78),
    "pdgr_spsd": PaperRow(37.97, 48.80, 53.65),
    "pdgr_ugaf": PaperRow(38.38, 51.86, 55.25),
    "all": PaperRow(40.33, 52.09, 56.36),
}
TABLE3 = {
    "gsnet_v1": PaperRow(35.08, None, 50.37),
    "rskt_v1": PaperRow(36.83, 48.52, 52.66),
    "drseg_v1": PaperRow(38.37, 50.94, 55.56),
    "gsnet_v3": PaperRow(38.30, 48.69, 51.82),
    "rskt_v3": PaperRow(36.39, 47.67, 51.02),
    "drseg_v3": PaperRow(40.33, 52.09, 56.36),
}
TABLE4 = {
    "mean": PaperRow(39.62, 51.66, 54.96),
    "concat": PaperRow(37.21, 49.79, 53.02),
    "separate": PaperRow(36.55, 47.29, 51.34),
    "ugaf": PaperRow(40.33, 52.09, 56.36),
}
TABLE5 = {
    0.3: PaperRow(37.71, 51.34, 54.62),
    0.4: PaperRow(38.80, 51.13, 54.79),
    0.5: PaperRow(40.33, 52.09, 56.36),
    0.6: PaperRow(39.25, 52.00, 54.52),
    0.7: PaperRow(37.75, 49.37, 52.68),
}
TABLE6 = {
    20: PaperRow(37.57, 50.62, 55.55),
    40: PaperRow(38.51, 50.27, 54.86),
    50: PaperRow(38.95, 51.74, 55.60),
    75: PaperRow(40.33, 52.09, 56.36),
    100: PaperRow(38.05, 49.26, 53.00),
}
