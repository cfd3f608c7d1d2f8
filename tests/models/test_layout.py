# SPDX-License-Identifier: Apache-2.0
"""How the parts hand maps to one another: attention is torch's own, and channels lie innermost all the way."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from drseg_core.models.build import build_model
from drseg_core.models.clip import SplitAttention
from drseg_core.models.correlation import rotate_back
from drseg_core.models.segmenter import Segmenter
from drseg_core.nn import ugaf

NAMES = ["green roof", "bare soil", "tennis court"]


class Called(TorchFunctionMode):
    """How often each function of torch is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count[getattr(function, "__name__", str(function))] += 1
        return function(*arguments, **(options or {}))


def run(model: Segmenter) -> Any:
    return model(torch.rand(2, 3, 64, 64), model.tokenize(NAMES))


@pytest.mark.parametrize("kind", ["efficient", "swin"])
def test_every_attention_is_torch_s_own(variant, kind: str) -> None:
    model = build_model(variant("aggregator", kind=kind)).eval()
    with torch.no_grad(), Called() as called:
        run(model)
    # the last image block has a value path only
    clip = sum(isinstance(module, SplitAttention) for module in model.clip.modules()) - 1
    # across space and classes once each; two windows where the classes' attention is linear
    aggregator = 2 * len(model.aggregator.spatial)
    assert called.count["scaled_dot_product_attention"] == clip + len(model.dino.encoder.blocks) + aggregator
    assert called.count["softmax"] == 0


def test_turned_maps_are_folded_where_they_lie() -> None:
    maps = rotate_back(torch.rand(8, 3, 5, 5), 4)
    folded = ugaf._fold(maps)
    assert folded.data_ptr() == maps.data_ptr() and folded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(folded.unflatten(0, (2, 3)).transpose(1, 2), maps)
    # any other memory in one pass
    other = torch.rand(2, 4, 3, 5, 5)
    assert torch.equal(ugaf._fold(other), other.transpose(1, 2).flatten(0, 1))
    assert ugaf._fold(other).is_contiguous(memory_format=torch.channels_last)


def given(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, Tensor]:
    """What each module of these kinds is given first, filled as the model runs."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(lambda module, given, name=name: found.update({name: given[0]}))
    return found


@pytest.mark.parametrize("kind", ["efficient", "swin", "conv"])
def test_convolutions_and_the_graph_are_given_channels_innermost(variant, kind: str) -> None:
    model = build_model(variant("aggregator", kind=kind)).eval()
    seen = given(model, (nn.Conv2d, nn.ConvTranspose2d, type(model.pdgr)))
    with torch.no_grad():
        run(model)
    assert {"pdgr", "fusion.embed_original", "decoder.stages.1.up", "aggregator.project_visual"} <= seen.keys()
    own = {name: maps for name, maps in seen.items() if not name.startswith(("clip.", "dino.")) and maps.shape[1] > 1}
    assert [name for name, maps in own.items() if maps.stride(1) != 1] == []


@pytest.mark.parametrize("kind", ["efficient", "swin"])
def test_class_maps_are_resized_with_channels_innermost(variant, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strides: list[int] = []
    resize = torch.nn.functional.interpolate

    def watched(maps: Tensor, **options: Any) -> Tensor:
        if options.get("align_corners"):
            strides.append(maps.stride(1))
        return resize(maps, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    model = build_model(variant("aggregator", kind=kind)).eval()
    with torch.no_grad():
        run(model)
    assert strides == [1] * len(model.aggregator.classes)
