# SPDX-License-Identifier: Apache-2.0
"""What each number of a configuration may be, said a second time: the least that is taken, and what is refused."""

from __future__ import annotations

import pytest

from drseg_core.config.load import load_config, override, preset_names
from drseg_core.config.validate import RANGES, validate
from drseg_core.errors import ConfigError
from drseg_core.nn import PDGR

FROM_0 = """
    model.clip.guidance_blocks model.dino.guidance_blocks model.dino.layer model.remote.guidance_blocks
    model.graph.decay model.graph.norm_scale model.aggregator.layers model.aggregator.class_slots
    train.clip_learning_rate_scale train.weight_decay train.alignment_weight train.warmup_iterations train.workers
    evaluation.overlap
""".split()
FROM_1 = """
    model.clip.image_size model.dino.image_size model.remote.image_size model.spsd.prototypes_per_class
    model.graph.edge_hidden model.graph.layers model.graph.hidden model.aggregator.width model.aggregator.heads
    model.aggregator.mlp_hidden model.aggregator.window model.aggregator.class_pooling model.decoder.widths
    model.decoder.guidance_widths model.decoder.guidance_hidden model.proposals.queries model.proposals.width
    model.proposals.layers model.proposals.heads model.proposals.hidden model.proposals.image_size
    model.proposals.recognition_blocks train.iterations train.batch_size train.crop_size train.checkpoint_every
    train.keep_checkpoints train.log_every train.nan_limit evaluation.tile_size evaluation.batch_size
""".split()
ABOVE_0 = """
    model.graph.gamma model.graph.edge_temperature model.graph.edge_decay model.fusion.tau train.seconds
    train.learning_rate train.gradient_clip train.edge_eps reading.gsd
""".split()
SHARES = ["model.spsd.semantic_ratio", "model.graph.dropout"]
SEEDS = ["seed", "model.dino.seed"]
TAKEN_AND_REFUSED = {
    **{name: ((0, 1), (-1,)) for name in FROM_0},
    **{name: ((1, 2), (0, -1)) for name in FROM_1},
    **{name: ((1e-30, 1.0), (0, -1)) for name in ABOVE_0},
    **{name: ((0, 0.99), (-0.01, 1)) for name in SHARES},
    **{name: ((0, 2**63 - 1), (-1, 2**63)) for name in SEEDS},
    "model.spsd.alpha": ((0, 1), (-0.01, 1.01)),
    "model.graph.k": ((0, 75, 0.01, 0.99), (-1, 0.0, 1.0)),
    "model.clip.template": (("a {}",), ("a", "{} {}")),
}


def test_every_range_is_said_here():
    assert TAKEN_AND_REFUSED.keys() == RANGES.keys()


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("guided", [False, True])
def test_presets_are_taken_with_and_without_guidance(name, guided):
    options = {"model.decoder.dino_guidance": guided, "model.decoder.remote_clip": guided}
    validate(override(load_config(name), options))


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"gamma": 80.0, "use_affinity_as_weight": True}, True),
        ({"gamma": 80.5, "use_affinity_as_weight": True}, False),
        ({"gamma": 80.5, "use_affinity_as_weight": True, "affinity": "gauss"}, False),
        ({"gamma": 80.5, "use_affinity_as_weight": True, "affinity": "power"}, True),
        ({"gamma": 20.0, "use_affinity_as_weight": True, "norm": "sym_count"}, True),
        ({"gamma": 20.5, "use_affinity_as_weight": True, "norm": "sym_count"}, False),
        ({"gamma": 20.5, "use_affinity_as_weight": True, "norm": "sym_count", "layers": 1}, True),
        ({"gamma": 80.5}, True),
        ({"gamma": 1e39, "affinity": "linear"}, False),
        ({"decay": 1e39, "affinity": "product"}, False),
        ({"gamma": 1e-38}, True),
        ({"gamma": 1e-40}, False),
        ({"gamma": 1e-320, "decay": 1e300}, False),
        ({"gamma": 1e-40, "affinity": "product"}, True),
        ({"gamma": 1e-40, "decay": 0.0}, True),
    ],
    ids=str,
)
def test_scales_of_the_graph_are_taken_and_refused_as_by_pdgr(options, fits):
    config = override(load_config("tiny"), {f"model.graph.{name}": value for name, value in options.items()})
    if fits:
        validate(config)
        PDGR(2, 3, k=2, edge_hidden=2, **options)
        return
    with pytest.raises(ConfigError, match="^validate: model.graph.(gamma|decay) is too .*; expected .*, got [^\\n]*$"):
        validate(config)
    with pytest.raises(ValueError, match="^PDGR: (gamma|decay) is too .*; expected .*, got [^\\n]*$"):
        PDGR(2, 3, k=2, edge_hidden=2, **options)


@pytest.mark.parametrize("option", [{"edge_temperature": 1e-39}, {"edge_decay": 1e39}], ids=str)
def test_starts_of_the_graph_that_leave_float32_are_refused_as_by_pdgr(option):
    (name,) = option
    with pytest.raises(ConfigError, match=f"model.graph.{name} is out of range"):
        validate(override(load_config("tiny"), {f"model.graph.{name}": option[name]}))
    with pytest.raises(ValueError, match=f"^PDGR: {name} is too .*; expected at .*, got .*$"):
        PDGR(2, 3, k=2, edge_hidden=2, **option)


@pytest.mark.parametrize("name", TAKEN_AND_REFUSED)
def test_the_bounds_of_an_option(name):
    _, fits = RANGES[name]
    taken, refused = TAKEN_AND_REFUSED[name]
    assert all(map(fits, taken)) and not any(map(fits, refused))
