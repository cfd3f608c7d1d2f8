# SPDX-License-Identifier: Apache-2.0
"""By which mean and deviation an encoder normalises pixels, and what stands beside a file of weights about them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from drseg_core.errors import CheckpointError

_log = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """Of the three channels of RGB in [0, 1]."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
NORMALIZATIONS = {
    "sat": Statistics((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    "imagenet": Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": Statistics(PIXEL_MEAN, PIXEL_DEVIATION),
    "half": Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""By name: of DINOv3's SAT-493M weights, of most encoders of images, of OpenAI's CLIP, and of some of LAION's."""

# of transformers, and of open_clip, which has them one level deeper
_FILES = (
    ("preprocessor_config.json", None, "image_mean", "image_std"),
    ("open_clip_config.json", "preprocess_cfg", "mean", "std"),
)


def described_normalization(path: str | Path) -> str | None:
    """The name of the statistics that a description beside a file of weights has; None where there is none.

    Raises:
        CheckpointError: these are others than all of :data:`NORMALIZATIONS`.
    """
    for file, part, mean, deviation in _FILES:
        beside = Path(path).with_name(file)
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
            content = content if part is None else content[part]
            found = Statistics(_three(content[mean]), _three(content[deviation]))
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
        for name, known in NORMALIZATIONS.items():
            if all(abs(a - b) < 1e-3 for a, b in zip(sum(found, ()), sum(known, ()), strict=True)):
                return name
        raise CheckpointError(
            f"{beside}: pixel statistics are not supported; expected those of {', '.join(NORMALIZATIONS)}, "
            f"got mean {found.mean} and deviation {found.deviation}"
        )
    return None


def warn_of_other(path: str | Path, option: str, chosen: str) -> None:
    """Say that what was chosen is not what a description beside a file has."""
    try:
        said: str | None = described_normalization(path)
    except CheckpointError as error:
        _log.warning("%s; %s=%s is taken", error, option, chosen)
        return
    if said is not None and said != chosen:
        _log.warning("%s: its description has the pixel statistics of %s; %s=%s is taken", path, said, option, chosen)


def _three(values: Any) -> tuple[float, ...]:
    first, second, third = map(float, values)
    return first, second, third
