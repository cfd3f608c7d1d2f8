# SPDX-License-Identifier: Apache-2.0
"""Variants are trained once, taken up where they stopped, shared between studies, and fail alone."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from drseg_core.checkpoints.lock import run_lock
from drseg_core.checkpoints.run import LoadedRun
from drseg_core.checkpoints.versions import device_name
from drseg_core.config.load import override
from drseg_core.data.protocols import PROTOCOLS
from drseg_core.data.synthetic import write_scenes
from drseg_core.errors import CheckpointError, ConfigError, NumericalError
from drseg_core.models.segmenter import SegmenterOutput
from drseg_core.studies import plan as planning
from drseg_core.studies import runner
from drseg_core.studies.plan import plan, plan_variant
from drseg_core.studies.setting import ScoredSet, Setting, make_setting
from drseg_core.studies.tables import TrainingStudy, Variant
from drseg_core.studies.tasks import run_tasks
from drseg_core.studies.training import run_training_study
from drseg_core.training.signals import TrainingStopped
from tests.data.miniatures import write_release
from tests.studies.tasks import pid, sleep, square, stop, threads

PLAIN, OTHER = (
    Variant("plain", "plain", {"model.fusion.kind": "none"}),
    Variant("other", "other", {"model.fusion.tau": 0.5}),
)


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
    """A folder with both variants trained and scored."""
    out = tmp_path_factory.mktemp("studies")
    found = {
        variant.name: runner.run_variant(plan_variant(setting, variant, 0, out))
        for variant in (PLAIN, OTHER)
        if runner.train_start(plan_variant(setting, variant, 0, out))
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
    assert set(row) == {"mIoU", "fwIoU", "mACC", "pACC", "boundary", "novel", "per_class"}
    assert 0 <= row["mIoU"] <= 100 and len(row["per_class"]) == 25


def test_complete_variants_are_taken_as_they_are(setting, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")
    names = trained(monkeypatch)
    assert runner.run_variant(plan_variant(setting, PLAIN, 0, out)) == finished[1]["plain"] and not names
    # other test sets: scored again, not trained again
    other = dataclasses.replace(setting, tests=(dataclasses.replace(setting.tests[0], name="b"),))
    assert runner.run_variant(plan_variant(other, PLAIN, 0, out))["b"] == finished[1]["plain"]["a"] and not names
    # so are scores with a metric's name of before
    scores = plan_variant(setting, OTHER, 0, out).folder / runner.SCORES
    scores.write_text(scores.read_text().replace('"novel"', '"unseen"'))
    assert runner.run_variant(plan_variant(setting, OTHER, 0, out)) == finished[1]["other"] and not names


def test_what_the_variants_took_is_counted_once(setting, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    folders = [
        plan_variant(setting, PLAIN, 0, out).start.path,
        *(plan_variant(setting, c, 0, out).folder for c in (PLAIN, OTHER)),
    ]
    for place, folder in enumerate(folders):
        kept = json.loads((folder / runner.SECONDS).read_text())
        # a dual encoder is not scored
        assert set(kept) == ({"train", "score"} if place else {"train"}) and all(value > 0 for value in kept.values())
        (folder / runner.SECONDS).write_text(json.dumps({"train": 10.0**place, "score": 0.5}))
    twin = Variant("twin", "twin", OTHER.options)
    never = Variant("never", "never", {"model.fusion.tau": 0.9})
    assert runner.seconds(plan(setting, [PLAIN, OTHER, twin, never], out)) == 111 + 3 * 0.5
    assert runner.seconds(plan(setting, [never], out)) == 0


def test_a_variant_that_stopped_goes_on_and_ends_the_same(setting, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")
    folder = plan_variant(setting, OTHER, 0, out).folder
    # before its first checkpoint, but with all its other files: it must not go on from random weights
    (folder / runner.SCORES).unlink()
    shutil.rmtree(folder / "checkpoints")
    assert (folder / "config.yaml").is_file()
    assert runner.run_variant(plan_variant(setting, OTHER, 0, out)) == finished[1]["other"]
    # before its first file
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".lock").touch()
    assert runner.run_variant(plan_variant(setting, OTHER, 0, out)) == finished[1]["other"]
    # after the training, before the scores
    (folder / runner.SCORES).unlink()
    names = trained(monkeypatch)
    assert runner.run_variant(plan_variant(setting, OTHER, 0, out)) == finished[1]["other"] and not names


def test_a_variant_needs_nothing_that_was_there_before(setting, finished, tmp_path):
    assert runner.run_variant(plan_variant(setting, PLAIN, 0, tmp_path)) == finished[1]["plain"]


def test_a_damaged_checkpoint_is_not_scored(setting, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    folder = plan_variant(setting, OTHER, 0, out).folder
    (folder / runner.SCORES).unlink()
    (weights,) = folder.glob("checkpoints/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        runner.run_variant(plan_variant(setting, OTHER, 0, out))


def test_a_run_that_another_process_trains_is_not_wiped(setting, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    folder = plan_variant(setting, OTHER, 0, out).folder
    (folder / runner.SCORES).unlink()
    shutil.rmtree(folder / "checkpoints")
    with run_lock(folder), pytest.raises(CheckpointError, match=f"in use; locked by pid {os.getpid()}"):
        runner.run_variant(plan_variant(setting, OTHER, 0, out))
    assert (folder / "config.yaml").is_file()


def test_a_file_that_another_study_writes_meanwhile_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").touch()
    # the other one is complete by now, and has another name
    names = [*tmp_path.iterdir(), tmp_path / ".seconds-1-abc.part.json"]
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: iter(names))
    runner._clear(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


def test_commits_and_machines_are_those_of_the_trainings(setting, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    never = Variant("never", "never", {"model.fusion.tau": 0.9})
    here = f"{device_name('cpu')}, threads: 1"
    found = runner.provenance(plan(setting, [PLAIN, OTHER, never], out))
    assert len(found["commits"]) <= 1 and found["machines"] == [here]
    path = plan_variant(setting, PLAIN, 0, out).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "git": "abc", "machine": {"device": "H100", "threads": 4}}))
    found = runner.provenance(plan(setting, [PLAIN, OTHER], out))
    assert "abc" in found["commits"] and found["machines"] == sorted(["H100, threads: 4", here])
    # one that went on elsewhere, and one that did not say
    path.write_text(json.dumps({"git": "abc", "resumed": [{"git": "def", "machine": {"device": "CPU", "threads": 1}}]}))
    found = runner.provenance(plan(setting, [PLAIN], out))
    assert found == {"commits": ["abc", "def"], "machines": ["CPU, threads: 1", "a machine that was not noted"]}


def test_a_dual_encoder_that_fails_is_tried_once(setting, tmp_path, monkeypatch):
    names = trained(monkeypatch)
    train = runner.train

    def broken(config, data, folder, **options):
        if config.seed == 1:
            names.append("broken")
            raise NumericalError("train: 10 steps in a row were not finite")
        return train(config, data, folder, **options)

    monkeypatch.setattr(runner, "train", broken)
    found = {}
    both = dataclasses.replace(setting, seeds=(0, 1))
    runner.run_variants(
        plan(both, [PLAIN, OTHER], tmp_path),
        done=lambda item, *rest: found.update({(item.variant.name, item.seed): rest}),
    )
    assert names.count("broken") == 1
    for name in ("plain", "other"):
        assert found[name, 0][0] is not None and found[name, 0][1] is None
        assert found[name, 1] == (None, "its dual encoder failed; train: 10 steps in a row were not finite")


def test_a_stop_stops_the_study_and_is_no_failed_variant(setting, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")

    def stopped(*arguments, **options):
        raise TrainingStopped("train: stopped by SIGTERM", 15)

    monkeypatch.setattr(runner, "train", stopped)
    new = Variant("new", "new", {"model.fusion.tau": 0.9})
    with pytest.raises(TrainingStopped) as caught:
        runner.run_variants(plan(setting, [new, PLAIN], out), done=lambda *_: pytest.fail("went on"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.exit_code == 143 and str(again) == "train: stopped by SIGTERM"


def test_content_that_changes_under_its_path_is_other_content(setting, tmp_path):
    out = tmp_path / "out"
    for name in ("tr", "te"):
        write_scenes(tmp_path / name, splits={"train": 2, "val": 2}, size=32, seed=0)
    data = f"folder:{tmp_path / 'tr'}"
    changed = dataclasses.replace(setting, data=data, tests=(ScoredSet("a", f"folder:{tmp_path / 'te'}"),))
    folder, tests = plan_variant(changed, PLAIN, 0, out).folder, runner.scored_sets(changed)
    weights = tmp_path / "prior.safetensors"
    weights.write_bytes(b"one")
    with_file = override(changed.config, {"model.dino.weights": str(weights)})
    first = planning.files_hash(with_file, out)
    for name in ("tr", "te"):
        write_scenes(tmp_path / name, splits={"train": 2, "val": 2}, size=32, seed=1, overwrite=True)
    weights.write_bytes(b"two!")
    planning.fingerprint.cache_clear()
    runner.scored_fingerprint.cache_clear()
    assert plan_variant(changed, PLAIN, 0, out).folder != folder and runner.scored_sets(changed) != tests
    assert planning.files_hash(with_file, out) != first


class Constant(torch.nn.Module):
    """Says the class of a scene's left half everywhere; knows no name but those it was made with."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def tokenize(self, names):
        return torch.zeros(len(names), 1, dtype=torch.long)

    def encode_text(self, tokens):
        return torch.zeros(len(tokens), 1)

    def forward(self, image, text):
        logits = torch.full((len(image), len(text), 8, 8), -5.0)
        logits[:, self.label] = 5.0
        return SegmenterOutput(logits, torch.zeros(len(image), 1, 8, 8), logits, None)


