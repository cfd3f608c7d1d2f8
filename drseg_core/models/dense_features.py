# SPDX-License-Identifier: Apache-2.0
"""Dense CLIP features without training: what papers put in place of the last block of the image tower.

CLIP is trained to match only its class token with a text. All blocks but the last run as they are. The attention of the
last block is exchanged for one with which a patch keeps its own meaning. Every variant is one row of the table at
:func:`dense_features`. There, x are the tokens that enter the block, class token first. ``q``, ``k`` and ``v`` are its
projections of ``ln_1(x)`` in each head, ``s`` is ``(head width)**-0.5``, and ``O`` the output projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drseg_core.config.zero_shot import VARIANTS
from drseg_core.models.clip import SplitAttention, VisionTower

__all__ = ["VARIANTS", "DenseOptions", "dense_features", "neighbourhood", "prior_attention"]

# projections of a token that are compared with those of all tokens, each with its own softmax
COMPARED: dict[str, tuple[str, ...]] = {
    "sclip": ("q_proj", "k_proj"),
    "clearclip": ("q_proj",),
    "naclip": ("k_proj",),
    "segearth": ("q_proj", "k_proj", "v_proj"),
}
# the others leave out the residual connection and the MLP of the last block
WHOLE_BLOCK = ("maskclip", "sclip")


@dataclass(frozen=True)
class DenseOptions:
    """Numbers of the variants, by default those of their papers' code; each is read by one variant.

    Args:
        sigma: ``naclip``, standard deviation of the neighbourhood in cells, > 0.
        beta: ``proxyclip``, share of the mean cosine that is subtracted, >= 0.
        gamma: ``proxyclip``, factor of the difference, > 0.
        class_share: ``segearth``, share of the class token that is subtracted from every patch, >= 0.

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> from drseg_core.models.dense_features import DenseOptions
        >>> DenseOptions(sigma=2.0)
        DenseOptions(sigma=2.0, beta=1.2, gamma=3.0, class_share=0.3)
    """

    sigma: float = 5.0
    beta: float = 1.2
    gamma: float = 3.0
    class_share: float = 0.3

    def __post_init__(self) -> None:
        for field in fields(self):
            value, positive = getattr(self, field.name), field.name in ("sigma", "gamma")
            if not 0 <= value < math.inf or (positive and value == 0):
                rule = "> 0" if positive else ">= 0"
                raise ValueError(
                    f"DenseOptions: {field.name} is out of range; expected a finite number {rule}, got {value}"
                )


def dense_features(
    tower: VisionTower,
    pixels: Tensor,
    variant: str,
    *,
    prior: Tensor | None = None,
    options: DenseOptions | None = None,
) -> Tensor:
    """Features of every patch in CLIP's joint space, ready for the product with L2-normalised text.

    ========================  ==============================================  =============  ==========================
    variant                   last block's attention                          residual, MLP  source
    ========================  ==============================================  =============  ==========================
    ``value``                 ``O(v)``, every token its own value             neither        MaskCLIP as ClearCLIP's
                                                                                             code has it
    ``maskclip``              ``O(v)``                                        both           MaskCLIP (2112.01071)
    ``value_residual``        ``O(v)``                                        both; the      CAT-Seg, RSKT-Seg; see
                                                                              class token's  ``Block.forward_value``
    ``sclip``                 ``(softmax(s q q^T) + softmax(s k k^T)) v``     both           SCLIP (2312.01597)
    ``clearclip``             ``softmax(s q q^T) v``                          neither        ClearCLIP (2407.12442)
    ``naclip``                ``softmax(s k k^T + G) v``                      neither        NACLIP (2404.08181)
    ``proxyclip``             ``softmax(gamma (S - beta mean(S))) v``         neither        ProxyCLIP (2408.04883)
    ``segearth``              ``sclip``'s plus ``softmax(s v v^T) v``         neither        SegEarth-OV (2410.01768)
    ========================  ==============================================  =============  ==========================

    ``G`` is :func:`neighbourhood`, ``softmax(gamma (S - beta mean(S)))`` is :func:`prior_attention`. Then follow
    ``ln_post``, the joint projection and L2 normalisation. ``segearth`` then subtracts ``class_share`` times the class
    token from every patch, and does not normalise again. That class token is normalised, and comes from the same
    exchanged block.

    The formulas are those of the papers' public code, as it was in 2026, with these differences:

    * Position embeddings are resized to the grid itself. Most of that code resizes by a slightly larger factor.
    * Windows and images are not resized here.
    * The mean of ``proxyclip`` is over one image, not over a batch. :func:`prior_attention` has another difference.
    * The learned up-sampler of ``segearth`` is left out.

    Args:
        tower: CLIP's image tower.
        pixels: (B, 3, H, W) normalised as the tower expects, H and W multiples of its patch.
        variant: one of ``VARIANTS``.
        prior: (B, D, h', w') patch features of the same images, of any length but 0; only for ``proxyclip``.
        options: numbers of the variants; by default those of the papers.

    Returns:
        (B, C, h, w) on the tower's grid (``proxyclip``: on the prior's grid), in the dtype of the tower. All have
        length 1, except those of ``segearth``.

    Raises:
        ValueError: an unknown variant, pixels of a wrong size, or a prior that is missing, of a wrong shape, or given
            to a variant that needs none.

    Examples:
        >>> import torch, drseg_core as drseg
        >>> from drseg_core.models.dense_features import dense_features
        >>> tower = drseg.load("run").model.clip.visual
        >>> features = dense_features(tower, torch.randn(2, 3, 32, 48), "clearclip")
        >>> features.shape[2:], torch.allclose(features.norm(dim=1), torch.ones(2, 4, 6))
        (torch.Size([4, 6]), True)
    """
    options = DenseOptions() if options is None else options
    _check(tower, pixels, variant, prior)
    x, grid = tower.embed(pixels)
    for block in tower.blocks[:-1]:
        x = block(x)
    if variant == "value_residual":
        return F.normalize(tower.dense(x, grid), dim=1)
    last: Any = tower.blocks[-1]
    seen = last.ln_1(x)
    if prior is not None:
        # patches only: the prior has no cell for the class token
        mixed = last.attn.out_proj(_guided(last.attn, seen[:, 1:], grid, prior, options))
        grid = (prior.shape[2], prior.shape[3])
    elif variant in COMPARED:
        bias = neighbourhood(grid, options.sigma).to(seen) if variant == "naclip" else None
        mixed = _self_compared(last.attn, seen, COMPARED[variant], bias)
    else:
        mixed = last.attn.value(seen)
    mixed = last.ls_1(mixed)
    if variant in WHOLE_BLOCK:
        mixed = x + mixed
        mixed = mixed + last.ls_2(last.mlp(last.ln_2(mixed)))
    token = F.normalize(tower.ln_post(mixed) @ tower.proj, dim=-1)
    patch = token if prior is not None else token[:, 1:]
    if variant == "segearth":
        patch = patch - options.class_share * token[:, :1]
    return patch.transpose(1, 2).unflatten(2, grid)


def neighbourhood(grid: tuple[int, int], sigma: float) -> Tensor:
    """The term that NACLIP adds to its attention's logits: ``exp(-distance**2 / (2 sigma**2))`` of two grid cells.

    The class token takes part in the attention, with nothing added.

    Args:
        grid: (h, w).
        sigma: in cells.

    Returns:
        (1 + hw, 1 + hw) float64, the class token first.

    Examples:
        >>> from drseg_core.models.dense_features import neighbourhood
        >>> neighbourhood((1, 2), 1.0).round(decimals=4).tolist()
        [[0.0, 0.0, 0.0], [0.0, 1.0, 0.6065], [0.0, 0.6065, 1.0]]
    """
    along = []
    for length in grid:
        place = torch.arange(length, dtype=torch.float64)
        along.append(torch.exp(-(place[:, None] - place).square() / (2 * sigma**2)))
    return F.pad(torch.kron(*along), (1, 0, 1, 0))


def prior_attention(prior: Tensor, beta: float = 1.2, gamma: float = 3.0) -> Tensor:
    """ProxyCLIP's attention: ``softmax(gamma (S - beta mean(S)))`` over the patches where this is not negative.

    ``S`` are the cosines of a prior's patches. In an image that looks the same everywhere, even a patch's own cosine
    may be below ``beta`` times the mean. The paper's code then leaves nothing to attend to, and gives NaN. Here nothing
    is masked in that case: all patches of a constant image count the same.

    Args:
        prior: (B, D, h, w) features, finite.
        beta: share of the mean that is subtracted. The mean is over one image.
        gamma: factor of the difference.

    Returns:
        (B, hw, hw) weights, each row of sum 1, in the dtype of the prior.

    Examples:
        >>> import torch
        >>> from drseg_core.models.dense_features import prior_attention
        >>> prior_attention(torch.eye(2).view(1, 2, 1, 2))[0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> prior_attention(torch.ones(1, 2, 1, 2))[0].tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    unit = F.normalize(prior.flatten(2), dim=1)
    cosine = unit.transpose(1, 2) @ unit
    score = gamma * (cosine - beta * cosine.mean(dim=(1, 2), keepdim=True))
    masked = score < 0
    masked &= ~masked.all(dim=-1, keepdim=True)
    return score.masked_fill(masked, -torch.inf).softmax(dim=-1)


def _guided(
    attention: SplitAttention, seen: Tensor, grid: tuple[int, int], prior: Tensor, options: DenseOptions
) -> Tensor:
    """Values (B, h'w', width) on the prior's grid, mixed by its attention, the same for every head."""
    value = attention.v_proj(seen)
    size = (prior.shape[2], prior.shape[3])
    if size != grid:
        table = value.transpose(1, 2).unflatten(2, grid)
        value = F.interpolate(table, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    return prior_attention(prior.to(value.dtype), options.beta, options.gamma) @ value


def _self_compared(attention: SplitAttention, seen: Tensor, compared: tuple[str, ...], bias: Tensor | None) -> Tensor:
    """The sum over projections p of ``softmax(s p p^T + bias) v``, after the output projection."""

    def heads(name: str) -> Tensor:
        return getattr(attention, name)(seen).unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    value = heads("v_proj")
    mixed = torch.zeros_like(value)
    for name in compared:
        own = heads(name)
        mixed = mixed + F.scaled_dot_product_attention(own, own, value, attn_mask=bias)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


def _check(tower: VisionTower, pixels: Tensor, variant: str, prior: Tensor | None) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"dense_features: variant is unknown; expected one of {', '.join(VARIANTS)}, got {variant!r}")
    sides = zip(pixels.shape[2:], tower.patch_size, strict=False)
    if pixels.dim() != 4 or pixels.shape[1] != 3 or any(side == 0 or side % patch for side, patch in sides):
        raise ValueError(
            "dense_features: pixels have a wrong shape; expected (B, 3, H, W) with H and W multiples of the patch "
            f"{tower.patch_size}, got {tuple(pixels.shape)}"
        )
    if (variant == "proxyclip") != (prior is not None):
        wanted = "the prior's features" if prior is None else "None, as only proxyclip looks at it"
        raise ValueError(
            f"dense_features: prior does not fit {variant}; expected {wanted}, got "
            f"{None if prior is None else tuple(prior.shape)}"
        )
    if prior is not None and (prior.dim() != 4 or prior.shape[0] != pixels.shape[0] or 0 in prior.shape[1:]):
        raise ValueError(
            f"dense_features: prior has a wrong shape; expected ({pixels.shape[0]}, D, h, w), got {tuple(prior.shape)}"
        )
