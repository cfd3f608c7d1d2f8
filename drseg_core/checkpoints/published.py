# SPDX-License-Identifier: Apache-2.0
"""Weights that others publish: where they lie on this machine, how they are fetched, and which files to bring."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from drseg_core.checkpoints.checkpoint import first_line
from drseg_core.checkpoints.licences import clip_licence, prior_licence
from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.errors import CheckpointError, ConfigError
from drseg_core.extras import require

HUB = "hub:"
"""Begins ``hub:owner/name/file``, a file on the Hugging Face hub."""

_log = logging.getLogger(__name__)


class Published(NamedTuple):
    """Weights of one encoder: any of ``files`` from ``place``, a repository on the Hugging Face hub.

    ``option`` is the option that names a local file in their place.
    """

    part: str
    name: str
    option: str
    place: str
    files: tuple[str, ...]
    licence: str

    @property
    def address(self) -> str:
        return f"https://huggingface.co/{self.place}"


def published_clip(config: ClipConfig) -> Published | None:
    """The published weights that a CLIP's configuration names; None for random weights and for files.

    Raises:
        ConfigError: ``hub:`` without repository or file, or weights that are not on the hub.
    """
    if config.weights is None:
        return None
    if config.weights.startswith(HUB):
        return _on_hub("CLIP", config.name, "--clip", config.weights, clip_licence(config))
    require("zero_shot", "model")
    from open_clip.pretrained import get_pretrained_cfg

    # a tag is one whatever lies in the working folder, for the encoder too
    tag = get_pretrained_cfg(config.name, config.weights)
    if not tag:
        return None
    described = f"{config.name} ({config.weights})"
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if repository:
        files = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return Published("CLIP", described, "--clip", repository, files, clip_licence(config))
    raise ConfigError(f"zero_shot: {described} is not on the hub; expected a file with --clip {config.name}:FILE")


def published_prior(config: DinoConfig) -> Published | None:
    """The published weights that a prior's configuration names; None for random weights and for files.

    Raises:
        ConfigError: ``hub:`` without repository or file, or an architecture without published weights.
    """
    if config.weights is None:
        return None
    if config.weights.startswith(HUB):
        return _on_hub("the prior", config.name, "--prior", config.weights, prior_licence(config))
    if config.weights != "pretrained":
        return None
    require("zero_shot", "model")
    import timm

    known = timm.is_model(config.name.split(".", 1)[0])
    found = timm.get_pretrained_cfg(config.name) if known else None
    if found is None or not found.hf_hub_id:
        raise ConfigError(f"zero_shot: prior {config.name} has no published weights; expected {config.name}:FILE")
    files = (found.hf_hub_filename,) if found.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    return Published("the prior", config.name, "--prior", found.hf_hub_id, files, prior_licence(config))


def _on_hub(part: str, name: str, option: str, value: str, licence: str) -> Published:
    words = value.removeprefix(HUB).split("/", 2)
    if len(words) != 3 or not all(words):
        raise ConfigError(f"zero_shot: {option} has a wrong form; expected {HUB}owner/name/file, got {value!r}")
    return Published(part, name, option, f"{words[0]}/{words[1]}", (words[2],), licence)


def located(source: Published) -> Path | None:
    """The local file of the weights, found without a network; None if it is not there."""
    require("zero_shot", "huggingface_hub")
    import huggingface_hub

    for file in source.files:
        found = huggingface_hub.try_to_load_from_cache(source.place, file)
        if isinstance(found, str):
            return Path(found)
    return None


def fetched(sources: Sequence[Published], *, offline: bool = False) -> list[Path]:
    """Files of all weights, from the cache or fetched. All licences are shown before the first one is fetched.

    Args:
        sources: the weights that are needed.
        offline: never connect to a network.

    Raises:
        CheckpointError: some are missing and cannot be fetched; one line says which files to bring, and to where.
    """
    found = [located(source) for source in sources]
    missing = [source for source, path in zip(sources, found, strict=True) if path is None]
    if missing and offline:
        raise _to_bring(missing, "--offline never connects")
    for source in missing:
        _log.info(
            "fetching the weights of %s, %s, from %s; licence: %s",
            source.part,
            source.name,
            source.address,
            source.licence,
        )
    paths = []
    for source, path in zip(sources, found, strict=True):
        try:
            with without_retries():
                paths.append(path or _download(source))
        except Exception as error:
            left = [other for other in missing if located(other) is None]
            raise _to_bring(left, f"{type(error).__name__}: {first_line(error)}") from error
    return paths


@contextlib.contextmanager
def without_retries() -> Iterator[None]:
    """Keep the hub's lines on each retry from the log: our one line says what failed and what to do."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _download(source: Published) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    *first, last = source.files
    for file in first:
        try:
            return Path(huggingface_hub.hf_hub_download(source.place, file))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    return Path(huggingface_hub.hf_hub_download(source.place, last))


def _to_bring(missing: Sequence[Published], why: str) -> CheckpointError:
    """The one line that says which files are wanted, where they are published, and which option names them."""
    wanted = [
        f"{' or '.join(source.files)} from {source.address} ({source.part}, {source.name}; licence: {source.licence}), "
        f"anywhere, named by {source.option} FILE"
        for source in missing
    ]
    return CheckpointError(
        f"zero_shot: weights are missing; expected {'; and '.join(wanted)}; got none: {why}{_cache()}; "
        f"{' '.join(f'{source.option} random' for source in missing)} works without weights: such a map means nothing"
    )


def _cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return f" (looked in the hub's cache, {HF_HUB_CACHE})"
