# SPDX-License-Identifier: Apache-2.0
"""Semantic-purity guided channel split (SPSD): which channels carry class meaning, and which carry structure.

The ranking is made once, offline, from class prototypes of the frozen CLIP encoder (Eq. 1-4). The module then slices
feature maps by fixed channel indices (Eq. 5-6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from drseg_core.errors import CheckpointError

# below this summed activation a channel says nothing about any class (prototypes have unit length)
DEAD_ACTIVATION = 1e-8
# pairs compared at once where similarity has no closed form
PAIR_BLOCK = 1 << 22


class RankingRule(Protocol):
    """What Eq. 1-4 leave open; ``drseg_core.config.schema.SPSDConfig`` and :class:`RankingOptions` fit."""

    @property
    def alpha(self) -> float: ...
    @property
    def entropy_activation(self) -> str: ...
    @property
    def dead_channel_entropy(self) -> str: ...
    @property
    def similarity(self) -> str: ...
    @property
    def rank_ties(self) -> str: ...


@dataclass(frozen=True)
class RankingOptions:
    """Options of :func:`rank_by_prototypes`.

    Args:
        alpha: weight of the entropy term in Eq. 4, in [0, 1]; the similarity term has ``1 - alpha``.
        entropy_activation: Eq. 1 takes ``max(z, 0)``, ``|z|``, or ``z`` minus the channel's smallest value.
        dead_channel_entropy: entropy of a channel that no class activates: ``uniform`` (log T, so that it does not
            count as selective) or ``zero``.
        similarity: pair measure of Eq. 3: ``z_m z_n``, ``-|z_m - z_n|``, ``exp(-(z_m - z_n)^2 / s)``, or
            ``sign(z_m) sign(z_n)``. ``s`` is the mean squared cross-class difference over all channels.
        rank_ties: equal values are ranked in channel order, or share their average rank.
    """

    alpha: float = 0.5
    entropy_activation: Literal["relu", "abs", "shift"] = "relu"
    dead_channel_entropy: Literal["uniform", "zero"] = "uniform"
    similarity: Literal["product", "neg_abs_diff", "rbf", "sign_agreement"] = "product"
    rank_ties: Literal["ordinal", "average"] = "ordinal"


@dataclass(frozen=True)
class ChannelRanking:
    """Result of Eq. 1-4, all ``(C,)`` float64.

    Args:
        score: g of Eq. 4 in [0, 1]; larger is more semantic.
        entropy: H of Eq. 2 in nats; low is selective.
        similarity: S of Eq. 3; low is discriminative.
        alpha: balance that made the score.
        classes: classes that had prototypes.
        prototypes: number of prototypes.
    """

    score: Tensor
    entropy: Tensor
    similarity: Tensor
    alpha: float
    classes: int
    prototypes: int

    def split(self, semantic_ratio: float) -> tuple[Tensor, Tensor]:
        """Semantic and structural channel indices of Eq. 5, each ascending."""
        return split_by_score(self.score, semantic_ratio)


def rank_by_prototypes(
    prototype: Tensor, label: Tensor, num_classes: int, *, options: RankingRule | None = None
) -> ChannelRanking:
    """Score every channel by how purely it carries class meaning (Eq. 1-4).

    ``a_ck = mean_m act(z_mc)``, ``p_ck = a_ck / sum_k a_ck``, ``H_c = -sum_k p_ck log p_ck``.
    ``S_c`` is the mean per-channel similarity over all pairs of prototypes of different classes.
    ``g_c = alpha (1 - rank(H_c)) + (1 - alpha) (1 - rank(S_c))`` with ascending ranks divided by ``C - 1``.

    Classes without a prototype take no part. Computed in float64 on the tensor's device.

    Args:
        prototype: (M, C) L2-normalised pixel features, floating.
        label: (M,) integer class of each, in [0, num_classes).
        num_classes: number of classes, at least 2.
        options: see :class:`RankingOptions`.

    Returns:
        The ranking, float64.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, non-finite prototype, label out of range, fewer than two classes present.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import rank_by_prototypes
        >>> prototype = torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [0.6, 0.0, 0.8]])
        >>> ranking = rank_by_prototypes(prototype, torch.tensor([0, 1, 0, 0]), num_classes=2)
        >>> ranking.score.shape, ranking.split(0.34)[0].tolist()
        (torch.Size([3]), [1])
    """
    rule: RankingRule = RankingOptions() if options is None else options
    _check_prototypes(prototype, label, num_classes)
    if not 0.0 <= rule.alpha <= 1.0:
        raise ValueError(f"rank_by_prototypes: alpha is out of range; expected 0..1, got {rule.alpha}")
    z = prototype.detach().to(torch.float64)
    present, label = torch.unique(label, return_inverse=True)
    if len(present) < 2:
        raise ValueError(
            f"rank_by_prototypes: label names too few classes; expected at least 2 with prototypes, got {len(present)}"
        )
    count = torch.bincount(label, minlength=len(present)).to(torch.float64)
    entropy = _entropy(z, label, count, rule)
    similarity = _similarity(z, label, count, rule.similarity)
    score = rule.alpha * (1 - _rank(entropy, rule.rank_ties)) + (1 - rule.alpha) * (
        1 - _rank(similarity, rule.rank_ties)
    )
    return ChannelRanking(score, entropy, similarity, rule.alpha, len(present), len(z))


def split_by_score(score: Tensor, semantic_ratio: float) -> tuple[Tensor, Tensor]:
    """The ``floor(rho C)`` channels of largest score and the rest (Eq. 5), each ascending; ties to the lower index."""
    order = torch.argsort(score, descending=True, stable=True)
    semantic = _semantic_count(len(score), semantic_ratio)
    return order[:semantic].sort().values, order[semantic:].sort().values


class SPSD(nn.Module):
    """Slices a feature map into semantic and structural channels, and joins them again (Eq. 5-6).

    Without a ranking the first ``floor(rho C)`` channels are semantic, until :meth:`set_ranking` is called.

    Args:
        channels: C.
        semantic_ratio: rho in [0, 1]; 0 makes every channel structural.
        ranking: (C,) score, larger is more semantic.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import SPSD
        >>> spsd = SPSD(4, semantic_ratio=0.5, ranking=torch.tensor([0.1, 0.9, 0.3, 0.8]))
        >>> features = torch.randn(2, 4, 6, 6)
        >>> semantic, structural = spsd.split(features)
        >>> spsd.semantic_index.tolist(), torch.equal(spsd.merge(semantic, structural), features)
        ([1, 3], True)
    """

    semantic_index: Tensor
    structural_index: Tensor

    def __init__(self, channels: int, semantic_ratio: float = 0.5, ranking: Tensor | None = None) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"SPSD: channels is too small; expected at least 1, got {channels}")
        self.channels = channels
        semantic = _semantic_count(channels, semantic_ratio)
        self.register_buffer("semantic_index", torch.arange(semantic))
        self.register_buffer("structural_index", torch.arange(semantic, channels))
        self._ranking = None if ranking is None else ranking.detach().clone()
        if ranking is not None:
            self.set_ranking(ranking)

    def reset_parameters(self) -> None:
        """Split as when it was built: by the ranking given then, or with the first channels as semantic ones."""
        # equals stay in the order of the channels
        self.set_ranking(torch.zeros(self.channels, device="cpu") if self._ranking is None else self._ranking)

    def extra_repr(self) -> str:
        return f"semantic={len(self.semantic_index)}, structural={len(self.structural_index)}"

    @torch.no_grad()
    def set_ranking(self, score: Tensor) -> None:
        """Split by a new (C,) score, keeping the number of semantic channels."""
        if score.shape != (self.channels,):
            raise ValueError(f"SPSD: ranking has a wrong shape; expected ({self.channels},), got {tuple(score.shape)}")
        if not torch.isfinite(score).all():
            raise ValueError("SPSD: ranking is not finite; expected finite scores, got NaN or infinity")
        order = torch.argsort(score.to(self.semantic_index.device), descending=True, stable=True)
        count = len(self.semantic_index)
        self.semantic_index.copy_(order[:count].sort().values)
        self.structural_index.copy_(order[count:].sort().values)

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) to semantic (B, C_s, h, w) and structural (B, C_t, h, w) channels."""
        if features.dim() < 2 or features.shape[1] != self.channels:
            raise ValueError(
                f"SPSD.split: features has a wrong shape; expected (B, {self.channels}, ...), "
                f"got {tuple(features.shape)}"
            )
        # with channels innermost, as token encoders give them and PDGR reads them
        tokens = features.movedim(1, -1)
        semantic, structural = (tokens.index_select(-1, i) for i in (self.semantic_index, self.structural_index))
        return semantic.movedim(-1, 1), structural.movedim(-1, 1)

    def merge(self, semantic: Tensor, structural: Tensor) -> Tensor:
        """Both parts back in the original channel order, so that text embeddings need no permutation."""
        if semantic.shape[1] != len(self.semantic_index) or structural.shape[1] != len(self.structural_index):
            raise ValueError(
                f"SPSD.merge: parts have wrong widths; expected {len(self.semantic_index)} and "
                f"{len(self.structural_index)} channels, got {semantic.shape[1]} and {structural.shape[1]}"
            )
        kind = torch.promote_types(semantic.dtype, structural.dtype)
        tokens = structural.new_empty((semantic.shape[0], *semantic.shape[2:], self.channels), dtype=kind)
        for part, index in ((semantic, self.semantic_index), (structural, self.structural_index)):
            given = (-1, index, part.movedim(1, -1).to(kind))
            # a transform (vmap, say) may track one part alone, and cannot write into a tensor that it does not track
            batched = torch._C._are_functorch_transforms_active()
            tokens = tokens.index_copy(*given) if batched else tokens.index_copy_(*given)
        return tokens.movedim(-1, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        semantic = state_dict.get(prefix + "semantic_index")
        structural = state_dict.get(prefix + "structural_index")
        given = structural if semantic is None else semantic
        if isinstance(given, Tensor):
            # of a dictionary that has one of them alone, the other stays
            semantic = self.semantic_index if semantic is None else semantic
            structural = self.structural_index if structural is None else structural
            if not (semantic.is_meta or structural.is_meta):
                check_partition(semantic.to(given.device), structural.to(given.device), self.channels)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_partition(semantic: Tensor, structural: Tensor, channels: int) -> None:
    """Refuse indices that are not a partition of ``0..channels-1``.

    Raises:
        CheckpointError: a channel is missing, repeated or out of range.
    """
    if semantic.is_floating_point() or structural.is_floating_point():
        raise CheckpointError("SPSD: channel indices have a wrong dtype; expected integers, got floating point")
    joined = torch.cat((semantic.flatten(), structural.flatten())).sort().values
    expected = torch.arange(channels, device=joined.device)
    if joined.shape != expected.shape or not torch.equal(joined.to(expected.dtype), expected):
        raise CheckpointError(
            f"SPSD: semantic and structural channels are no partition; expected each of 0..{channels - 1} once, "
            f"got {len(semantic)} and {len(structural)} indices with {len(joined.unique())} different values"
        )


def _semantic_count(channels: int, semantic_ratio: float) -> int:
    if not 0.0 <= semantic_ratio <= 1.0:
        raise ValueError(f"SPSD: semantic_ratio is out of range; expected 0..1, got {semantic_ratio}")
    # 0.3 * 10 is 2.9999999999999996 in binary: the small addend keeps the floor of the decimal value
    return int(semantic_ratio * channels + 1e-9)


def _check_prototypes(prototype: Tensor, label: Tensor, num_classes: int) -> None:
    name = "rank_by_prototypes"
    if not prototype.is_floating_point():
        raise TypeError(f"{name}: prototype has a wrong dtype; expected floating point, got {prototype.dtype}")
    if label.is_floating_point() or label.dtype == torch.bool:
        raise TypeError(f"{name}: label has a wrong dtype; expected integers, got {label.dtype}")
    if prototype.dim() != 2 or prototype.shape[1] == 0:
        raise ValueError(f"{name}: prototype has a wrong shape; expected (M, C), got {tuple(prototype.shape)}")
    if label.shape != prototype.shape[:1]:
        raise ValueError(f"{name}: label has a wrong shape; expected ({len(prototype)},), got {tuple(label.shape)}")
    if num_classes < 2:
        raise ValueError(f"{name}: num_classes is too small; expected at least 2, got {num_classes}")
    if label.numel() and (label.min() < 0 or label.max() >= num_classes):
        raise ValueError(
            f"{name}: label is out of range; expected 0..{num_classes - 1}, got {int(label.min())}..{int(label.max())}"
        )
    if not torch.isfinite(prototype).all():
        raise ValueError(f"{name}: prototype is not finite; expected finite values, got NaN or infinity")


def _class_sum(value: Tensor, label: Tensor, classes: int) -> Tensor:
    return value.new_zeros(classes, value.shape[1]).index_add_(0, label, value)


def _entropy(z: Tensor, label: Tensor, count: Tensor, rule: RankingRule) -> Tensor:
    if rule.entropy_activation == "relu":
        activation = z.clamp_min(0)
    elif rule.entropy_activation == "abs":
        activation = z.abs()
    elif rule.entropy_activation == "shift":
        activation = z - z.min(dim=0).values
    else:
        raise ValueError(
            "rank_by_prototypes: entropy_activation is unknown; expected relu, abs or shift, "
            f"got {rule.entropy_activation!r}"
        )
    if rule.dead_channel_entropy not in ("uniform", "zero"):
        raise ValueError(
            "rank_by_prototypes: dead_channel_entropy is unknown; expected uniform or zero, "
            f"got {rule.dead_channel_entropy!r}"
        )
    response = _class_sum(activation, label, len(count)) / count[:, None]
    total = response.sum(dim=0)
    dead = total < DEAD_ACTIVATION
    share = response / torch.where(dead, torch.ones_like(total), total)
    entropy = torch.special.entr(share).sum(dim=0)
    if rule.dead_channel_entropy == "uniform":
        return torch.where(dead, count.new_tensor(float(len(count))).log(), entropy)
    return entropy.masked_fill(dead, 0.0)


def _similarity(z: Tensor, label: Tensor, count: Tensor, kind: str) -> Tensor:
    # ordered pairs of different classes
    pairs = count.sum() ** 2 - (count**2).sum()
    if kind == "product":
        return _cross_product(z, label, len(count)) / pairs
    if kind == "sign_agreement":
        return _cross_product(z.sign(), label, len(count)) / pairs
    if kind == "neg_abs_diff":
        within = sum(_pairwise_distance(z[label == k]) for k in range(len(count)))
        return -(_pairwise_distance(z) - within) / pairs
    if kind == "rbf":
        return _cross_rbf(z, label, pairs)
    raise ValueError(
        "rank_by_prototypes: similarity is unknown; expected product, neg_abs_diff, rbf or sign_agreement, "
        f"got {kind!r}"
    )


def _cross_product(z: Tensor, label: Tensor, classes: int) -> Tensor:
    # sum over cross-class pairs of z_m z_n = (sum of all)^2 - sum over classes of (class sum)^2
    total = _class_sum(z, label, classes)
    return total.sum(dim=0) ** 2 - (total**2).sum(dim=0)


def _pairwise_distance(z: Tensor) -> Tensor:
    # sum over ordered pairs of |z_m - z_n|: in sorted order element i is added i times and subtracted M-1-i times
    place = torch.arange(len(z), dtype=z.dtype, device=z.device)
    return 2 * ((2 * place - (len(z) - 1))[:, None] * z.sort(dim=0).values).sum(dim=0)


def _cross_rbf(z: Tensor, label: Tensor, pairs: Tensor) -> Tensor:
    square = (z**2).sum(dim=0) * len(z) * 2 - 2 * z.sum(dim=0) ** 2
    for k in label.unique():
        own = z[label == k]
        square = square - ((own**2).sum(dim=0) * len(own) * 2 - 2 * own.sum(dim=0) ** 2)
    scale = (square / pairs).mean().clamp_min(torch.finfo(z.dtype).tiny)
    rows = max(1, PAIR_BLOCK // z.numel())
    total = torch.zeros_like(z[0])
    for start in range(0, len(z), rows):
        block = z[start : start + rows]
        other = (label[start : start + rows, None] != label[None, :]).to(z.dtype)
        value = torch.exp(-((block[:, None, :] - z[None, :, :]) ** 2) / scale)
        total += torch.einsum("mn,mnc->c", other, value)
    return total / pairs


def _rank(value: Tensor, ties: str) -> Tensor:
    channels = len(value)
    order = torch.argsort(value, stable=True)
    place = torch.arange(channels, dtype=torch.float64, device=value.device)
    if ties == "average":
        _, group = torch.unique_consecutive(value[order], return_inverse=True)
        size = torch.bincount(group).to(torch.float64)
        place = (torch.zeros_like(size).index_add_(0, group, place) / size)[group]
    elif ties != "ordinal":
        raise ValueError(f"rank_by_prototypes: rank_ties is unknown; expected ordinal or average, got {ties!r}")
    return torch.empty_like(place).index_copy_(0, order, place) / max(channels - 1, 1)
