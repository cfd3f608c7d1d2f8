# SPDX-License-Identifier: Apache-2.0
"""Options of a map from words alone, and their presets."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from drseg_core.config.load import parse_config, read_text
from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.errors import ConfigError

__all__ = ["ZeroShotConfig", "load_zero_shot"]

VARIANTS = ("value", "value_residual", "maskclip", "sclip", "clearclip", "naclip", "segearth", "proxyclip")
"""Dense features of :mod:`drseg_core.models.dense_features`; here, so that a command line knows them without torch."""

NO_PRIOR = "none"
"""The name that means: no prior."""

DECAY = 0.16
"""The decay of LPOSS, for each cell of 16 pixels."""

IN_METRES = {"decay": "decay_per_metre", "radius": "radius_metres"}
"""Options in cells, and those that take their place in metres."""


@dataclass(frozen=True)
class ZeroShotConfig:
    """Every option of :func:`drseg_core.zero_shot`.

    Only name and weights of ``clip`` are read. The image size of ``prior`` is not read: the window takes its place.

    The defaults were not compared here, because CLIP's weights were not at hand. Variant and templates are those of
    their papers. The window is CLIP's own input with half overlap. ``alpha``, ``gamma`` and ``decay`` are LPOSS's (per
    cell of 16 pixels), and ``k`` is DR-Seg's.

    Args:
        clip: image and text towers.
        prior: structural prior; the name ``none`` leaves it out, and with it the graph.
        variant: dense features, one of ``VARIANTS``.
        rotations: 1, or 4 for the mean over quarter turns.
        window: side of a window in pixels, a multiple of CLIP's patch (a cell), at least two of them.
        overlap: pixels shared by neighbouring windows, a multiple of a cell.
        batch_size: windows per forward pass.
        k: neighbours of a cell in the graph of the scene.
        gamma: exponent of the prior's cosine.
        decay: spatial decay for each cell of distance; null means 0.16, if ``decay_per_metre`` is null too.
        decay_per_metre: the decay for each metre on the ground, instead of ``decay``. The sides of a pixel in the
            middle of the scene may differ by at most 5 %.
        radius: cells farther apart than this many cells are no neighbours; null is no limit.
        radius_metres: the radius in metres on the ground, instead of ``radius``.
        select: neighbours by the whole weight (``affinity``), or by the ``cosine`` alone.
        alpha: share of the neighbours, in [0, 1).
        steps: number of propagation steps; null solves to the end, 0 leaves the graph out.
        refine: also spread the logits over pixels of like colour (:mod:`drseg_core.nn.pixel_propagation`). On real
            labelled pieces it moved few outlines (``docs/zero_shot.md``), so it is off by default.
        logit_scale: factor of the cosines before the softmax that gives scores; CLIP's own training ended at 100.
        max_cells: a single graph of more cells is refused.
        super_tile: most cells of one part. With a radius and steps, a larger scene is mapped in overlapping parts, and
            the map is the same. The default takes about 2 GB with a prior of 768 channels.

    Raises:
        ConfigError: a number is out of range.

    Examples:
        >>> from drseg_core.config.zero_shot import ZeroShotConfig
        >>> ZeroShotConfig(steps=5).window
        336
    """

    clip: ClipConfig = field(default_factory=ClipConfig)
    prior: DinoConfig = field(default_factory=DinoConfig)
    variant: str = "segearth"
    rotations: int = 1
    window: int = 336
    overlap: int = 168
    batch_size: int = 4
    k: int = 75
    gamma: float = 3.0
    decay: float | None = None
    decay_per_metre: float | None = None
    radius: float | None = None
    radius_metres: float | None = None
    select: Literal["affinity", "cosine"] = "affinity"
    alpha: float = 0.95
    steps: int | None = None
    refine: bool = False
    logit_scale: float = 100.0
    max_cells: int = 262144
    super_tile: int = 262144

    def __post_init__(self) -> None:
        steps, decay, decay_metres = self.steps or 0, self.decay or 0.0, self.decay_per_metre or 0.0
        radius, metres = self.radius or 0.0, self.radius_metres or 0.0
        for cells, other in IN_METRES.items():
            given = getattr(self, cells), getattr(self, other)
            if None not in given:
                raise ConfigError(
                    f"zero_shot: {cells} and {other} are both given; expected one, got {given[0]} and {given[1]}"
                )
        for name, good, rule in (
            ("rotations", self.rotations in (1, 4), "1 or 4"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("k", self.k >= 1, ">= 1"),
            ("gamma", 0 < self.gamma < math.inf, "> 0"),
            ("decay", 0 <= decay < math.inf, ">= 0"),
            ("decay_per_metre", 0 <= decay_metres < math.inf, ">= 0"),
            ("radius", 0 <= radius < math.inf, ">= 0"),
            ("radius_metres", 0 <= metres < math.inf, ">= 0"),
            ("alpha", 0 <= self.alpha < 1, "0 <= alpha < 1"),
            ("steps", steps >= 0, ">= 0"),
            ("logit_scale", 0 < self.logit_scale < math.inf, "> 0"),
            ("max_cells", self.max_cells >= 1, ">= 1"),
            ("super_tile", self.super_tile >= 1, ">= 1"),
        ):
            if not good:
                raise ConfigError(f"zero_shot: {name} is out of range; expected {rule}, got {getattr(self, name)}")

    @property
    def has_reach(self) -> bool:
        """Whether a cell depends only on cells within a reach, so that a scene can be mapped in parts."""
        return self.steps is not None and (self.radius is not None or self.radius_metres is not None)


def zero_shot_presets() -> tuple[str, ...]:
    """Names that :func:`load_zero_shot` takes, besides paths."""
    folder = resources.files("drseg_core.config") / "presets" / "zero_shot"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_zero_shot(source: str | os.PathLike[str]) -> ZeroShotConfig:
    """Read a preset by name (``b``, ``l``, ``tiny``) or a YAML file by path. What it leaves out keeps its default.

    Raises:
        ConfigError: no such preset or file, unknown or repeated key, wrong type, a number out of range.

    Examples:
        >>> from drseg_core.config.zero_shot import load_zero_shot
        >>> load_zero_shot("b").clip.name
        'ViT-B-16-quickgelu'
    """
    name = os.fspath(source)
    if name in zero_shot_presets():
        folder = resources.files("drseg_core.config") / "presets" / "zero_shot"
        return parse_config((folder / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml", ZeroShotConfig)
    if not Path(name).is_file():
        raise ConfigError(
            f"zero_shot: preset {name} not found; expected a YAML file or one of {', '.join(zero_shot_presets())}"
        )
    return parse_config(read_text(Path(name)), name, ZeroShotConfig)
