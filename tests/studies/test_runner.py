# SPDX-License-Identifier: Apache-2.0
"""Cells are trained once, taken up where they stopped, shared between studies, and fail alone."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from drseg_core.config.load import override
from drseg_core.errors import NumericalError, ResourceError
from drseg_core.studies import runner
from drseg_core.studies.setting import ScoredSet, Setting, make_setting
from drseg_core.studies.tables import Cell, TrainingStudy
from drseg_core.studies.training import run_training_study

PLAIN, OTHER = Cell("plain", "plain", {"model.fusion.kind": "none"}), Cell("other", "other", {"model.fusion.tau": 0.5})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setting() -> Setting:
    setting = make_setting(quick=True, start_steps=2)
    small = {
        "model.clip.image_size": 32,
        "model.dino.image_size": 32,
        "model.rotations": 1,
        "model.graph.k": 3,
        "train.crop_size": 32,
        "train.iterations": 2,
    }
    tests = (ScoredSet("a", "synthetic:world=landscape,scenes=2,size=32,vocabulary=full"),)
    return dataclasses.replace(setting, config=override(setting.config, small), tests=tests)


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    """A folder with both cells trained and scored."""
    out = tmp_path_factory.mktemp("studies")
    found = {
        cell.name: runner.run_cell(setting, cell, 0, out)
        for cell in (PLAIN, OTHER)
        if runner.train_start(setting, 0, out)
    }
    return out, found


def trained(monkeypatch) -> list[str]:
    """Names of the folders that are trained from here on."""
    names: list[str] = []
    train = runner.train

    def counted(config, data, folder, **options):
        names.append(folder.name)
        return train(config, data, folder, **options)

    monkeypatch.setattr(runner, "train", counted)
    return names


def test_scores(finished):
    _, found = finished
    row = found["plain"]["a"]
    assert set(row) == {"mIoU", "fwIoU", "mACC", "pACC", "boundary", "unseen", "per_class"}
    assert 0 <= row["mIoU"] <= 100 and len(row["per_class"]) == 25


def test_complete_cells_are_taken_as_they_are(setting, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")
    names = trained(monkeypatch)
    assert runner.run_cell(setting, PLAIN, 0, out) == finished[1]["plain"] and not names
    # other test sets: scored again, not trained again
    other = dataclasses.replace(setting, tests=(dataclasses.replace(setting.tests[0], name="b"),))
    assert runner.run_cell(other, PLAIN, 0, out)["b"] == finished[1]["plain"]["a"] and not names


def test_a_cell_that_stopped_goes_on_and_ends_the_same(setting, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")
    folder = runner.cell_folder(setting, OTHER, 0, out)
    (folder / runner.SCORES).unlink()
    shutil.rmtree(folder / "checkpoints")
    assert runner.run_cell(setting, OTHER, 0, out) != {}
    # killed before its first file
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".lock").touch()
    assert runner.run_cell(setting, OTHER, 0, out) == finished[1]["other"]


def test_everything_that_decides_a_cell_is_in_its_name(setting, tmp_path):
    names = {
        runner.cell_folder(changed, cell, seed, tmp_path).name
        for changed in (
            setting,
            dataclasses.replace(setting, data=setting.data + ",seed=1"),
            dataclasses.replace(setting, start_steps=3),
            dataclasses.replace(setting, config=override(setting.config, {"train.learning_rate": 1e-3})),
        )
        for cell in (PLAIN, OTHER)
        for seed in (0, 1)
    }
    assert len(names) == 16
    # what is scored decides nothing of the training
    scored = dataclasses.replace(setting, tests=(ScoredSet("c", "folder:c"),))
    assert runner.cell_folder(scored, PLAIN, 0, tmp_path) == runner.cell_folder(setting, PLAIN, 0, tmp_path)


def test_cells_of_equal_options_are_one_training(setting, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")
    names = trained(monkeypatch)
    twin = Cell("twin", "twin", dict(PLAIN.options))
    found = {}
    runner.run_cells(
        setting, [PLAIN, twin], out, done=lambda cell, seed, scores, problem: found.update({cell.name: scores})
    )
    assert found["twin"] == found["plain"] == finished[1]["plain"] and not names


def test_a_cell_that_fails_fails_alone(setting, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")
    study = TrainingStudy("t", "T", (PLAIN, Cell("bad", "bad", {"model.fusion.tau": 0.7}), OTHER), reference="plain")
    monkeypatch.setattr("drseg_core.studies.training.training_study", lambda name, setting: study)

    def broken(config, *arguments, **options):
        raise NumericalError("train: 10 steps in a row were not finite")

    monkeypatch.setattr(runner, "train", broken)
    problems = run_training_study("t", setting, out, command="drseg study t")
    assert list(problems) == ["bad"] and "not finite" in problems["bad"]
    content = json.loads((out / "t.json").read_text())
    cells = {cell["name"]: cell for cell in content["cells"]}
    assert cells["bad"]["not_run"] == problems["bad"] and cells["plain"]["scores"]["0"]["a"]["mIoU"] is not None
    assert "bad (not run: seed 0:" in (out / "t.md").read_text() and (out / "t.png").stat().st_size > 1000


def test_two_processes_find_the_same(setting, finished, tmp_path):
    found = {}
    runner.run_cells(
        setting,
        [PLAIN, OTHER],
        tmp_path,
        jobs=2,
        done=lambda cell, seed, scores, problem: found.update({cell.name: scores}),
    )
    assert found == finished[1]


def _square(value):
    if value == 3:
        raise NumericalError("three")
    if value == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return value * value


def _sleep(path):
    path.touch()
    time.sleep(600)


class TestTasks:
    """In processes of their own."""

    def test_results(self):
        assert sorted(runner.run_tasks([(_square, (value,)) for value in (0, 1, 2, 5)], 2)) == [
            (0, 0),
            (1, 1),
            (2, 4),
            (3, 25),
        ]

    def test_an_error_is_the_error(self):
        with pytest.raises(NumericalError, match="three"):
            list(runner.run_tasks([(_square, (3,))], 2))

    def test_a_process_that_is_killed_is_no_hang(self):
        with pytest.raises(ResourceError, match="exit code -9"):
            list(runner.run_tasks([(_square, (4,))], 2))

    def test_whoever_stops_leaves_nobody_running(self, tmp_path):
        def stopped():
            for _ in runner.run_tasks([(_square, (1,)), (_sleep, (tmp_path / "started",))], 2):
                while not (tmp_path / "started").exists():
                    time.sleep(0.05)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped()
        gc.collect()
        assert not multiprocessing.active_children()
