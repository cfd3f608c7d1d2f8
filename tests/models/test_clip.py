# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from drseg_core import extras
from drseg_core.config.schema import ClipConfig
from drseg_core.errors import CheckpointError, MissingExtraError
from drseg_core.models import clip as clip_module
from drseg_core.models.clip import TINY, ClipEncoder, SplitAttention

CONFIG = ClipConfig(name="drseg-tiny", weights=None, image_size=128, guidance_blocks=(0, 1), trainable="all")
NAMES = ["green roof", "bare soil", "tennis court"]


def with_options(**options) -> ClipConfig:
    return dataclasses.replace(CONFIG, **options)


def open_clip_model(architecture: dict = TINY) -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(**copy.deepcopy(architecture)).eval()


def small(name: str) -> dict:
    """A real open_clip architecture with three thin layers, its keys unchanged."""
    import open_clip

    architecture = open_clip.get_model_config(name)
    architecture["vision_cfg"].update(layers=3, width=64, head_width=32, patch_size=32)
    architecture["text_cfg"].update(layers=2, width=64, heads=2, vocab_size=49408)
    architecture["embed_dim"] = 32
    return architecture


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, ClipEncoder]:
    """The same weights in open_clip's model and in the adapter."""
    model = open_clip_model()
    path = tmp_path / "tiny.safetensors"
    save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, path)
    return model, ClipEncoder(with_options(weights=str(path))).eval()


def test_image_encoder_is_open_clips(pair) -> None:
    model, encoder = pair
    pixels = torch.randn(2, 3, 128, 128)
    torch.testing.assert_close(encoder.visual.forward_ordinary(pixels), model.encode_image(pixels))


def test_text_encoder_is_open_clips_with_and_without_padding(pair) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    model, encoder = pair
    prompts = [f"A photo of a {name} in the scene" for name in NAMES]
    padded = SimpleTokenizer(context_length=16)(prompts)
    tokens = encoder.tokenize(NAMES)
    expected = F.normalize(model.encode_text(padded), dim=-1)
    assert tokens.shape[1] < 32 and torch.equal(tokens, padded[:, : tokens.shape[1]])
    torch.testing.assert_close(encoder.encode_text(tokens), expected)
    torch.testing.assert_close(encoder.encode_text(padded), expected)
    torch.testing.assert_close(encoder.encode_text(tokens).norm(dim=1), torch.ones(3))


def test_encoders_share_a_vocabulary_and_keep_their_lengths(monkeypatch) -> None:
    first, second = (ClipEncoder(with_options()) for _ in range(2))
    # padded to the length of the text tower
    first.text.causal = second.text.causal = False
    second.text.context_length = 20
    tokens = first.tokenize(NAMES)
    monkeypatch.setattr("open_clip.tokenizer.SimpleTokenizer", None)
    longer = second.tokenize(NAMES)
    assert tokens.shape == (3, 16) and longer.shape == (3, 20)
    assert torch.equal(longer[:, :16], tokens) and not longer[:, 16:].any()


def literal_value_path(model: nn.Module, pixels: Tensor) -> Tensor:
    """The dense feature of model.md 3.2 from open_clip's own modules, token by token."""
    visual = model.visual
    x = visual._embeds(pixels)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    block = visual.transformer.resblocks[-1]
    width = x.shape[-1]
    weight, bias = block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :]
    value = block.attn.out_proj(F.linear(block.ln_1(x), weight, bias)) + x[:, 0:1].expand_as(x)
    value = value + block.mlp(block.ln_2(value))
    value = (visual.ln_post(value) @ visual.proj)[:, 1:]
    side = int(value.shape[1] ** 0.5)
    return value.permute(0, 2, 1).reshape(len(pixels), -1, side, side)


