# SPDX-License-Identifier: Apache-2.0
"""Are these the published weights? Compares the values that an encoder computes with known ones.

Known values are committed in :mod:`drseg_core.checkpoints.known_weights`. If there is none, the report says so. The
values found can be saved, to compare another machine or a later version with them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.checkpoints.encoders import Encoders, load_encoders
from drseg_core.checkpoints.known_weights import PICTURES, PROMPTS, TOKEN_IDS, Known, known_values, published_hash
from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.config.zero_shot import NO_PRIOR
from drseg_core.errors import CheckpointError, DatasetError
from drseg_core.extras import require
from drseg_core.files import parse_json, write_text_atomic
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.dino import DinoPrior

__all__ = ["Finding", "check_weights", "read_values", "save_values"]

Verdict = Literal["same", "DIFFERS", "unknown", "seen", "ODD"]
SHOWN = 8
"""Number of compared values: the first ones of a feature of length 1."""
TOLERANCE = 1e-3
"""Tolerance of such a value: half precision changes it by 5e-4, an exchange of two matrices by a hundred times that."""
SCALE = 100.0
MARGIN = 0.5
"""Margin of the probability of a picture's own words over the next one, to count as seen."""


class Finding(NamedTuple):
    """One comparison.

    ``name`` says what was compared, with the values ``found`` and ``expected`` (None: nothing is known). ``verdict`` is
    same, DIFFERS or unknown. For what a person should see in a picture, it is seen or ODD.

    Examples:
        >>> from drseg_core.checkpoints.check_weights import Finding
        >>> print(Finding("ids", [1, 2], [1, 2], "same").text())
        same     ids: [1, 2]
    """

    name: str
    found: Any
    expected: Any
    verdict: Verdict

    def text(self) -> str:
        """One line."""
        said = f"{self.verdict:<8} {self.name}: {_short(self.found)}"
        if self.verdict == "unknown":
            return f"{said}; no expected value is committed for it"
        return said if self.verdict == "same" else f"{said}; expected {_short(self.expected)}"


def check_weights(
    clip: ClipConfig,
    prior: DinoConfig,
    *,
    offline: bool = False,
    picture: str | Path | None = None,
    expected: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Load both encoders and compare what they are and compute with what is known.

    For CLIP these are SHA-256, token ids, text features, features of two drawn pictures, and which of four prompts it
    finds in each. For the prior these are SHA-256 and features of the same pictures, from the block that is used. The
    prior runs at the image size of its architecture, so that no position is resized.

    Args:
        clip: CLIP of a preset, see :func:`drseg_core.checkpoints.encoders.choose_clip`.
        prior: the prior in the same way; the name ``none`` means no prior.
        offline: never connect to a network.
        picture: an image whose scores may be published: CLIP.png of OpenAI's README.
        expected: from :func:`read_values`, in place of the committed values.

    Returns:
        The comparisons, in order.

    Raises:
        CheckpointError: weights are missing and cannot be fetched, or do not fit their architecture.
        ConfigError: an architecture is unknown.
        DatasetError: no such picture.

    Examples:
        >>> from drseg_core.checkpoints.check_weights import check_weights
        >>> from drseg_core.config.zero_shot import load_zero_shot
        >>> tiny = load_zero_shot("tiny")
        >>> [finding.verdict for finding in check_weights(tiny.clip, tiny.prior)][:3]
        ['unknown', 'same', 'same']
    """
    if picture is not None and not Path(picture).is_file():
        raise DatasetError(f"check_weights: picture {picture} not found; expected an image file")
    if prior.name != NO_PRIOR:
        prior = dataclasses.replace(prior, image_size=_own_size(prior))
    encoders = load_encoders(clip, prior, offline=offline)
    values = _found(encoders, clip, picture)
    known = known_values(clip, prior) if expected is None else {key: Known(value) for key, value in expected.items()}
    if expected is None:
        known |= _published_hashes(clip, encoders)
    findings = [_compared(name, value, known.get(name)) for name, value in values.items()]
    # expected values that were not computed, such as another prior's features
    findings += [
        Finding(name, None, value.value, "DIFFERS") for name, value in known.items() if name not in values and expected
    ]
    return findings + _what_to_see(encoders, clip)


def _own_size(prior: DinoConfig) -> int:
    require("check_weights", "model")
    import timm

    name = prior.name.split(".", 1)[0]
    return timm.get_pretrained_cfg(name).input_size[-1] if timm.is_model(name) else prior.image_size


def _published_hashes(clip: ClipConfig, encoders: Encoders) -> dict[str, Known]:
    digest = published_hash(clip, encoders.facts.get("clip", ""))
    return {} if digest is None else {"SHA-256 of CLIP": Known(digest)}


@torch.no_grad()
def _found(encoders: Encoders, clip: ClipConfig, picture: str | Path | None) -> dict[str, Any]:
    model, facts = encoders.clip, encoders.facts
    found: dict[str, Any] = {"SHA-256 of CLIP": facts.get("clip_sha256", "random weights")}
    for prompt in TOKEN_IDS:
        found[f"token ids of {prompt!r}"] = model.tokenize([prompt], "{}")[0].tolist()
    for prompt, feature in zip(PROMPTS, _text(model), strict=True):
        found[f"text feature of {prompt!r}"] = _first(feature)
    for name, feature in zip(PICTURES, _images(model), strict=True):
        found[f"image feature of {name}"] = _first(feature)
    for name, scores in zip(PICTURES, _scores(model), strict=True):
        found[f"scores of {name}"] = [round(float(score), 4) for score in scores]
    if picture is not None:
        found[f"scores of {Path(picture).name}"] = _scores_of_file(model, clip, Path(picture))
    if encoders.prior is not None:
        found["SHA-256 of the prior"] = facts.get("prior_sha256", "random weights")
        for name, feature in zip(PICTURES, _prior_tokens(encoders.prior), strict=True):
            found[f"prior feature of {name}"] = _first(feature)
    return found


def _text(model: ClipEncoder) -> Tensor:
    return model.encode_text(model.tokenize(PROMPTS, "{}"))


def _images(model: ClipEncoder) -> Tensor:
    """Features of the class token, of pictures drawn at the encoder's own size."""
    side = model.visual.native_grid[0] * model.visual.patch_size[0]
    image = torch.stack([draw(side) for draw in PICTURES.values()])
    return F.normalize(model.visual.forward_ordinary((image - model.pixel_mean) / model.pixel_deviation), dim=-1)


def _scores(model: ClipEncoder) -> Tensor:
    return (SCALE * _images(model) @ _text(model).T).softmax(dim=-1)


def _scores_of_file(model: ClipEncoder, clip: ClipConfig, path: Path) -> list[float]:
    """Probabilities of OpenAI's three captions, with its own preparation of the image."""
    from open_clip.transform import image_transform
    from PIL import Image

    from drseg_core.data.images import opened

    side = model.visual.native_grid[0] * model.visual.patch_size[0]
    mean, deviation = (tuple(value.flatten().tolist()) for value in (model.pixel_mean, model.pixel_deviation))
    prepare = image_transform(side, is_train=False, mean=mean, std=deviation, interpolation="bicubic")
    with opened(path, Image.MAX_IMAGE_PIXELS or 10**8) as image:
        pixels = prepare(image)[None]
    feature = F.normalize(model.visual.forward_ordinary(pixels), dim=-1)
    text = model.encode_text(model.tokenize(("a diagram", "a dog", "a cat"), "{}"))
    return [round(float(score), 4) for score in (SCALE * feature @ text.T).softmax(dim=-1)[0]]


def _prior_tokens(prior: DinoPrior) -> Tensor:
    """The feature of the middle cell of each picture."""
    side = prior.config.image_size
    maps = prior.maps(torch.stack([draw(side) for draw in PICTURES.values()])).features
    return maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]


