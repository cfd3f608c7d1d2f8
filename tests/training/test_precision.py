# SPDX-License-Identifier: Apache-2.0
"""Training in bfloat16: what is narrow, what stays wide, and that nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch

from drseg_core.checkpoints.checkpoint import newest_checkpoint
from drseg_core.checkpoints.run import model_of
from drseg_core.config.load import override
from drseg_core.config.schema import Config
from drseg_core.errors import NumericalError
from drseg_core.training import loop
from drseg_core.training.logs import read_log
from drseg_core.training.loop import train
from drseg_core.training.signals import TrainingStopped
from tests.training.test_resume import differences, final_state, stop_after
from tests.training.test_train import poisoned


@pytest.fixture
def narrow(config) -> Config:
    return override(config, {"train.precision": "bfloat16"})


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """Dtypes of what some modules give, and of what the loss is given."""
    seen: dict[str, set[torch.dtype]] = {}

    def build(config: Config, **options):
        model = model_of(config, **options)
        for name in ("aggregator.project_text", "clip.visual.conv1", "decoder.head"):
            module = model.get_submodule(name)
            module.register_forward_hook(lambda m, i, output, name=name: seen.setdefault(name, set()).add(output.dtype))
        return model

    def loss(output, mask, options):
        parts = loop_loss(output, mask, options)
        seen.setdefault("original", set()).add(output.original.dtype)
        seen.setdefault("loss", set()).update(part.total.dtype for part in parts)
        return parts

    loop_loss = loop.training_loss
    monkeypatch.setattr(loop, "model_of", build)
    monkeypatch.setattr(loop, "training_loss", loss)
    return seen


def test_layers_are_narrow_and_the_rest_is_wide(narrow, data, tmp_path, monkeypatch):
    # the channel ranking before the training is no part of it
    narrow = override(narrow, {"model.spsd.semantic_ratio": 0.0})
    seen = watched(monkeypatch)
    run = train(narrow, data, tmp_path / "run", show_progress=False)
    for name in ("aggregator.project_text", "clip.visual.conv1", "decoder.head"):
        assert seen[name] == {torch.bfloat16}, name
    assert seen["original"] == seen["loss"] == {torch.float32}
    kept = newest_checkpoint(run)
    assert {value.dtype for value in kept.weights().values() if value.is_floating_point()} == {torch.float32}
    moments = kept.training_state()["optimizer"]["state"].values()
    assert {moment["exp_avg"].dtype for moment in moments} == {torch.float32}


def test_the_protocol_is_float32(config, data, tmp_path, monkeypatch):
    assert Config().train.precision == "float32"
    seen = watched(monkeypatch)
    train(override(config, {"train.iterations": 1}), data, tmp_path / "run", show_progress=False)
    assert set().union(*seen.values()) == {torch.float32}


def test_losses_are_near_those_of_float32(config, narrow, data, tmp_path):
    losses = []
    for name, options in (("wide", config), ("narrow", narrow)):
        options = override(options, {"model.graph.dropout": 0.0})
        run = train(options, data, tmp_path / name, show_progress=False)
        losses.append([record["loss"] for record in read_log(run)])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.promise("C30")
def test_resumed_equals_uninterrupted(narrow, data, tmp_path):
    train(narrow, data, tmp_path / "straight", show_progress=False)
    with pytest.raises(TrainingStopped):
        train(narrow, data, tmp_path / "run", show_progress=False, on_step=stop_after(2))
    train(narrow, data, tmp_path / "run", resume=True, show_progress=False)
    assert differences(final_state(tmp_path / "straight"), final_state(tmp_path / "run")) == []


@pytest.mark.promise("C34")
def test_bad_steps_are_skipped_counted_and_end_the_training(narrow, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "training_loss", poisoned(1, 2))
    run = train(override(narrow, {"train.nan_limit": 3}), data, tmp_path / "few", show_progress=False)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records] == [2, 2, 2]
    assert all(torch.isfinite(value).all() for value in newest_checkpoint(run).weights().values())
    monkeypatch.setattr(loop, "training_loss", poisoned(*range(100)))
    with pytest.raises(NumericalError, match="3 steps in a row were not finite"):
        train(override(narrow, {"train.nan_limit": 3}), data, tmp_path / "many", show_progress=False)


def test_the_first_bad_tensor_is_looked_for_in_the_same_precision(narrow, data, tmp_path, monkeypatch):
    def build(config: Config, **options):
        model = model_of(config, **options)
        # overflows only where the layer is narrow
        model.decoder.register_forward_hook(
            lambda module, inputs, output: output * (float("inf") if output.dtype == torch.bfloat16 else 1.0)
        )
        return model

    monkeypatch.setattr(loop, "model_of", build)
    limited = override(narrow, {"train.nan_limit": 1})
    with pytest.raises(NumericalError, match="the first bad tensor is output of decoder"):
        train(limited, data, tmp_path / "run", show_progress=False)


def test_tensorboard_has_every_record_once(config, data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(TrainingStopped):
        train(config, data, tmp_path / "run", show_progress=False, on_step=stop_after(2))
    run = train(config, data, tmp_path / "run", resume=True, show_progress=False)
    board = accumulator.EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    records = read_log(run)
    for name in ("loss", "miou", "learning_rate", "gradient_norm"):
        events = board.Scalars(f"train/{name}")
        assert [event.step for event in events] == [2, 4, 6]
        assert [event.value for event in events] == pytest.approx([record[name] for record in records])
