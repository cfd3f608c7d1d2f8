# SPDX-License-Identifier: Apache-2.0
"""The file of a channel ranking: what SPSD's split was made from (Eq. 1-5)."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drseg_core.errors import CheckpointError
from drseg_core.extras import require
from drseg_core.files import parse_json
from drseg_core.models.weights import write_tensors
from drseg_core.nn.spsd import check_partition, split_by_score

__all__ = ["ChannelFile", "load_channels", "save_channels"]

FORMAT_VERSION = 2
"""Of 1 there was no energy."""


@dataclass(frozen=True)
class ChannelFile:
    """Content of ``channels.safetensors``.

    Args:
        score: (C,) g of Eq. 4, float64; larger is more semantic.
        semantic_index: channels of the semantic subspace, ascending.
        structural_index: all others, ascending.
        entropy: (C,) H of Eq. 2.
        similarity: (C,) S of Eq. 3.
        metadata: backbone, weights_sha256, dataset_sha256, class_names, alpha, semantic_ratio,
            prototypes_per_class, seed and the other options of the ranking.
        energy: (C,) float64, mean over the training set's places of each channel's squared feature, before
            normalisation; None in files of earlier versions.

    Examples:
        >>> from drseg_core.checkpoints.channels import load_channels
        >>> channels = load_channels("run/channels.safetensors")
        >>> len(channels.split_again(0.25).semantic_index), len(channels.score)
        (16, 64)
    """

    score: Tensor
    semantic_index: Tensor
    structural_index: Tensor
    entropy: Tensor
    similarity: Tensor
    metadata: dict[str, Any]
    energy: Tensor | None = None

    @property
    def structural_norm(self) -> float:
        """Root mean square of the norm that CLIP's structural channels have together.

        Raises:
            CheckpointError: the ranking is of an earlier version, which did not measure it.
        """
        return float(self._energy()[self.structural_index].sum().sqrt())

    @property
    def norm_scale(self) -> float:
        """Weight of a LayerNorm whose output has that norm; its output has that of a root of its channels times it.

        Raises:
            CheckpointError: as above.
        """
        return self.structural_norm / max(len(self.structural_index), 1) ** 0.5

    def structural_share(self, norm: float | None = None) -> float:
        """Share of the structural channels in CLIP's squared norm, or if they had another norm.

        Raises:
            CheckpointError: as above.
        """
        semantic = float(self._energy()[self.semantic_index].sum())
        structural = (self.structural_norm if norm is None else norm) ** 2
        return structural / max(semantic + structural, 1e-30)

    def _energy(self) -> Tensor:
        if self.energy is None:
            raise CheckpointError(
                "norm_scale: the ranking has no norms; expected one made by this version of drseg rank, got an old one"
            )
        return self.energy

    def split_again(self, semantic_ratio: float) -> ChannelFile:
        """The same ranking with another share of semantic channels (Eq. 5)."""
        semantic, structural = split_by_score(self.score, semantic_ratio)
        metadata = {**self.metadata, "semantic_ratio": semantic_ratio}
        return dataclasses.replace(self, semantic_index=semantic, structural_index=structural, metadata=metadata)


def save_channels(path: str | os.PathLike[str], channels: ChannelFile) -> None:
    """Write ``channels.safetensors``, complete or not at all.

    Raises:
        ResourceError: the file cannot be written (disk full, read-only).

    Examples:
        >>> from drseg_core.checkpoints.channels import load_channels, save_channels
        >>> save_channels("half.safetensors", load_channels("run/channels.safetensors").split_again(0.5))
        >>> load_channels("half.safetensors").metadata["semantic_ratio"]
        0.5
    """
    names = ("score", "semantic_index", "structural_index", "entropy", "similarity")
    tensors = {name: getattr(channels, name).contiguous() for name in names}
    if channels.energy is not None:
        tensors["energy"] = channels.energy.contiguous()
    write_tensors(path, tensors, {"drseg_channels": json.dumps(channels.metadata)}, "save_channels")


def load_channels(
    path: str | os.PathLike[str], *, channels: int | None = None, backbone: str | None = None
) -> ChannelFile:
    """Read ``channels.safetensors`` and check that it is whole.

    Args:
        path: file made by ``drseg rank``.
        channels: C that the model has.
        backbone: name of the model's image encoder.

    Raises:
        CheckpointError: not readable, of another kind or model, or its indices are no partition of the channels.

    Examples:
        >>> from drseg_core.checkpoints.channels import load_channels
        >>> load_channels("run/channels.safetensors", channels=64, backbone="drseg-tiny").metadata["class_names"]
        ['bare soil', 'red roof', 'blue pond']
    """
    require("load_channels", "safetensors")
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = parse_json((file.metadata() or {})["drseg_channels"])
            tensor = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        content = ChannelFile(metadata=metadata, **tensor)
        version = int(metadata["format_version"])
    except FileNotFoundError:
        raise CheckpointError(
            f"load_channels: file not found; expected a file made by drseg rank, got {path}"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"load_channels: {path} is not a channel ranking; expected a file made by drseg rank"
        ) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"load_channels: {path} format_version is newer than this program; expected at most {FORMAT_VERSION}, "
            f"got {version}"
        )
    score = content.score
    if score.dim() != 1 or not score.is_floating_point() or not torch.isfinite(score).all():
        raise CheckpointError(f"load_channels: {path} score is not usable; expected (C,) finite floating point values")
    check_partition(content.semantic_index, content.structural_index, len(score))
    energy = content.energy
    if energy is not None and (energy.shape != score.shape or not torch.isfinite(energy).all() or (energy < 0).any()):
        raise CheckpointError(f"load_channels: {path} energy is not usable; expected (C,) finite values of at least 0")
    if channels is not None and len(score) != channels:
        raise CheckpointError(
            f"load_channels: {path} belongs to another model; expected {channels} channels, got {len(score)}"
        )
    found = metadata.get("backbone")
    if backbone is not None and found != backbone:
        raise CheckpointError(
            f"load_channels: {path} belongs to another model; expected backbone {backbone!r}, got {found!r}"
        )
    return content
