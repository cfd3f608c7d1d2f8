# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of CLIP and DINO as other projects write them: what is found in them, and what is refused."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drseg_core.checkpoints.encoders import load_encoders
from drseg_core.config.schema import ClipConfig, DinoConfig
from drseg_core.errors import CheckpointError
from drseg_core.models.clip import open_clip_model
from drseg_core.models.dino import DinoPrior

State = dict[str, Tensor]
DINO = DinoConfig(name="drseg-tiny", weights=None, image_size=64)
CLIP = ClipConfig(name="drseg-tiny", weights=None, image_size=64, guidance_blocks=(0, 1))

WRITTEN = ((CLIP, "clip.pt"), (DINO, "prior.pth"))


def under(place: str, state: State) -> State:
    return {f"{place}{name}": value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def heads(place: str = "", wide: int = 6) -> State:
    names = ("mlp.0.weight", "mlp.0.bias", "last_layer.weight_g", "last_layer.weight_v")
    return {f"{place}{head}.{name}": torch.ones(wide, 2) for head in ("dino_head", "ibot_head") for name in names}


@pytest.fixture(scope="module")
def prior() -> State:
    return DinoPrior(DINO).encoder.state_dict()


@pytest.fixture(scope="module")
def clip() -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip_model(CLIP, True)[0].state_dict()


def read_prior(content: Any, folder: Path) -> State:
    path = folder / "prior.pth"
    torch.save(content, path)
    return DinoPrior(dataclasses.replace(DINO, weights=str(path))).encoder.state_dict()


def read_clip(content: Any, folder: Path) -> State:
    path = folder / "clip.pt"
    torch.save(content, path)
    return open_clip_model(dataclasses.replace(CLIP, weights=str(path)), True)[0].state_dict()


def equal(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def refused(read: Any, content: Any, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(content, folder)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 4
    return message


@pytest.mark.parametrize("place", ["", "module.", "teacher."])
def test_the_backbone_of_a_training_is_read_without_its_heads(place: str, prior: State, tmp_path: Path) -> None:
    """As DINOv2 and DINOv3 write them: the heads of self-distillation beside the encoder."""
    content = under(f"{place}backbone.", prior) | heads(place)
    assert equal(read_prior({"teacher": content}, tmp_path), prior)
    assert equal(read_prior({"teacher": prior | heads()}, tmp_path), prior)


@pytest.mark.parametrize(
    "place", ["model.", "teacher.", "student.", "encoder.", "clip.", "visual.", "module.encoder.", "a.b.c."]
)
def test_leading_names_are_found_whatever_they_are(place: str, prior: State, clip: State, tmp_path: Path) -> None:
    assert equal(read_prior(under(place, prior), tmp_path), prior)
    assert equal(read_clip(under(place, clip), tmp_path), clip)
    path = tmp_path / "prior.safetensors"
    save_file(under(place, prior), path)
    assert equal(DinoPrior(dataclasses.replace(DINO, weights=str(path))).encoder.state_dict(), prior)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema", "student", "teacher", "net"])
def test_wrappers_are_found_beside_the_rest_of_a_training(key: str, prior: State, clip: State, tmp_path: Path) -> None:
    rest = {"epoch": torch.tensor(3), "args": {"lr": 0.1}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    assert equal(read_prior({**rest, key: prior}, tmp_path), prior)
    assert equal(read_clip({**rest, key: under("module.", clip)}, tmp_path), clip)


@pytest.mark.parametrize("better", ["teacher", "model_ema", "state_dict_ema", "ema", "teacher.module", "ema_model"])
@pytest.mark.parametrize("worse", ["student", "model", "state_dict"])
def test_a_teacher_or_average_goes_before_the_others(better: str, worse: str, prior: State, tmp_path: Path) -> None:
    for first, second in ((better, worse), (worse, better)):
        content = {name: prior if name == better else other(prior) for name in (first, second)}
        assert equal(read_prior(content, tmp_path), prior)
        flat = {key: value for name, state in content.items() for key, value in under(f"{name}.", state).items()}
        assert equal(read_prior(flat, tmp_path), prior)


def test_a_model_goes_before_a_student_and_a_student_that_fits_before_a_teacher_that_does_not(
    prior: State, tmp_path: Path
) -> None:
    assert equal(read_prior({"student": other(prior), "model": prior}, tmp_path), prior)
    larger = other(prior) | {"blocks.2.norm1.weight": torch.ones(96)}
    assert equal(read_prior({"teacher": larger, "student": prior}, tmp_path), prior)


def test_of_two_that_fit_none_is_guessed(prior: State, clip: State, tmp_path: Path) -> None:
    for content in ({"a": prior, "b": other(prior)}, under("a.", prior) | under("b.", other(prior))):
        message = refused(read_prior, content, tmp_path)
        assert "holds several models that fit drseg-tiny; expected one, got 'a', 'b'" in message
    message = refused(read_clip, {"teacher": clip, "model_ema": other(clip)}, tmp_path)
    assert "expected one, got 'teacher', 'model_ema'" in message or "got 'model_ema', 'teacher'" in message
    # the same twice is no guess
    twins = {name: value.clone() for name, value in prior.items()}
    assert equal(read_prior({"a": prior, "b": twins}, tmp_path), prior)


def test_moments_of_an_optimizer_are_no_weights(prior: State, tmp_path: Path) -> None:
    moments = {"exp_avg": other(prior), "exp_avg_sq": other(prior)}
    assert equal(read_prior({"model": prior, "optimizer": moments}, tmp_path), prior)
    assert "holds no tensors" in refused(read_prior, {"optimizer": moments, "epoch": 3}, tmp_path)


@pytest.mark.promise("C32")
@pytest.mark.parametrize("place", ["", "backbone.", "teacher.module.backbone."])
def test_what_fits_only_in_part_is_refused(place: str, prior: State, clip: State, tmp_path: Path) -> None:
    for read, state, lost in (
        (read_prior, prior, "blocks.1.norm1.weight"),
        (read_clip, clip, "visual.transformer.resblocks.2.ln_1.weight"),
    ):
        looked = f"; looked under {place.removesuffix('.')!r}" if place else ""
        part = {name: value for name, value in state.items() if name != lost}
        message = refused(read, under(place, part) | heads("other."), tmp_path)
        assert f"1 missing: {lost}" in message and message.endswith(looked)
        # elsewhere in the file is not where it belongs
        message = refused(read, under(place, part) | {f"elsewhere.{lost}": state[lost]}, tmp_path)
        assert f"1 missing: {lost}" in message
        more = state | {lost.replace(".1.", ".7.").replace(".2.", ".7."): state[lost]}
        assert "1 unexpected: " in refused(read, under(place, more), tmp_path)
        assert "1 unexpected: adapter.weight" in refused(
            read, under(place, state | {"adapter.weight": torch.ones(2)}), tmp_path
        )
        shaped = state | {lost: torch.ones(3)}
        assert re.search(
            rf"{re.escape(lost)} expected \(96,\) float32, got \(3,\) float32",
            refused(read, under(place, shaped), tmp_path),
        )
        broken = state | {lost: torch.full_like(state[lost], torch.nan)}
        assert f"{lost} has 96 non-finite values" in refused(read, under(place, broken), tmp_path)


@pytest.mark.promise("C32")
def test_a_tensor_that_is_also_beside_the_encoder_is_refused(prior: State, tmp_path: Path) -> None:
    message = refused(read_prior, under("backbone.", prior) | {"norm.weight": torch.ones(96)}, tmp_path)
    assert "holds parts of drseg-tiny twice; expected them under 'backbone' alone, got also norm.weight" in message
    message = refused(read_prior, {"backbone": prior, "backbone.norm.weight": torch.ones(96)}, tmp_path)
    assert "holds backbone.norm.weight twice" in message


def test_names_that_do_not_fit_are_named_with_those_that_would(prior: State, clip: State, tmp_path: Path) -> None:
    message = refused(read_prior, under("x.", nn.Linear(2, 2).state_dict()), tmp_path)
    assert re.search(
        r"no name of its tensors fits; expected \d+ such as blocks\.0\.attn\.proj\.bias, .*, got 2 such as x\.bias, "
        r"x\.weight$",
        message,
    )
    assert "no name of its tensors fits" in refused(read_clip, prior, tmp_path)
    # one tower of two
    message = refused(read_clip, {name: clip[name] for name in clip if name.startswith("visual.")}, tmp_path)
    assert re.search(r"\d+ missing: ln_final.bias, ln_final.weight, .* \(is it", message)


def test_names_nested_without_end_are_refused(prior: State, tmp_path: Path) -> None:
    deep: Any = prior
    for _ in range(50):
        deep = {"model": deep}
    assert "holds no tensors" in refused(read_prior, deep, tmp_path)
    itself: dict[str, Any] = dict(copy.copy(prior))
    itself["again"] = itself
    assert equal(read_prior(itself, tmp_path), prior)
    assert "no name of its tensors fits" in refused(read_prior, {"a." * 5000: torch.ones(1)}, tmp_path)


@pytest.mark.parametrize("place", ["", "module.", "state_dict.model."])
def test_buffers_that_clip_makes_itself_are_left_out(place: str, clip: State, tmp_path: Path) -> None:
    mask, ids = torch.full((16, 16), -torch.inf).triu(1), torch.arange(16)[None]
    for buffers in ({"attn_mask": mask}, {"position_ids": ids}, {"text.attn_mask": mask, "visual.position_ids": ids}):
        assert equal(read_clip(under(place, clip | buffers), tmp_path), clip)
    # the same values under other names are damage, or of another model
    broken = clip | {"ln_final.bias": torch.full((64,), -torch.inf)}
    assert "ln_final.bias has 64 non-finite values" in refused(read_clip, under(place, broken), tmp_path)
    assert "1 unexpected: mask" in refused(read_clip, under(place, clip | {"mask": mask}), tmp_path)


class Runs:
    """What a file would do on being read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


class Hooked(argparse.Namespace):
    """Of the same base, and still another class."""


@pytest.mark.parametrize("zipped", [True, False])
def test_options_of_a_training_beside_the_weights_are_read_over(zipped: bool, prior: State, tmp_path: Path) -> None:
    path, before = tmp_path / "dino.pth", torch.serialization.get_safe_globals()
    options = argparse.Namespace(arch="vit_small", lr=0.1, crops=(0.4, 1.0), inner=argparse.Namespace(a=[1, None]))
    content = {
        "student": other(under("module.backbone.", prior)),
        "teacher": under("module.backbone.", prior) | heads("module."),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": options,
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert equal(DinoPrior(dataclasses.replace(DINO, weights=str(path))).encoder.state_dict(), prior)
    # not for other readers in this process
    assert torch.serialization.get_safe_globals() == before


@pytest.mark.promise("C31")
def test_other_classes_stay_refused_inside_and_beside_options(prior: State, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    for args in (
        argparse.Namespace(callback=Runs(target)),
        argparse.Namespace(path=Path("a")),
        argparse.Namespace(__setstate__=os.system),
        Hooked(lr=0.1),
        argparse.ArgumentParser,
        Runs(target),
    ):
        message = refused(read_prior, {"teacher": prior, "args": args}, tmp_path)
        assert "refused (unsafe or damaged content)" in message
    assert not target.exists()
    # no attribute of the file's is set, so none can be called
    options = argparse.Namespace(__setstate__=OrderedDict, lr=0.1)
    vars(options)["__class__"] = OrderedDict
    assert equal(read_prior({"teacher": prior, "args": [options, options]}, tmp_path), prior)
    message = refused(read_prior, argparse.Namespace(model=prior), tmp_path)
    assert "has no state dict" in message


def test_what_was_taken_is_said(prior: State, clip: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"teacher": under("backbone.", prior) | heads(), "student": other(prior)}, tmp_path / "prior.pth")
    torch.save({"state_dict": under("module.", clip), "epoch": 3}, tmp_path / "clip.pt")
    files = [dataclasses.replace(config, weights=str(tmp_path / file)) for config, file in WRITTEN]
    with caplog.at_level(logging.INFO, "drseg_core"):
        facts = load_encoders(*files, offline=True).facts
    assert (facts["clip_place"], facts["prior_place"]) == ("state_dict.module", "teacher.backbone")
    assert any(line.endswith("prior.pth: taken from teacher.backbone") for line in caplog.messages)
    # nothing to say of a file that is the encoder
    torch.save(prior, tmp_path / "prior.pth")
    torch.save(clip, tmp_path / "clip.pt")
    caplog.clear()
    with caplog.at_level(logging.INFO, "drseg_core"):
        facts = load_encoders(*files, offline=True).facts
    assert not any(name.endswith("_place") for name in facts) and not any("taken" in line for line in caplog.messages)


def test_blocks_in_chunks_are_those_of_the_encoder(prior: State, tmp_path: Path) -> None:
    """As DINOv2 trains its larger models: the second number counts through all chunks."""
    chunked = {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): value for name, value in prior.items()}
    assert "blocks.1.1.norm1.weight" in chunked
    assert equal(read_prior({"teacher": under("backbone.", chunked) | heads()}, tmp_path), prior)
    # two with one number: neither is guessed
    double = chunked | {"blocks.0.1.norm1.weight": torch.ones(96)}
    assert "blocks" in refused(read_prior, {"teacher": under("backbone.", double)}, tmp_path)
