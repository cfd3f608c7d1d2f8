# SPDX-License-Identifier: Apache-2.0
"""Files with the names and layouts of published weights, at reduced depth and width, against the formulas written out.

The key names are literal: those of OpenAI's CLIP, of DINO's training checkpoints and of DINOv3's release and timm port.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.models import clip as clip_module
from drseg_core.models.clip import ClipEncoder
from drseg_core.models.dino import DinoPrior
from drseg_core.models.pixel_statistics import PIXEL_DEVIATION, PIXEL_MEAN

WIDTH, CONTEXT, WORDS, JOINT = 64, 77, 49408, 32
# the image tower needs two inner blocks for guidance
DEPTH = {"visual.transformer": 3, "transformer": 2}


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def openai_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "positional_embedding": (CONTEXT, WIDTH),
        "text_projection": (WIDTH, JOINT),
        "logit_scale": (),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (1 + 14 * 14, WIDTH),
        "visual.proj": (WIDTH, JOINT),
        "visual.conv1.weight": (WIDTH, 3, 16, 16),
        "token_embedding.weight": (WORDS, WIDTH),
        "input_resolution": (),
        "context_length": (),
        "vocab_size": (),
    }
    for tower, depth in DEPTH.items():
        for block in (f"{tower}.resblocks.{index}" for index in range(depth)):
            shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
            shapes |= {f"{block}.attn.out_proj.weight": (WIDTH, WIDTH), f"{block}.attn.out_proj.bias": (WIDTH,)}
            shapes |= {f"{block}.ln_{i}.{part}": (WIDTH,) for i in (1, 2) for part in ("weight", "bias")}
            shapes |= {f"{block}.mlp.c_fc.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.c_fc.bias": (4 * WIDTH,)}
            shapes |= {f"{block}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.c_proj.bias": (WIDTH,)}
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    return shapes


def norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    score = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return ((score if mask is None else score + mask).softmax(-1) @ value).transpose(1, 2).flatten(2)


def clip_block(state: dict[str, Tensor], block: str, x: Tensor, mask: Tensor | None = None, dense: bool = False):
    y = norm(state, f"{block}.ln_1", x)
    parts = F.linear(y, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"]).chunk(3, -1)
    mixed = parts[2] if dense else attention(*parts, heads=WIDTH // 32, mask=mask)
    # CAT-Seg's dense path: every token's own value, on top of the class token
    x = x[:, :1] if dense else x
    x = x + F.linear(mixed, state[f"{block}.attn.out_proj.weight"], state[f"{block}.attn.out_proj.bias"])
    y = F.linear(norm(state, f"{block}.ln_2", x), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"])
    y = y * torch.sigmoid(1.702 * y)
    return x + F.linear(y, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])


def clip_dense(state: dict[str, Tensor], pixels: Tensor, side: int) -> Tensor:
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat((state["visual.class_embedding"].expand(len(x), 1, -1), x), 1)
    table = state["visual.positional_embedding"]
    grid = table[1:].T.reshape(1, WIDTH, 14, 14)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    x = norm(state, "visual.ln_pre", x + torch.cat((table[:1], grid.flatten(2)[0].T)))
    for index in range(3):
        x = clip_block(state, f"visual.transformer.resblocks.{index}", x, dense=index == 2)
    x = norm(state, "visual.ln_post", x) @ state["visual.proj"]
    return x[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def clip_text(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    for index in range(2):
        x = clip_block(state, f"transformer.resblocks.{index}", x, mask)
    x = norm(state, "ln_final", x)[torch.arange(len(x)), tokens.argmax(1)] @ state["text_projection"]
    return F.normalize(x, dim=-1)


@torch.no_grad()
def test_openai_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    name = "ViT-B-16-quickgelu"
    architecture = open_clip.get_model_config(name)
    architecture["embed_dim"] = JOINT
    architecture["vision_cfg"].update(layers=DEPTH["visual.transformer"], width=WIDTH, head_width=32)
    architecture["text_cfg"].update(layers=DEPTH["transformer"], width=WIDTH, heads=2)
    monkeypatch.setattr(clip_module, "ARCHITECTURES", {name: architecture})
    state = drawn(openai_shapes())
    path = tmp_path / "ViT-B-16.pt"
    torch.save(state, path)
    encoder = ClipEncoder(ClipConfig(name=name, weights=str(path), image_size=384, guidance_blocks=(0, 1))).eval()
    image = torch.rand(2, 3, 384, 384)
    # the benchmark's pixel statistics, on 0..255
    mean = torch.tensor([122.7709, 116.7460, 104.0937]).view(3, 1, 1)
    deviation = torch.tensor([68.5005, 66.6322, 70.3232]).view(3, 1, 1)
    found = encoder(image).features
    assert found.shape == (2, JOINT, 24, 24)
    torch.testing.assert_close(found, clip_dense(state, (image * 255 - mean) / deviation, 24), rtol=1e-3, atol=1e-4)
    tokens = encoder.tokenize(["bare soil", "tennis court"])
    torch.testing.assert_close(encoder.encode_text(tokens), clip_text(state, tokens), rtol=1e-4, atol=1e-5)


def dino_shapes(depth: int, patch: int, *, released_v3: bool = False) -> dict[str, tuple[int, ...]]:
    """Names of DINO's vision transformer; those of DINOv3's release where asked."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if released_v3:
        shapes |= {"storage_tokens": (1, 4, WIDTH), "mask_token": (1, WIDTH), "rope_embed.periods": (8,)}
        shapes |= {f"local_cls_norm.{part}": (WIDTH,) for part in ("weight", "bias")}
    else:
        shapes["pos_embed"] = (1, 1 + 28 * 28, WIDTH)
    for block in (f"blocks.{index}" for index in range(depth)):
        shapes |= {f"{block}.norm{i}.{part}": (WIDTH,) for i in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH), f"{block}.attn.qkv.bias": (3 * WIDTH,)}
        shapes |= {f"{block}.attn.proj.weight": (WIDTH, WIDTH), f"{block}.attn.proj.bias": (WIDTH,)}
        shapes |= {f"{block}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{block}.mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.fc2.bias": (WIDTH,)}
        if released_v3:
            shapes |= {f"{block}.ls1.gamma": (WIDTH,), f"{block}.ls2.gamma": (WIDTH,)}
            shapes[f"{block}.attn.qkv.bias_mask"] = (3 * WIDTH,)
    return shapes


