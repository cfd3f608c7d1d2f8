# SPDX-License-Identifier: Apache-2.0
"""Encoders as Hugging Face's transformers writes them, read as the same weights under the names of their authors.

The names and shapes here are those of transformers 5.24's ``save_pretrained``; with its models, features of equal
weights agreed to 2e-6 of the largest (CLIP, ViT, DINOv2 with and without registers, DINOv3 with and without a gate).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.errors import CheckpointError
from drseg_core.models.clip import open_clip_model
from drseg_core.models.dino import DinoPrior
from drseg_core.models.transformers_names import dino_as_published

State = dict[str, Tensor]
DINO = DinoConfig(name="drseg-tiny", weights=None, image_size=64)
CLIP = ClipConfig(name="drseg-tiny", weights=None, image_size=64, guidance_blocks=(0, 1))


@pytest.fixture(scope="module")
def clip() -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip_model(CLIP, True)[0].state_dict()


@pytest.fixture(scope="module")
def clip_model(clip: State) -> State:
    """The same weights as a ``CLIPModel`` has them."""
    state = {"logit_scale": clip["logit_scale"].clone()}
    for tower, theirs, width in (("visual.", "vision_model", 96), ("", "text_model", 64)):
        for block in range(3 if tower else 2):
            ours, layer = f"{tower}transformer.resblocks.{block}", f"{theirs}.encoder.layers.{block}"
            for kind in ("weight", "bias"):
                for letter, part in zip("qkv", clip[f"{ours}.attn.in_proj_{kind}"].split(width), strict=True):
                    state[f"{layer}.self_attn.{letter}_proj.{kind}"] = part.clone()
                for mine, name in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    state[f"{layer}.{name}.{kind}"] = clip[f"{ours}.{mine}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"vision_model.pre_layrnorm.{kind}"] = clip[f"visual.ln_pre.{kind}"]
        state[f"vision_model.post_layernorm.{kind}"] = clip[f"visual.ln_post.{kind}"]
        state[f"text_model.final_layer_norm.{kind}"] = clip[f"ln_final.{kind}"]
    state["vision_model.embeddings.class_embedding"] = clip["visual.class_embedding"]
    state["vision_model.embeddings.patch_embedding.weight"] = clip["visual.conv1.weight"]
    state["vision_model.embeddings.position_embedding.weight"] = clip["visual.positional_embedding"]
    state["vision_model.embeddings.position_ids"] = torch.arange(len(clip["visual.positional_embedding"]))[None]
    state["text_model.embeddings.token_embedding.weight"] = clip["token_embedding.weight"]
    state["text_model.embeddings.position_embedding.weight"] = clip["positional_embedding"]
    state["visual_projection.weight"] = clip["visual.proj"].T.contiguous()
    state["text_projection.weight"] = clip["text_projection"].T.contiguous()
    return state


def described(activation: str | None = "gelu", **changes: Any) -> dict[str, Any]:
    """A ``config.json``: with an activation for both towers, and what else it says."""
    tower = {} if activation is None else {"hidden_act": activation}
    return {"model_type": "clip", "vision_config": tower, "text_config": tower, **changes}


def read_clip(state: State, folder: Path, config: Any = None) -> State:
    """What is read of a ``CLIPModel``; without a config.json where that is False."""
    path = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    if config is not False:
        (folder / "config.json").write_text(json.dumps(described() if config is None else config))
    return open_clip_model(dataclasses.replace(CLIP, weights=str(path)), True)[0].state_dict()


@pytest.mark.parametrize("place", ["", "module.", "clip.model."])
def test_a_clip_model_is_read(place: str, clip: State, clip_model: State, tmp_path: Path) -> None:
    found = read_clip({f"{place}{name}": value for name, value in clip_model.items()}, tmp_path)
    assert found.keys() == clip.keys()
    assert all(torch.equal(found[name], clip[name]) for name in clip)


@pytest.mark.parametrize("activation", ["quick_gelu", None])
def test_an_activation_that_is_not_the_models_is_refused(
    activation: str | None, clip_model: State, tmp_path: Path
) -> None:
    """Left out of config.json, it is what transformers takes by default: that of OpenAI."""
    with pytest.raises(ValueError, match=r"trained with QuickGELU; expected model\.clip\.name drseg-tiny-quickgelu"):
        read_clip(clip_model, tmp_path, described(activation))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vision_config": {"hidden_act": "gelu_new"}}, r"another hidden_act; expected .*, got gelu and gelu_new$"),
        (
            {"text_config": {}},
            r"hidden_act; expected one of gelu and quick_gelu in both towers, got gelu and quick_gelu$",
        ),
        ({"text_config": None}, "another hidden_act"),
        (
            {"text_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-6}},
            "another layer_norm_eps; expected 1e-05, got",
        ),
        ({"vision_config": {"layer_norm_eps": [1]}}, r"another layer_norm_eps; expected 1e-05, got 1e-05 and \[1\]$"),
        ({"model_type": "siglip"}, "another model_type; expected clip, got siglip"),
        # older files have a tower twice, and transformers takes the second
        ({"text_config_dict": {"hidden_act": "quick_gelu"}}, "in both towers, got gelu and quick_gelu$"),
        ({"vision_config_dict": {"layer_norm_eps": 1e-6}}, "another layer_norm_eps"),
    ],
)
def test_what_open_clip_would_compute_otherwise_is_refused(
    changes: dict[str, Any], problem: str, clip_model: State, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read_clip(clip_model, tmp_path, described(**changes))


@pytest.mark.parametrize("config", [False, [1]])
def test_an_activation_that_nothing_says_is_a_warning(
    config: Any, clip_model: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "drseg_core"):
        read_clip(clip_model, tmp_path, config)
    (said,) = caplog.messages
    assert "no config.json beside it says its activation; exact GELU, that of drseg-tiny, is taken" in said


def test_one_with_its_activation_beside_it_says_nothing(
    clip_model: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "drseg_core"):
        read_clip(clip_model, tmp_path)
    assert not caplog.messages


def test_a_clip_model_without_a_projection_is_refused_in_names_of_the_model(clip_model: State, tmp_path: Path) -> None:
    for name, ours in (
        ("visual_projection.weight", "visual.proj"),
        ("vision_model.encoder.layers.1.self_attn.k_proj.weight", "visual.transformer.resblocks.1.attn.in_proj_weight"),
        ("text_model.encoder.layers.0.self_attn.q_proj.bias", "transformer.resblocks.0.attn.in_proj_bias"),
    ):
        with pytest.raises(CheckpointError, match=f"does not fit the architecture; 1 missing: {ours}[; (]") as caught:
            read_clip({key: value for key, value in clip_model.items() if key != name}, tmp_path)
        assert "\n" not in str(caught.value)


def test_a_clip_model_whose_keys_have_no_bias_is_refused(clip_model: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"5 missing: .*in_proj_bias"):
        read_clip({key: value for key, value in clip_model.items() if not key.endswith("k_proj.bias")}, tmp_path)


def test_parts_of_a_model_are_refused(clip_model: State, tmp_path: Path) -> None:
    for name in (
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    ):
        save_file(clip_model, tmp_path / name)
        config = dataclasses.replace(CLIP, weights=str(tmp_path / name))
        if "of-00001" in name:
            open_clip_model(config, True)
            continue
        with pytest.raises(CheckpointError, match=r"is (one part|a list of the parts) of a model; expected one file"):
            open_clip_model(config, True)
    with pytest.raises(CheckpointError, match="are a folder; expected a file or a tag"):
        open_clip_model(dataclasses.replace(CLIP, weights=str(tmp_path)), True)


def layers(start: str, blocks: int, names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{start}{block}.{name}": shape for block in range(blocks) for name, shape in names.items()}


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention(width: int) -> dict[str, tuple[int, ...]]:
    parts = [linear(f"attention.attention.{part}", width, width) for part in ("query", "key", "value")]
    return {name: shape for part in parts for name, shape in part.items()} | linear(
        "attention.output.dense", width, width
    )


def fitted(name: str, state: State, **options: Any) -> State:
    """A small encoder of ``name`` after it has read ``state`` as timm reads what DINO's authors published."""
    import timm

    encoder = timm.create_model(name, depth=1, num_classes=0, **options)
    translate = sys.modules[type(encoder).__module__].checkpoint_filter_fn
    encoder.load_state_dict(translate(dino_as_published(state), encoder))
    return encoder.state_dict()