def test_dense_features_follow_the_value_path(pair) -> None:
    model, encoder = pair
    image = torch.rand(2, 3, 128, 128)
    mean = torch.tensor([122.7709, 116.7460, 104.0937]).view(3, 1, 1)
    deviation = torch.tensor([68.5005, 66.6322, 70.3232]).view(3, 1, 1)
    expected = literal_value_path(model, (image * 255 - mean) / deviation)
    found = encoder(image)
    assert found.features.shape == (2, 64, 16, 16)
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_the_output_of_the_named_blocks(pair) -> None:
    model, encoder = pair
    pixels = torch.randn(3, 3, 128, 128)
    reference = model.visual.forward_intermediates(pixels, indices=[0, 1])["image_intermediates"]
    found = encoder.visual(pixels, blocks=(0, 1), guided=2).guidance
    for own, other in zip(found, reference, strict=True):
        torch.testing.assert_close(own, other[:2])
    swapped = encoder.visual(pixels, blocks=(1, 0)).guidance
    torch.testing.assert_close(swapped[0], reference[1])


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (24, 24), (7, 5)])
def test_any_grid(pair, grid: tuple[int, int]) -> None:
    _, encoder = pair
    found = encoder(torch.rand(1, 3, grid[0] * 8, grid[1] * 8))
    assert found.features.shape == (1, 64, *grid)
    position = encoder.visual.position(grid)
    assert position.shape == (grid[0] * grid[1] + 1, 96)
    torch.testing.assert_close(position[0], encoder.visual.positional_embedding[0])


def test_position_embedding_keeps_rows_and_columns_apart(pair) -> None:
    _, encoder = pair
    rows = torch.arange(16.0).view(16, 1, 1).expand(16, 16, 96).reshape(256, 96)
    with torch.no_grad():
        encoder.visual.positional_embedding[1:] = rows
    resized = encoder.visual.position((32, 8))[1:].view(32, 8, 96)
    torch.testing.assert_close(resized, resized[:, :1].expand_as(resized))
    assert (resized[1:, 0, 0] > resized[:-1, 0, 0]).all()


