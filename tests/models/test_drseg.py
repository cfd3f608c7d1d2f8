# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drseg_core.config.load import load_config
from drseg_core.config.schema import TrainConfig
from drseg_core.models.build import build_model
from drseg_core.models.correlation import cosine
from drseg_core.models.count import count_parameters
from drseg_core.models.drseg import DRSeg

NAMES = ["green roof", "bare soil", "tennis court", "water"]
KINDS = ("ugaf", "mean", "concat", "separate", "replace", "sum", "none")


class PassThrough(nn.Module):
    def forward(self, features, prior):
        return features


def loss_of(model: DRSeg, image: torch.Tensor) -> torch.Tensor:
    logits = model(image, model.tokenize(NAMES)).logits
    target = torch.zeros_like(logits)
    target[:, 0] = 1
    return F.binary_cross_entropy_with_logits(logits, target)


@pytest.mark.promise("C3")
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(variant, kind: str) -> None:
    model = build_model(variant("fusion", kind=kind))
    output = model(torch.rand(2, 3, 64, 64), model.tokenize(NAMES))
    assert output.logits.shape == (2, 4, 32, 32)
    assert output.uncertainty.shape == (2, 1, 8, 8) and output.original.shape == (2, 4, 8, 8)
    assert (output.refined is None) == (kind == "none")
    assert output.refined is None or output.refined.shape == (2, 4, 8, 8)
    assert 0 <= output.uncertainty.min() and output.uncertainty.max() <= 1
    loss_of(model, torch.rand(2, 3, 64, 64)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("replace", "sum")])
def test_the_mean_of_the_original_maps(variant, kind: str) -> None:
    """A fusion whose kernel is the same for all rotations sees their mean; the mean alone has one kernel for it."""
    torch.manual_seed(0)
    stacked = build_model(variant("fusion", kind=kind)).eval()
    averaged = build_model(variant("fusion", kind=kind, original="mean")).eval()
    maps, refined = torch.rand(2, 4, 3, 8, 8), torch.rand(2, 1, 3, 8, 8)
    if kind != "mean":
        state = averaged.fusion.state_dict()
        name = {"none": "embed.weight", "concat": "embed.weight"}.get(kind, "embed_original.weight")
        weight = state[name]
        spread = weight[:, :1].repeat(1, 4, 1, 1) / 4
        stacked.fusion.load_state_dict({**state, name: torch.cat((spread, weight[:, 1:]), dim=1)})
        found = averaged.fusion(maps.mean(dim=1, keepdim=True), refined)
        expected = stacked.fusion(maps, refined)
        torch.testing.assert_close(found.embedding, expected.embedding)
        torch.testing.assert_close(found.uncertainty, expected.uncertainty)
    seen: list[tuple[int, ...]] = []
    averaged.fusion.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    output = averaged(torch.rand(2, 3, 64, 64), averaged.tokenize(NAMES))
    assert seen == [(2, 1, 4, 8, 8)] and output.original.shape == (2, 4, 8, 8)


def test_the_baseline_has_neither_prior_nor_graph_nor_split(variant) -> None:
    model = build_model(variant("fusion", kind="none"))
    assert model.dino is None and model.pdgr is None and model.spsd is None
    assert not any(name.startswith(("dino", "pdgr", "spsd")) for name in model.state_dict())
    with pytest.raises(ValueError, match="baseline has no prior"):
        model.rectify(torch.rand(1, 64, 8, 8), torch.rand(1, 3, 64, 64))


def test_identity_graph_gives_back_the_canonical_map(variant) -> None:
    model = build_model(variant("fusion", kind="ugaf")).eval()
    model.spsd.set_ranking(torch.rand(64))
    model.pdgr = PassThrough()
    image, text = torch.rand(2, 3, 64, 64), model.encode_text(model.tokenize(NAMES))
    features = model.dense_features(image)
    assert torch.equal(model.rectify(features, image), features)
    torch.testing.assert_close(model(image, text).refined, cosine(features, text))
    single = build_model(variant(rotations=1)).eval()
    single.pdgr = PassThrough()
    output = single(image, text)
    torch.testing.assert_close(output.refined, output.original)


def test_graph_without_split(variant) -> None:
    model = build_model(variant("spsd", semantic_ratio=0.0))
    assert len(model.spsd.semantic_index) == 0
    assert [tuple(weight.shape) for weight in model.pdgr.weights] == [(64, 64), (64, 64)]
    loss_of(model, torch.rand(1, 3, 64, 64)).backward()


