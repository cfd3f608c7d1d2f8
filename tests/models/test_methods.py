# SPDX-License-Identifier: Apache-2.0
"""The comparison methods: one interface, gradients everywhere, sizes, and what makes each of them itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from drseg_core.config.load import load_config, override
from drseg_core.config.methods import METHODS, apply_method
from drseg_core.config.schema import Config, ModelConfig
from drseg_core.errors import ConfigError
from drseg_core.models.baselines import proposals
from drseg_core.models.baselines.proposals import ProposalSegmenter, SideOutput
from drseg_core.models.build import build_model
from drseg_core.models.clip import StageTower, open_clip_model
from drseg_core.models.count import count_parameters
from drseg_core.models.decoder import GuidanceAttention, Stage
from drseg_core.models.segmenter import SegmenterOutput
from drseg_core.training.loss import segmentation_loss, training_loss

NAMES = ("bare soil", "red roof", "blue pond", "white car", "grass")


@pytest.fixture
def method(tiny_config: ModelConfig):
    def make(name: str, **options: object) -> Config:
        config = dataclasses.replace(load_config("tiny"), model=tiny_config)
        return override(apply_method(config, name), {key.replace("__", "."): value for key, value in options.items()})

    return make


@pytest.mark.parametrize("name", METHODS)
def test_shapes_and_gradients(method, name):
    config = method(name)
    model = build_model(config.model)
    image, mask = torch.rand(2, 3, 96, 80), torch.randint(0, len(NAMES), (2, 96, 80))
    output = model(image, model.tokenize(NAMES))
    side = 64 if name == "sed" else 32
    assert output.logits.shape == (2, 5, side, side) and output.original.shape == (2, 5, 8, 8)
    assert output.uncertainty.shape == (2, 1, 8, 8) and 0 <= output.uncertainty.min() <= output.uncertainty.max() <= 1
    assert output.original.abs().max() <= 1 + 1e-6
    torch.stack([part.mean() for part in training_loss(output, mask, config.train)]).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
    # every part learns something: a gradient that is zero everywhere means a branch that is cut off
    parts = {key.split(".")[0] for key, value in model.named_parameters() if value.requires_grad}
    for part in parts:
        total = (
            sum(float(v.grad.abs().sum()) for v in getattr(model, part).parameters() if v.grad is not None)
            if (isinstance(getattr(model, part), torch.nn.Module))
            else float(getattr(model, part).grad.abs().sum())
        )
        assert total > 0, part
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_any_vocabulary_at_any_time(method, name):
    model = build_model(method(name).model).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for names in (NAMES[:1], NAMES, NAMES[::-1]):
            output = model(image, model.tokenize(names))
            assert output.logits.shape[1] == len(names) and torch.isfinite(output.logits).all()
        forwards, backwards = (model(image, model.tokenize(names)).logits for names in (NAMES, NAMES[::-1]))
    # the order of the names means nothing
    torch.testing.assert_close(forwards, backwards.flip(1), rtol=1e-3, atol=1e-4)


# of the presets, without CLIP and prior, whose counts tests/models/test_counts.py has
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("catseg", {"fusion": 6_400, "aggregator": 2_140_160, "decoder": 3_438_817}),
        ("ovrs", {"fusion": 25_216, "aggregator": 2_140_160, "decoder": 3_438_817 + 97 * 32 + 2 + 49 * 16 + 2}),
        ("gsnet", {"fusion": 1_618_560, "aggregator": 2_140_160, "project_prior": 787_200}),
        ("rskt", {"fusion": 1_637_376, "aggregator": 2_644_480, "project_prior": 787_200}),
    ],
)
def test_parameter_counts_at_full_size(name, expected):
    config = apply_method(load_config("vitl"), name).model
    clip, dino = (dataclasses.replace(part, weights=None) for part in (config.clip, config.dino))
    with torch.device("meta"):
        counts = count_parameters(build_model(dataclasses.replace(config, clip=clip, dino=dino)))
    for part, total in expected.items():
        assert counts[part].total == total == counts[part].trainable, (part, counts[part])


def test_unknown_name():
    with pytest.raises(ConfigError, match="name is unknown.*catseg.*'catsegg'"):
        apply_method(Config(), "catsegg")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_simplifies(name):
    assert METHODS[name].simplified and METHODS[name].source.startswith("arXiv ")


def test_the_second_branch_is_the_prior_itself(method):
    model = build_model(method("rskt").model).eval()
    image = torch.rand(1, 3, 64, 64)
    text = model.encode_text(model.tokenize(NAMES))
    with torch.no_grad():
        projected = model.project_prior(model.dino.maps(image).features)
        expected = torch.einsum("bchw,tc->bthw", F.normalize(projected, dim=1), F.normalize(text, dim=1))
        torch.testing.assert_close(model(image, text).refined, expected)
    assert model.spsd is None and model.pdgr is None


def test_a_finer_prior_comes_down_by_the_same_map(method):
    model = build_model(method("gsnet", model__dino__image_size=128).model).eval()
    assert model.project_prior.kernel_size == (2, 2)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64), model.tokenize(NAMES)).refined.shape == (1, 5, 8, 8)


class TestSED:
    def test_no_gradient_through_guidance_and_early_heads(self, method):
        config = method("sed").model
        model = build_model(config)
        guidance = [torch.randn(1, 96, 8, 8, requires_grad=True) for _ in range(3)]
        embedding = torch.randn(1, config.aggregator.width, 3, 8, 8, requires_grad=True)
        correlation = torch.randn(1, 3, 8, 8, requires_grad=True)
        logits, early = model.decoder(embedding, guidance, correlation)
        assert [tuple(one.shape[2:]) for one in (*early, logits)] == [(8, 8), (16, 16), (32, 32), (64, 64)]
        sum(one.sum() for one in early).backward(retain_graph=True)
        assert embedding.grad is None and model.decoder.heads[1].weight.grad.abs().sum() > 0
        logits.sum().backward()
        assert all(maps.grad is None for maps in guidance)
        assert embedding.grad.abs().sum() > 0 and correlation.grad.abs().sum() > 0

    def test_early_heads_have_the_loss_of_the_logits(self, method):
        config = method("sed")
        model = build_model(config.model)
        output = model(torch.rand(1, 3, 64, 64), model.tokenize(NAMES))
        mask = torch.randint(0, len(NAMES), (1, 64, 64))
        parts = training_loss(output, mask, config.train)
        assert len(parts) == 4 + 1
        for logits, part in zip((output.logits, *output.auxiliary), parts, strict=False):
            torch.testing.assert_close(part.total, segmentation_loss(logits, mask).total)
        assert isinstance(model.eval()(torch.rand(1, 3, 64, 64), model.tokenize(NAMES)), SegmenterOutput)

    def test_a_convnext_guides_by_its_own_stages(self, method):
        model = build_model(method("sed", model__clip__name="drseg-tiny-convnext", model__clip__image_size=128).model)
        dense = model.clip(torch.rand(2, 3, 128, 128), guided=1)
        assert dense.features.shape == (2, 64, 4, 4)
        assert [tuple(maps.shape) for maps in dense.guidance] == [(1, 48, 8, 8), (1, 32, 16, 16), (1, 24, 32, 32)]

    def test_dense_features_are_the_encoder_s_own_of_one_place(self, method):
        """Where one place is all there is, pooling changes nothing: open_clip's embedding of the image."""
        config = method("sed", model__clip__name="drseg-tiny-convnext", model__clip__image_size=32).model.clip
        model, _ = open_clip_model(config, True, hierarchical=True)
        image = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            expected = model.eval().encode_image(image)
            found = StageTower(model.visual).eval()(image).features
        torch.testing.assert_close(found[:, :, 0, 0], expected)

    def test_only_the_image_tower_is_trained(self, method):
        options = {"model__clip__name": "drseg-tiny-convnext", "model__clip__trainable": "visual"}
        clip = build_model(method("sed", **options).model).clip
        assert all(one.requires_grad for one in clip.visual.parameters())
        assert not any(one.requires_grad for one in clip.text.parameters())

    def test_other_methods_have_no_use_for_a_convnext(self, method):
        with pytest.raises(ValueError, match="is not a vision transformer of open_clip"):
            build_model(method("catseg", model__clip__name="drseg-tiny-convnext").model)


