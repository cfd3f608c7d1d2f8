# SPDX-License-Identifier: Apache-2.0
"""CLIP as a dense encoder: an adapter on open_clip's vision transformers.

open_clip builds the architecture and names the weights. The forward passes are the adapter's own. Dense features need
the last block's value path (:meth:`VisionTower.forward`), any grid size, and query, key and value projections that can
be trained separately.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drseg_core.config.schema import ClipConfig
from drseg_core.errors import CheckpointError, ConfigError
from drseg_core.extras import require
from drseg_core.models.correlation import rotate
from drseg_core.models.pixel_statistics import NORMALIZATIONS, Statistics, described_normalization, warn_of_other
from drseg_core.models.prompts import class_prompts
from drseg_core.models.transformers_names import clip_as_published, from_transformers, says_quick_gelu
from drseg_core.models.weights import WithoutInitialWeights, fitting_state, foreign_tensors

_log = logging.getLogger(__name__)

TINY: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 128, "layers": 3, "width": 96, "patch_size": 8, "head_width": 24},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
TINY_STAGES: dict[str, Any] = {
    **TINY,
    "vision_cfg": {
        "timm_model_name": "test_convnext",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 128,
    },
}
ARCHITECTURES: Mapping[str, dict[str, Any]] = {"drseg-tiny": TINY, "drseg-tiny-convnext": TINY_STAGES}

# entries of OpenAI's own state dicts that are not weights
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# last part of the names of what a model makes itself: a mask, which is -inf above its diagonal, and 0, 1, 2, ...
BUFFERS = ("attn_mask", "position_ids")


@functools.cache
def _tokenizer() -> Any:
    """One for all models: reading its vocabulary takes a quarter of a second."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


class DenseFeatures(NamedTuple):
    """``features`` (B, C, h, w) in the joint space; ``guidance`` two maps (B', width, h, w) of inner blocks."""

    features: Tensor
    guidance: tuple[Tensor, ...]


