# SPDX-License-Identifier: Apache-2.0
"""Scenes that are drawn, not photographed: the objects, the landscapes, and the data set of either."""

from drseg_core.data.synthetic.dataset import (
    CLASS_NAMES,
    HELD_OUT,
    HELD_OUT_IDS,
    SEEN_NAMES,
    SyntheticDataset,
    SyntheticOptions,
    Vocabulary,
    class_names,
    held_out_ids,
    render_scene,
    write_scenes,
)

__all__ = [
    "CLASS_NAMES",
    "HELD_OUT",
    "HELD_OUT_IDS",
    "SEEN_NAMES",
    "SyntheticDataset",
    "SyntheticOptions",
    "Vocabulary",
    "class_names",
    "held_out_ids",
    "render_scene",
    "write_scenes",
]