def test_scores_by_hand(setting, tmp_path):
    """Two halves, one of which is called by its name: every figure can be said beforehand."""
    root = tmp_path / "halves"
    for part in ("images", "masks"):
        (root / "val" / part).mkdir(parents=True)
    (root / "classes.txt").write_text("left\nright\nnowhere\n")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 1
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(root / "val" / "images" / "a.png")
    Image.fromarray(mask).save(root / "val" / "masks" / "a.png")
    loaded = LoadedRun(Constant(0), setting.config, ("left", "nowhere"), 1, tmp_path)
    tests = (ScoredSet("halves", f"folder:{root}"),)
    row = runner.score(loaded, dataclasses.replace(setting, tests=tests))["halves"]
    assert row["mIoU"] == 25 and row["fwIoU"] == 25 and row["mACC"] == 50 and row["pACC"] == 50
    # the only name that was not trained, and that the data show, is "right"
    assert row["novel"] == 0 and row["per_class"] == {"left": 50, "right": 0, "nowhere": None}
    # the outline of what covers all is the frame of the image, half of which is not the truth's
    assert row["boundary"] not in (None, row["mIoU"]) and 0 < row["boundary"] < 50
    all_known = LoadedRun(Constant(0), setting.config, ("left", "right", "nowhere"), 1, tmp_path)
    assert runner.score(all_known, dataclasses.replace(setting, tests=tests))["halves"]["novel"] is None


