# SPDX-License-Identifier: Apache-2.0
"""Options that decide how stored pixels become 8-bit RGB: bands, nodata and scale, as text and as numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from drseg_core.config.schema import ReadingConfig
from drseg_core.errors import ConfigError

AUTO = "auto"
Limits = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        bands: one or three band numbers from 1, as red, green and blue; None looks for them.
        nodata: value of pixels without data, besides what the file declares.
        scale: one or three pairs LOW, HIGH that become 0 and 255; None leaves 8-bit values alone and measures others.
        measure: measure the scale whatever the type.
        depth: type of the stored values that the scale is for, such as ``uint16``; None means any type.
    """

    bands: tuple[int, ...] | None = None
    nodata: float | None = None
    scale: Limits | None = None
    measure: bool = False
    depth: str | None = None

    @property
    def plain(self) -> bool:
        """Whether 8-bit RGB stays what it is."""
        return replace(self, depth=None) == Reading()

    def fits(self, depth: str) -> bool:
        """Whether the scale is for values of this type."""
        return self.depth in (None, depth) or {self.depth, depth} == {"int16", "uint16"}


def parse_reading(config: ReadingConfig) -> Reading:
    """The options of a configuration as numbers.

    Raises:
        ConfigError: one of them cannot be understood.
    """
    measure = config.scale is not None and config.scale.strip().lower() == AUTO
    return Reading(
        None if config.bands is None else parse_bands(config.bands),
        config.nodata,
        None if config.scale is None or measure else parse_scale(config.scale),
        measure,
        config.depth,
    )


def parse_bands(text: str) -> tuple[int, ...]:
    """Band numbers from ``"4,3,2"``.

    Raises:
        ConfigError: not one or three whole numbers from 1.
    """
    try:
        bands = tuple(int(number) for number in text.split(","))
    except ValueError:
        bands = ()
    if len(bands) not in (1, 3) or min(bands) < 1:
        raise ConfigError(f"--bands is not a list of band numbers; expected for example 4,3,2, got {text!r}")
    return bands


def parse_scale(text: str) -> Limits:
    """Pairs from ``"0,3000"`` or, for each of three bands, ``"0,3000;0,2800;0,2500"``.

    Raises:
        ConfigError: not one or three pairs of numbers, LOW below HIGH.
    """
    try:
        numbers = [float(word) for word in re.split(r"[,;]", text)]
    except ValueError:
        numbers = []
    pairs = tuple(zip(numbers[::2], numbers[1::2], strict=False))
    usable = all(math.isfinite(n) for n in numbers) and all(low < high for low, high in pairs)
    if len(numbers) not in (2, 6) or not usable:
        raise ConfigError(
            f"--scale is not usable; expected auto, LOW,HIGH or LOW,HIGH;LOW,HIGH;LOW,HIGH with LOW below HIGH, "
            f"got {text!r}"
        )
    return pairs


def scale_text(limits: Sequence[tuple[float, float]]) -> str:
    """What :func:`parse_scale` reads back to the same numbers of single precision."""
    return ";".join(f"{low:.9g},{high:.9g}" for low, high in limits)


def choose_reading(trained: ReadingConfig, given: ReadingConfig) -> ReadingConfig:
    """The options of a run with those of the command line on top."""
    values = {name: getattr(given, name) for name in ("bands", "nodata", "scale", "gsd")}
    # a scale from the command line is for the files it is given with, whatever their type
    own = {"depth": None} if given.scale is not None else {}
    return replace(trained, **own, **{name: value for name, value in values.items() if value is not None})
