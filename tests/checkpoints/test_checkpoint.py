# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drseg_core.checkpoints import checkpoint as module
from drseg_core.checkpoints import lock
from drseg_core.checkpoints.checkpoint import (
    DESCRIPTION,
    FOLDER,
    TRAINING,
    WEIGHTS,
    content_hash,
    file_hash,
    generations,
    newest_checkpoint,
    open_checkpoint,
    remove_leftovers,
    save_checkpoint,
    set_aside_damaged,
)
from drseg_core.checkpoints.lock import run_lock
from drseg_core.errors import CheckpointError, ResourceError
from drseg_core.files import write_text_atomic
from drseg_core.models.weights import save_weights
from drseg_core.scenes.block_store import BlockStore
from drseg_core.training.randomness import random_state, restore_random_state, seed_everything

CONFIG = {"model": {"k": 3}, "seed": 0}
NAMES = ("field", "tank")


def save(run: Path, step: int, *, size: int = 50, **options: Any) -> Path:
    return save_checkpoint(
        run,
        step,
        model={"weight": torch.full((size,), float(step)), "bias": torch.ones(3)},
        training={"step": step, "random": [random_state()], "optimizer": {"state": {0: {"exp_avg": torch.ones(size)}}}},
        config=CONFIG,
        class_names=NAMES,
        **options,
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / FOLDER).iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path, 120)
    assert path == tmp_path / "checkpoints" / "step-00000120"
    found = newest_checkpoint(tmp_path)
    assert (found.step, found.config, found.class_names) == (120, CONFIG, NAMES)
    assert found.versions["torch"] == str(torch.__version__).split("+")[0] or "torch" in found.versions
    assert torch.equal(found.weights()["weight"], torch.full((50,), 120.0))
    assert found.training_state()["step"] == 120
    assert set(names(tmp_path)) == {"step-00000120"}
    assert json.loads((path / DESCRIPTION).read_text())["config_sha256"] == content_hash(CONFIG)


@pytest.mark.promise("C28")
def test_the_folder_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").mkdir()
    path = save(tmp_path, 1)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    plain, ours = tmp_path / "plain.txt", tmp_path / "ours.txt"
    plain.write_text("x")
    write_text_atomic(ours, "x")
    assert ours.stat().st_mode == plain.stat().st_mode
    # what was there keeps its own
    ours.chmod(0o640)
    write_text_atomic(ours, "y")
    assert ours.stat().st_mode & 0o777 == 0o640


@pytest.mark.promise("C28")
@pytest.mark.parametrize(
    ("options", "left"),
    [({}, 2), *(({"keep": keep}, left) for keep, left in ((0, 2), (1, 2), (2, 2), (3, 3)))],
    ids=str,
)
def test_the_newest_generations_stay(tmp_path, options, left):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, **options)
    assert names(tmp_path) == [f"step-{step:08d}" for step in range(6 - left, 6)]


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / FOLDER / "step-x").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None


def test_order_is_by_step_not_by_time(tmp_path):
    save(tmp_path, 20)
    save(tmp_path, 3)
    assert newest_checkpoint(tmp_path).step == 20
    # one digit more
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert newest_checkpoint(tmp_path).step == 100_000_000