def _first(feature: Tensor) -> list[float]:
    return [round(float(value), 5) for value in F.normalize(feature.float(), dim=-1)[:SHOWN]]


def _compared(name: str, found: Any, known: Known | None) -> Finding:
    if known is None:
        return Finding(name, found, None, "unknown")
    return Finding(name, found, known.value, "same" if _same(found, known.value, known.tolerance) else "DIFFERS")


def _same(found: Any, expected: Any, tolerance: float = TOLERANCE) -> bool:
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(_same(a, b, tolerance) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isfinite(found) and abs(found - expected) <= tolerance
    return found == expected


def _what_to_see(encoders: Encoders, clip: ClipConfig) -> list[Finding]:
    """Each drawn picture must be best described by its own prompt, by a margin. Any trained CLIP should find that.

    To be first is not enough, because a guess is first for one picture in four.
    """
    if clip.weights is None:
        return []
    findings = []
    with torch.no_grad():
        for own, (name, scores) in enumerate(zip(PICTURES, _scores(encoders.clip), strict=True)):
            (first, second), (best, next_best) = (pair.tolist() for pair in scores.topk(2))
            found = f"{PROMPTS[best]!r} ({first:.2f}), then {PROMPTS[next_best]!r} ({second:.2f})"
            verdict: Verdict = "seen" if best == own and first >= second + MARGIN else "ODD"
            expected = f"{PROMPTS[own]!r}, by far: {MARGIN:g} more than the next"
            findings.append(Finding(f"best prompt of {name}", found, expected, verdict))
    return findings


def save_values(findings: list[Finding], path: str | Path) -> None:
    """Write the values found, as JSON for :func:`read_values`.

    Examples:
        >>> from drseg_core.checkpoints.check_weights import Finding, read_values, save_values
        >>> save_values([Finding("a", [0.5], None, "unknown")], "values.json")
        >>> read_values("values.json")
        {'a': [0.5]}
    """
    values = {item.name: item.found for item in findings if item.verdict not in ("seen", "ODD")}
    write_text_atomic(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_values(path: str | Path) -> dict[str, Any]:
    """The values that :func:`save_values` wrote.

    Raises:
        CheckpointError: no such file, or another one.

    Examples:
        >>> from drseg_core.checkpoints.check_weights import read_values
        >>> read_values("absent.json")
        Traceback (most recent call last):
        drseg_core.errors.CheckpointError: check_weights: absent.json cannot be read; expected values that were saved...
    """
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"check_weights: {path} cannot be read; expected values that were saved, got {reason}"
        ) from error
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"check_weights: {path} holds no values; expected those of --out")
    return values


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], float):
        return "[" + ", ".join(f"{number:.4f}" for number in value) + "]"
    return str(value)
