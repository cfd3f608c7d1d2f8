# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import re
import signal

import pytest
import torch

from drseg_core.checkpoints import checkpoint as checkpoint_module
from drseg_core.checkpoints.channels import load_channels, save_channels
from drseg_core.checkpoints.checkpoint import generations, newest_checkpoint
from drseg_core.checkpoints.run import load_run
from drseg_core.config.load import load_config, override
from drseg_core.data import open_dataset
from drseg_core.device import select_device
from drseg_core.errors import BackendUnavailableError, CheckpointError, ConfigError, NumericalError, ResourceError
from drseg_core.models.build import build_model
from drseg_core.training import loop
from drseg_core.training.loop import train
from drseg_core.training.loss import LossSum, training_loss
from drseg_core.training.signals import TrainingStopped
from tests.few_words import few_words  # noqa: F401

pytestmark = pytest.mark.usefixtures("few_words")


@pytest.mark.promise("C39")
def test_a_run_folder(config, data, tmp_path):
    run = train(config, data, tmp_path / "run", show_progress=False)
    visible = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert visible - {"tensorboard"} == {
        "config.yaml",
        "manifest.json",
        "classes.txt",
        "channels.safetensors",
        "log.jsonl",
        "log.csv",
        "checkpoints",
    }
    assert [path.name for path in generations(run)] == ["step-00000006", "step-00000004"]
    assert load_config(run / "config.yaml") == config
    assert (run / "classes.txt").read_text().splitlines() == ["bare soil", "red roof", "blue pond"]
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    with open(run / "log.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [record["loss"] for record in records]
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest) >= {"started", "git", "versions", "seed", "backends", "command", "device", "data", "processes"}
    assert manifest["data"] == {"spec": data, "sha256": manifest["data"]["sha256"], "samples": 5}
    assert manifest["versions"]["torch"] and manifest["backends"]


def test_training_learns(config, plain_data, tmp_path):
    changes = {"train.iterations": 50, "train.checkpoint_every": 100, "train.log_every": 10, "train.batch_size": 4}
    changes |= {"train.color_jitter": False, "model.graph.dropout": 0.0}
    changes |= {"train.learning_rate": 5e-4, "train.schedule": "constant"}
    run = train(override(config, changes), plain_data, tmp_path / "run", show_progress=False)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    # a model that gives every class its share of one third, whatever the image, has a loss of 0.637
    assert records[-1]["loss"] < 0.55, records


def test_a_loaded_run_is_the_trained_model(config, data, tmp_path):
    run = train(config, data, tmp_path / "run", show_progress=False)
    loaded = load_run(run)
    assert (loaded.step, loaded.config, loaded.class_names[1]) == (6, config, "red roof")
    assert not loaded.model.training
    saved = newest_checkpoint(run).weights()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.model.state_dict().items() if name in saved)
    older = load_run(generations(run)[1])
    assert older.step == 4
    name = "decoder"
    changed = [
        not torch.equal(a, b)
        for (key, a), b in zip(loaded.model.state_dict().items(), older.model.state_dict().values(), strict=True)
        if key.startswith(name) and key.endswith("weight")
    ]
    assert any(changed)


@pytest.mark.parametrize(
    ("path", "message"),
    [("absent", "not found"), ("empty", "not the folder of a training run"), ("file", "is not a folder")],
)
def test_what_is_no_run_is_refused(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_run(tmp_path / path)
    assert caught.value.exit_code == 4


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError):
        load_run(tmp_path / "loop")


def test_a_time_limit_ends_the_training(config, data, tmp_path):
    limited = override(config, {"train.iterations": 100_000, "train.seconds": 0.5, "train.checkpoint_every": 100_000})
    run = train(limited, data, tmp_path / "run", show_progress=False)
    record = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert 0.5 <= record["seconds"] < 5
    assert record["learning_rate"] < 0.5 * config.train.learning_rate
    assert newest_checkpoint(run).step == record["step"]


def poisoned(*which: int):
    """The loss, but not a number in these calls, from 1 on."""
    calls = []

    def loss(output, mask, options):
        calls.append(None)
        parts = training_loss(output, mask, options)
        factor = float("nan") if len(calls) in which else 1.0
        return tuple(LossSum(part.total * factor, part.terms) for part in parts)

    return loss


@pytest.mark.promise("C34")
def test_single_bad_steps_are_skipped_and_counted(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "training_loss", poisoned(1, 2))
    run = train(override(config, {"train.nan_limit": 3}), data, tmp_path / "run", show_progress=False)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records] == [2, 2, 2]
    assert records[0]["loss"] is None and records[1]["loss"] > 0
    assert all(torch.isfinite(value).all() for value in newest_checkpoint(run).weights().values())


