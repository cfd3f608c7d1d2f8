# SPDX-License-Identifier: Apache-2.0
"""Ranges of the numeric options, checked before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drseg_core.config.schema import Config
from drseg_core.errors import ConfigError

# generators take seeds of 63 bits
SEED_LIMIT = 2**63
# of the scores by which neighbours are chosen, and of the weights if these hold their exponentials
LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
LARGEST_GAMMA_OF_WEIGHTS = 80.0
# of learned starts, of which exponentials of logarithms are taken
SMALLEST_TEMPERATURE, LARGEST_DECAY = 1e-38, 1e38


def _at_least(bound: float) -> tuple[str, Callable[[Any], bool]]:
    return f"at least {bound}", lambda value: value >= bound


_POSITIVE: tuple[str, Callable[[Any], bool]] = ("above 0", lambda value: value > 0)
_SHARE: tuple[str, Callable[[Any], bool]] = ("0 to below 1", lambda value: 0 <= value < 1)
_SEED: tuple[str, Callable[[Any], bool]] = (f"0 to below {SEED_LIMIT}", lambda value: 0 <= value < SEED_LIMIT)
# null passes here, because the type says where it is allowed; both values of a pair are checked
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seed": _SEED,
    "model.clip.image_size": _at_least(1),
    "model.clip.guidance_blocks": _at_least(0),
    "model.clip.template": ("exactly one {}", lambda value: value.count("{}") == 1),
    "model.dino.image_size": _at_least(1),
    "model.dino.layer": _at_least(0),
    "model.dino.guidance_blocks": _at_least(0),
    "model.dino.seed": _SEED,
    "model.remote.image_size": _at_least(1),
    "model.remote.guidance_blocks": _at_least(0),
    "model.spsd.semantic_ratio": _SHARE,
    "model.spsd.alpha": ("0 to 1", lambda value: 0 <= value <= 1),
    "model.spsd.prototypes_per_class": _at_least(1),
    "model.graph.k": (
        "at least 0, or a share above 0 and below 1",
        lambda value: 0 < value < 1 if isinstance(value, float) else value >= 0,
    ),
    "model.graph.gamma": _POSITIVE,
    "model.graph.norm_scale": ("at least 0, or match", lambda value: value == "match" or value >= 0),
    "model.graph.edge_temperature": _at_least(SMALLEST_TEMPERATURE),
    "model.graph.edge_decay": (f"above 0, at most {LARGEST_DECAY}", lambda value: 0 < value <= LARGEST_DECAY),
    "model.graph.decay": _at_least(0),
    "model.graph.edge_hidden": _at_least(1),
    "model.graph.layers": _at_least(1),
    "model.graph.hidden": _at_least(1),
    "model.graph.dropout": _SHARE,
    "model.fusion.tau": _POSITIVE,
    "model.aggregator.layers": _at_least(0),
    "model.aggregator.width": _at_least(1),
    "model.aggregator.heads": _at_least(1),
    "model.aggregator.mlp_hidden": _at_least(1),
    "model.aggregator.window": _at_least(1),
    "model.aggregator.class_pooling": _at_least(1),
    "model.aggregator.class_slots": _at_least(0),
    "model.decoder.widths": _at_least(1),
    "model.decoder.guidance_widths": _at_least(1),
    "model.decoder.guidance_hidden": _at_least(1),
    "model.proposals.queries": _at_least(1),
    "model.proposals.width": _at_least(1),
    "model.proposals.layers": _at_least(1),
    "model.proposals.heads": _at_least(1),
    "model.proposals.hidden": _at_least(1),
    "model.proposals.image_size": _at_least(1),
    "model.proposals.recognition_blocks": _at_least(1),
    "train.iterations": _at_least(1),
    "train.seconds": _POSITIVE,
    "train.batch_size": _at_least(1),
    "train.crop_size": _at_least(1),
    "train.learning_rate": _POSITIVE,
    "train.clip_learning_rate_scale": _at_least(0),
    "train.weight_decay": _at_least(0),
    "train.gradient_clip": _POSITIVE,
    "train.edge_eps": _POSITIVE,
    "train.alignment_weight": _at_least(0),
    "train.warmup_iterations": _at_least(0),
    "train.workers": _at_least(0),
    "train.checkpoint_every": _at_least(1),
    "train.keep_checkpoints": _at_least(1),
    "train.log_every": _at_least(1),
    "train.nan_limit": _at_least(1),
    "evaluation.tile_size": _at_least(1),
    "evaluation.overlap": _at_least(0),
    "evaluation.batch_size": _at_least(1),
    "reading.gsd": _POSITIVE,
}


def validate(config: Config) -> None:
    """Refuse numbers that no model, training or evaluation can use.

    Raises:
        ConfigError: names the option, what is expected and what was given.
    """
    for name, (expected, fits) in RANGES.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and not fits(item):
                raise ConfigError(f"validate: {name} is out of range; expected {expected}, got {value!r}")
    graph = config.model.graph
    # as PDGR says it, before any weights are read
    most = LARGEST_GAMMA_OF_WEIGHTS / (2 * graph.layers if graph.norm == "sym_count" else 1)
    if graph.use_affinity_as_weight and graph.affinity in ("exp", "gauss") and graph.gamma > most:
        raise ConfigError(
            f"validate: model.graph.gamma is too large; expected at most {most:.4g} with use_affinity_as_weight, "
            f"affinity {graph.affinity} and norm {graph.norm}, got {graph.gamma}"
        )
    for key in ("gamma", "decay"):
        if getattr(graph, key) > LARGEST_FLOAT32:
            raise ConfigError(
                f"validate: model.graph.{key} is too large; expected at most {LARGEST_FLOAT32:.4g}, "
                f"got {getattr(graph, key)}"
            )
    if graph.affinity != "product" and graph.decay / graph.gamma > LARGEST_FLOAT32:
        raise ConfigError(
            f"validate: model.graph.gamma is too small; expected decay / gamma <= {LARGEST_FLOAT32:.4g}, "
            f"got {graph.decay} / {graph.gamma}"
        )
    aggregator, evaluation = config.model.aggregator, config.evaluation
    if aggregator.width % aggregator.heads:
        raise ConfigError(
            "validate: model.aggregator.heads does not divide model.aggregator.width; expected a divisor of "
            f"{aggregator.width}, got {aggregator.heads}"
        )
    decoder, kind = config.model.decoder, config.model.proposals.kind
    if kind != "none" and (decoder.dino_guidance or decoder.remote_clip):
        raise ConfigError(
            "validate: model.decoder guides nothing; expected dino_guidance and remote_clip false with "
            f"model.proposals.kind {kind}, got {decoder.dino_guidance} and {decoder.remote_clip}"
        )
    fusion = config.model.fusion
    if fusion.kind == "replace" and fusion.original == "mean" and config.model.rotations > 1:
        raise ConfigError(
            "validate: model.fusion.kind replace has no canonical map to replace; expected model.fusion.original "
            "stack, got mean"
        )
    if evaluation.overlap >= evaluation.tile_size:
        raise ConfigError(
            "validate: evaluation.overlap is not below evaluation.tile_size; expected less than "
            f"{evaluation.tile_size}, got {evaluation.overlap}"
        )
