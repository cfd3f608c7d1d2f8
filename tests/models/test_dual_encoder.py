# SPDX-License-Identifier: Apache-2.0
"""The dual encoder alone: what it computes, that it is small, and that its weights start the whole model."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from drseg_core.config.load import load_config, override
from drseg_core.models.build import build_model
from drseg_core.models.correlation import cosine
from drseg_core.models.weights import model_state
from drseg_core.training.loss import softmax_loss

TINY = load_config("tiny").model
DUAL = dataclasses.replace(TINY, fusion=dataclasses.replace(TINY.fusion, kind="cosine"), rotations=1)


def test_logits_are_scaled_cosines():
    model = build_model(DUAL).eval()
    image = torch.rand(2, 3, 128, 128)
    text = model.encode_text(model.tokenize(["red roof", "blue pond", "bare soil"]))
    output = model(image, text)
    expected = cosine(model.dense_features(image), text)
    torch.testing.assert_close(output.original, expected)
    torch.testing.assert_close(output.logits, 10 * expected - 10)
    assert output.logits.shape == (2, 3, 16, 16) and output.refined is None
    assert ((output.uncertainty >= 0) & (output.uncertainty <= 1)).all()


def test_every_trained_parameter_gets_a_gradient_and_nothing_else_is_built():
    model = build_model(DUAL)
    assert model.dino is None and model.pdgr is None and model.decoder is None
    tokens = model.tokenize(["red roof", "blue pond"])
    mask = torch.randint(0, 2, (1, 128, 128))
    softmax_loss(model(torch.rand(1, 3, 128, 128), tokens).logits, mask).mean().backward()
    trained = [
        parameter for group in model.parameter_groups(load_config("tiny").train) for parameter in group["params"]
    ]
    assert trained and all(parameter.grad is not None for parameter in trained)


def test_its_weights_fit_the_whole_model():
    state = model_state(build_model(DUAL))
    whole = build_model(override(load_config("tiny"), {}).model).state_dict()
    clip = [name for name in state if name.startswith("clip.")]
    assert clip and all(whole[name].shape == state[name].shape for name in clip)


def test_softmax_loss():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=random).requires_grad_()
    mask = torch.randint(0, 3, (2, 4, 4), generator=random).to(torch.uint8)
    mask[0, 0] = 255
    loss = softmax_loss(logits, mask)
    assert int(loss.terms) == 28
    torch.testing.assert_close(loss.mean(), F.cross_entropy(logits, mask.long(), ignore_index=255))
    # a finer mask is read at the middle of each cell
    fine = mask.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(softmax_loss(logits, fine).mean(), loss.mean())
    nothing = softmax_loss(logits, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    (grad,) = torch.autograd.grad(nothing.mean(), logits)
    assert float(nothing.mean().detach()) == 0 and not grad.any()