@pytest.mark.parametrize("causal", [False, True])
def test_split_attention_is_multi_head_attention(causal: bool) -> None:
    attention = nn.MultiheadAttention(24, 3, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    split = SplitAttention(attention)
    x = torch.randn(2, 7, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    expected, _ = attention(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(split(x, causal), expected)


def loss_of(encoder: ClipEncoder) -> Tensor:
    dense = encoder(torch.rand(1, 3, 128, 128))
    text = encoder.encode_text(encoder.tokenize(NAMES))
    cosine = torch.einsum("bchw,tc->bthw", F.normalize(dense.features, dim=1), text)
    return cosine.square().mean() + sum(part.square().mean() for part in dense.guidance)


def test_attention_mode_trains_exactly_query_and_value_projections() -> None:
    encoder = ClipEncoder(with_options(trainable="attention"))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    loss_of(encoder).backward()
    optimizer.step()
    for name, parameter in encoder.named_parameters():
        inside = ".blocks." in name and name.endswith(("attn.q_proj.weight", "attn.v_proj.weight"))
        used = name != "visual.blocks.2.attn.q_proj.weight"  # the value path has no query in the last block
        changed = not torch.equal(parameter, before[name])
        assert changed == (inside and used), name
    assert sum(p.requires_grad for p in encoder.parameters()) == 2 * (3 + 2) - 1


@pytest.mark.parametrize("trainable", ["attention", "all"])
def test_every_trainable_parameter_gets_a_gradient(trainable: str) -> None:
    encoder = ClipEncoder(with_options(trainable=trainable))
    loss_of(encoder).backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_none_trains_nothing() -> None:
    encoder = ClipEncoder(with_options(trainable="none"))
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(torch.rand(1, 3, 128, 128)).features.requires_grad


def test_prompts_take_the_part_before_the_comma() -> None:
    encoder = ClipEncoder(CONFIG)
    assert torch.equal(encoder.tokenize(["car, automobile"]), encoder.tokenize(["Car"]))


def test_bad_class_names() -> None:
    encoder = ClipEncoder(CONFIG)
    with pytest.raises(ValueError, match="too long; expected a prompt of at most 16 tokens"):
        encoder.tokenize(["a very long name of a class that nobody would ever write down " * 3])
    with pytest.raises(ValueError, match="name is empty"):
        encoder.tokenize(["roof", " "])
    with pytest.raises(ValueError, match="at least one"):
        encoder.tokenize([])
    with pytest.raises(TypeError, match="sequence of names"):
        encoder.tokenize("roof")
    with pytest.raises(ValueError, match="exactly one"):
        ClipEncoder(with_options(template="no place")).tokenize(["roof"])


def test_open_clips_registry_is_left_alone() -> None:
    import open_clip

    before = set(open_clip.list_models())
    ClipEncoder(CONFIG)
    assert set(open_clip.list_models()) == before and "drseg-tiny" not in before


@pytest.mark.parametrize("kind", ["safetensors", "plain", "wrapped", "half", "openai"])
def test_weights_from_files_as_published(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ViT-B-16-quickgelu"
    architecture = small(name)
    monkeypatch.setattr(clip_module, "ARCHITECTURES", {name: architecture})
    model = open_clip_model(architecture)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "plain":
        torch.save(state, path)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif kind == "half":
        torch.save({key: value.half() for key, value in state.items()}, path)
    else:
        extras = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
        torch.save(state | {key: torch.tensor(value) for key, value in extras.items()}, path)
    encoder = ClipEncoder(ClipConfig(name=name, weights=str(path), image_size=224, guidance_blocks=(0, 1))).eval()
    pixels = torch.randn(1, 3, 224, 224)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if kind == "half" else {}
    torch.testing.assert_close(encoder.visual.forward_ordinary(pixels), model.encode_image(pixels), **tolerance)
    assert encoder.visual.conv1.weight.dtype == torch.float32


def test_position_embedding_of_another_size_is_resized_on_loading(tmp_path: Path) -> None:
    larger = copy.deepcopy(TINY)
    larger["vision_cfg"]["image_size"] = 192
    path = tmp_path / "larger.pt"
    torch.save(open_clip_model(larger).state_dict(), path)
    assert ClipEncoder(with_options(weights=str(path))).visual.positional_embedding.shape == (257, 96)


def test_quick_gelu_mismatch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected model.clip.name ViT-B-32-quickgelu, got ViT-B-32"):
        ClipEncoder(ClipConfig(name="ViT-B-32", weights="openai", image_size=224, guidance_blocks=(3, 7)))
    monkeypatch.setattr(clip_module, "ARCHITECTURES", {"ViT-B-16": small("ViT-B-16")})
    path = tmp_path / "openai.pt"
    extras = {key: torch.tensor(1) for key in clip_module.OPENAI_EXTRAS}
    torch.save(open_clip_model(small("ViT-B-16")).state_dict() | extras, path)
    with pytest.raises(ValueError, match="QuickGELU"):
        ClipEncoder(ClipConfig(name="ViT-B-16", weights=str(path), image_size=224, guidance_blocks=(0, 1)))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"name": "RN50"}, ValueError, "not a vision transformer"),
        ({"name": "ViT-B-16-SigLIP"}, ValueError, "not a vision transformer"),
        ({"name": "convnext_base"}, ValueError, "not a vision transformer"),
        ({"name": "coca_ViT-B-32"}, ValueError, "pools by attention"),
        ({"name": "roberta-ViT-B-32"}, ValueError, "text tower"),
        ({"name": "ViT-Z-1"}, ValueError, "name is unknown"),
        ({"guidance_blocks": (0, 2)}, ValueError, "expected two of 0..1, got"),
        ({"guidance_blocks": (-1, 1)}, ValueError, "guidance_blocks"),
        ({"image_size": 100}, ValueError, "multiple of 8, got 100"),
        ({"trainable": "some"}, ValueError, "trainable is unknown"),
        ({"weights": "nowhere.pt"}, CheckpointError, "not found; expected a file or a tag"),
    ],
)
def test_bad_configurations(options, error, text) -> None:
    with pytest.raises(error, match=text):
        ClipEncoder(with_options(**options))


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require.cache_clear()
    monkeypatch.setattr(extras, "installed", lambda library: library != "open_clip_torch")
    with pytest.raises(MissingExtraError, match="^ClipEncoder: open_clip_torch is not installed; expected the extra"):
        clip_module.open_clip_model(with_options(), read_weights=False)


@pytest.mark.promise("C32")
def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    other = copy.deepcopy(TINY)
    other["vision_cfg"]["layers"] = 2
    path = tmp_path / "other.pt"
    torch.save(open_clip_model(other).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"12 missing: visual\.transformer\.resblocks\.2.* and 2 more"):
        ClipEncoder(with_options(weights=str(path)))
    wide = copy.deepcopy(TINY)
    wide["embed_dim"] = 32
    torch.save(open_clip_model(wide).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"expected \(96, 64\) float32, got \(96, 32\) float32"):
        ClipEncoder(with_options(weights=str(path)))


def test_a_tag_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip.pretrained

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", fail)
    with pytest.raises(CheckpointError, match="cannot be fetched; expected a network or a local file"):
        ClipEncoder(ClipConfig(name="ViT-B-32-quickgelu", weights="openai", image_size=224, guidance_blocks=(3, 7)))