def test_scores_by_a_protocol(setting, tmp_path, monkeypatch):
    """Its views, its convention and its refusal of training images."""
    write_release("potsdam", tmp_path)
    seen = {}

    def noted(model, names, dataset, evaluation, **options):
        seen.update(options)
        counts = {"present": 1.0, "union": 2.0, "all": 3.0}
        row = {"iou": 0.0, "accuracy": 0.0, "pixels": 0}
        return {
            "mIoU_conventions": counts, "fwIoU": 0.0, "mACC": 0.0, "pACC": 0.0, "boundary": {"mIoU": 0.0},
            "subsets": {"novel": {"mIoU": 0.0}}, "per_class": dict.fromkeys(names, row),
        }  # fmt: skip

    monkeypatch.setattr(runner, "evaluate", noted)
    loaded = LoadedRun(Constant(0), setting.config, ("left",), 1, tmp_path)
    tests = (ScoredSet("potsdam", f"potsdam:{tmp_path}"),)
    for name, expected in (("rskt", 1.0), ("segearth", 2.0)):
        scored = dataclasses.replace(setting, tests=tests, protocol=name)
        assert runner.score(loaded, scored)["potsdam"]["mIoU"] == expected
        assert seen["views"] is PROTOCOLS[name].views and seen["boundary"] is True
    clean = dataclasses.replace(setting, tests=tests, protocol="clean", data=f"potsdam:{tmp_path}")
    with pytest.raises(ConfigError, match="images it never saw"):
        clean.open_test(tests[0])


def test_everything_that_decides_a_variant_is_in_its_name(setting, tmp_path):
    names = {
        plan_variant(changed, variant, seed, tmp_path).folder.name
        for changed in (
            setting,
            dataclasses.replace(setting, data=setting.data + ",seed=1"),
            dataclasses.replace(setting, start_steps=3),
            dataclasses.replace(setting, config=override(setting.config, {"train.learning_rate": 1e-3})),
        )
        for variant in (PLAIN, OTHER)
        for seed in (0, 1)
    }
    assert len(names) == 16
    # what is scored decides nothing of the training
    scored = dataclasses.replace(setting, tests=(ScoredSet("c", "folder:c"),))
    assert plan_variant(scored, PLAIN, 0, tmp_path).folder == plan_variant(setting, PLAIN, 0, tmp_path).folder


