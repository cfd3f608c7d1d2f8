# SPDX-License-Identifier: Apache-2.0
"""Logits from class names alone: dense CLIP features without training beside the features of a prior."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.models.class_text import ClassText, class_logits, encode_classes
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.dense_features import VARIANTS, DenseOptions, dense_features
from drseg_core.models.dino import DinoPrior, resample
from drseg_core.models.prompts import AERIAL_TEMPLATES
from drseg_core.models.window_maps import Windows, blended_bands

__all__ = ["ZeroShot", "ZeroShotMaps", "ZeroShotOutput"]


class ZeroShotMaps(NamedTuple):
    """Dense features of an image before the classes are known.

    ``features`` (B, C, h, w) are from :func:`drseg_core.models.dense_features.dense_features`. ``prior`` (B, D, h, w)
    is on the same grid; None without a prior.

    Examples:
        >>> import torch, drseg_core as drseg
        >>> from drseg_core.models.zero_shot import ZeroShot
        >>> model = drseg.load("run").model
        >>> maps = ZeroShot(model.clip, model.dino).maps(torch.rand(1, 3, 32, 32))
        >>> maps.features.shape[2:] == maps.prior.shape[2:]
        True
    """

    features: Tensor
    prior: Tensor | None


class ZeroShotOutput(NamedTuple):
    """``logits`` (B, T, h, w), cosines without a scale; ``features`` and ``prior`` of :class:`ZeroShotMaps`.

    Examples:
        >>> import torch, drseg_core as drseg
        >>> from drseg_core.models.zero_shot import ZeroShot
        >>> model = ZeroShot(drseg.load("run").model.clip)
        >>> output = model(torch.rand(1, 3, 32, 48), model.encode(["road", "tree"]))
        >>> output.logits.shape, output.prior is None
        (torch.Size([1, 2, 4, 6]), True)
    """

    logits: Tensor
    features: Tensor
    prior: Tensor | None


def check_choices(variant: str, rotations: int, grid: str = "clip", *, has_prior: bool) -> None:
    """Check the options of :class:`ZeroShot` before any encoder is made.

    Raises:
        ValueError: :class:`ZeroShot` does not take them.
    """
    for name, value, choices in (
        ("variant", variant, VARIANTS),
        ("rotations", rotations, (1, 4)),
        ("grid", grid, ("clip", "prior")),
    ):
        if value not in choices:
            listed = ", ".join(map(str, choices))
            raise ValueError(f"ZeroShot: {name} is unknown; expected one of {listed}, got {value!r}")
    if not has_prior and (variant == "proxyclip" or grid == "prior"):
        raise ValueError(
            f"ZeroShot: prior is missing; expected one for variant {variant} on the grid of {grid}, got None"
        )


class ZeroShot(nn.Module):
    """An image and class names to logits on a grid of patches, with nothing trained.

    The given modules are frozen and stay in evaluation mode. An image is seen whole at its own resolution
    (:meth:`forward`, :meth:`maps`), or in overlapping windows (:meth:`windows`). A larger scene blends its windows
    itself. Features are averaged over turns and windows. The papers average logits, which differs only for classes of
    several words.

    Args:
        clip: image and text towers.
        prior: structural prior, for the graph that rectifies the logits, and for ``proxyclip``.
        variant: see :func:`drseg_core.models.dense_features.dense_features`. The default is what its paper found best
            on aerial images. It was not compared here, because CLIP's weights were not at hand.
        options: numbers of the variants.
        rotations: 1, or 4 for the mean over quarter turns of the image, each turned back. The prior is computed only
            unturned, and its features are turned with the image.
        grid: grid of the maps. With ``clip`` the prior is resampled to CLIP's patches. With ``prior`` the features are
            resampled bilinearly to the prior's grid, as LPOSS does.

    Raises:
        ValueError: an unknown option, or a prior that is needed and missing.

    Examples:
        >>> import torch, drseg_core as drseg
        >>> from drseg_core.models.zero_shot import ZeroShot
        >>> from drseg_core.nn import LabelPropagation
        >>> parts = drseg.load("run").model
        >>> model = ZeroShot(parts.clip, parts.dino, variant="proxyclip")
        >>> output = model(torch.rand(1, 3, 32, 32), model.encode(["building", "road", "tree, bush"]))
        >>> LabelPropagation(k=5)(output.logits, output.prior).argmax(dim=1).shape
        torch.Size([1, 4, 4])
    """

    def __init__(
        self,
        clip: ClipEncoder,
        prior: DinoPrior | None = None,
        *,
        variant: str = "segearth",
        options: DenseOptions | None = None,
        rotations: int = 1,
        grid: Literal["clip", "prior"] = "clip",
    ) -> None:
        super().__init__()
        check_choices(variant, rotations, grid, has_prior=prior is not None)
        self.clip, self.prior = clip, prior
        self.variant, self.options, self.rotations, self.grid = variant, options, rotations, grid
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> ZeroShot:
        """Stays in evaluation mode: nothing here is trained."""
        return super().train(False)

    def encode(
        self,
        classes: Sequence[str | Sequence[str]],
        templates: Sequence[str] = AERIAL_TEMPLATES,
        background: Sequence[str] = (),
    ) -> ClassText:
        """:func:`encode_classes` with this model's text tower."""
        return encode_classes(self.clip, classes, templates, background)

    def forward(self, image: Tensor, text: ClassText) -> ZeroShotOutput:
        """An image seen whole.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], H and W multiples of CLIP's patch.
            text: of :meth:`encode`.
        """
        maps = self.maps(image)
        return ZeroShotOutput(class_logits(maps.features, text), *maps)

    @torch.no_grad()
    def maps(self, image: Tensor) -> ZeroShotMaps:
        """The part of :meth:`forward` that does not depend on the classes.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], H and W multiples of CLIP's patch.

        Raises:
            TypeError: integer image.
            ValueError: a wrong shape.
        """
        self._check("maps", image)
        pixels = (image - self.clip.pixel_mean) / self.clip.pixel_deviation
        found = None if self.prior is None else self.prior.maps(image).features
        tower = self.clip.visual
        grid = (image.shape[2] // tower.patch_size[0], image.shape[3] // tower.patch_size[1])
        if self.grid == "clip":
            found = None if found is None else resample(found, grid)
        elif found is not None:
            grid = (found.shape[2], found.shape[3])
        mean = torch.stack([self._turned(pixels, found, turn) for turn in range(self.rotations)]).mean(dim=0)
        if mean.shape[2:] != torch.Size(grid):
            mean = F.interpolate(mean, size=grid, mode="bilinear", align_corners=False)
        return ZeroShotMaps(mean, found)

    def _turned(self, pixels: Tensor, prior: Tensor | None, turn: int) -> Tensor:
        """Features of the pixels after ``turn`` quarter turns, turned back."""
        guide = None
        if self.variant == "proxyclip" and prior is not None:
            guide = torch.rot90(prior, turn, (2, 3))
        turned = torch.rot90(pixels, turn, (2, 3))
        features = dense_features(self.clip.visual, turned, self.variant, prior=guide, options=self.options)
        return torch.rot90(features, -turn, (2, 3))

    @torch.no_grad()
    def windows(
        self,
        image: Tensor,
        side: int,
        overlap: int,
        *,
        batch_size: int = 4,
        blend: Literal["smooth", "equal"] = "smooth",
    ) -> ZeroShotMaps:
        """:meth:`maps` of an image of any size in overlapping windows at its own resolution.

        The windows are those of :func:`drseg_core.models.tiling.tile_starts`, counted in cells. So the cells of
        overlapping windows coincide. The features of a cell are the weighted mean of the windows that cover it. The
        papers weigh all windows alike (``blend="equal"``) and blend enlarged logits.

        Args:
            image: (B, 3, H, W) RGB in [0, 1], any size. It is mirrored at its lower and right edge to whole cells, and
                to one window if it is smaller.
            side: side of a window in pixels, a multiple of a cell. The papers have 224 or 336.
            overlap: pixels shared by neighbouring windows, a multiple of a cell. The papers have half of ``side``.
            batch_size: windows per forward pass.
            blend: weights fall off smoothly over the overlap, or are all equal.

        Returns:
            Maps on a grid of ``ceil(H / cell)`` x ``ceil(W / cell)`` cells, in float32 or wider.

        Raises:
            TypeError: integer image.
            ValueError: a wrong shape, or sizes of windows that do not fit the cells.
        """
        self._check("windows", image)

        def read(rows: Tensor, columns: Tensor) -> tuple[Tensor, None]:
            return image[:, :, rows.to(image.device)][:, :, :, columns.to(image.device)], None

        bands = blended_bands(
            self.parts,
            read,
            image.shape[2],
            image.shape[3],
            self.window_grid(side, overlap, batch_size, blend),
            batch_size=batch_size,
            blend=blend,
        )
        features, *prior = map(torch.cat, zip(*(band.parts for band in bands), strict=True), repeat(2))
        return ZeroShotMaps(features, prior[0] if prior else None)

    def parts(self, image: Tensor) -> list[Tensor]:
        """:meth:`maps` as a list, without ``prior`` if it is None."""
        return [part for part in self.maps(image) if part is not None]

    def window_grid(self, side: int, overlap: int, batch_size: int = 1, blend: str = "smooth") -> Windows:
        """The windows of :meth:`windows` in cells.

        Raises:
            ValueError: sizes of windows that do not fit the cells.
        """
        patch = self.clip.visual.patch_size[0]
        cells = self.prior.grid[0] if self.grid == "prior" and self.prior is not None else max(side // patch, 1)
        if side < patch or side % patch or side % cells:
            raise ValueError(
                f"ZeroShot.windows: side does not fit the grid; expected a multiple of the patch {patch} that divides "
                f"into {cells} cells, got {side}"
            )
        cell = side // cells
        if not 0 <= overlap < side or overlap % cell:
            raise ValueError(
                f"ZeroShot.windows: overlap does not fit; expected a multiple of {cell} pixels below {side}, "
                f"got {overlap}"
            )
        if batch_size < 1:
            raise ValueError(f"ZeroShot.windows: batch_size is out of range; expected >= 1, got {batch_size}")
        if blend not in ("smooth", "equal"):
            raise ValueError(f"ZeroShot.windows: blend is unknown; expected smooth or equal, got {blend!r}")
        return Windows(cells, cell, overlap // cell)

    def _check(self, method: str, image: Tensor) -> None:
        if not image.is_floating_point():
            raise TypeError(
                f"ZeroShot.{method}: image has a wrong dtype; expected floating point in [0, 1], got {image.dtype}"
            )
        if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(
                f"ZeroShot.{method}: image has a wrong shape; expected (B, 3, H, W), got {tuple(image.shape)}"
            )
