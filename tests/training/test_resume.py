# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped or killed, and goes on, ends bit for bit like one that was never stopped (on the CPU)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drseg_core.checkpoints.checkpoint import TRAINING, generations, newest_checkpoint
from drseg_core.cli.main import main
from drseg_core.config.load import override
from drseg_core.errors import CheckpointError, ConfigError
from drseg_core.training import loop
from drseg_core.training.logs import read_log
from drseg_core.training.loop import train
from drseg_core.training.signals import TrainingStopped
from tests.few_words import few_words  # noqa: F401
from tests.forks import in_ranks, in_torchrun

pytestmark = pytest.mark.usefixtures("few_words")


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of values that are not bit for bit equal; the clock's reading is no part of the comparison."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{name}: keys"]
        return [item for key in a if key != "elapsed" for item in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{name}: length"]
        return [item for i, (x, y) in enumerate(zip(a, b, strict=True)) for item in differences(x, y, f"{name}.{i}")]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    return [] if a == b else [name]


def final_state(run: Path) -> dict[str, Any]:
    checkpoint = newest_checkpoint(run)
    return {"step": checkpoint.step, "weights": checkpoint.weights(), "training": checkpoint.training_state()}


def stop_after(step: int, number: int = signal.SIGTERM):
    """The signal comes while step ``step + 1`` runs, so that one is finished and saved."""

    def on_step(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    return on_step


@pytest.fixture(scope="module")
def finished(config, data, tmp_path_factory) -> Path:
    """A run of 6 steps of 2 images, of 5 there are: step 3 ends in the middle of the second pass."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(config, data, run, show_progress=False)
    return run


@pytest.fixture(scope="module")
def uninterrupted(finished) -> dict[str, Any]:
    """The state at the end of it."""
    return final_state(finished)


def stopped_run(config, data, run: Path, step: int = 2) -> None:
    with pytest.raises(TrainingStopped) as caught:
        train(config, data, run, show_progress=False, on_step=stop_after(step))
    assert caught.value.exit_code == 143
    assert newest_checkpoint(run).step == step + 1


@pytest.fixture(scope="module")
def stopped(config, data, tmp_path_factory) -> Callable[..., None]:
    """``stopped(run, step)`` makes a stopped run, of which each is trained once."""
    place = tmp_path_factory.mktemp("stopped")

    def make(run: Path, step: int = 2) -> None:
        kept = place / str(step)
        if not kept.exists():
            stopped_run(config, data, kept, step)
        shutil.copytree(kept, run)

    return make


@pytest.mark.promise("C24")
def test_two_runs_are_equal(config, data, tmp_path, uninterrupted):
    train(config, data, tmp_path / "run", show_progress=False)
    assert differences(uninterrupted, final_state(tmp_path / "run")) == []


@pytest.mark.promise("C30")
@pytest.mark.parametrize("step", [1, 2, 4])
def test_resumed_equals_uninterrupted(config, data, tmp_path, uninterrupted, stopped, step):
    run = tmp_path / "run"
    stopped(run, step)
    torch.manual_seed(99)
    train(config, data, run, resume=True, show_progress=False)
    assert differences(uninterrupted, final_state(run)) == []
    assert [record["step"] for record in read_log(run)] == [2, 4, 6]
    assert len(json.loads((run / "manifest.json").read_text())["resumed"]) == 1


@pytest.mark.promise("C30")
def test_resumed_at_the_boundary_of_a_pass_over_the_data(config, tmp_path):
    from drseg_core.data import open_dataset

    spec = "synthetic:seed=0,scenes=4,size=32"
    assert len(open_dataset(spec)) == 4
    train(config, spec, tmp_path / "straight", show_progress=False)
    stopped_run(config, spec, tmp_path / "run", step=1)
    train(config, spec, tmp_path / "run", resume=True, show_progress=False)
    assert differences(final_state(tmp_path / "straight"), final_state(tmp_path / "run")) == []


@pytest.mark.promise("C30")
def test_the_number_of_workers_does_not_matter(config, data, tmp_path, uninterrupted):
    run = tmp_path / "run"
    stopped_run(override(config, {"train.workers": 1}), data, run)
    train(config, data, run, resume=True, show_progress=False)
    assert differences(uninterrupted, final_state(run)) == []


@pytest.mark.promise("C30")
def test_several_stops(config, data, tmp_path, uninterrupted, stopped):
    run = tmp_path / "run"
    stopped(run, step=1)
    with pytest.raises(TrainingStopped):
        train(config, data, run, resume=True, show_progress=False, on_step=stop_after(3))
    train(config, data, run, resume=True, show_progress=False)
    assert differences(uninterrupted, final_state(run)) == []


@pytest.mark.promise("C30")
@pytest.mark.parametrize("sabotage", ["random", "position", "optimizer", "weights"])
def test_a_resume_that_forgets_something_fails_the_comparison(
    config, data, tmp_path, uninterrupted, stopped, monkeypatch, sabotage
):
    run = tmp_path / "run"
    stopped(run)
    if sabotage == "random":
        monkeypatch.setattr(loop, "restore_random_state", lambda state: None)
    elif sabotage == "position":
        original = loop.training_batches
        monkeypatch.setattr(loop, "training_batches", lambda *a, **options: original(*a, **{**options, "start": 0}))
    elif sabotage == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    else:
        # in memory that nobody has written there may be anything
        monkeypatch.setattr(loop, "load_into", lambda model, *_, **__: [p.data.zero_() for p in model.parameters()])
    train(config, data, run, resume=True, show_progress=False)
    changed = differences(uninterrupted, final_state(run))
    assert any(name.startswith(".weights") for name in changed)


@pytest.mark.promise("C30")
def test_killed_at_random_times(config, data, tmp_path, uninterrupted, fork, caplog):
    """SIGKILL, ten times, during ranking, steps and saving; after each the run goes on from a whole checkpoint."""
    run = tmp_path / "run"
    config = override(config, {"train.checkpoint_every": 1})
    generator = random.Random(1)
    steps = [0]
    for _ in range(10):
        resume = (run / "config.yaml").is_file()
        status = fork(lambda resume=resume: part(config, data, run, resume), kill_after=generator.uniform(0.1, 0.9))
        assert status in (-9, 0)
        found = newest_checkpoint(run)
        steps.append(found.step if found else 0)
        assert steps[-1] >= steps[-2]
        if steps[-1] == config.train.iterations:
            break
    assert "checksum" not in caplog.text
    resume = (run / "config.yaml").is_file()
    assert fork(lambda: part(config, data, run, resume)) == 0
    assert differences(uninterrupted, final_state(run)) == []


def part(config, data, run: Path, resume: bool) -> None:
    # slow steps, so that kills fall between the first and the last
    train(config, data, run, resume=resume, show_progress=False, on_step=lambda step: time.sleep(0.05))


@pytest.mark.promise("C29")
def test_damage_goes_back_one_checkpoint(config, data, tmp_path, finished, uninterrupted, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = generations(run)[0]
    content = (newest / TRAINING).read_bytes()
    (newest / TRAINING).write_bytes(content[: len(content) // 2])
    train(config, data, run, resume=True, show_progress=False)
    assert "checksum mismatch in training.pt; using previous step-00000004" in caplog.text
    assert differences(uninterrupted, final_state(run)) == []


def test_a_finished_run_resumes_to_nothing(config, data, tmp_path, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = generations(run)[0].stat().st_mtime_ns
    train(config, data, run, resume=True, show_progress=False)
    assert generations(run)[0].stat().st_mtime_ns == before


def test_more_iterations_may_be_asked_for(config, data, tmp_path, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    longer = override(config, {"train.iterations": 8, "train.checkpoint_every": 5, "train.log_every": 1})
    train(longer, data, run, resume=True, show_progress=False)
    assert newest_checkpoint(run).step == 8
    with pytest.raises(CheckpointError, match="train.iterations: 8 then, 6 now"):
        train(config, data, run, resume=True, show_progress=False)


@pytest.mark.promise("C32")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.graph.k": 4}, "model.graph.k: 3 then, 4 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"model.decoder.widths": [8, 8]}, r"model.decoder.widths: \[16, 8\] then, \[8, 8\] now"),
        ({"train.learning_rate": 0.5}, "train.learning_rate: 0.001 then, 0.5 now"),
        ({"train.batch_size": 1}, "train.batch_size: 2 then, 1 now"),
    ],
)
def test_another_configuration_is_refused(config, data, tmp_path, stopped, change, message):
    run = tmp_path / "run"
    stopped(run, step=1)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        train(override(config, change), data, run, resume=True, show_progress=False)
    assert (run / "config.yaml").read_bytes() == before


def test_a_run_older_than_an_option_goes_on(config, data, tmp_path, uninterrupted, monkeypatch):
    run = tmp_path / "run"
    original = loop.plain_config

    def older(config) -> dict[str, Any]:
        content = original(config)
        del content["model"]["graph"]["grid"]
        return content

    with monkeypatch.context() as patch:
        patch.setattr(loop, "plain_config", older)
        stopped_run(config, data, run)
    with pytest.raises(CheckpointError, match="model.graph.grid: 'clip' then, 'prior' now"):
        train(override(config, {"model.graph.grid": "prior"}), data, run, resume=True, show_progress=False)
    train(config, data, run, resume=True, show_progress=False)
    assert differences(uninterrupted, final_state(run)) == []


def test_a_run_goes_on_whose_edge_bias_was_a_single_number(config, data, tmp_path, uninterrupted, monkeypatch):
    run = tmp_path / "run"
    original = loop.save_checkpoint
    numbers = []

    def older(*arguments: Any, model: dict[str, Any], training: dict[str, Any], **options: Any) -> Path:
        name = next(name for name in model if name.endswith("edge_bias"))
        model = {**model, name: model[name].view(())}
        for kept in training["optimizer"]["state"].values():
            for key, value in kept.items():
                if key != "step" and value.numel() == 1:
                    kept[key] = value.view(())
                    numbers.append(key)
        return original(*arguments, model=model, training=training, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", older)
        stopped_run(config, data, run)
    assert numbers
    train(config, data, run, resume=True, show_progress=False)
    assert differences(uninterrupted, final_state(run)) == []


@pytest.mark.promise("C32")
def test_other_classes_and_other_data_are_refused(config, other_data, tmp_path, stopped):
    run = tmp_path / "run"
    stopped(run, step=1)
    manifest = (run / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="dataset_sha256: [0-9a-f]{12} then, [0-9a-f]{12} now"):
        train(config, other_data, run, resume=True, show_progress=False)
    names = Path(other_data.removeprefix("folder:")) / "classes.txt"
    original = names.read_text()
    try:
        names.write_text(original.replace("red roof", "red shed"))
        with pytest.raises(CheckpointError, match=r"classes\[1\]: 'red roof' then, 'red shed' now"):
            train(config, other_data, run, resume=True, show_progress=False)
        names.write_text(original + "yellow field\n")
        with pytest.raises(CheckpointError, match="classes: 3 then, 4 now"):
            train(config, other_data, run, resume=True, show_progress=False)
    finally:
        names.write_text(original)
    assert (run / "manifest.json").read_bytes() == manifest


@pytest.mark.promise("C48")
def test_a_folder_in_use_is_not_overwritten(config, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="out is not empty") as caught:
        train(config, data, out, show_progress=False)
    assert caught.value.exit_code == 2
    assert [path.name for path in out.iterdir()] == ["letter.txt"]
    with pytest.raises(ConfigError, match="out is not a folder"):
        train(config, data, out / "letter.txt", show_progress=False)
    with pytest.raises(CheckpointError, match="has no config.yaml"):
        train(config, data, out, resume=True, show_progress=False)
    with pytest.raises(CheckpointError, match="not found"):
        train(config, data, tmp_path / "absent", resume=True, show_progress=False)
    with pytest.raises(ConfigError, match="resume and init exclude each other"):
        train(config, data, out, resume=True, init=out, show_progress=False)
    assert not (tmp_path / "absent").exists()


def test_a_second_trainer_is_refused(config, data, tmp_path):
    run = tmp_path / "run"
    messages = []

    def second(step: int) -> None:
        if step == 1:
            with pytest.raises(CheckpointError, match=f"locked by pid {os.getpid()} on host") as caught:
                train(config, data, run, resume=True, show_progress=False)
            messages.append(str(caught.value))

    train(override(config, {"train.iterations": 1}), data, run, show_progress=False, on_step=second)
    assert len(messages) == 1


@pytest.mark.promise("C28")
def test_killed_before_the_first_checkpoint(config, data, tmp_path, uninterrupted, fork, caplog):
    run = tmp_path / "run"
    late = override(config, {"train.checkpoint_every": 1000})

    def stall() -> None:
        train(late, data, run, show_progress=False, on_step=lambda step: os.kill(os.getpid(), signal.SIGKILL))

    assert fork(stall) == -9
    train(config, data, run, resume=True, show_progress=False)
    assert "has no checkpoint yet; training starts at step 0" in caplog.text
    assert differences(uninterrupted, final_state(run)) == []


@pytest.mark.promise("C33")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_at_once(config, data, tmp_path, fork, number, code):
    run = tmp_path / "run"

    def twice() -> None:
        def on_step(step: int) -> None:
            if step == 3:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)
                os._exit(99)

        train(config, data, run, show_progress=False, on_step=on_step)

    assert fork(twice) == code
    assert newest_checkpoint(run).step == 2
    train(config, data, run, resume=True, show_progress=False)
    assert newest_checkpoint(run).step == 6


@pytest.mark.promise("C33")
def test_interrupt_says_how_to_go_on(config, data, tmp_path):
    with pytest.raises(TrainingStopped, match="stopped by SIGINT after step 3; go on with --resume") as caught:
        train(config, data, tmp_path / "run", show_progress=False, on_step=stop_after(2, signal.SIGINT))
    assert caught.value.exit_code == 130


@pytest.mark.promise("C30")
def test_processes_started_again_by_torchrun_go_on(config, data, tmp_path, uninterrupted, stopped, monkeypatch):
    run = tmp_path / "run"
    stopped(run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ConfigError, match="not empty"):
        train(config, data, run, show_progress=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(config, data, run, show_progress=False)
    assert differences(uninterrupted, final_state(run)) == []


def train_words(config_file: Path, data: str, run: Path, *more: str) -> list[str]:
    return ["train", "--config", str(config_file), "--data", data, "--device", "cpu", "--out", str(run), *more]


def in_two_processes(*given: Any) -> None:
    code, _, errors = in_torchrun(train_words(*given), given[2].parent, anew=False)
    assert code == 0, errors


def in_two_forks(*given: Any) -> None:
    found = in_ranks(lambda: main(train_words(*given)), given[2].parent)
    assert [code for code, _, _ in found] == [0, 0], found


def way_apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """How far two weights are from each other, as a share of how far training moved the first."""
    moving = [name for name, value in start.items() if value.is_floating_point()]
    apart = sum(float((first[name] - second[name]).double().square().sum()) for name in moving)
    moved = sum(float((first[name] - start[name]).double().square().sum()) for name in moving)
    return (apart / moved) ** 0.5


@pytest.mark.promise("C22")
def test_two_processes_are_one(config, data, tmp_path, caplog):
    """Two gloo processes make the batches, losses and weights of one. Killed in the middle of a pass over the data,
    they end bit for bit where they would have; and one process can go on with their run."""
    config = override(config, {"model.graph.dropout": 0.0})
    # so small a rate leaves the first weights
    unmoved = override(config, {"train.learning_rate": 1e-30, "train.iterations": 1})
    train(unmoved, data, tmp_path / "start", show_progress=False)
    train(config, data, tmp_path / "one", show_progress=False)
    config_file = tmp_path / "config.yaml"
    config_file.write_text((tmp_path / "one" / "config.yaml").read_text())
    in_two_processes(config_file, data, tmp_path / "two")
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [record["samples"] for record in two] == [record["samples"] for record in one] == [4, 8, 12]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
    start, first, second = (newest_checkpoint(tmp_path / name).weights() for name in ("start", "one", "two"))
    assert way_apart(first, second, start) < 0.01
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    straight = final_state(tmp_path / "two")
    assert len(straight["training"]["random"]) == 2
    # 4 steps of 2 images, of 5 there are
    shutil.rmtree(generations(tmp_path / "two")[0])
    assert newest_checkpoint(tmp_path / "two").step == 4
    # without torchrun now, which costs more than all else here
    in_two_forks(config_file, data, tmp_path / "two", "--resume")
    assert differences(straight, final_state(tmp_path / "two")) == []
    longer = override(config, {"train.iterations": 7})
    train(longer, data, tmp_path / "two", resume=True, show_progress=False)
    assert "2 processes then, 1 now" in caplog.text
    assert newest_checkpoint(tmp_path / "two").step == 7
