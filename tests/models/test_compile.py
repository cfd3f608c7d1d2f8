# SPDX-License-Identifier: Apache-2.0
"""The whole model is one graph for ``torch.compile``, forward and backward, in float32 and under bfloat16 autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from drseg_core.evaluation.inference import Predictor
from drseg_core.models.build import build_model
from drseg_core.models.segmenter import Segmenter

NAMES = ["green roof", "bare soil", "tennis court"]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def precision(name: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if name == "autocast" else contextlib.nullcontext()


def step(model: Segmenter, call: Callable[..., Any], image: Tensor, name: str) -> list[Tensor]:
    model.zero_grad()
    with precision(name):
        output = call(image, model.tokenize(NAMES))
    output.logits.float().square().mean().backward()
    return [output.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# in float32 a prediction below
def test_inference_under_autocast(tiny) -> None:
    model = tiny.eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    image, text = torch.rand(2, 3, 64, 64), model.encode_text(model.tokenize(NAMES)).detach()
    with torch.inference_mode(), precision("autocast"):
        expected, found = model(image, text), compiled(image, text)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.promise("C21")
@pytest.mark.parametrize("name", ["float32", "autocast"])
def test_training(variant, name: str) -> None:
    model = build_model(variant("graph", dropout=0.0)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    image = torch.rand(2, 3, 64, 64)
    expected, found = step(model, model, image, name), step(model, compiled, image, name)
    assert len(expected) == len(found) > 50
    # sums may be taken in another order, and bfloat16 then rounds another way
    bound = {"rtol": 1e-3, "atol": 1e-5} if name == "float32" else {"rtol": 0.1, "atol": 2e-2}
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, **bound)


def test_prediction_with_a_compiled_model(tiny) -> None:
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    expected = Predictor(tiny, NAMES)(image)
    found = Predictor(torch.compile(tiny, backend="aot_eager", fullgraph=True), NAMES)(image)
    torch.testing.assert_close(found.score, expected.score)
    assert torch.equal(found.class_index, expected.class_index)
