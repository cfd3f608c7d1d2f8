# SPDX-License-Identifier: Apache-2.0
"""The frozen structural prior: an adapter on timm's self-supervised encoders (DINOv3 by default, DINO's too)."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import DinoConfig
from drseg_core.errors import CheckpointError
from drseg_core.extras import require
from drseg_core.models.pixel_statistics import NORMALIZATIONS, warn_of_other
from drseg_core.models.transformers_names import dino_as_published
from drseg_core.models.weights import WithoutInitialWeights, fitting_state, foreign_tensors
from drseg_core.nn.resample import resample

if TYPE_CHECKING:
    from drseg_core.models.prior_cache import PriorCache

# modules of a training that are no part of the encoder: a classifier, and the heads of self-distillation
HEADS = ("head.", "dino_head.", "ibot_head.")

TINY: dict[str, Any] = {"depth": 2, "embed_dim": 96, "num_heads": 4, "patch_size": 8}


class PriorMaps(NamedTuple):
    """``features`` (B, D, h, w) for the graph; ``guidance`` one map (B, D, h, w) per block that was asked for."""

    features: Tensor
    guidance: tuple[Tensor, ...]


class DinoPrior(nn.Module):
    """Patch features of a frozen encoder on a given grid. Never trained, always in evaluation mode.

    ``weights_place`` is where in the file the weights were, such as ``teacher.backbone``; empty where the whole file is
    the encoder.

    Args:
        config: architecture, weights, input size, pixel normalisation and which features.
        read_weights: False leaves the weights as memory is, for a checkpoint that holds all of them.
        offline: never connect: published weights, which are fetched here, are refused.

    Raises:
        ValueError: unknown architecture, one without feature maps or without the named block, or an image size that is
            no multiple of its patch.
        CheckpointError: weights that cannot be had or do not fit.
    """

    pixel_mean: Tensor
    pixel_deviation: Tensor
    # set by drseg_core.models.prior_cache.prior_cache, for as long as it is open
    cache: PriorCache | None = None

    def __init__(self, config: DinoConfig, *, read_weights: bool = True, offline: bool = False) -> None:
        super().__init__()
        self.config = config
        if config.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"DinoPrior: normalization is unknown; expected {', '.join(NORMALIZATIONS)}, "
                f"got {config.normalization!r}"
            )
        mean, deviation = NORMALIZATIONS[config.normalization]
        self.encoder: Any = _build(config, offline, read_weights)
        self.weights_place: str = getattr(self.encoder, "weights_place", "")
        blocks = getattr(self.encoder, "blocks", None)
        if config.layer is not None or self._projects:
            if blocks is None or not hasattr(blocks[0], "attn"):
                raise ValueError(
                    f"DinoPrior: features of {config.name} are its tokens only; expected features tokens and layer "
                    f"null, got {config.features} and {config.layer}"
                )
            if config.layer is not None and config.layer >= len(blocks):
                raise ValueError(
                    f"DinoPrior: layer is out of range for {config.name}; expected 0..{len(blocks) - 1}, "
                    f"got {config.layer}"
                )
        self.width = int(self.encoder.num_features)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> DinoPrior:
        """Stays in evaluation mode: the prior is frozen."""
        return super().train(False)

    @property
    def _projects(self) -> bool:
        """Whether features are keys or values of an attention."""
        return self.config.features in ("key", "value")

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid (h, w) at the configured image size.

        Raises:
            ValueError: an encoder without patches.
        """
        patch = _patch_size(self.encoder)
        if patch is None:
            raise ValueError(f"DinoPrior: {self.config.name} has no patches; expected a vision transformer")
        return self.config.image_size // patch, self.config.image_size // patch

    @torch.no_grad()
    def forward(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1] to (B, D, h, w) on ``grid``, without gradient.

        Patch features of the configured kind and block; a finer grid is averaged down where it is a multiple of
        ``grid``, otherwise resampled bilinearly.
        """
        return resample(self.maps(image).features, grid)

    @torch.no_grad()
    def maps(self, image: Tensor, blocks: Sequence[int] = ()) -> PriorMaps:
        """Features, and the outputs of ``blocks`` through the final norm, on the encoder's own grid in one pass."""
        side = (self.config.image_size, self.config.image_size)
        if image.shape[2:] != side:
            image = F.interpolate(image, size=side, mode="bilinear", align_corners=False)
        if self.cache is not None:
            return self.cache.maps(image, tuple(blocks), self._maps)
        return self._maps(image, blocks)

    def _maps(self, image: Tensor, blocks: Sequence[int]) -> PriorMaps:
        """:meth:`maps` of an image (B, 3, S, S) of the configured size."""
        found = self._encoded(image, blocks)
        return found._replace(features=torch.ones_like(found.features)) if self.config.features == "constant" else found

    def _encoded(self, image: Tensor, blocks: Sequence[int]) -> PriorMaps:
        pixels = (image - self.pixel_mean) / self.pixel_deviation
        layer = self.config.layer
        if not blocks and layer is None and not self._projects:
            # the one call that convolutional encoders understand too
            return PriorMaps(self._run(pixels, 1)[-1], ())
        layer = len(self.encoder.blocks) - 1 if layer is None else layer
        wanted = sorted({layer, *blocks})
        with self._projected(layer) as projected:
            outputs = dict(zip(wanted, self._run(pixels, wanted), strict=True))
        features = outputs[layer]
        if self._projects:
            features = projected[0].transpose(1, 2).contiguous().unflatten(2, features.shape[2:])
        return PriorMaps(features, tuple(outputs[block] for block in blocks))

    def _run(self, pixels: Tensor, indices: int | list[int]) -> list[Tensor]:
        maps = self.encoder.forward_intermediates(pixels, indices=indices, norm=True, intermediates_only=True)
        # in one layout, as later sums may round otherwise in another: what a PriorCache reads has this one
        return [value.contiguous() for value in maps]

    @contextlib.contextmanager
    def _projected(self, layer: int) -> Iterator[list[Tensor]]:
        """Collects keys or values (B, hw, D) of a block while the encoder runs; nothing for tokens."""
        found: list[Tensor] = []

        def collect(attention: Any, arguments: tuple[Tensor, ...]) -> None:
            weight, bias = _projection(attention, self.config.features)
            found.append(F.linear(arguments[0][:, self.encoder.num_prefix_tokens :], weight, bias))

        if not self._projects:
            yield found
            return
        handle = self.encoder.blocks[layer].attn.register_forward_pre_hook(collect)
        try:
            yield found
        finally:
            handle.remove()