def test_no_structural_channel_is_refused(variant) -> None:
    with pytest.raises(ValueError, match="leaves no structural channel"):
        build_model(variant("spsd", semantic_ratio=1.0))


def test_semantic_channels_are_not_changed_by_the_graph(tiny) -> None:
    tiny.spsd.set_ranking(torch.rand(64))
    image = torch.rand(1, 3, 64, 64)
    features = tiny.dense_features(image)
    rectified = tiny.rectify(features, image)
    assert torch.equal(rectified[:, tiny.spsd.semantic_index], features[:, tiny.spsd.semantic_index])
    assert not torch.equal(rectified[:, tiny.spsd.structural_index], features[:, tiny.spsd.structural_index])


def test_text_as_tokens_or_embeddings(tiny) -> None:
    tiny.eval()
    image, tokens = torch.rand(2, 3, 64, 64), tiny.tokenize(NAMES)
    with torch.no_grad():
        from_tokens = tiny(image, tokens)
        from_embeddings = tiny(image, tiny.encode_text(tokens))
    assert torch.equal(from_tokens.logits, from_embeddings.logits)


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (200, 30), (1, 1)])
def test_any_image_size(tiny, size: tuple[int, int]) -> None:
    output = tiny.eval()(torch.rand(1, 3, *size), tiny.encode_text(tiny.tokenize(NAMES)))
    assert output.logits.shape == (1, 4, 32, 32) and torch.isfinite(output.logits).all()


