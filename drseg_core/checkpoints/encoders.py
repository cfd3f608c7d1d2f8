# SPDX-License-Identifier: Apache-2.0
"""The encoders of a map from words alone: chosen by name or file, found, and built."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

from drseg_core.checkpoints.checkpoint import file_hash
from drseg_core.checkpoints.published import HUB, Published, fetched, published_clip, published_prior
from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.config.zero_shot import NO_PRIOR
from drseg_core.errors import CheckpointError, ConfigError
from drseg_core.extras import require
from drseg_core.models.clip import ARCHITECTURES, ClipEncoder
from drseg_core.models.dino import DinoPrior
from drseg_core.models.pixel_statistics import NORMALIZATIONS, described_normalization
from drseg_core.models.weights import WithoutInitialWeights

Normalization = Literal["sat", "imagenet", "clip", "half"]
RANDOM = "random"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")

_log = logging.getLogger(__name__)


class Encoders(NamedTuple):
    """The modules, and ``facts`` about their weights: names to text."""

    clip: ClipEncoder
    prior: DinoPrior | None
    facts: dict[str, str]


def choose_clip(config: ClipConfig, value: str | None) -> ClipConfig:
    """The configuration of a CLIP from its option.

    The option is ``random``, a FILE, ``hub:owner/name/file``, a tag or an architecture of open_clip, or
    ``ARCHITECTURE:`` and one of the others.

    Raises:
        CheckpointError: it looks like a file, and there is no such file.
        ConfigError: an architecture without a tag such as that of the preset.
    """
    if value is None:
        return config
    if value == RANDOM:
        return dataclasses.replace(config, weights=None)
    if _is_file(value, "--clip"):
        return dataclasses.replace(config, weights=value)
    require("zero_shot", "model")
    from open_clip import list_models
    from open_clip.pretrained import list_pretrained_tags_by_model

    name, _, rest = value.partition(":")
    if name in list_models() or name in ARCHITECTURES:
        named = dataclasses.replace(config, name=name)
        if rest:
            return choose_clip(named, rest)
        tags = list_pretrained_tags_by_model(name)
        if config.weights not in tags:
            raise ConfigError(
                f"zero_shot: --clip {name} has no weights {config.weights}; expected {name}:WEIGHTS with a file or one "
                f"of {', '.join(tags) or 'no tags'}"
            )
        return named
    return dataclasses.replace(config, weights=value)


def choose_prior(config: DinoConfig, value: str | None) -> DinoConfig:
    """The configuration of a prior from its option.

    The option is ``none``, ``random``, a FILE, ``hub:owner/name/file``, an architecture of timm, or ``ARCHITECTURE:``
    and one of the others. Pixels are normalised as timm has it for the architecture.

    Raises:
        CheckpointError: it looks like a file, and there is no such file.
    """
    if value is None:
        return config
    if value == NO_PRIOR:
        return dataclasses.replace(config, name=NO_PRIOR)
    if value == RANDOM:
        return dataclasses.replace(config, weights=None)
    if _is_file(value, "--prior"):
        return dataclasses.replace(config, weights=value)
    name, _, rest = value.partition(":")
    named = dataclasses.replace(config, name=name, weights="pretrained", normalization=_normalization(name), layer=None)
    return choose_prior(named, rest) if rest else named


def load_encoders(clip: ClipConfig, prior: DinoConfig, *, offline: bool = False) -> Encoders:
    """Both encoders with their weights, on the CPU.

    Args:
        clip: image and text towers.
        prior: structural prior; the name ``none`` means no prior.
        offline: never connect to a network.

    Raises:
        CheckpointError: weights are missing and cannot be fetched, or do not fit.
        ConfigError: an architecture is unknown, or an option does not fit it.
    """
    with_prior = prior.name != NO_PRIOR
    sources: dict[str, Published] = {}
    for part, source in (("clip", published_clip(clip)), ("prior", published_prior(prior) if with_prior else None)):
        if source is not None:
            sources[part] = source
    files = dict(zip(sources, fetched(list(sources.values()), offline=offline), strict=True))
    clip = clip if "clip" in sources else _as_described(clip)
    prior = prior if "prior" in sources else _as_described(prior)
    facts = _facts("clip", clip.name, clip.weights, files.get("clip"))
    try:
        encoder = _clip(clip, files.get("clip"), offline)
        found = None
        if with_prior:
            if prior.weights is None:
                _log.warning("the prior has random weights (%s): its graph is little better than none", prior.name)
            facts |= _facts("prior", prior.name, prior.weights, files.get("prior"))
            if "prior" in files:
                prior = dataclasses.replace(prior, weights=str(files["prior"]))
            # everything is fetched already, and the libraries would not know of it
            found = DinoPrior(prior, offline=offline)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for part, module in (("clip", encoder), ("prior", found)):
        if module is not None and module.weights_place:
            # names in a file may hold anything, and of any length
            facts[f"{part}_place"] = ascii(module.weights_place)[1:-1][:200]
    return Encoders(encoder, found, facts)


def _as_described(config: Any) -> Any:
    """With the pixel statistics that stand beside a file of weights, where they do."""
    path = config.weights
    found = described_normalization(path) if path is not None and Path(path).is_file() else None
    return config if found is None else dataclasses.replace(config, normalization=found)


def _clip(config: ClipConfig, file: Path | None, offline: bool) -> ClipEncoder:
    if file is not None and config.weights is not None and config.weights.startswith(HUB):
        config, file = dataclasses.replace(config, weights=str(file)), None
    if config.weights is None:
        _log.warning("CLIP has random weights (%s): the map means nothing; this only tries the command", config.name)
    # inner blocks are not needed here, and small towers have fewer than the defaults name
    config = dataclasses.replace(config, guidance_blocks=(0, 1), trainable="none")
    drawn = contextlib.nullcontext() if config.weights is None else WithoutInitialWeights()
    with torch.random.fork_rng(devices=[]), drawn:
        torch.manual_seed(0)
        return ClipEncoder(config, file=file, offline=offline)


def _facts(part: str, name: str, weights: str | None, file: Path | None) -> dict[str, str]:
    """Architecture, weights without the folder they lie in, and SHA-256 of their file."""
    if weights is None:
        return {part: f"{name}, random weights"}
    own = Path(weights)
    path = file or (own if own.is_file() else None)
    shown = own.name if own.is_file() else weights
    return {part: f"{name}, {shown}"} | ({} if path is None else {f"{part}_sha256": file_hash(path)})


def _is_file(value: str, option: str) -> bool:
    if value.startswith(HUB) or Path(value).is_file():
        return True
    if ":" not in value and (value.endswith(_SUFFIXES) or "/" in value):
        found = "is a folder" if Path(value).is_dir() else "not found"
        raise CheckpointError(f"zero_shot: {option} {value} {found}; expected a file of weights")
    return False


def _normalization(name: str) -> Normalization:
    """The pixel statistics that timm has for an architecture, by their name here."""
    require("zero_shot", "model")
    import timm

    found = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".", 1)[0]) else None
    for own, (mean, _) in NORMALIZATIONS.items():
        if found is not None and all(abs(a - b) < 1e-3 for a, b in zip(found.mean, mean, strict=True)):
            return cast(Normalization, own)
    return "imagenet"