def dino_v1(state: dict[str, Tensor], pixels: Tensor, depth: int) -> Tensor:
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    side = x.shape[2]
    x = torch.cat((state["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)), 1)
    table = state["pos_embed"]
    grid = table[0, 1:].T.reshape(1, WIDTH, 28, 28)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False, antialias=True)
    x = x + torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2)), 1)
    for block in (f"blocks.{index}" for index in range(depth)):
        y = norm(state, f"{block}.norm1", x, 1e-6)
        parts = F.linear(y, state[f"{block}.attn.qkv.weight"], state[f"{block}.attn.qkv.bias"]).chunk(3, -1)
        mixed = attention(*parts, heads=2)
        x = x + F.linear(mixed, state[f"{block}.attn.proj.weight"], state[f"{block}.attn.proj.bias"])
        y = F.linear(
            norm(state, f"{block}.norm2", x, 1e-6), state[f"{block}.mlp.fc1.weight"], state[f"{block}.mlp.fc1.bias"]
        )
        x = x + F.linear(F.gelu(y), state[f"{block}.mlp.fc2.weight"], state[f"{block}.mlp.fc2.bias"])
    return norm(state, "norm", x, 1e-6)[:, 1:].transpose(1, 2).unflatten(2, (side, side))


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> int:
    """timm's models with two blocks of 64 channels; returns the depth."""
    import timm

    create = timm.create_model
    reduced = {"depth": 2, "embed_dim": WIDTH, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda *a, **options: create(*a, **{**options, **reduced}))
    return 2


@pytest.mark.parametrize("size", [224, 384])
@torch.no_grad()
def test_dino_v1_training_checkpoint(tmp_path: Path, shallow: int, size: int) -> None:
    """Key ``teacher``, prefixes ``module.`` and ``backbone.``, a head, and positions of 28 x 28 patches."""
    state = drawn(dino_shapes(shallow, 8))
    wrapped = {f"module.backbone.{name}": value for name, value in state.items()}
    head = {"module.head.mlp.0.weight": torch.zeros(4, WIDTH), "module.head.last_layer.weight_g": torch.ones(4, 1)}
    path = tmp_path / "RSIB.pth"
    student = {name: torch.full_like(value, 9.0) for name, value in wrapped.items()}
    torch.save({"student": student, "teacher": wrapped | head, "epoch": 100}, path)
    config = DinoConfig(name="vit_base_patch8_224", weights=str(path), image_size=size, normalization="clip")
    prior = DinoPrior(config)
    image = torch.rand(1, 3, size, size)
    mean, deviation = (torch.tensor(part).view(3, 1, 1) for part in (PIXEL_MEAN, PIXEL_DEVIATION))
    side = size // 8
    expected = dino_v1(state, (image - mean) / deviation, shallow)
    torch.testing.assert_close(prior(image, (side, side)), expected, rtol=1e-3, atol=1e-4)
    half = (side // 2, side // 2)
    torch.testing.assert_close(prior(image, half), F.avg_pool2d(expected, 2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["release", "timm"])
def test_dino_v3(tmp_path: Path, shallow: int, kind: str) -> None:
    """The release's names (which timm translates) and timm's own give the same encoder, tensor for tensor."""
    state = drawn(dino_shapes(shallow, 16, released_v3=True))
    unused = ("mask_token", "rope_embed.periods", "local_cls_norm.weight", "local_cls_norm.bias")
    own = {}
    for name, value in state.items():
        if name in unused or name.endswith(("qkv.bias", "bias_mask")):
            continue
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        own[name.replace("storage_tokens", "reg_token")] = value
    if kind == "release":
        path = tmp_path / "dinov3_vitl16_pretrain_sat493m.pth"
        torch.save(state, path)
    else:
        path = tmp_path / "model.safetensors"
        save_file(own, path)
    prior = DinoPrior(DinoConfig(weights=str(path), image_size=64))
    loaded = prior.encoder.state_dict()
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], value) for name, value in own.items())
    assert prior.encoder.num_prefix_tokens == 5
    assert prior(torch.rand(1, 3, 64, 64), (4, 4)).shape == (1, WIDTH, 4, 4)