def test_variants_of_equal_options_are_one_training(setting, finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "out")
    names = trained(monkeypatch)
    twin = Variant("twin", "twin", dict(PLAIN.options))
    found = {}
    runner.run_variants(
        plan(setting, [PLAIN, twin], out),
        done=lambda item, scores, problem: found.update({item.variant.name: scores}),
    )
    assert found["twin"] == found["plain"] == finished[1]["plain"] and not names


@pytest.mark.parametrize(
    "error",
    [
        NumericalError("train: 10 steps in a row were not finite"),
        ValueError("prototype is not finite"),
        torch.OutOfMemoryError("not finite memory"),
    ],
)
def test_a_variant_that_fails_fails_alone(setting, finished, tmp_path, monkeypatch, error):
    out = shutil.copytree(finished[0], tmp_path / "out")
    study = TrainingStudy("t", "T", (PLAIN, Variant("bad", "bad", {"model.fusion.tau": 0.7}), OTHER), reference="plain")
    monkeypatch.setattr("drseg_core.studies.training.training_study", lambda name, setting: study)

    def broken(config, *arguments, **options):
        raise error

    monkeypatch.setattr(runner, "train", broken)
    problems = run_training_study("t", setting, out, command="drseg study t")
    assert list(problems) == ["bad"] and "not finite" in problems["bad"]
    content = json.loads((out / "t.json").read_text())
    variants = {variant["name"]: variant for variant in content["variants"]}
    assert variants["bad"]["not_run"] == problems["bad"] and variants["plain"]["scores"]["0"]["a"]["mIoU"] is not None
    assert "bad (not run: seed 0:" in (out / "t.md").read_text() and (out / "t.png").stat().st_size > 1000


def test_two_processes_find_the_same(setting, finished, tmp_path):
    found = {}
    runner.run_variants(
        plan(setting, [PLAIN, OTHER], tmp_path),
        jobs=2,
        done=lambda item, scores, problem: found.update({item.variant.name: scores}),
    )
    assert found == finished[1]


class TestTasks:
    """In processes of their own."""

    @pytest.fixture(autouse=True)
    def nobody_is_left(self):
        # other tests of this process may have children too
        before = set(multiprocessing.active_children())
        yield
        gc.collect()
        assert set(multiprocessing.active_children()) <= before

    def test_a_task_that_fails_fails_alone(self):
        found = dict(run_tasks([(square, (value,)) for value in (3, 2)], 1))
        assert found == {0: (None, "three"), 1: (4, None)}

    @pytest.mark.parametrize("task", [threads, torch.get_num_threads], ids=["loads", "is"])
    def test_each_process_has_its_share_of_the_threads(self, task):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            # a task of torch itself brings it along
            assert next(run_tasks([(task, ())], 2))[1] == (1, None)
        finally:
            torch.set_num_threads(before)

    def test_a_process_says_why_it_cannot_load_its_task(self, tmp_path, monkeypatch, capfd):
        (tmp_path / "only_here.py").write_text(
            "import multiprocessing\n"
            "if multiprocessing.parent_process() is not None:\n"
            "    raise OSError('libnone.so is missing')\n"
            "def task():\n"
            "    pass\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        task = importlib.import_module("only_here").task
        assert "died with exit code 1" in next(run_tasks([(task, ())], 2))[1].problem
        assert "OSError: libnone.so is missing" in capfd.readouterr().err

    def test_a_stop_is_raised(self):
        with pytest.raises(TrainingStopped, match="stopped by SIGTERM"):
            list(run_tasks([(stop, ()), (square, (1,))], 2))

    def test_a_task_that_fails_and_a_process_that_is_killed_fail_alone(self):
        found = dict(run_tasks([(square, (value,)) for value in (4, 1, 3, 2, 4, 5)], 2))
        died = (found.pop(0), found.pop(4))
        assert found == {1: (1, None), 2: (None, "three"), 3: (4, None), 5: (25, None)}
        assert all(lost.result is None and "died with exit code -9" in lost.problem for lost in died)

    def test_processes_are_used_again(self):
        assert len({outcome.result for _, outcome in run_tasks([(pid, ())] * 5, 2)}) <= 2

    def test_whoever_stops_leaves_nobody_running(self, tmp_path):
        def stopped():
            for _ in run_tasks([(square, (1,)), (sleep, (tmp_path / "started",))], 2):
                while not (tmp_path / "started").exists():
                    time.sleep(0.05)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped()
