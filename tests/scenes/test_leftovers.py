# SPDX-License-Identifier: Apache-2.0
"""Files of dead processes go, those of living ones stay; a full disk is called one; a closed terminal ends a map."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from drseg_core import files
from drseg_core.errors import ConfigError, ResourceError
from drseg_core.files import atomic_path, check_room, own_prefix
from drseg_core.scenes.predict import predict_scene
from drseg_core.scenes.writer import written
from tests.cli.conftest import data, folder, forked, one_thread, run
from tests.scenes.test_predict import predictor, write

__all__ = ["data", "folder", "forked", "one_thread", "run"]
rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def of_dead_process(target: Path) -> str:
    """How the unfinished files for ``target`` begin of a process that is no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    # the number of this process may stand in other parts of the name too
    return own_prefix(target).removesuffix(f"{os.getpid()}-") + f"{done.pid}-"


@pytest.mark.promise("C28")
def test_unfinished_files_of_dead_processes_go(tmp_path):
    target = tmp_path / "map.tif"
    own = own_prefix(target)
    dead = of_dead_process(target)
    nested = f".{dead}abc.part-{dead.removeprefix('.map-')}abc.part.tif"
    gone = [f"{dead}abc.part.tif", f"{dead}abc.part.work.tif", f"{dead}x.part", nested]
    kept = [
        f"{own}abc.part.tif",
        f"{dead}abc.part.tif".replace(".map-", ".other-"),
        ".map-notours.part.tif",
        f".map-00000000-{dead.split('-')[2]}-abc.part.tif",
    ]
    for name in (*gone[:2], nested, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / gone[2]).mkdir()
    (tmp_path / gone[2] / "inside").write_text("x")
    with atomic_path(target) as temporary:
        assert temporary.name.startswith(own)
        temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "map.tif"])


@pytest.mark.promise("C45")
def test_what_a_call_left_that_was_killed_as_it_tidied_goes(tmp_path):
    image = write(tmp_path / "in.tif", np.zeros((3, 40, 40), np.uint8))
    predict_scene(predictor(), image, tmp_path / "map.tif", progress=False)
    files_of_map = sorted(path.name for path in tmp_path.iterdir())
    folder = tmp_path / f"{of_dead_process(tmp_path / 'map.tif')}work.part"
    folder.mkdir()
    (folder / "key.json").write_text("{}")
    with pytest.raises(ConfigError, match="map.tif exists; expected a new path, or overwrite"):
        predict_scene(predictor(), image, tmp_path / "map.tif", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == files_of_map


@pytest.mark.promise("C45")
def test_a_folder_that_goes_while_it_is_made_is_made(tmp_path, monkeypatch):
    """Another call removes it after the system has found it there, and before pathlib looks whether it is a folder."""
    folder, make, left = tmp_path / "map.tif.work", os.mkdir, [True]
    folder.mkdir()

    def raced(path, *more):
        try:
            make(path, *more)
        except FileExistsError:
            if left and left.pop():
                folder.rmdir()
            raise

    monkeypatch.setattr(os, "mkdir", raced)
    files.make_folder(folder)
    assert folder.is_dir() and not left
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        files.make_folder(tmp_path / "file")


def test_a_file_that_goes_while_it_is_replaced_is_written(tmp_path, monkeypatch):
    target, stat = tmp_path / "map.tif", Path.stat
    target.write_text("before")

    def raced(self, **options):
        if self == target:
            target.unlink(missing_ok=True)
        return stat(self, **options)

    # whatever was asked before, it is gone when its mode is
    monkeypatch.setattr(Path, "exists", lambda self, **options: True)
    monkeypatch.setattr(Path, "stat", raced)
    files.write_text_atomic(target, "after")
    monkeypatch.undo()
    assert target.read_text() == "after" and os.listdir(tmp_path) == ["map.tif"]


def test_a_folder_of_many_files_is_not_listed_for_each(tmp_path, monkeypatch):
    """With thousands of maps in a folder that took longer than the maps; what dead processes left goes all the same."""
    listed: list[object] = []
    names = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or names(folder))
    monkeypatch.setattr(files, "_MANY", 5)
    monkeypatch.setattr(files, "_listed", {})
    dead = of_dead_process(tmp_path / "0.tif").removeprefix(".0")
    for number in range(20):
        unfinished = f".{number}{dead}"
        (tmp_path / f"{unfinished}abc.part.tif").write_text("x")
    for number in range(20):
        with atomic_path(tmp_path / f"{number}.tif") as temporary:
            temporary.write_text("whole")
    assert len(listed) == 1 and sorted(os.listdir(tmp_path)) == sorted(f"{number}.tif" for number in range(20))
    # later ones are found later
    (tmp_path / f"{unfinished}abc.part.tif").write_text("x")
    monkeypatch.setattr(files, "_AGAIN", 0.0)
    files.remove_dead(tmp_path / "19.tif")
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match=r"map.tif cannot be written: the disk is full \(Write error\)"):
        with written(tmp_path / "map.tif"):
            raise OSError("Write error")
    from rasterio._err import CPLE_AppDefinedError

    # rasterio lets this one through where it makes a Cloud Optimized GeoTIFF
    with pytest.raises(ResourceError, match=r"map.tif cannot be written: the disk is full \(Seek error at line 0\)"):
        with written(tmp_path / "map.tif"):
            raise CPLE_AppDefinedError(3, 1, "Seek error\nat line 0")
    with pytest.raises(ResourceError, match="train: the disk of .* is full; expected 2 MB, got 0 MB") as caught:
        check_room(tmp_path / "new" / "run", 2_000_000, "train")
    assert caught.value.exit_code == 7
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    check_room(tmp_path / "new" / "run", 2_000_000, "train")
    assert not files.disk_is_full(tmp_path / "new" / "map.tif")
    # there is room again, or too little for what was asked for
    with pytest.raises(ResourceError, match=r"map.gpkg cannot be written: the disk is full \(.*No space left"):
        with written(tmp_path / "map.gpkg"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_map_that_the_disk_cannot_hold_is_refused_before(tmp_path, monkeypatch):
    image = write(tmp_path / "in.tif", np.zeros((3, 400, 400), np.uint8))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    used = predictor()
    with pytest.raises(ResourceError, match="predict_scene: the disk of .* is full"):
        predict_scene(used, image, tmp_path / "map.tif", progress=False)
    assert used.model.batches == [] and [path.name for path in tmp_path.iterdir()] == ["in.tif"]


def test_a_training_that_the_disk_cannot_hold_is_refused_before(tmp_path, drseg, small, data, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, _, errors = drseg("train", *small, "--data", data, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 7 and "train: the disk of" in errors and not (tmp_path / "run").exists()


def test_a_closed_terminal_leaves_nothing_but_finished_blocks(forked, run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1500, 1500)).astype(np.uint8)
    image = write(tmp_path / "in.tif", pixels)
    started = forked("predict", run, image, "--out", tmp_path / "map.tif", "--device", "cpu")
    end = time.monotonic() + 120
    while len(list(tmp_path.glob(".*work.tif"))) < 2 and time.monotonic() < end:
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.05)
    started.send_signal(signal.SIGHUP)
    _, errors = started.communicate()
    # tqdm may say a word of its own where its bar was being made
    assert started.returncode == 143 and "drseg: terminated" in errors.splitlines()
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("in.tif", "key.json")]
    assert all(path.parent.name == "map.tif.work" and path.suffix == ".block" for path in left), left
