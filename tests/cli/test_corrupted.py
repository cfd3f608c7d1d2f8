# SPDX-License-Identifier: Apache-2.0
"""Seeded damage to every kind of file that a command reads: a right result, or one line with that kind's exit code;
within half a minute and two gigabytes, and with nothing left behind.

``make test-deep`` (``DRSEG_DEEP=1``) takes a thousand cases instead of sixty. A case says its kind and number, of which
it can be made again: ``DRSEG_CASE=17 pytest tests/cli/test_corrupted.py -k geotiff``.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from drseg_core.cli.main import main
from drseg_core.errors import DRSegError
from tests.forks import in_child

rasterio = pytest.importorskip("rasterio")

SECONDS, GIGABYTES = 120, 2


class Kind(NamedTuple):
    """Files to damage, what reads them, the exit codes that may come of it, and what a failure must not leave."""

    make: Callable[[Path, Path], list[Path]]
    read: Callable[[Path, Path], int]
    codes: set[int]
    outputs: tuple[str, ...] = ()
    right: Callable[[Path, Path], bool] = lambda run, place: True


def damaged(content: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """What was done, and what came of it."""
    data = bytearray(content)
    how = ("cut", "flip", "splice", "header", "zeros", "longer")[random.integers(6)]
    place = int(random.integers(len(data)))
    if how == "cut":
        del data[place:]
    elif how == "flip":
        for _ in range(int(random.integers(1, 9))):
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    elif how == "splice":
        begin, length = int(random.integers(len(data))), int(random.integers(1, 200))
        data[place:place] = data[begin : begin + length]
    elif how == "header":
        # sizes, offsets and counts lie there
        for _ in range(int(random.integers(1, 5))):
            data[int(random.integers(min(len(data), 256)))] = int(random.integers(256))
    elif how == "zeros":
        data[place : place + 100] = bytes(len(data[place : place + 100]))
    else:
        data += random.bytes(int(random.integers(1, 500)))
    return f"{how} at {place}", bytes(data)


def command(*words: object) -> int:
    return main([str(word) for word in words])


def call(function: Callable[[], object]) -> int:
    """What a command makes of an error of a function."""
    try:
        function()
    except DRSegError as error:
        print(f"drseg: error: {error}", flush=True)
        return error.exit_code
    return 0


def geotiff(run: Path, place: Path) -> list[Path]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 70, 90)).astype(np.uint8)
    profile = {"driver": "GTiff", "height": 70, "width": 90, "count": 3, "dtype": "uint8", "tiled": True}
    profile |= {"blockxsize": 32, "blockysize": 32, "compress": "deflate"}
    with rasterio.open(place / "scene.tif", "w", crs="EPSG:32633", **profile) as file:
        file.write(pixels)
    return [place / "scene.tif"]


def map_is_whole(run: Path, place: Path) -> bool:
    with rasterio.open(place / "map.tif") as found, rasterio.open(place / "scene.tif") as scene:
        return found.shape == scene.shape and found.read(1).shape == scene.shape


def image(suffix: str) -> Callable[[Path, Path], list[Path]]:
    def make(run: Path, place: Path) -> list[Path]:
        for part in ("images", "masks"):
            (place / "set" / "val" / part).mkdir(parents=True)
        (place / "set" / "classes.txt").write_text("bare soil\nred roof\nblue pond\n")
        random = np.random.default_rng(1)
        picture = Image.fromarray(random.integers(0, 256, (40, 40, 3)).astype(np.uint8))
        picture.save(place / "set" / "val" / "images" / f"0{suffix}")
        Image.fromarray(random.integers(0, 3, (40, 40)).astype(np.uint8)).save(
            place / "set" / "val" / "masks" / "0.png"
        )
        return [place / "set" / "val" / "images" / f"0{suffix}", place / "set" / "val" / "masks" / "0.png"]

    return make


def checkpoint(run: Path, place: Path) -> list[Path]:
    shutil.copytree(run, place / "run")
    (generation,) = sorted((place / "run" / "checkpoints").iterdir())[-1:]
    for older in (place / "run" / "checkpoints").iterdir():
        if older != generation:
            shutil.rmtree(older)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(place / "image.png")
    return [path for path in sorted(generation.iterdir()) if path.is_file()]


def archive(kind: str) -> Callable[[Path, Path], list[Path]]:
    def make(run: Path, place: Path) -> list[Path]:
        path = place / f"a{kind}"
        random = np.random.default_rng(2)
        for name in ("one.txt", "two.txt"):
            (place / name).write_bytes(random.integers(97, 123, 3000).astype(np.uint8).tobytes())
        if kind == ".zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                for name in ("one.txt", "two.txt"):
                    file.write(place / name, f"deep/{name}")
        else:
            with tarfile.open(path, "w:gz") as tar:
                for name in ("one.txt", "two.txt"):
                    tar.add(place / name, f"deep/{name}")
        return [path]

    return make


def unpacked(path: str) -> Callable[[Path, Path], int]:
    def read(run: Path, place: Path) -> int:
        from drseg_core.data.prepare.archives import unpack

        return call(lambda: unpack(place / path, place / "out"))

    return read


def same_text(run: Path, place: Path) -> bool:
    """Both formats carry checksums, so what was unpacked is what was packed; names have none in a zip."""
    wanted = sorted((place / name).read_bytes() for name in ("one.txt", "two.txt"))
    return all(path.read_bytes() in wanted for path in (place / "out").rglob("*") if path.is_file())


def classes(run: Path, place: Path) -> list[Path]:
    (place / "classes.txt").write_text("red roof, tiles #ff0000\nmeadow\n# a remark\nStraße\n", encoding="utf-8")
    return [place / "classes.txt"]


def read_classes(run: Path, place: Path) -> int:
    from drseg_core.data.vocabulary import parse_classes

    return call(lambda: parse_classes(f"@{place / 'classes.txt'}"))


def ranking(run: Path, place: Path) -> list[Path]:
    return [Path(shutil.copy(run / "channels.safetensors", place))]


def read_ranking(run: Path, place: Path) -> int:
    from drseg_core.checkpoints.channels import load_channels

    return call(lambda: load_channels(place / "channels.safetensors"))


def card(run: Path, place: Path) -> list[Path]:
    fields = {"weights_sha256": "0" * 64, "data": {"spec": "folder:x", "split": "val"}, "protocol": None, "images": 3}
    fields |= {"class_names_sha256": "1" * 64, "mIoU_convention": "present", "mIoU": 1.0, "mACC": 2.0, "fwIoU": None}
    (place / "scores.json").write_text(json.dumps(fields, indent=1))
    return [place / "scores.json"]


def read_card(run: Path, place: Path) -> int:
    from drseg_core.checkpoints.card import read_scores

    return call(lambda: read_scores([place / "scores.json"], "0" * 64))


MAP = ("map.tif", "map_overlay.png", "map_uncertainty.tif")
KINDS = {
    "geotiff": Kind(
        geotiff, lambda run, place: command("predict", run, place / "scene.tif", "--out", place / "map.tif"), {0, 3, 7},
        MAP, map_is_whole,
    ),
    "png": Kind(image(".png"), lambda run, place: command("data", "check", "folder", place / "set"), {0, 3}),
    "jpeg": Kind(image(".jpg"), lambda run, place: command("data", "check", "folder", place / "set"), {0, 3}),
    "checkpoint": Kind(
        checkpoint,
        lambda run, place: command("predict", place / "run", place / "image.png", "--out", place / "map.tif"),
        {4}, MAP,
    ),
    "zip": Kind(archive(".zip"), unpacked("a.zip"), {0, 3}, ("out",), same_text),
    "tar": Kind(archive(".tar.gz"), unpacked("a.tar.gz"), {0, 3}, ("out",), same_text),
    "classes": Kind(classes, read_classes, {0, 2, 3}),
    "ranking": Kind(ranking, read_ranking, {0, 4}),
    "card": Kind(card, read_card, {0, 2}),
}  # fmt: skip

DEEP = bool(os.environ.get("DRSEG_DEEP"))
CASES = (1000 if DEEP else 63) // len(KINDS)


def limited(function: Callable[[], int], log: Path) -> tuple[int, str]:
    """``function`` in a child of this process with little time and memory."""

    def work() -> int:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTES * 2**30,) * 2)
        return function()

    return in_child(work, log, SECONDS)


@pytest.mark.promise("C54")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit of memory needs Linux")
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_a_line_or_no_matter(name, run, tmp_path):
    kind = KINDS[name]
    only = os.environ.get("DRSEG_CASE")
    found: dict[int, int] = {}
    for number in range(CASES) if only is None else [int(only)]:
        place = tmp_path / str(number)
        place.mkdir()
        files = kind.make(run, place)
        # the text of a kind, so that kinds do not share their damage
        random = np.random.default_rng([number, *name.encode()])
        path = files[int(random.integers(len(files)))]
        content = path.read_bytes()
        how, changed = damaged(content, random)
        if changed == content:
            continue
        path.write_bytes(changed)
        code, said = limited(lambda kind=kind, place=place: kind.read(run, place), tmp_path / "log")
        case = f"{name} {number}: {path.name}, {how}\n{said}"
        assert code in kind.codes, case
        assert "Traceback" not in said and "internal error" not in said, case
        if code == 0:
            assert kind.right(run, place), case
        else:
            lines = [line for line in said.splitlines() if line.startswith("drseg: error")]
            assert len(lines) == 1 or name in ("png", "jpeg"), case
            assert not any((place / output).exists() for output in kind.outputs), case
        assert not [left.name for left in place.rglob("*.part*")], case
        found[code] = found.get(code, 0) + 1
        shutil.rmtree(place)
    # damage that never shows would test nothing
    assert only is not None or any(code for code in found), found