@pytest.mark.promise("C34")
def test_bad_steps_that_are_not_in_a_row_stop_nothing(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "training_loss", poisoned(1, 3, 5))
    run = train(override(config, {"train.nan_limit": 2}), data, tmp_path / "run", show_progress=False)
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["skipped"] == 3


def test_images_without_labels_are_counted(config, partly_labelled_data, tmp_path):
    changes = {"train.batch_size": 5, "train.iterations": 2, "train.log_every": 1}
    run = train(override(config, changes), partly_labelled_data, tmp_path / "run", show_progress=False)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["unlabelled"] for record in records] == [3, 3]
    assert all(record["loss"] > 0 and record["miou"] is not None for record in records)


@pytest.mark.promise("C34")
def test_bad_steps_in_a_row_stop_the_training(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "training_loss", poisoned(*range(100)))
    with pytest.raises(NumericalError, match="3 steps in a row were not finite, the last at step 3") as caught:
        train(override(config, {"train.nan_limit": 3}), data, tmp_path / "run", show_progress=False)
    assert caught.value.exit_code == 6


@pytest.mark.promise("C34")
@pytest.mark.parametrize(("steps", "bad"), [(5, (4, 5)), (1, (1,))])
def test_a_training_that_ends_with_bad_steps_fails_and_is_kept(config, data, tmp_path, monkeypatch, steps, bad):
    monkeypatch.setattr(loop, "training_loss", poisoned(*bad))
    out = tmp_path / "run"
    with pytest.raises(NumericalError, match=f"{len(bad)} steps in a row were not finite, the last at step {steps}"):
        train(override(config, {"train.iterations": steps}), data, out, show_progress=False)
    assert newest_checkpoint(out).step == steps


@pytest.mark.promise("C34")
def test_a_last_step_that_spoils_the_weights_fails_and_is_kept(config, data, tmp_path):
    far = override(config, {"train.learning_rate": 1e30, "train.iterations": 1})
    with pytest.raises(NumericalError, match="not finite after the last step, 1; the first bad tensor is ") as found:
        train(far, data, tmp_path / "run", show_progress=False)
    assert found.value.exit_code == 6 and newest_checkpoint(tmp_path / "run").step == 1


