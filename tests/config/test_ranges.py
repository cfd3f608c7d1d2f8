# SPDX-License-Identifier: Apache-2.0
"""The smallest number of every option that counts something: it is taken, and what is below it is not."""

from __future__ import annotations

import pytest

from drseg_core.config.validate import RANGES

FROM_ONE = (
    "model.clip.image_size model.dino.image_size model.remote.image_size model.spsd.prototypes_per_class "
    "model.graph.edge_hidden model.graph.layers model.graph.hidden model.aggregator.width model.aggregator.heads "
    "model.aggregator.mlp_hidden model.aggregator.window model.aggregator.class_pooling model.decoder.widths "
    "model.decoder.guidance_widths model.decoder.guidance_hidden model.proposals.queries model.proposals.width "
    "model.proposals.layers model.proposals.heads model.proposals.hidden model.proposals.image_size "
    "model.proposals.recognition_blocks train.iterations train.batch_size train.crop_size train.checkpoint_every "
    "train.keep_checkpoints train.log_every train.nan_limit evaluation.tile_size evaluation.batch_size"
).split()
FROM_ZERO = (
    "model.clip.guidance_blocks model.dino.layer model.dino.guidance_blocks model.remote.guidance_blocks "
    "model.graph.decay model.aggregator.layers model.aggregator.class_slots train.clip_learning_rate_scale "
    "train.weight_decay train.alignment_weight train.warmup_iterations train.workers evaluation.overlap"
).split()


@pytest.mark.parametrize(("smallest", "names"), [(1, FROM_ONE), (0, FROM_ZERO)], ids=["one", "zero"])
def test_the_smallest_is_taken_and_what_is_below_is_not(smallest, names):
    found = {name: (RANGES[name][1](smallest), RANGES[name][1](smallest - 1), RANGES[name][0]) for name in names}
    assert found == {name: (True, False, f"at least {smallest}") for name in names}


def test_every_option_that_counts_is_among_them():
    counted = {name for name, (expected, _) in RANGES.items() if expected in ("at least 0", "at least 1")}
    assert counted == {*FROM_ONE, *FROM_ZERO}