class SplitAttention(nn.Module):
    """Multi-head self-attention whose query, key and value projections are layers of their own."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        weights = attention.in_proj_weight.detach().chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = attention.out_proj

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def value(self, x: Tensor) -> Tensor:
        """Every token's own value, as if it attended to itself alone."""
        return self.out_proj(self.v_proj(x))

    def attend(self, x: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        """Tokens (B, Q, width) look at ``seen`` (B, N, width) with ``bias`` (B, heads or 1, Q, N) on the logits."""
        query, key, value = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.q_proj, x), (self.k_proj, seen), (self.v_proj, seen))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block of open_clip with :class:`SplitAttention`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        if not isinstance(block.attn, nn.MultiheadAttention) or not block.attn._qkv_same_embed_dim:
            raise ValueError(
                f"ClipEncoder: attention of {type(block).__name__} is not supported; "
                "expected open_clip's default residual block"
            )
        self.ln_1 = block.ln_1
        self.attn = SplitAttention(block.attn)
        self.ls_1 = block.ls_1
        self.ln_2 = block.ln_2
        self.mlp = block.mlp
        self.ls_2 = block.ls_2

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), causal))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def forward_beside(self, x: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        """Tokens that look at others without being looked at; see :meth:`SplitAttention.attend`."""
        x = x + self.ls_1(self.attn.attend(self.ln_1(x), self.ln_1(seen), bias))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def forward_value(self, x: Tensor) -> Tensor:
        """The value path of CAT-Seg: the residual of every token is the class token, not the token itself."""
        x = x[:, :1] + self.ls_1(self.attn.value(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class VisionTower(nn.Module):
    """open_clip's vision transformer for any grid of patches."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.patch_size: tuple[int, int] = tuple(visual.patch_size)
        self.native_grid: tuple[int, int] = tuple(visual.grid_size)
        self.conv1 = visual.conv1
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre = visual.ln_pre
        self.blocks = nn.ModuleList(Block(block) for block in visual.transformer.resblocks)
        self.ln_post = visual.ln_post
        self.proj = visual.proj

    @property
    def width(self) -> int:
        return self.conv1.out_channels

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, 1 + hw, width) with position embedding, class token first, and the grid (h, w)."""
        patches = self.conv1(pixels)
        grid = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).transpose(1, 2)
        start = self.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        tokens = torch.cat((start, tokens), dim=1) + self.position(grid).to(tokens.dtype)
        return self.ln_pre(tokens), grid

    def position(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (1 + hw, width), resized bicubically from the native grid."""
        if grid == self.native_grid:
            return self.positional_embedding
        table = self.positional_embedding[1:].unflatten(0, self.native_grid).permute(2, 0, 1)[None]
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)[0]
        return torch.cat((self.positional_embedding[:1], table.flatten(1).transpose(0, 1)))

    def forward(self, pixels: Tensor, blocks: Sequence[int] = (), guided: int | None = None) -> DenseFeatures:
        """Dense joint-space features: all blocks but the last run as usual, the last runs its value path.

        Args:
            pixels: (B, 3, H, W) normalised.
            blocks: inner blocks whose outputs are returned too.
            guided: how many leading images have those outputs; None for all.
        """
        x, (h, w) = self.embed(pixels)
        kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks[:-1]):
            x = block(x)
            if index in blocks:
                kept[index] = x[:guided, 1:].transpose(1, 2).unflatten(2, (h, w))
        return DenseFeatures(self.dense(x, (h, w)), tuple(kept[index] for index in blocks))

    def dense(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What enters the last block (B, 1 + hw, width) to joint-space features (B, C, h, w) by its value path."""
        last: Any = self.blocks[-1]
        x = self.ln_post(last.forward_value(x)) @ self.proj
        return x[:, 1:].transpose(1, 2).unflatten(2, grid)

    def states(self, pixels: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """What enters every block (B, 1 + hw, width), class token first, and the grid (h, w)."""
        x, grid = self.embed(pixels)
        found = [x]
        for block in self.blocks[:-1]:
            found.append(block(found[-1]))
        return found, grid

    def forward_ordinary(self, pixels: Tensor) -> Tensor:
        """Class-token embedding (B, C) of the unmodified encoder."""
        x, _ = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class StageTower(nn.Module):
    """open_clip's ConvNeXt as timm has it: four stages, each half as fine as the one before."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        trunk = visual.trunk
        self.stem, self.stages = trunk.stem, trunk.stages
        # only the norm of timm's head: the head pools, and here every place is an image of its own
        self.norm = nn.Sequential(trunk.norm_pre, trunk.head.norm)
        self.head = visual.head
        widths = [info["num_chs"] for info in trunk.feature_info]
        self.guidance_widths: tuple[int, ...] = tuple(widths[-2::-1])
        side = trunk.feature_info[-1]["reduction"]
        self.patch_size = (side, side)

    def forward(self, pixels: Tensor, blocks: Sequence[int] = (), guided: int | None = None) -> DenseFeatures:
        """Dense joint-space features, and as guidance the outputs of all stages but the last, the coarsest first.

        Args:
            pixels: (B, 3, H, W) normalised.
            blocks: ignored.
            guided: how many leading images have those outputs; None for all.
        """
        x, kept = self.stem(pixels), []
        for stage in self.stages:
            x = stage(x)
            kept.append(x[:guided])
        joint = self.head(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return DenseFeatures(joint, tuple(kept[-2::-1]))


class TextTower(nn.Module):
    """open_clip's causal text transformer; tokens may stop at the longest prompt."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.context_length = int(model.context_length)
        self.causal = model.attn_mask is not None
        self.end_token = int(model.text_eos_id) if model.text_pool_type == "eos" else None
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.blocks = nn.ModuleList(Block(block) for block in model.transformer.resblocks)
        self.ln_final = model.ln_final
        self.text_projection = model.text_projection

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, L) token ids to (T, C) embeddings, not normalised."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=self.causal)
        # the end token is the largest id of the vocabulary
        end = tokens.argmax(dim=-1) if self.end_token is None else (tokens == self.end_token).int().argmax(dim=-1)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])
        return self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection


class ClipEncoder(nn.Module):
    """Dense image features and class embeddings in CLIP's joint space.

    ``weights_place`` is where in the file the weights were, such as ``state_dict.module``; empty where the whole
    file is CLIP.

    Args:
        config: architecture, weights and what is trained.
        read_weights: False neither reads nor draws them, for a checkpoint that holds all of them.
        file: local file of the published weights that ``config`` names; by default they are fetched.
        offline: never connect to a network: published weights without ``file`` are refused.
        hierarchical: whether the image tower may be a ConvNeXt.

    Raises:
        ValueError: unknown or unsupported architecture, or weights that need another activation.
        CheckpointError: weights are not available or do not fit.
    """

    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(
        self,
        config: ClipConfig,
        *,
        read_weights: bool = True,
        file: Path | None = None,
        offline: bool = False,
        hierarchical: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        model, statistics = open_clip_model(config, read_weights, file, offline, hierarchical)
        self.visual: Any = StageTower(model.visual) if hasattr(model.visual, "trunk") else VisionTower(model.visual)
        self.text = TextTower(model)
        self.weights_place: str = getattr(model, "weights_place", "")
        self.embed_dim = int(model.text_projection.shape[1])
        self.register_buffer("pixel_mean", torch.tensor(statistics.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_deviation", torch.tensor(statistics.deviation).view(3, 1, 1), persistent=False)
        if isinstance(self.visual, VisionTower):
            inner = len(self.visual.blocks) - 1
            if len(config.guidance_blocks) != 2 or not all(0 <= index < inner for index in config.guidance_blocks):
                raise ValueError(
                    f"ClipEncoder: guidance_blocks is out of range for {config.name}; "
                    f"expected two of 0..{inner - 1}, got {tuple(config.guidance_blocks)}"
                )
        if config.image_size % self.visual.patch_size[0] or config.image_size < self.visual.patch_size[0]:
            raise ValueError(
                f"ClipEncoder: image_size does not fit {config.name}; expected a multiple of "
                f"{self.visual.patch_size[0]}, got {config.image_size}"
            )
        self._set_trainable()

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid (h, w) at the configured image size."""
        side = self.config.image_size // self.visual.patch_size[0]
        return side, side

    def forward(self, image: Tensor, guided: int | None = None, rotations: int = 1) -> DenseFeatures:
        """(B, 3, H, W) RGB in [0, 1] to dense features in ``rotations`` orientations, the unturned batch first.

        The first ``guided`` images of these also have guidance maps.
        """
        pixels = (image - self.pixel_mean) / self.pixel_deviation
        return self.visual(rotate(pixels, rotations), self.config.guidance_blocks, guided)

    def tokenize(self, class_names: Sequence[str], template: str | None = None) -> Tensor:
        """Prompts of the classes as token ids (T, L), int64, L the longest prompt.

        ``template`` replaces the configured one.

        Raises:
            ConfigError: an empty name, or one too long for the text encoder.
        """
        tokenizer = _tokenizer()
        prompts = class_prompts(class_names, self.config.template if template is None else template)
        lengths = [len(tokenizer.encode(prompt)) + 2 for prompt in prompts]
        for name, length in zip(class_names, lengths, strict=True):
            if length > self.text.context_length:
                raise ConfigError(
                    f"ClipEncoder.tokenize: class name {name!r} is too long; expected a prompt of at most "
                    f"{self.text.context_length} tokens, got {length}"
                )
        tokens = tokenizer(prompts, self.text.context_length)
        # padding after the end token cannot be seen under a causal mask, so it need not be computed
        return tokens[:, : max(lengths)].contiguous() if self.text.causal else tokens

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(T, L) token ids to L2-normalised class embeddings (T, C)."""
        return F.normalize(self.text(tokens), dim=-1)

    def _set_trainable(self) -> None:
        mode = self.config.trainable
        if mode not in ("attention", "all", "visual", "position", "none"):
            raise ValueError(
                f"ClipEncoder: trainable is unknown; expected attention, all, visual, position or none, got {mode!r}"
            )
        self.requires_grad_(mode == "all")
        if mode == "visual":
            self.visual.requires_grad_(True)
        elif mode == "position":
            self.visual.positional_embedding.requires_grad_(True)
        attentions = [module for module in self.modules() if isinstance(module, SplitAttention)]
        if mode == "attention":
            for attention in attentions:
                attention.q_proj.weight.requires_grad_(True)
                attention.v_proj.weight.requires_grad_(True)
        if isinstance(self.visual, VisionTower):
            # the value path never computes these, and a parameter without gradient stops DDP
            last: Any = self.visual.blocks[-1]
            last.attn.q_proj.requires_grad_(False)
            last.attn.k_proj.requires_grad_(False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def _architecture(name: str) -> dict[str, Any]:
    if name in ARCHITECTURES:
        return copy.deepcopy(ARCHITECTURES[name])
    import open_clip

    known = name in open_clip.list_models()
    if not known:
        raise ValueError(
            f"ClipEncoder: name is unknown; expected {', '.join(ARCHITECTURES)} or an architecture of open_clip, "
            f"got {name!r}"
        )
    return open_clip.get_model_config(name)


def patch_side(name: str) -> int | None:
    """Side in pixels of a patch of an architecture; None if it is no transformer of open_clip.

    Raises:
        ValueError: an unknown architecture.
    """
    side = _architecture(name)["vision_cfg"].get("patch_size")
    return side if isinstance(side, int) else None


def open_clip_model(
    config: ClipConfig,
    read_weights: bool,
    file: Path | None = None,
    offline: bool = False,
    hierarchical: bool = False,
) -> tuple[Any, Statistics]:
    """An open_clip model with its weights, and its pixel statistics. No registry of open_clip is touched."""
    require("ClipEncoder", "model")
    if config.normalization is not None and config.normalization not in NORMALIZATIONS:
        raise ValueError(
            f"ClipEncoder: normalization is unknown; expected {', '.join(NORMALIZATIONS)} or null, "
            f"got {config.normalization!r}"
        )
    from open_clip.model import CLIP

    architecture = _architecture(config.name)
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    stages = hierarchical and "convnext" in vision.get("timm_model_name", "")
    if not stages and (vision.get("timm_model_name") or not isinstance(vision.get("layers", 12), int)):
        raise ValueError(
            f"ClipEncoder: vision tower of {config.name} is not a vision transformer of open_clip; "
            "expected a ViT such as ViT-B-16-quickgelu"
        )
    if vision.get("attentional_pool"):
        raise ValueError(
            f"ClipEncoder: {config.name} pools by attention and has no dense joint space; expected a plain ViT"
        )
    special = architecture.get("custom_text") or architecture.get("multimodal_cfg")
    if special or text.get("hf_model_name") or text.get("hf_tokenizer_name") or text.get("embed_cls"):
        raise ValueError(f"ClipEncoder: text tower of {config.name} is not supported; expected CLIP's own text encoder")
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise ValueError(f"ClipEncoder: text pooling of {config.name} is not supported; expected the end token")
    if not stages:
        vision["patch_dropout"] = 0.0
    tensors, statistics = _weights(config, bool(architecture.get("quick_gelu", False)), read_weights, file, offline)
    # what a checkpoint is then loaded into needs no initial weights; where weights are read, random ones of other parts
    # are drawn next, and are those of the seed
    with contextlib.nullcontext() if read_weights else WithoutInitialWeights():
        model = CLIP(**architecture)
    if tensors is not None:
        _load(model, tensors, config)
    return model, statistics


def _weights(
    config: ClipConfig, quick_gelu: bool, read_weights: bool, file: Path | None, offline: bool
) -> tuple[dict[str, Tensor] | None, Statistics]:
    statistics = NORMALIZATIONS[config.normalization or "clip"]
    if config.weights is None:
        return None, statistics
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    tag = get_pretrained_cfg(config.name, config.weights)
    if tag:
        if bool(tag.get("quick_gelu", False)) != quick_gelu:
            _refuse_activation(config, not quick_gelu)
        if config.normalization is None:
            statistics = Statistics(tag.get("mean") or statistics.mean, tag.get("std") or statistics.deviation)
        if not read_weights:
            return None, statistics
        if offline and file is None:
            raise CheckpointError(
                f"ClipEncoder: weights {config.weights!r} of {config.name} are not here; "
                "expected a file, as offline is set"
            )
        try:
            path = file or download_pretrained(tag)
        except Exception as error:
            raise CheckpointError(
                f"ClipEncoder: weights {config.weights!r} of {config.name} cannot be fetched; expected a network or a "
                f"local file in model.clip.weights, got {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        return foreign_tensors(path), statistics
    if not read_weights:
        return None, statistics
    if not Path(config.weights).is_file():
        tags = ", ".join(list_pretrained_tags_by_model(config.name)) or "none"
        found = "are a folder" if Path(config.weights).is_dir() else "not found"
        raise CheckpointError(
            f"ClipEncoder: weights {config.weights!r} {found}; expected a file or a tag of {config.name} ({tags})"
        )
    tensors = foreign_tensors(config.weights)
    last = {key.rpartition(".")[2] for key in tensors}
    if last.issuperset(OPENAI_EXTRAS) and not quick_gelu:
        _refuse_activation(config, True)
    if from_transformers(tensors):
        said = says_quick_gelu(config.weights)
        if said is None:
            own = "QuickGELU" if quick_gelu else "exact GELU"
            _log.warning(
                "%s: no config.json beside it says its activation; %s, that of %s, is taken (OpenAI's is QuickGELU)",
                config.weights,
                own,
                config.name,
            )
        elif said != quick_gelu:
            _refuse_activation(config, said)
    if config.normalization is not None:
        warn_of_other(config.weights, "model.clip.normalization", config.normalization)
    # not taken from there without a word: a checkpoint has the option, and may outlive the file
    elif (described := described_normalization(config.weights)) not in (None, "clip"):
        raise ValueError(
            f"ClipEncoder: the description beside {config.weights} has other pixel statistics; "
            f"expected model.clip.normalization {described}, got null, which means clip"
        )
    return tensors, statistics


def _refuse_activation(config: ClipConfig, needs_quick: bool) -> None:
    other = f"{config.name}-quickgelu" if needs_quick else config.name.removesuffix("-quickgelu")
    raise ValueError(
        f"ClipEncoder: weights {config.weights!r} were trained with {'Quick' if needs_quick else 'exact '}GELU; "
        f"expected model.clip.name {other}, got {config.name}"
    )


def _load(model: Any, tensors: dict[str, Tensor], config: ClipConfig) -> None:
    from open_clip.model import resize_pos_embed

    own = model.state_dict()

    def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = clip_as_published(state)
        # neither is used here, and some checkpoints store them as numbers, others as vectors of one
        for key in ("logit_scale", "logit_bias"):
            state.pop(key, None)
            if key in own:
                state[key] = own[key]
        position = state.get("visual.positional_embedding")
        if position is not None and position.dim() == 2 and math.isqrt(len(position) - 1) ** 2 == len(position) - 1:
            resize_pos_embed(state, model)
        # published checkpoints are often half precision
        return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}

    fitting = fitting_state(
        tensors,
        own,
        caller="ClipEncoder",
        name=f"{config.name} from {config.weights}",
        target="the architecture",
        ignored=lambda key: key in OPENAI_EXTRAS or key.rpartition(".")[2] in BUFFERS,
        translate=translate,
    )
    model.weights_place = fitting.place
    if own["logit_scale"].device.type == "meta":
        model.load_state_dict(fitting.state, assign=True)
    else:
        model.load_state_dict(fitting.state)
