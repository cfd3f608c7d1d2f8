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
from drseg_core.models.baselines.proposals import ProposalSegmenter
from drseg_core.models.build import build_model
from drseg_core.models.count import count_parameters
from drseg_core.models.decoder import GuidanceAttention, Stage
from drseg_core.training.loss import training_loss

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
    assert output.logits.shape == (2, 5, 32, 32) and output.original.shape == (2, 5, 8, 8)
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
        ("sed", {"fusion": 6_400, "decoder": 3_438_817 + 10 * (96 + 48)}),
    ],
)
def test_parameter_counts_at_full_size(name, expected):
    config = apply_method(load_config("vitl"), name).model
    clip, dino = (dataclasses.replace(part, weights=None) for part in (config.clip, config.dino))
    with torch.device("meta"):
        counts = count_parameters(build_model(dataclasses.replace(config, clip=clip, dino=dino)))
    for part, total in expected.items():
        assert counts[part].total == total == counts[part].trainable, (part, counts[part])


@pytest.mark.parametrize("name", ["san", "scan"])
def test_parameter_counts_of_proposals_by_hand(name):
    config = apply_method(load_config("vitb"), name).model
    clip, dino = (dataclasses.replace(part, weights=None) for part in (config.clip, config.dino))
    with torch.device("meta"):
        counts = count_parameters(build_model(dataclasses.replace(config, clip=clip, dino=dino)))
    width, queries, grid, heads = 240, 100, 48 * 48, 12 if name == "san" else 1
    layer = (
        4 * width + (width + 1) * 3 * width + (width + 1) * width + (width + 1) * 4 * width + (4 * width + 1) * width
    )
    side = (3 * 8 * 8 + 1) * width + grid * width + queries * width + 8 * layer
    side += 4 * (2 * 768 + (768 + 1) * width) + 2 * width
    side += 2 * (width + 1) * width + (4 * width + 1) * width + (width + 1) * width
    side += (width + 1) * width + 2 * (width + 1) * heads * width
    assert counts["side"].total == side
    assert "dino" not in counts and counts["total"].total > counts["clip"].total + side


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


def test_sed_sends_no_gradient_through_the_guidance(method):
    config = method("sed").model
    model = build_model(config)
    image = torch.rand(1, 3, 64, 64)
    dense = model.clip(image)
    guidance = tuple(maps.detach().requires_grad_() for maps in dense.guidance)
    embedding = torch.randn(1, config.aggregator.width, 3, 8, 8)
    correlation = torch.randn(1, 3, 8, 8, requires_grad=True)
    model.decoder(embedding, guidance, (), correlation).sum().backward()
    assert all(maps.grad is None for maps in guidance) and correlation.grad.abs().sum() > 0


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
    def test_every_place_shares_itself_out(self, method):
        """With one proposal all places have its class logits."""
        model = build_model(method("san", model__proposals__queries=1).model).eval()
        with torch.no_grad():
            logits = model(torch.rand(1, 3, 64, 64), model.tokenize(NAMES)).logits
        torch.testing.assert_close(logits, logits[..., :1, :1].expand_as(logits))

    def test_the_side_network_steers_where_san_looks(self, method):
        model = build_model(method("san").model).eval()
        states = [torch.randn(1, 1 + 64, 96) for _ in model.clip.visual.blocks]
        bias = torch.full((1, 4, 2, 64), -1e4)
        bias[:, :, 0, 5], bias[:, :, 1, 9] = 1e4, 1e4
        with torch.no_grad():
            before = model._recognised(states, model._bias(torch.empty(0), bias, (8, 8)))
            states[-1][:, 1 + 5] += 3 * torch.randn(96)
            after = model._recognised(states, model._bias(torch.empty(0), bias, (8, 8)))
        assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-3)
        torch.testing.assert_close(before[:, 1], after[:, 1])

    def test_contextual_shift_replaces_other_places_by_the_class_token(self, method):
        """A bias of log n on the class token is n copies of it; against the replacement written down."""
        model = build_model(method("scan").model).eval()
        state = torch.randn(1, 1 + 64, 96)
        share = torch.zeros(1, 1, 32, 32)
        share[..., :16, :] = 1
        with torch.no_grad():
            found = model._recognised([state] * 3, model._bias(share, torch.empty(0), (8, 8)))
            shifted = state.clone()
            shifted[:, 1 + 32 :] = state[:, :1]
            visual = model.clip.visual
            x = visual.blocks[-1].forward_beside(state[:, :1], shifted[:, 1:], torch.zeros(1, 1, 1, 64))
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

    def test_scan_averages_what_the_side_network_and_clip_say(self, method, monkeypatch):
        """All of it CLIP's, all of it the side network's, and in between their mean by the stated share."""
        model = build_model(method("scan").model).eval()
        image, tokens = torch.rand(1, 3, 64, 64), model.tokenize(NAMES)
        logits = {}
        for share in (0.0, 0.4, 1.0):
            monkeypatch.setattr(proposals, "CLIP_SHARE", share)
            with torch.no_grad():
                logits[share] = model(image, tokens).logits
        torch.testing.assert_close(logits[0.4], 0.6 * logits[0.0] + 0.4 * logits[1.0], rtol=1e-4, atol=1e-4)
        monkeypatch.undo()
        assert proposals.CLIP_SHARE == 0.4
        # what CLIP says alone does not know of the integration
        with torch.no_grad():
            model.integrate.project[2].bias += 1
            monkeypatch.setattr(proposals, "CLIP_SHARE", 1.0)
            torch.testing.assert_close(model(image, tokens).logits, logits[1.0])

    def test_states_of_clip_are_spread_over_its_depth(self, method):
        model = build_model(method("san", model__proposals__layers=2).model)
        # three blocks, the last recognises: states before it
        assert model.taps == [0, 2] and len(model.side.taps) == 2

    def test_refusals(self, method):
        with pytest.raises(ValueError, match=r"recognition_blocks is out of range.*expected 1\.\.3, got 4"):
            build_model(method("san", model__proposals__recognition_blocks=4).model)
        with pytest.raises(ValueError, match="heads does not divide width"):
            build_model(method("san", model__proposals__heads=5).model)
        with pytest.raises(ValueError, match="kind is unknown"):
            ProposalSegmenter(method("catseg").model)
