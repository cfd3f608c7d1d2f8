# SPDX-License-Identifier: Apache-2.0
"""Uncertainty-guided adaptive fusion (UGAF) of the original and the refined correlation, and its simpler rivals.

Every fusion has one call, ``fusion(original (B,R,T,h,w), refined (B,1,T,h,w) | None) -> FusionOutput``. It acts on each
class map alone, with the classes folded into the batch. So it takes any number of classes T at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Gate = Literal["sigmoid_proj", "residual", "direct", "feature", "proj_on_map", "none"]
Kind = Literal["ugaf", "mean", "concat", "separate", "replace", "sum", "none"]


class FusionOutput(NamedTuple):
    """``embedding`` (B, width, T, h, w) of every class map; ``uncertainty`` (B, 1, h, w) float32 in [0, 1]."""

    embedding: Tensor
    uncertainty: Tensor


def uncertainty(correlation: Tensor, tau: float | Tensor = 0.01) -> Tensor:
    """Normalised class entropy of every place (Eq. 12): 0 is certain, 1 is uncertain.

    ``q = softmax_c(M / tau)``, ``U = -sum_c q_c log q_c / log T``; ``U = 0`` for T = 1.

    Args:
        correlation: (B, T, h, w) cosine of every class.
        tau: temperature, above 0.

    Returns:
        (B, 1, h, w) float32 (float64 for float64 input).
    """
    if correlation.dim() != 4 or correlation.shape[1] == 0:
        raise ValueError(
            f"uncertainty: correlation has a wrong shape; expected (B, T, h, w), got {tuple(correlation.shape)}"
        )
    value = correlation if correlation.dtype == torch.float64 else correlation.float()
    # relative to the best class, so that no temperature overflows; exp(-1e4) is 0 in every format
    logit = ((value - value.amax(dim=1, keepdim=True).detach()) / tau).clamp_min(-1e4)
    log_share = logit.log_softmax(dim=1)
    entropy = -(log_share.exp() * log_share).sum(dim=1, keepdim=True)
    classes = correlation.shape[1]
    return (entropy / (math.log(classes) if classes > 1 else 1.0)).clamp(0.0, 1.0)


def group_norm(channels: int, per_group: int = 16) -> nn.GroupNorm:
    """GroupNorm with about ``per_group`` channels in a group, whatever the width."""
    groups = max(1, channels // per_group)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class _Fusion(nn.Module):
    """What all fusions share: folding of the classes and the uncertainty map."""

    def __init__(self, width: int, tau: float | None) -> None:
        super().__init__()
        if tau is not None and not tau > 0:
            raise ValueError(f"fusion: tau is out of range; expected above 0, got {tau}")
        self.width = width
        self.tau = 0.01 if tau is None else tau

    def forward(self, original: Tensor, refined: Tensor | None = None) -> FusionOutput:
        _check_maps(original, refined)
        batch, _, classes = original.shape[:3]
        embedding = self._embed(_fold(original), None if refined is None else _fold(refined))
        with torch.no_grad():
            u = uncertainty(original.mean(dim=1), self.tau)
        return FusionOutput(_unfold(embedding, batch, classes), u)

    def _embed(self, original: Tensor, refined: Tensor | None) -> Tensor:
        raise NotImplementedError


class NoFusion(_Fusion):
    """The baseline: 7x7 convolution of the original maps alone; the refined map is not read."""

    def __init__(self, rotations: int, width: int, *, tau: float | None = 0.01) -> None:
        super().__init__(width, tau)
        self.embed = nn.Conv2d(rotations, width, 7, padding=3)

    def _embed(self, original: Tensor, refined: Tensor | None) -> Tensor:
        return self.embed(original)


class MeanFusion(_Fusion):
    """Table 4 ``mean``: 7x7 convolution of the average of all R + 1 maps."""

    def __init__(self, rotations: int, width: int, *, tau: float | None = 0.01) -> None:
        super().__init__(width, tau)
        self.embed = nn.Conv2d(1, width, 7, padding=3)

    def _embed(self, original: Tensor, refined: Tensor | None) -> Tensor:
        return self.embed(torch.cat((original, _required(refined)), dim=1).mean(dim=1, keepdim=True))


class ConcatFusion(_Fusion):
    """Table 4 ``concat``: 7x7 convolution of all R + 1 maps."""

    def __init__(self, rotations: int, width: int, *, tau: float | None = 0.01) -> None:
        super().__init__(width, tau)
        self.embed = nn.Conv2d(rotations + 1, width, 7, padding=3)

    def _embed(self, original: Tensor, refined: Tensor | None) -> Tensor:
        return self.embed(torch.cat((original, _required(refined)), dim=1))


class SeparateFusion(_Fusion):
    """Table 4 ``separate``: each branch embedded alone, then joined by a 7x7 convolution, plus the original branch."""

    def __init__(self, rotations: int, width: int, *, tau: float | None = 0.01) -> None:
        super().__init__(width, tau)
        self.embed_original = nn.Conv2d(rotations, width, 7, padding=3)
        self.embed_refined = nn.Conv2d(1, width, 7, padding=3)
        self.head = nn.Conv2d(2 * width, width, 7, padding=3)

    def _embed(self, original: Tensor, refined: Tensor | None) -> Tensor:
        first = self.embed_original(original).sigmoid()
        second = self.embed_refined(_required(refined)).sigmoid()
        return self.head(torch.cat((first, second), dim=1)).sigmoid() + first


class ReplaceFusion(NoFusion):
    """The baseline with the refined map in place of the canonical one, which is the first.

    The paper does not say what its Table 2 has in place of UGAF. This fusion shows what the graph alone changes.
    """

    def _embed(self, original: Tensor, refined: Tensor | None) -> Tensor:
        return self.embed(torch.cat((_required(refined), original[:, 1:]), dim=1))


class SumFusion(NoFusion):
    """The baseline with the refined map added to each original one: another reading of Table 2 without UGAF."""

    def _embed(self, original: Tensor, refined: Tensor | None) -> Tensor:
        return self.embed(original + _required(refined))


class MultiScaleBlock(nn.Module):
    """Depth-wise convolutions of three reaches beside the input, joined by a 1x1 convolution, with a residual.

    Args:
        width: channels.
        kind: ``dilation`` (3x3, dilation 1, 2, 3) or ``kernel`` (3x3, 5x5, 7x7).
    """

    def __init__(self, width: int, kind: Literal["dilation", "kernel"] = "dilation") -> None:
        super().__init__()
        if kind == "dilation":
            reach = [nn.Conv2d(width, width, 3, padding=d, dilation=d, groups=width) for d in (1, 2, 3)]
        elif kind == "kernel":
            reach = [nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in (3, 5, 7)]
        else:
            raise ValueError(f"MultiScaleBlock: kind is unknown; expected dilation or kernel, got {kind!r}")
        self.reach = nn.ModuleList(reach)
        self.join = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = group_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([x, *(conv(x) for conv in self.reach)], dim=1)
        return x + self.norm(self.join(wide)).relu()


class _Gate(nn.Conv2d):
    """``4 U + bias`` at first, for one channel or several.

    It starts itself: who resets a model module by module, parents first, would else draw it anew.
    """

    def __init__(self, width: int, bias: float) -> None:
        self.start = bias
        super().__init__(1, width, 1)

    def reset_parameters(self) -> None:
        # drawn all the same, so that a seed gives the layers after it what it always gave
        super().reset_parameters()
        nn.init.constant_(self.weight, 4.0)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.start)


class UGAF(nn.Module):
    """Lets the refined map speak where the original one is uncertain (Eq. 12-13).

    The uncertainty ``U`` (Eq. 12) is the class entropy of the mean original map. The gate is the factor of Eq. 13. It
    is made of ``U`` and weighs the refined map ``M_r``:

    * ``sigmoid_proj``: ``sigmoid(a U + b) M_r`` (a, b learned, from 4 and -2);
    * ``residual``: ``(1 + sigmoid(a U + b)) M_r``;
    * ``direct``: ``U M_r``;
    * ``feature``: ``sigmoid(a U + b)`` with one a, b per channel, on the embedded map;
    * ``proj_on_map``: ``U sigmoid(a M_r + b)``;
    * ``none``: ``M_r``, whatever the uncertainty (a reading of Table 2 without UGAF).

    Args:
        rotations: original maps per class (R).
        width: channels of the embedding.
        tau: temperature of the uncertainty; None learns it, from 0.01.
        gate: form of Eq. 13.
        detach_gate: the uncertainty sends no gradient into the original maps (a learned tau still gets its own).
        head: joins both embeddings by ``conv1x1`` with GroupNorm and ReLU, or by ``conv7x7`` with sigmoid and residual.
        multi_scale: see :class:`MultiScaleBlock`.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import UGAF
        >>> fusion = UGAF(rotations=4, width=32)
        >>> output = fusion(torch.rand(2, 4, 5, 24, 24), torch.rand(2, 1, 5, 24, 24))  # five classes here
        >>> output.embedding.shape, output.uncertainty.shape
        (torch.Size([2, 32, 5, 24, 24]), torch.Size([2, 1, 24, 24]))
    """

    def __init__(
        self,
        rotations: int,
        width: int,
        *,
        tau: float | None = 0.01,
        gate: Gate = "sigmoid_proj",
        detach_gate: bool = True,
        head: Literal["conv1x1", "conv7x7"] = "conv1x1",
        multi_scale: Literal["dilation", "kernel"] = "dilation",
    ) -> None:
        super().__init__()
        if tau is not None and not tau > 0:
            raise ValueError(f"UGAF: tau is out of range; expected above 0, got {tau}")
        self.width = width
        self.tau = tau
        learned = tau is None and gate != "none"
        self.log_tau = nn.Parameter(torch.tensor(math.log(0.01))) if learned else None
        self.gate = gate
        self.detach_gate = detach_gate
        self.project: nn.Conv2d | None = None
        if gate in ("sigmoid_proj", "residual", "feature", "proj_on_map"):
            # more uncertain means more correction from the first step: sigmoid(-2) .. sigmoid(2)
            self.project = _Gate(width if gate == "feature" else 1, 0.0 if gate == "proj_on_map" else -2.0)
        elif gate not in ("direct", "none"):
            raise ValueError(
                "UGAF: gate is unknown; expected sigmoid_proj, residual, direct, feature, proj_on_map or none, "
                f"got {gate!r}"
            )
        self.embed_original = nn.Conv2d(rotations, width, 7, padding=3)
        self.embed_refined = nn.Conv2d(1, width, 7, padding=3)
        self.multi_scale = MultiScaleBlock(width, multi_scale)
        self.head: nn.Module
        if head == "conv1x1":
            join = nn.Conv2d(2 * width, width, 1, bias=False)
            self.head = nn.Sequential(join, group_norm(width), nn.ReLU())
        elif head == "conv7x7":
            self.head = nn.Sequential(nn.Conv2d(2 * width, width, 7, padding=3), nn.Sigmoid())
        else:
            raise ValueError(f"UGAF: head is unknown; expected conv1x1 or conv7x7, got {head!r}")
        self.head_residual = head == "conv7x7"

    def reset_parameters(self) -> None:
        """Draw new weights, and put back the start of the gate and of a learned temperature."""
        if self.log_tau is not None:
            nn.init.constant_(self.log_tau, math.log(0.01))
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.GroupNorm)):
                layer.reset_parameters()

    def forward(self, original: Tensor, refined: Tensor | None = None) -> FusionOutput:
        _check_maps(original, refined)
        refined = _required(refined)
        batch, _, classes = original.shape[:3]
        mean = original.mean(dim=1)
        tau = self.log_tau.exp() if self.log_tau is not None else self.tau
        u = uncertainty(mean.detach() if self.detach_gate else mean, 0.01 if tau is None else tau)
        first = self.embed_original(_fold(original))
        second = _channels_last(self.embed_refined(_fold(self._modulate(refined, u))))
        if self.gate == "feature" and self.project is not None:
            gate = self.project(u).sigmoid()
            second = (second.unflatten(0, (batch, classes)) * gate[:, None]).flatten(0, 1)
        second = self.multi_scale(second)
        joined = self.head(torch.cat((first, second), dim=1))
        if self.head_residual:
            joined = joined + first
        return FusionOutput(_unfold(joined, batch, classes), u.detach())

    def _modulate(self, refined: Tensor, u: Tensor) -> Tensor:
        # the uncertainty (B,1,h,w) is the same for every class: a dimension of one stands for T
        if self.gate == "direct":
            return u[:, None] * refined
        if self.gate == "proj_on_map" and self.project is not None:
            projected = self.project(refined.flatten(2, 3)).sigmoid().view_as(refined)
            return u[:, None] * projected
        if self.gate in ("sigmoid_proj", "residual") and self.project is not None:
            gate = self.project(u).sigmoid()
            return (1 + gate if self.gate == "residual" else gate)[:, None] * refined
        return refined


def build_fusion(
    kind: Kind,
    rotations: int,
    width: int,
    *,
    tau: float | None = 0.01,
    gate: Gate = "sigmoid_proj",
    detach_gate: bool = True,
    head: Literal["conv1x1", "conv7x7"] = "conv1x1",
    multi_scale: Literal["dilation", "kernel"] = "dilation",
) -> UGAF | _Fusion:
    """The fusion of that name; options that a kind does not have are ignored.

    Examples:
        >>> import torch
        >>> from drseg_core.nn import build_fusion
        >>> fusion = build_fusion("concat", rotations=4, width=32)
        >>> fusion(torch.rand(1, 4, 3, 8, 8), torch.rand(1, 1, 3, 8, 8)).embedding.shape
        torch.Size([1, 32, 3, 8, 8])
    """
    if kind == "ugaf":
        return UGAF(rotations, width, tau=tau, gate=gate, detach_gate=detach_gate, head=head, multi_scale=multi_scale)
    simple: dict[str, Callable[..., _Fusion]] = {
        "mean": MeanFusion,
        "concat": ConcatFusion,
        "separate": SeparateFusion,
        "replace": ReplaceFusion,
        "sum": SumFusion,
        "none": NoFusion,
    }
    if kind not in simple:
        raise ValueError(f"fusion: kind is unknown; expected ugaf, {', '.join(simple)}, got {kind!r}")
    return simple[kind](rotations, width, tau=tau)


def _check_maps(original: Tensor, refined: Tensor | None) -> None:
    if original.dim() != 5:
        raise ValueError(f"fusion: original has a wrong shape; expected (B, R, T, h, w), got {tuple(original.shape)}")
    if refined is not None:
        expected = (original.shape[0], 1, *original.shape[2:])
        if tuple(refined.shape) != expected:
            raise ValueError(f"fusion: refined has a wrong shape; expected {expected}, got {tuple(refined.shape)}")


def _required(refined: Tensor | None) -> Tensor:
    if refined is None:
        raise ValueError("fusion: refined is missing; expected (B, 1, T, h, w), got None")
    return refined


def _fold(maps: Tensor) -> Tensor:
    # (B, R, T, h, w) to (B*T, R, h, w) in channels_last memory: one pass, and none where R lies innermost already
    return maps.permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous().permute(0, 3, 1, 2)


def _channels_last(maps: Tensor) -> Tensor:
    # In this format convolutions of few channels are twice as fast on a CPU. The token layers that follow see
    # (B*T, h*w, width) without a copy. A single channel has both formats, so the result is asked for its format.
    # A transform (vmap, say) has no formats.
    if torch._C._are_functorch_transforms_active():
        return maps
    return maps.contiguous(memory_format=torch.channels_last)


def _unfold(embedding: Tensor, batch: int, classes: int) -> Tensor:
    return embedding.unflatten(0, (batch, classes)).transpose(1, 2)