def test_ovrs_weighs_guidance_by_what_is_decoded():
    attention = GuidanceAttention(6, 4)
    guidance, decoded = torch.randn(2, 4, 8, 8), torch.randn(2 * 3, 6, 8, 8)
    weighed = attention(guidance, decoded)
    mean = decoded.view(2, 3, 6, 8, 8).mean(1)
    channel = F.linear(mean.mean((2, 3)), attention.channel.weight, attention.channel.bias)
    place = mean.mean(1) * attention.place.weight.item() + attention.place.bias.item()
    expected = guidance + guidance * channel[:, :, None, None] + guidance * place[:, None]
    torch.testing.assert_close(weighed, expected)
    # one image's weights come from its own maps alone
    decoded[3:] = 0
    torch.testing.assert_close(attention(guidance, decoded)[0], weighed[0])
    assert not torch.equal(attention(guidance, decoded)[1], weighed[1])


def test_a_plain_stage_has_none_of_it():
    assert not [key for key in Stage(16, 4, 8).state_dict() if "attention" in key or "skip" in key]


class TestProposals:
    def test_logits_are_shares_of_masks_times_class_probabilities(self, method):
        model = build_model(method("san", model__proposals__queries=3).model)
        image, tokens = torch.rand(1, 3, 64, 64), model.tokenize(NAMES)
        with torch.no_grad():
            output = model(image, tokens)
        assert len(output.proposals) == 2
        mask, score = output.proposals[-1]
        assert mask.shape == (1, 3, 16, 16) and score.shape == (1, 3, len(NAMES) + 1)
        inside = F.interpolate(mask, size=(32, 32), mode="bilinear").sigmoid()
        expected = sum(score.softmax(-1)[0, q, :-1, None, None] * inside[0, q] for q in range(3))
        torch.testing.assert_close(output.logits[0].exp(), expected.clamp_min(1e-6))
        assert isinstance(model.eval()(image, tokens), SegmenterOutput)

    def test_the_side_network_steers_where_san_looks(self, method):
        model = build_model(method("san").model).eval()
        states = [torch.randn(1, 1 + 64, 96) for _ in model.clip.visual.blocks]
        bias = torch.full((1, 4, 2, 64), -1e4)
        bias[:, :, 0, 5], bias[:, :, 1, 9] = 1e4, 1e4
        layer = SideOutput(torch.empty(0), torch.empty(0), bias)
        with torch.no_grad():
            before = model._recognised(states, model._bias(layer, (8, 8)))
            states[-1][:, 1 + 5] += 3 * torch.randn(96)
            after = model._recognised(states, model._bias(layer, (8, 8)))
        assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-3)
        torch.testing.assert_close(before[:, 1], after[:, 1])

    def test_a_proposal_sees_itself_and_its_places_alone(self, method):
        """Against SAN's attention written down: no class token, no other proposal."""
        model = build_model(method("san").model).eval()
        state, bias = torch.randn(1, 1 + 64, 96), torch.randn(1, 4, 2, 64)
        block = model.clip.visual.blocks[-1]
        with torch.no_grad():
            found = model._recognised([state] * 3, model._bias(SideOutput(state, state, bias), (8, 8)))
            for query in range(2):
                seen = torch.cat((state[:, :1], state[:, 1:]), dim=1)
                own = F.pad(bias[:, :, query : query + 1], (1, 0))
                x = block.forward_beside(state[:, :1], seen, own)
                expected = F.normalize(model.clip.visual.ln_post(x) @ model.clip.visual.proj, dim=-1)
                torch.testing.assert_close(found[:, query : query + 1], expected)

    def test_contextual_shift_replaces_other_places_by_the_class_token(self, method):
        """A bias of log n on the class token is n copies of it; against the replacement written down."""
        model = build_model(method("scan").model).eval()
        state = torch.randn(1, 1 + 64, 96)
        mask = torch.full((1, 1, 16, 16), -20.0)
        mask[..., :8, :] = 20.0
        with torch.no_grad():
            found = model._recognised([state] * 3, model._bias(SideOutput(state, mask, None), (8, 8)))
            shifted = state.clone()
            shifted[:, 1 + 32 :] = state[:, :1]
            visual = model.clip.visual
            seen = torch.cat((state[:, :1], shifted[:, 1:]), dim=1)
            x = visual.blocks[-1].forward_beside(state[:, :1], seen, torch.zeros(1, 1, 1, 65))
            expected = F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)

    def test_proposals_do_not_change_what_clip_sees(self, method):
        model = build_model(method("scan").model).eval()
        plain = build_model(method("catseg").model).eval()
        plain.clip.load_state_dict(model.clip.state_dict())
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            tokens = model.tokenize(NAMES)
            torch.testing.assert_close(model(image, tokens).original, plain(image, tokens).original)

    def test_scan_weighs_what_the_side_network_and_clip_say(self, method, monkeypatch):
        """By a geometric mean of probabilities; with weights of CLIP's only the side network's say is trained."""
        model = build_model(method("scan").model)
        layer = SideOutput(torch.randn(1, 2, 48), torch.empty(0), None)
        recognised, dense, classes = torch.rand(1, 2, 4), torch.randn(1, 64, 8, 8), torch.randn(4, 64)
        said = {}
        with torch.no_grad():
            for share in (0.0, 0.7, 1.0):
                monkeypatch.setattr(proposals, "CLIP_SHARE", share)
                said[share] = model.eval()._score(layer, recognised, dense, classes)
            torch.testing.assert_close(said[0.7], 0.3 * said[0.0] + 0.7 * said[1.0])
            torch.testing.assert_close(said[1.0], (10 * recognised).log_softmax(-1))
            monkeypatch.undo()
            assert proposals.CLIP_SHARE == 0.7
            model.train()
            torch.testing.assert_close(model._score(layer, recognised, dense, classes), said[0.7])
            model.learns = False
            own = model._score(layer, recognised, dense, classes)
            torch.testing.assert_close(own.log_softmax(-1), said[0.0])

    def test_states_of_clip_are_spread_over_its_depth(self, method):
        model = build_model(method("san", model__proposals__layers=2).model)
        # three blocks, the last recognises: states before it
        assert model.taps == [0, 2] and len(model.side.taps) == 2

    def test_the_side_network_may_see_a_larger_image(self, method):
        model = build_model(method("san", model__proposals__image_size=160).model)
        output = model(torch.rand(1, 3, 96, 96), model.tokenize(NAMES))
        assert output.proposals[0].mask.shape[2:] == (10, 10) and output.logits.shape[2:] == (32, 32)

    def test_refusals(self, method):
        with pytest.raises(ValueError, match=r"recognition_blocks is out of range.*expected 1\.\.3, got 4"):
            build_model(method("san", model__proposals__recognition_blocks=4).model)
        with pytest.raises(ValueError, match="heads does not divide width"):
            build_model(method("san", model__proposals__heads=5).model)
        with pytest.raises(ValueError, match="image_size does not fit the patch; expected a multiple of 16, got 100"):
            build_model(method("san", model__proposals__image_size=100).model)
        with pytest.raises(ValueError, match="kind is unknown"):
            ProposalSegmenter(method("catseg").model)