def _projection(attention: Any, kind: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the key or value projection of one of timm's attention layers."""
    if attention.qkv is None:
        layer = attention.k_proj if kind == "key" else attention.v_proj
        return layer.weight, layer.bias
    place = 1 if kind == "key" else 2
    bias = attention.qkv.bias
    if bias is not None:
        return attention.qkv.weight.chunk(3)[place], bias.chunk(3)[place]
    # EVA's layers keep their biases apart
    return attention.qkv.weight.chunk(3)[place], getattr(attention, "k_bias" if kind == "key" else "v_bias", None)


def _patch_size(encoder: Any) -> int | None:
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, (tuple, list)) else patch
    return side if isinstance(side, int) else None


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # only the CPU generator: initial weights are drawn there, and no device is woken up
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _build(config: DinoConfig, offline: bool, read_weights: bool) -> Any:
    require("DinoPrior", "model")
    import timm

    options: dict[str, Any] = {"num_classes": 0}
    name = config.name
    if name == "drseg-tiny":
        name = "vit_small_patch16_dinov3"
        options.update(TINY)
    elif not timm.is_model(name.split(".", 1)[0]):
        raise ValueError(f"DinoPrior: name is unknown; expected drseg-tiny or an architecture of timm, got {name!r}")
    pretrained = read_weights and config.weights == "pretrained"
    if pretrained and config.name == "drseg-tiny":
        raise CheckpointError("DinoPrior: drseg-tiny has no published weights; expected null or a file, got pretrained")
    if pretrained and offline:
        raise CheckpointError(f"DinoPrior: weights of {config.name} are not here; expected a file, as offline is set")
    file = read_weights and config.weights is not None and not pretrained
    drawn = contextlib.nullcontext() if read_weights and not file else WithoutInitialWeights()
    with _seeded(config.seed), drawn:
        try:
            encoder = _create(timm, name, pretrained, options, config.image_size)
        except (ValueError, TypeError):
            raise
        except AssertionError as error:
            raise ValueError(
                f"DinoPrior: image_size does not fit {config.name}; got {config.image_size} ({error})"
            ) from error
        except Exception as error:
            raise CheckpointError(
                f"DinoPrior: weights of {config.name} cannot be fetched; expected a network or a local file in "
                f"model.dino.weights, got {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    if not hasattr(encoder, "forward_intermediates"):
        raise ValueError(f"DinoPrior: {config.name} has no feature maps; expected a model with forward_intermediates")
    side = _patch_size(encoder)
    if side is not None and config.image_size % side:
        raise ValueError(
            f"DinoPrior: image_size does not fit {config.name}; expected a multiple of {side}, got {config.image_size}"
        )
    if file:
        _load(encoder, config)
        warn_of_other(str(config.weights), "model.dino.normalization", config.normalization)
    return encoder


def _create(timm: Any, name: str, pretrained: bool, options: dict[str, Any], image_size: int) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        # convolutional models take any size and no such option
        return timm.create_model(name, pretrained=pretrained, **options)


def _load(encoder: Any, config: DinoConfig) -> None:
    if not Path(str(config.weights)).is_file():
        raise CheckpointError(
            f"DinoPrior: weights {config.weights!r} not found; expected pretrained, null or the path of a file"
        )
    # timm's own translation of published checkpoints into its names
    rename = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    own = encoder.state_dict()
    chunks = re.compile(r"^blocks\.\d+\.(\d+)\.")

    def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dino_as_published(state)
        if not any(chunks.match(key) for key in own):
            # trainings of DINOv2 keep blocks in chunks; the second number counts through all of them
            flat = {chunks.sub(r"blocks.\1.", key): value for key, value in state.items()}
            # two of one name would be a guess
            state = flat if len(flat) == len(state) else state
        if rename is not None:
            # timm prints what it looks for and does not find
            with contextlib.redirect_stdout(io.StringIO()):
                state = rename(state, encoder)
        return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}

    fitting = fitting_state(
        foreign_tensors(str(config.weights)),
        own,
        caller="DinoPrior",
        name=str(config.weights),
        target=config.name,
        ignored=lambda key: key.startswith(HEADS),
        translate=translate,
    )
    encoder.weights_place = fitting.place
    encoder.load_state_dict(fitting.state, assign=any(value.is_meta for value in own.values()))