@pytest.mark.promise("C34")
def test_bad_steps_are_counted_across_a_resume(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "training_loss", poisoned(*range(100)))
    limited = override(config, {"train.nan_limit": 4, "train.iterations": 9})

    def stop(step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None

    with pytest.raises(TrainingStopped):
        train(limited, data, tmp_path / "run", show_progress=False, on_step=stop)
    with pytest.raises(NumericalError, match="4 steps in a row were not finite, the last at step 4"):
        train(limited, data, tmp_path / "run", show_progress=False, resume=True)


@pytest.mark.promise("C34")
def test_the_first_bad_tensor_is_named(config, data, tmp_path, monkeypatch):
    def build(config, **options):
        model = build_model(config.model)
        with torch.no_grad():
            next(model.aggregator.parameters()).flatten()[0] = float("inf")
        return model

    monkeypatch.setattr(loop, "model_of", build)
    limited = override(config, {"train.nan_limit": 1})
    with pytest.raises(NumericalError, match=r"the first bad tensor is parameter aggregator\.\S+ \(1 of \d+ values\)"):
        train(limited, data, tmp_path / "run", show_progress=False)


@pytest.mark.promise("C34")
def test_an_activation_is_named_by_its_module(config, data, tmp_path, monkeypatch):
    def build(config, **options):
        model = build_model(config.model)
        model.decoder.register_forward_hook(lambda module, inputs, output: output * float("inf"))
        return model

    monkeypatch.setattr(loop, "model_of", build)
    limited = override(config, {"train.nan_limit": 1})
    with pytest.raises(NumericalError, match=r"the first bad tensor is output of decoder"):
        train(limited, data, tmp_path / "run", show_progress=False)


@pytest.mark.promise("C28")
def test_a_full_disk_keeps_the_last_checkpoint(config, data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = checkpoint_module.save_weights

    def save(path, state, metadata):
        if metadata["step"] > 2:
            raise OSError(28, "No space left on device")
        original(path, state, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_weights", save)
        with pytest.raises(ResourceError, match="No space left on device") as caught:
            train(config, data, run, show_progress=False)
    assert caught.value.exit_code == 7
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    train(config, data, run, resume=True, show_progress=False)
    assert newest_checkpoint(run).step == 6


def test_another_run_gives_the_first_weights(config, data, tmp_path, capsys):
    baseline = override(config, {"model.fusion.kind": "none", "train.iterations": 2})
    train(baseline, data, tmp_path / "baseline", show_progress=False)
    assert not (tmp_path / "baseline" / "channels.safetensors").exists()
    capsys.readouterr()
    first = {}

    class Stop(Exception):
        pass

    def look(self, **options):
        first.update({name: value.clone() for name, value in self.model.state_dict().items()})
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "fit", look)
        with pytest.raises(Stop):
            train(config, data, tmp_path / "run", init=tmp_path / "baseline", show_progress=False)
    text = capsys.readouterr().err
    before = newest_checkpoint(tmp_path / "baseline").weights()
    shared = {name for name in before if name in first and before[name].shape == first[name].shape}
    assert f"init: {len(shared)} of {len(first)} tensors taken from" in text
    assert all(torch.equal(first[name], before[name]) for name in shared)
    assert any(name.startswith("pdgr.") for name in first.keys() - shared)


def test_the_split_of_a_graph_is_kept_with_its_weights(config, data, tmp_path):
    short = override(config, {"train.iterations": 1})
    train(short, data, tmp_path / "first", show_progress=False)
    before = load_run(tmp_path / "first").model.spsd.semantic_index
    other = override(short, {"seed": 5, "model.spsd.alpha": 0.0})
    train(other, data, tmp_path / "second", init=tmp_path / "first", show_progress=False)
    assert torch.equal(load_run(tmp_path / "second").model.spsd.semantic_index, before)


def test_weights_that_do_not_fit_at_all_are_refused(config, data, tmp_path):
    from drseg_core.models.weights import save_weights

    save_weights(tmp_path / "odd.safetensors", {"something": torch.ones(3)}, {})
    with pytest.raises(CheckpointError, match="no tensor of .*odd.safetensors has the name and shape"):
        train(config, data, tmp_path / "run", init=tmp_path / "odd.safetensors", show_progress=False)
    with pytest.raises(CheckpointError, match="not found"):
        train(config, data, tmp_path / "other", init=tmp_path / "absent", show_progress=False)


def test_channels_are_ranked_once_or_given(config, data, tmp_path):
    short = override(config, {"train.iterations": 1})
    run = train(short, data, tmp_path / "run", show_progress=False)
    ranking = load_channels(run / "channels.safetensors")
    split = load_run(run).model.spsd
    assert torch.equal(split.semantic_index, ranking.semantic_index)
    assert not torch.equal(split.semantic_index, torch.arange(len(split.semantic_index)))

    # the same scores backwards
    given = tmp_path / "given.safetensors"
    save_channels(given, type(ranking)(**{**vars(ranking), "score": -ranking.score}))
    path = override(short, {"model.spsd.channels": str(given), "model.spsd.semantic_ratio": 0.25})
    other = load_run(train(path, data, tmp_path / "other", show_progress=False)).model.spsd
    expected = (-ranking.score).argsort(descending=True, stable=True)[: len(other.semantic_index)].sort().values
    assert torch.equal(other.semantic_index, expected)
    assert len(other.semantic_index) == len(split.semantic_index) // 2
    assert load_channels(tmp_path / "other" / "channels.safetensors").metadata["semantic_ratio"] == 0.25


@pytest.mark.parametrize("ratio", [0.5, 0.0])
def test_the_layer_norm_takes_the_norm_of_clip(config, data, tmp_path, ratio):
    """Its weight after a step too small to change it, against the ranking's own measure."""
    options = {
        "model.graph.norm_scale": "match",
        "model.spsd.semantic_ratio": ratio,
        "train.iterations": 1,
        "train.learning_rate": 1e-12,
    }
    run = train(override(config, options), data, tmp_path / "run")
    ranking = load_channels(run / "channels.safetensors")
    assert len(ranking.structural_index) == (64 if ratio == 0 else 32)
    weight = load_run(run).model.pdgr.output_norm.weight
    torch.testing.assert_close(weight, torch.full_like(weight, ranking.norm_scale))
    assert ranking.norm_scale != pytest.approx(1.0, abs=1e-3)
    # and it is what the dense features have
    images = open_dataset(data, "train")
    with torch.no_grad():
        features = [load_run(run).model.dense_features(images[i].image[None] / 255.0) for i in range(len(images))]
    square = torch.cat(features)[:, ranking.structural_index].square().sum(1).mean()
    assert ranking.structural_norm == pytest.approx(float(square.sqrt()), rel=1e-4)


def test_a_given_ranking_without_norms_is_refused(config, data, tmp_path):
    run = train(override(config, {"train.iterations": 1}), data, tmp_path / "run")
    given = tmp_path / "given.safetensors"
    save_channels(given, dataclasses.replace(load_channels(run / "channels.safetensors"), energy=None))
    options = {"model.graph.norm_scale": "match", "model.spsd.channels": str(given)}
    with pytest.raises(CheckpointError, match="the ranking has no norms"):
        train(override(config, options), data, tmp_path / "other")


def test_without_semantic_channels_nothing_is_ranked(config, data, tmp_path):
    everything = override(config, {"train.iterations": 1, "model.spsd.semantic_ratio": 0.0})
    run = train(everything, data, tmp_path / "run", show_progress=False)
    assert not (run / "channels.safetensors").exists()


def test_the_prior_is_frozen_and_the_rest_is_not(config, data, tmp_path):
    torch.manual_seed(0)
    run = train(config, data, tmp_path / "run", show_progress=False)
    first, last = (dict(load_run(path).model.named_parameters()) for path in reversed(generations(run)))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert not any(name.startswith("dino.") for name in moved)
    for part in ("clip.", "pdgr.", "fusion.", "aggregator.", "decoder."):
        assert any(name.startswith(part) for name in moved), part


def test_devices():
    assert select_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="got 'gpu'"):
        select_device("gpu")
    with pytest.raises(ConfigError, match="not supported"):
        select_device("meta")
    if not torch.backends.mps.is_available():
        with pytest.raises(BackendUnavailableError, match="mps is not available; torch is built without it|too old"):
            select_device("mps")
    if not torch.cuda.is_available():
        assert select_device(None).type == "cpu"
        with pytest.raises(BackendUnavailableError, match="0 CUDA devices found") as caught:
            select_device("cuda")
        assert caught.value.exit_code == 5


def test_a_batch_that_cannot_be_shared_is_refused(config, data, tmp_path, monkeypatch):
    import contextlib

    from drseg_core.training.distributed import ProcessGroup

    @contextlib.contextmanager
    def three(device):
        yield ProcessGroup(torch.device("cpu"), 0, 3)

    monkeypatch.setattr(loop, "process_group", three)
    with pytest.raises(ConfigError, match="expected a multiple of the 3 processes, got 2"):
        train(config, data, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_lines_where_there_is_no_terminal(config, data, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    train(override(config, {"train.iterations": 2}), data, tmp_path / "run")
    assert "step 2/2: loss " in capsys.readouterr().err
    assert re.search(
        r"trained parameters: clip \d\.\d\d of .*, dino 0\.00 of .*, total \d\.\d\d of \d\.\d\d M", caplog.text
    )


def test_a_bar_with_loss_and_score_on_a_terminal(config, data, tmp_path, monkeypatch):
    import io
    import sys

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train(config, data, tmp_path / "run")
    shown = terminal.getvalue()
    assert "6/6" in shown and "loss " in shown and "mIoU" in shown


def test_one_process_agrees_with_itself(config):
    from drseg_core.training.distributed import ProcessGroup

    group = ProcessGroup(torch.device("cpu"))
    parts = (LossSum(torch.tensor(6.0), torch.tensor(4)), LossSum(torch.tensor(3.0), torch.tensor(2)))
    assert group.agree(parts[:1], 2.5, 15) == (1.5, (4.0,), 2.5, 15)
    assert group.agree(parts, 2.5, 15) == (3.0, (4.0, 2.0), 2.5, 15)
    assert group.agree((LossSum(torch.tensor(0.0), torch.tensor(0)),), 0.0, 0) == (0.0, (0.0,), 0.0, 0)


@pytest.mark.parametrize("trainable", ["none", "attention"])
def test_frozen_text_is_encoded_once(config, data, tmp_path, monkeypatch, trainable):
    calls = []

    def build(options, **given):
        model = loop_model(options, **given)
        model.clip.text.register_forward_pre_hook(lambda *_: calls.append(1))
        return model

    loop_model = loop.model_of
    monkeypatch.setattr(loop, "model_of", build)
    config = override(config, {"model.clip.trainable": trainable})
    once = train(config, data, tmp_path / "once", show_progress=False)
    # a text encoder that is trained is asked in each step, and when the last one is looked at
    assert len(calls) == (1 if trainable == "none" else config.train.iterations + 1)
    if trainable == "none":
        monkeypatch.setattr(loop.Trainer, "_text", lambda trainer: trainer.tokens)
        again = train(config, data, tmp_path / "again", show_progress=False)
        first, second = (newest_checkpoint(run).weights() for run in (once, again))
        assert all(torch.equal(first[name], second[name]) for name in first | second)
