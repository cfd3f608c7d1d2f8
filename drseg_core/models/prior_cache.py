# SPDX-License-Identifier: Apache-2.0
"""Features of the frozen prior, kept on disk for the next evaluation of the same images.

The prior sees neither the class names nor anything that is trained, so other vocabularies and other checkpoints of one
prior share its features. Training cannot: every image is cropped and flipped anew (``drseg_core.data.transforms``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drseg_core.errors import CheckpointError, ConfigError, ResourceError
from drseg_core.models.dino import DinoPrior, PriorMaps
from drseg_core.models.weights import load_weights, payload_hash, save_weights

_log = logging.getLogger(__name__)

CACHE_BYTES = 20 * 10**9
"""Bound on a folder, unless another one is given: 8000 images with the default prior."""
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class PriorCache:
    """A folder with one file per batch of images, named after all that decides its features.

    That is the prior (weights, architecture, block, kind of features, normalisation) and the resized pixels. It is also
    the batch, the device, the number of threads and the versions of torch and timm, because sums round by them. So the
    values read are those that would be computed, to the last bit. With another batch size, or on another machine, they
    are computed again. A file takes 2.4 MB per image with the default prior.

    A full folder loses files that were not used since this cache was opened, the oldest first. If there are none left,
    nothing more is kept. An evaluation goes through its images in one order. If the newest image replaced the oldest,
    the next evaluation would find none of its images.

    Args:
        folder: made if it is not there.
        prior: its weights must not change from here on.
        limit: bound on the bytes of all its files.

    Raises:
        ConfigError: the folder is a file, or the limit is negative.
        ResourceError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], prior: DinoPrior, limit: int = CACHE_BYTES) -> None:
        if limit < 0:
            raise ConfigError(f"PriorCache: limit is out of range; expected >= 0 bytes, got {limit}")
        self.folder, self.limit = Path(folder), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ConfigError(f"PriorCache: folder is a file; expected a folder, got {self.folder}") from error
        except OSError as error:
            raise ResourceError(f"PriorCache: folder cannot be made; {error}") from error
        # where the weights came from and what guides the decoder do not matter: the values and the blocks do
        left_out = ("weights", "seed", "guidance_blocks")
        options = {name: value for name, value in dataclasses.asdict(prior.config).items() if name not in left_out}
        state = {name: value.detach().cpu() for name, value in prior.state_dict().items()}
        self._prior = {**options, "sha256": payload_hash(state)}
        self.found = self.computed = 0
        self._opened = time.time()
        # a file system's clock may be some milliseconds behind: what is used here is known by its name too
        self._used: set[Path] = set()
        self._bytes = sum(size for _, size, _ in self._files())
        self._full = False
        # a compiler cannot follow files, so compiled models step out for them
        self.maps: Callable[..., PriorMaps] = torch.compiler.disable(self._looked_up)

    def _looked_up(
        self, image: Tensor, blocks: tuple[int, ...], compute: Callable[[Tensor, tuple[int, ...]], PriorMaps]
    ) -> PriorMaps:
        """The result of ``compute(image, blocks)``, from its file if there is one; see ``maps``.

        A damaged or foreign file is replaced, with a warning.

        Raises:
            ResourceError: a file cannot be written (disk full, read-only).
        """
        key = self._key(image, blocks)
        path = self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.safetensors"
        held = _read(path, key)
        self._used.add(path)
        if held is not None:
            self.found += 1
            with contextlib.suppress(OSError):
                os.utime(path)
            features, *guidance = (held[name].to(image.device) for name in _names(blocks))
            return PriorMaps(features, tuple(guidance))
        self.computed += 1
        maps = compute(image, blocks)
        tensors = (maps.features, *maps.guidance)
        if self._has_room(sum(value.nbytes for value in tensors)):
            save_weights(path, dict(zip(_names(blocks), tensors, strict=True)), key)
            with contextlib.suppress(FileNotFoundError):
                self._bytes += path.stat().st_size
        return maps

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each file was last used, its bytes, and where it is; others may remove some, or all, meanwhile."""
        found, names = [], []
        with contextlib.suppress(FileNotFoundError):
            # whatever folder this is, files that this class did not write are left alone
            names = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        for path in names:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _has_room(self, more: int) -> bool:
        """Whether ``more`` bytes may be added, after removing files not used since this cache was opened."""
        if self._bytes + more <= self.limit or self._full:
            return not self._full
        files = self._files()
        self._bytes = sum(size for _, size, _ in files)
        for used, size, path in files:
            if self._bytes + more <= self.limit:
                break
            if used >= self._opened or path in self._used:
                continue
            path.unlink(missing_ok=True)
            self._bytes -= size
        self._full = self._bytes + more > self.limit
        if self._full:
            _log.warning("prior cache: %s is full (%.3g GB); no more is kept", self.folder, self.limit / 1e9)
        return not self._full

    def _key(self, image: Tensor, blocks: tuple[int, ...]) -> dict[str, Any]:
        kind = image.device.type
        return {
            "prior": self._prior,
            "blocks": list(blocks),
            "pixels_sha256": payload_hash({"image": image.detach().cpu()}),
            "device": torch.cuda.get_device_name(image.device) if kind == "cuda" else kind,
            "instruction_set": torch.backends.cpu.get_cpu_capability() if kind == "cpu" else None,
            "threads": torch.get_num_threads() if kind == "cpu" else None,
            "precision": _precision(kind),
            "versions": {name: metadata.version(name) for name in ("torch", "timm")},
        }


@contextlib.contextmanager
def prior_cache(model: Any, folder: str | os.PathLike[str], limit: int = CACHE_BYTES) -> Iterator[PriorCache]:
    """In this context the prior of ``model`` reads its features from ``folder``, and keeps new ones there.

    Raises:
        ConfigError: the model has no prior, the folder is a file, or the limit is negative.
        ResourceError: the folder cannot be made.
    """
    prior = getattr(model, "dino", None)
    if not isinstance(prior, DinoPrior):
        raise ConfigError("prior_cache: model has no prior whose features could be kept; expected one with a DinoPrior")
    prior.cache = PriorCache(folder, prior, limit)
    try:
        yield prior.cache
    finally:
        prior.cache = None


def _precision(kind: str) -> list[str | None]:
    """The settings that round products: autocast, and the older and the newer ones of float32."""
    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        # refused where the newer ones contradict it
        older = None
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return [autocast, older, *(getattr(place, "fp32_precision", None) for place in places)]


def _names(blocks: tuple[int, ...]) -> list[str]:
    return ["features", *(f"guidance.{place}" for place in range(len(blocks)))]


def _read(path: Path, key: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a file; None if there is no usable one."""
    if not path.exists():
        return None
    try:
        state, found = load_weights(path)
    except CheckpointError as error:
        _log.warning("prior cache: %s; its features are computed again", error)
        return None
    if found != key or sorted(state) != sorted(_names(tuple(key["blocks"]))):
        _log.warning("prior cache: %s holds other features than its name says; they are computed again", path)
        return None
    return state