@pytest.mark.promise("C29")
def test_truncation_and_bit_flips_anywhere_are_found(tmp_path, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    generator = random.Random(0)
    for name in (WEIGHTS, TRAINING, DESCRIPTION):
        good = (newest / name).read_bytes()
        for _ in range(50):
            place = generator.randrange(len(good))
            flipped = bytearray(good)
            flipped[place] ^= 1 << generator.randrange(8)
            for damaged in (good[:place], bytes(flipped)):
                (newest / name).write_bytes(damaged)
                caplog.clear()
                assert newest_checkpoint(tmp_path).step == 1, (name, place, len(damaged))
                assert "using previous step-00000001" in caplog.text
        (newest / name).unlink()
        assert newest_checkpoint(tmp_path).step == 1
        (newest / name).write_bytes(good)
        assert newest_checkpoint(tmp_path).step == 2


@pytest.mark.promise("C29")
def test_none_left_is_an_error(tmp_path):
    for step in (1, 2):
        path = save(tmp_path, step)
        (path / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no undamaged checkpoint is left"):
        newest_checkpoint(tmp_path)


@pytest.mark.promise("C29")
def test_a_newer_format_is_refused_by_both_numbers(tmp_path):
    path = save(tmp_path, 1)
    content = json.loads((path / DESCRIPTION).read_text())
    content["format_version"] = 7
    del content["sha256"]
    (path / DESCRIPTION).write_text(json.dumps({**content, "sha256": content_hash(content)}))
    with pytest.raises(CheckpointError, match="format_version .* at most 1, got 7"):
        newest_checkpoint(tmp_path)


def replace_training_state(path, state):
    """Another state under the checksums that fit."""
    torch.save(state, path / TRAINING)
    content = json.loads((path / DESCRIPTION).read_text())
    content["files"][TRAINING]["sha256"] = file_hash(path / TRAINING)
    del content["sha256"]
    (path / DESCRIPTION).write_text(json.dumps({**content, "sha256": content_hash(content)}))


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.promise("C31")
def test_code_in_the_training_state_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    replace_training_state(path, {"step": 1, "random": Payload()})
    with pytest.raises(CheckpointError, match="content, which is refused"):
        open_checkpoint(path).training_state()
    assert not (tmp_path / "executed").exists()


def test_a_training_state_of_another_kind_is_refused(tmp_path):
    path = save(tmp_path, 1)
    replace_training_state(path, [1, 2])
    with pytest.raises(CheckpointError, match="holds the wrong content; expected a dict, got list"):
        open_checkpoint(path).training_state()


def test_a_symlink_loop_is_damage_not_a_crash(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(path / WEIGHTS)
    assert newest_checkpoint(tmp_path).step == 1


def failing(error: OSError):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.mark.promise("C28")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("place", ["tempfile.mkdtemp", "save_weights", "torch.save", "os.fsync", "os.rename"])
def test_a_failing_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, place, code):
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in (tmp_path / FOLDER / "step-00000001").iterdir()}
    with monkeypatch.context() as patch:
        name = place.rsplit(".", 1)
        owner = module if len(name) == 1 else getattr(module, name[0])
        patch.setattr(owner, name[-1], failing(OSError(code, os.strerror(code))))
        with pytest.raises(ResourceError, match="earlier checkpoints are intact") as caught:
            save(tmp_path, 2)
    assert caught.value.exit_code == 7
    assert os.strerror(code) in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    assert {path: path.read_bytes() for path in before} == before
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("size", [100, 5_000_000])
def test_a_real_file_size_limit(tmp_path, fork, size):
    """The system itself refuses, in the weights or (small weights, large optimiser) in the training state."""
    save(tmp_path, 1)

    def limited() -> None:
        # Python leaves what it compiled cut short there, for all that import it later
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            save_checkpoint(
                tmp_path,
                2,
                model={"weight": torch.zeros(size)},
                training={"step": 2, "state": torch.zeros(5_000_000)},
                config=CONFIG,
                class_names=NAMES,
            )
        except ResourceError:
            os._exit(7)

    assert fork(limited) == 7
    assert names(tmp_path) == ["step-00000001"]


def test_an_error_of_ours_is_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, model={}, training={}, config={"bad": object()}, class_names=NAMES)
    assert names(tmp_path) == []


@pytest.mark.promise("C28")
def test_leftovers_of_dead_writers_are_removed(tmp_path):
    save(tmp_path, 1)
    for name in (".step-00000002-abc.part", ".step-00000001.old"):
        (tmp_path / FOLDER / name).mkdir()
        (tmp_path / FOLDER / name / WEIGHTS).write_bytes(b"half")
    assert newest_checkpoint(tmp_path).step == 1
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def test_damaged_generations_do_not_count_among_those_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / FOLDER / "step-00000003" / TRAINING).write_bytes(b"")
    set_aside_damaged(tmp_path, newest_checkpoint(tmp_path).step)
    save(tmp_path, 3)
    assert [path.name for path in generations(tmp_path)] == ["step-00000003", "step-00000002"]
    assert newest_checkpoint(tmp_path).step == 3
    assert (tmp_path / FOLDER / "step-00000003.damaged").is_dir()


def save_in_place(run: Path, step: int) -> None:
    """The control: the same files, written straight to where they are read."""
    path = run / FOLDER / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    module._write_generation(path, step, {"weight": torch.rand(1_000_000)}, {"step": step}, CONFIG, NAMES, {})
    for old in generations(run)[2:]:
        shutil.rmtree(old)


def save_atomically(run: Path, step: int) -> None:
    save_checkpoint(
        run, step, model={"weight": torch.rand(1_000_000)}, training={"step": step}, config=CONFIG, class_names=NAMES
    )


def kills(run: Path, fork, writer) -> int:
    """How many of 10 killed writers left a newest generation that is damaged."""
    generator = random.Random(0)
    damaged = 0
    step = 1

    def write_forever() -> None:
        remove_leftovers(run)
        current = step
        while True:
            writer(run, current)
            current += 1

    for _ in range(10):
        assert fork(write_forever, kill_after=generator.uniform(0.1, 0.4)) == -9
        found = generations(run)
        assert found
        try:
            open_checkpoint(found[0])
        except CheckpointError:
            damaged += 1
        step = int(found[0].name.removeprefix("step-")) + 1
    return damaged