def test_a_vit_model_is_read() -> None:
    """DINO, with the layer for classes that only its file has."""
    width = 24
    block = attention(width) | norm("layernorm_before", width) | norm("layernorm_after", width)
    block |= linear("intermediate.dense", 96, width) | linear("output.dense", width, 96)
    state = drawn(
        {
            "embeddings.cls_token": (1, 1, width),
            "embeddings.position_embeddings": (1, 17, width),
            "embeddings.patch_embeddings.projection.weight": (width, 3, 8, 8),
            "embeddings.patch_embeddings.projection.bias": (width,),
            **layers("encoder.layer.", 1, block),
            **norm("layernorm", width),
            **linear("pooler.dense", width, width),
        }
    )
    found = fitted("vit_small_patch8_224.dino", state, embed_dim=width, num_heads=2, img_size=32)
    one = "encoder.layer.0."
    for mine, theirs in {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
        "blocks.0.norm1.weight": f"{one}layernorm_before.weight",
        "blocks.0.norm2.bias": f"{one}layernorm_after.bias",
        "blocks.0.mlp.fc1.weight": f"{one}intermediate.dense.weight",
        "blocks.0.mlp.fc2.bias": f"{one}output.dense.bias",
        "blocks.0.attn.proj.weight": f"{one}attention.output.dense.weight",
    }.items():
        assert torch.equal(found[mine], state[theirs]), mine
    for kind in ("weight", "bias"):
        joined = [state[f"{one}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        assert torch.equal(found[f"blocks.0.attn.qkv.{kind}"], torch.cat(joined))


@pytest.mark.parametrize("registers", [0, 4])
def test_a_dinov2_model_is_read(registers: int) -> None:
    width = 24
    block = attention(width) | norm("norm1", width) | norm("norm2", width)
    block |= {"layer_scale1.lambda1": (width,), "layer_scale2.lambda1": (width,)}
    block |= linear("mlp.fc1", 96, width) | linear("mlp.fc2", width, 96)
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 17, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **layers("encoder.layer.", 1, block),
        **norm("layernorm", width),
    }
    if registers:
        shapes["embeddings.register_tokens"] = (1, registers, width)
    state = drawn(shapes)
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    found = fitted(name, state, embed_dim=width, num_heads=2, img_size=56)
    assert torch.equal(found["blocks.0.ls1.gamma"], state["encoder.layer.0.layer_scale1.lambda1"])
    assert torch.equal(found["blocks.0.ls2.gamma"], state["encoder.layer.0.layer_scale2.lambda1"])
    assert torch.equal(found["blocks.0.mlp.fc1.weight"], state["encoder.layer.0.mlp.fc1.weight"])
    if registers:
        assert torch.equal(found["reg_token"], state["embeddings.register_tokens"])


def test_the_gate_of_the_largest_dinov2_is_read() -> None:
    state = drawn({"embeddings.cls_token": (1, 1, 8), **layers("encoder.layer.", 1, linear("mlp.weights_in", 16, 8))})
    state |= drawn(layers("encoder.layer.", 1, linear("mlp.weights_out", 8, 8)))
    assert dino_as_published(state).keys() == {
        "cls_token",
        *(f"blocks.0.mlp.{part}.{kind}" for part in ("w12", "w3") for kind in ("weight", "bias")),
    }


def dinov3(width: int, patch: int, blocks: int, *, gated: bool, biased: bool) -> State:
    block = norm("norm1", width) | norm("norm2", width)
    block |= {"layer_scale1.lambda1": (width,), "layer_scale2.lambda1": (width,)}
    for letter in "qkv":
        block |= linear(f"attention.{letter}_proj", width, width, biased and letter != "k")
    block |= linear("attention.o_proj", width, width)
    block |= linear("mlp.up_proj", 4 * width, width) | linear("mlp.down_proj", width, 4 * width)
    if gated:
        block |= linear("mlp.gate_proj", 4 * width, width)
    return drawn(
        {
            "embeddings.cls_token": (1, 1, width),
            "embeddings.mask_token": (1, 1, width),
            "embeddings.register_tokens": (1, 4, width),
            "embeddings.patch_embeddings.weight": (width, 3, patch, patch),
            "embeddings.patch_embeddings.bias": (width,),
            **layers("layer.", blocks, block),
            **norm("norm", width),
        }
    )


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("biased", [False, True], ids=["without biases", "with biases"])
def test_a_dinov3_model_is_read(gated: bool, biased: bool) -> None:
    """Its keys have no bias; timm keeps those of queries and values apart."""
    state = dinov3(32, 16, 1, gated=gated, biased=biased)
    name = f"vit_small_{'plus_' if gated else ''}patch16_dinov3{'_qkvb' if biased else ''}"
    found = fitted(name, state, embed_dim=32, num_heads=2, mlp_ratio=4)
    assert torch.equal(found["reg_token"], state["embeddings.register_tokens"])
    assert torch.equal(found["blocks.0.gamma_2"], state["layer.0.layer_scale2.lambda1"])
    assert torch.equal(found["blocks.0.attn.proj.weight"], state["layer.0.attention.o_proj.weight"])
    joined = torch.cat([state[f"layer.0.attention.{letter}_proj.weight"] for letter in "qkv"])
    assert torch.equal(found["blocks.0.attn.qkv.weight"], joined)
    if biased:
        assert torch.equal(found["blocks.0.attn.q_bias"], state["layer.0.attention.q_proj.bias"])
        assert torch.equal(found["blocks.0.attn.v_bias"], state["layer.0.attention.v_proj.bias"])
    first = {"fc1_g": "gate_proj", "fc1_x": "up_proj"} if gated else {"fc1": "up_proj"}
    for mine, theirs in {**first, "fc2": "down_proj"}.items():
        assert torch.equal(found[f"blocks.0.mlp.{mine}.weight"], state[f"layer.0.mlp.{theirs}.weight"])


def test_a_bias_that_only_some_blocks_have_is_refused() -> None:
    state = dinov3(32, 16, 2, gated=False, biased=True)
    del state["layer.1.attention.v_proj.bias"]
    found = dino_as_published(state)
    assert "blocks.0.attn.qkv.bias" in found and "blocks.1.attn.qkv.bias" not in found


@pytest.mark.parametrize("place", ["", "backbone.", "teacher.backbone."])
def test_a_prior_reads_it_wherever_it_lies(place: str, tmp_path: Path) -> None:
    state = dinov3(96, 8, 2, gated=False, biased=False)
    path = tmp_path / "model.safetensors"
    save_file({f"{place}{name}": value for name, value in state.items()}, path)
    found = DinoPrior(dataclasses.replace(DINO, weights=str(path))).encoder.state_dict()
    assert torch.equal(found["blocks.1.mlp.fc2.weight"], state["layer.1.mlp.down_proj.weight"])


def test_what_timm_prints_of_a_file_is_not_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Biases of zeros that a file of DINOv3 has and the encoder does not: a line a block, in the middle of a map's."""
    config = DinoConfig(name="vit_small_patch16_dinov3", weights=None, image_size=64)
    own = DinoPrior(config).encoder.state_dict()
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    published = {}
    for key, value in own.items():
        for mine, theirs in names.items():
            key = key.replace(mine, theirs)
        published[key] = value
        if key.endswith("qkv.weight"):
            published[key.replace("weight", "bias")] = torch.zeros(len(value))
    torch.save(published, tmp_path / "dinov3.pth")
    capsys.readouterr()
    found = DinoPrior(dataclasses.replace(config, weights=str(tmp_path / "dinov3.pth"))).encoder.state_dict()
    assert all(torch.equal(found[key], own[key]) for key in own)
    assert capsys.readouterr().out == ""
