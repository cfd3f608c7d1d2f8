# SPDX-License-Identifier: Apache-2.0
"""A map whose making is killed, or refused by the disk, at any system call that writes it.

No file is there in part, finished blocks are not made again, and the next call ends with the bytes of one that was left
alone. At every commit some calls are drawn, in the deep run a hundred for each test (``make test-deep``).
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest

from drseg_core.cli.main import main
from tests.faults.conftest import RENAME, Call, one_line, places
from tests.scenes.test_predict import write

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def words(run, tmp_path_factory):
    pixels = np.random.default_rng(0).integers(1, 256, (3, 70, 90)).astype(np.uint8)
    place = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    scene = write(tmp_path_factory.mktemp("scene") / "scene.tif", pixels, crs="EPSG:32633", transform=place)
    return ["predict", str(run), str(scene), "--device", "cpu"]


def call(words, folder: Path) -> int:
    return main([*words, "--out", str(folder / "map.tif"), "--polygons", str(folder / "map.geojson")])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(inject, words, tmp_path_factory):
    # in this process once, which then has loaded all that a child needs
    assert call(words, tmp_path_factory.mktemp("here")) == 0
    place = tmp_path_factory.mktemp("undisturbed")
    done = inject(lambda: call(words, place), place)
    assert done.code == 0 and len(content(place)) == 7, done
    return content(place), done.calls


def blocks(calls: list[Call]) -> set[str]:
    """Blocks that were renamed."""
    found = [re.search(r"work/\.(block-\d+)-", call.path) for call in calls if call.number == RENAME]
    return {block[1] for block in found if block}


def whole(folder: Path, right: dict[str, bytes]) -> None:
    """What does not say that it is unfinished is complete."""
    for name, found in content(folder).items():
        if ".work/" not in name and not name.startswith("."):
            assert found == right[name], f"{name} is there in part"


def goes_on(inject, words, folder: Path, right: dict[str, bytes], kept: set[str]) -> None:
    """The same command makes no block again, and ends as if nothing had been."""
    done = inject(lambda: call(words, folder), folder)
    if done.code == 2:
        # all was done but the last words
        assert "exists; expected a new" in done.said, done
    else:
        assert done.code == 0 and not blocks(done.calls) & kept, done
    assert content(folder) == right


@pytest.mark.promise("C36", "C45")
def test_killed_at_a_system_call(inject, words, undisturbed, tmp_path):
    right, calls = undisturbed
    assert len(blocks(calls)) == 3
    for number, at in enumerate(places(calls, 4, seed=0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = inject(lambda folder=folder: call(words, folder), folder, at=at)
        assert done.code == -9, done
        whole(folder, right)
        goes_on(inject, words, folder, right, blocks(done.calls[:-1]))


@pytest.mark.promise("C36", "C38")
def test_refused_at_a_system_call(inject, words, undisturbed, tmp_path):
    right, calls = undisturbed
    for number, at in enumerate(places(calls, 3, seed=1)):
        error, once = ((errno.ENOSPC, False), (errno.EIO, True), (errno.ENOSPC, True))[number % 3]
        folder = tmp_path / str(number)
        folder.mkdir()
        done = inject(lambda folder=folder: call(words, folder), folder, at=at, error=error, once=once)
        whole(folder, right)
        if done.code == 0:
            # it did without, or wrote once more
            assert content(folder) == right, done
            continue
        one_line(done)
        assert not [name for name in content(folder) if name.startswith(".")], done
        goes_on(inject, words, folder, right, blocks(done.calls[: at - 1]))