def test_images_are_resized_bilinearly(tiny) -> None:
    tiny.eval()
    image = torch.rand(1, 3, 40, 100)
    resized = F.interpolate(image, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(tiny.dense_features(image), tiny.dense_features(resized))


@pytest.mark.parametrize("classes", [1, 2, 9])
def test_number_of_classes_may_change(tiny, classes: int) -> None:
    names = [f"class {index}" for index in range(classes)]
    assert tiny(torch.rand(1, 3, 64, 64), tiny.tokenize(names)).logits.shape[1] == classes


@pytest.mark.promise("C7")
def test_evaluation_is_deterministic_and_independent_of_the_batch(tiny) -> None:
    tiny.eval()
    image, text = torch.rand(3, 3, 64, 64), tiny.encode_text(tiny.tokenize(NAMES)).detach()
    with torch.no_grad():
        first, second = tiny(image, text), tiny(image, text)
        alone = tiny(image[1:2], text)
    assert torch.equal(first.logits, second.logits)
    torch.testing.assert_close(alone.logits, first.logits[1:2], rtol=1e-3, atol=1e-4)


def test_learns_a_colour(tiny) -> None:
    optimizer = torch.optim.AdamW(tiny.parameter_groups(load_config("tiny").train))
    image = torch.zeros(2, 3, 64, 64)
    image[:, 0, :, :32], image[:, 1, :, 32:] = 1.0, 1.0
    tokens = tiny.tokenize(["red roof", "green field"])
    target = torch.zeros(2, 2, 32, 32)
    target[:, 0, :, :16], target[:, 1, :, 16:] = 1.0, 1.0
    losses = []
    for _ in range(40):
        loss = F.binary_cross_entropy_with_logits(tiny(image, tokens).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_learned_numbers_of_edges_have_no_weight_decay(variant) -> None:
    model = build_model(variant("graph", edge_temperature=0.1, edge_decay=1.0))
    train = TrainConfig()
    (group,) = (group for group in model.parameter_groups(train) if group["name"] == "edge_no_decay")
    assert {id(p) for p in group["params"]} == {id(model.pdgr.edge_log_temperature), id(model.pdgr.edge_log_decay)}
    assert group["weight_decay"] == 0 and group["eps"] == train.edge_eps and group["lr"] == 2e-4


def test_parameter_groups_follow_the_protocol(variant) -> None:
    model = build_model(variant("clip", trainable="all"))
    train = TrainConfig()
    groups = {group["name"]: group for group in model.parameter_groups(train)}
    assert sorted(groups) == ["clip_decay", "clip_no_decay", "edge_decay", "head_decay", "head_no_decay"]
    edge = {name for name, p in model.named_parameters() if any(p is each for each in groups["edge_decay"]["params"])}
    words = ("vector", "bias", "source.weight", "source.bias", "target.weight")
    assert edge == {f"pdgr.edge_{word}" for word in words}
    assert [name for name, group in groups.items() if "eps" in group] == ["edge_decay"]
    assert groups["edge_decay"] | {"params": None} == {
        "name": "edge_decay", "params": None, "lr": 2e-4, "weight_decay": 1e-4, "eps": train.edge_eps
    }  # fmt: skip
    assert groups["clip_decay"]["lr"] == pytest.approx(2e-6) and groups["head_decay"]["lr"] == 2e-4
    assert groups["clip_decay"]["weight_decay"] == 1e-4 and groups["head_no_decay"]["weight_decay"] == 0
    listed = [id(p) for group in groups.values() for p in group["params"]]
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(listed) == sorted(trained)
    exempt = {trained[id(p)] for key in groups if "no_decay" in key for p in groups[key]["params"]}
    assert "clip.visual.positional_embedding" in exempt and "clip.text.token_embedding.weight" in exempt
    assert "clip.visual.class_embedding" in exempt and "aggregator.spatial.0.norm_mlp.weight" in exempt
    assert "decoder.head.bias" not in exempt and "clip.visual.conv1.weight" not in exempt
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for p in m.parameters()}
    assert all(id(p) in norms for name, p in model.named_parameters() if name in exempt and "norm" in name)


def test_only_attention_of_clip_is_in_the_groups_by_default(variant) -> None:
    model = build_model(variant("clip", trainable="attention"))
    groups = {group["name"]: group for group in model.parameter_groups(TrainConfig())}
    assert len(groups["clip_decay"]["params"]) == 9 and "clip_no_decay" not in groups


def test_state_dict_round_trip_gives_the_same_output(tiny_config, tiny) -> None:
    tiny.spsd.set_ranking(torch.rand(64))
    other = build_model(tiny_config)
    other.load_state_dict(tiny.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(
            tiny.eval()(image, tiny.tokenize(NAMES)).logits, other.eval()(image, other.tokenize(NAMES)).logits
        )


def test_runs_under_autocast(tiny) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny(torch.rand(1, 3, 64, 64), tiny.tokenize(NAMES))
        loss = output.logits.float().square().mean()
    loss.backward()
    assert output.original.dtype == torch.float32 and torch.isfinite(output.logits).all()


def test_bad_input(tiny) -> None:
    tokens = tiny.tokenize(NAMES)
    with pytest.raises(TypeError, match="expected floating point"):
        tiny(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), tokens)
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        tiny(torch.rand(3, 64, 64), tokens)
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        tiny(torch.rand(1, 4, 64, 64), tokens)
    with pytest.raises(ValueError, match="text has a wrong width"):
        tiny(torch.rand(1, 3, 64, 64), torch.rand(2, 32))
    with pytest.raises(ValueError, match="text has a wrong shape"):
        tiny(torch.rand(1, 3, 64, 64), torch.rand(64))


def test_counts(tiny) -> None:
    counts = count_parameters(tiny)
    parts = [name for name in counts if name != "total"]
    assert parts == ["clip", "dino", "spsd", "pdgr", "fusion", "aggregator", "decoder"]
    assert counts["dino"].trainable == 0 and counts["dino"].total > 0
    assert counts["total"].total == sum(counts[name].total for name in parts)
    assert counts["total"].total == sum(parameter.numel() for parameter in tiny.parameters())
    assert 3_000_000 < counts["total"].total < 5_000_000


@pytest.mark.parametrize(("preset", "channels", "grid"), [("vitb", 512, (24, 24)), ("vitl", 768, (24, 24))])
def test_large_presets_build_without_weights(preset: str, channels: int, grid: tuple[int, int]) -> None:
    config = load_config(preset).model
    config = dataclasses.replace(
        config,
        clip=dataclasses.replace(config.clip, weights=None),
        dino=dataclasses.replace(config.dino, weights=None),
    )
    with torch.device("meta"):
        model = build_model(config)
        output = model.clip(torch.empty(1, 3, config.clip.image_size, config.clip.image_size))
    assert model.clip.embed_dim == channels and model.clip.grid == grid
    assert output.features.shape == (1, channels, *grid) and len(output.guidance) == 2
    assert model.dino.width == 1024 and model.pdgr.k == 75
    trained = [name for name, p in model.clip.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in trained)


def test_importing_the_models_imports_neither_timm_nor_open_clip() -> None:
    code = (
        "import sys, drseg_core.models.build, drseg_core.models.weights, drseg_core.models.count, "
        "drseg_core.config.load\n"
        "print([n for n in ('timm', 'open_clip', 'torchvision', 'triton') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