def _written_text(folder: Path) -> None:
    write_text_atomic(folder / "note.txt", "whole")


def _written_weights(folder: Path) -> None:
    save_weights(folder / "weights.safetensors", {"weight": torch.ones(3)}, {})


def _written_blocks(folder: Path) -> None:
    BlockStore(folder / "map.work", {}).save("block-0", {"label": np.zeros((2, 3), np.uint8)})


@pytest.mark.promise("C28")
@pytest.mark.parametrize("write", [_written_text, _written_weights, _written_blocks, lambda folder: save(folder, 1)])
def test_files_are_on_the_disk_before_they_are_seen(write, tmp_path, monkeypatch):
    """A power cut after the rename finds their content, and their names: both are flushed, one before and one after."""
    flushed: dict[int, tuple[int, int]] = {}
    appeared: list[Path] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def flush(descriptor: int) -> None:
        found = os.fstat(descriptor)
        flushed[found.st_ino] = found.st_size, found.st_mtime_ns
        fsync(descriptor)

    def appears(source, target, move) -> None:
        source, target = Path(source), Path(target)
        for path in [source, *source.rglob("*")] if source.is_dir() else [source]:
            found = path.stat()
            assert flushed.get(found.st_ino) == (found.st_size, found.st_mtime_ns), path.name
        move(source, target)
        appeared.append(target)
        flushed.pop(target.parent.stat().st_ino, None)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda source, target: appears(source, target, replace))
    monkeypatch.setattr(os, "rename", lambda source, target: appears(source, target, rename))
    write(tmp_path)
    assert appeared and appeared[-1].parent.stat().st_ino in flushed


@pytest.mark.promise("C28")
def test_a_writer_killed_at_any_time_leaves_a_whole_checkpoint(tmp_path, fork):
    assert kills(tmp_path, fork, save_atomically) == 0


@pytest.mark.promise("C28")
def test_the_kill_test_catches_a_writer_that_is_not_atomic(tmp_path, fork):
    assert kills(tmp_path, fork, save_in_place) > 0


@pytest.mark.promise("C28")
def test_one_writer_per_run(tmp_path, fork):
    with run_lock(tmp_path):
        with pytest.raises(CheckpointError, match=f"locked by pid {os.getpid()} on host ") as caught:
            with run_lock(tmp_path):
                pass
    assert caught.value.exit_code == 4
    with run_lock(tmp_path):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, fork):
    def die_with_lock() -> None:
        with run_lock(tmp_path):
            os._exit(9)

    assert fork(die_with_lock) == 9
    assert "pid" in (tmp_path / ".lock").read_text()
    with run_lock(tmp_path):
        pass


def test_the_holder_is_named_where_a_longer_name_stood(tmp_path, fork):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 123456789, "host": "a-host-with-a-longer-name" * 5}))
    with run_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_forked_worker_knows_of_no_lock(tmp_path, fork):
    # it would close files of its own that have the same numbers, in its own children
    with run_lock(tmp_path):
        assert lock._held and fork(lambda: os._exit(len(lock._held))) == 0


def test_a_worker_that_outlives_its_trainer_does_not_hold_the_lock(tmp_path, fork):
    def leave_a_worker() -> None:
        with run_lock(tmp_path):
            if os.fork() == 0:
                import time

                time.sleep(1.5)
                os._exit(0)
            os._exit(9)

    assert fork(leave_a_worker) == 9
    with run_lock(tmp_path):
        pass


@pytest.mark.promise("C30")
def test_random_state_through_a_checkpoint(tmp_path):
    seed_everything(3)
    random.random(), np.random.rand(3), torch.rand(3)
    random.gauss(0, 1), np.random.randn()
    save(tmp_path, 1)
    expected = (random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(3))
    seed_everything(99)
    restore_random_state(newest_checkpoint(tmp_path).training_state()["random"][0])
    found = (random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(3))
    assert found[:4] == expected[:4]
    assert torch.equal(found[4], expected[4])


def test_generators_are_put_back_on_the_devices_of_both_sides(monkeypatch):
    put_back = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: put_back.append((value, device)))
    for states in (["a"], ["a", "b", "c"], []):
        restore_random_state({**random_state(), "cuda": states})
    assert put_back == [("a", 0), ("a", 0), ("b", 1)]


def test_any_seed_of_63_bits_is_taken():
    seed_everything(2**63 - 1)
    seed_everything(0)
