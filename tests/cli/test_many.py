# SPDX-License-Identifier: Apache-2.0
"""``drseg predict`` over several scenes: what it says, exit code 8, torchrun, and a call that was killed."""

from __future__ import annotations

import glob
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from drseg_core.cli.main import main
from drseg_core.scenes.predict import run_mapper
from tests.cli.conftest import ROOT
from tests.forks import Fork, in_torchrun
from tests.scenes.test_many import content
from tests.scenes.test_predict import NORTH_UP, write

rasterio = pytest.importorskip("rasterio")
from rasterio.transform import Affine  # noqa: E402

SIZES = ((150, 90), (40, 40), (60, 30), (33, 80), (50, 50))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        image = generator.integers(0, 256, (3, *size)).astype(np.uint8)
        # none is a neighbour of another
        place_of = NORTH_UP @ Affine.translation(1000 * number, 0)
        write(place / f"{number}.tif", image, crs="EPSG:32632", transform=place_of)
    return place


@pytest.fixture(scope="module")
def whole(run, scenes, tmp_path_factory) -> Path:
    """The maps of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "maps"
    assert main(["predict", str(run), str(scenes), "--out", f"{out}/{{name}}.tif", "--device", "cpu"]) == 0
    return out


@pytest.mark.promise("C38")
def test_what_is_said_of_many(drseg, run, scenes, whole, tmp_path):
    out, report = tmp_path / "maps", tmp_path / "report.json"
    bad = tmp_path / "bad.tif"
    bad.write_text("no image")
    words = ["predict", run, scenes / "1.tif", bad, f"{scenes}/[23].tif", "--out", f"{out}/", "--report", report]
    code, text, errors = drseg(*words, "--keep-going")
    assert code == 8
    assert f"failed: {bad}: read_scene: {bad} is not an image that GDAL reads" in errors
    assert f"predict: 1 of 4 scenes failed: {bad}" in errors and "the same command goes on there" in errors
    lines = text.splitlines()
    assert f"mapped: {scenes / '1.tif'} -> {out / '1.tif'}" in lines
    assert "mapped: 3 of 4 scenes" in lines and lines[-1] == f"written: {report}"
    found = json.loads(report.read_text())
    assert found["counts"]["failed"] == 1 and [scene["state"] for scene in found["scenes"]].index("failed") == 1
    assert (out / "2.tif").read_bytes() == (whole / "2.tif").read_bytes()
    # the first bad one ends the call, and those that exist are refused before it
    assert drseg(*words)[0] == 3
    code, _, errors = drseg("predict", run, f"{scenes}/*.tif", "--out", whole)
    assert code == 2 and "--out exists; expected a new file, or --overwrite" in errors
    code, _, errors = drseg("predict", run, scenes / "1.tif", tmp_path / "absent.tif", "--out", tmp_path / "new")
    assert code == 3 and "absent.tif is not a file" in errors and not (tmp_path / "new").exists()
    code, _, errors = drseg("predict", run, scenes, "--out", "map.tif")
    assert code == 2 and "have one output, map.tif; expected a pattern such as maps/{name}.tif" in errors
    assert drseg("predict", run, scenes, "--out", out, "--shard", "3/2")[0] == 2
    code, _, errors = drseg("predict", run, scenes, "--out", tmp_path / "r", "--report", tmp_path / "no" / "r.json")
    assert code == 2 and "--report is not writable" in errors
    code, _, errors = drseg("predict", run, scenes, "--out", tmp_path / "r", "--report", scenes / "1.tif")
    assert code == 2 and "--report is an input or a map; expected another path than" in errors
    # nor what is only going to be a map, or a file beside one
    for name in ("1.tif", "../new/3_areas.csv", "2.qml", "4.html"):
        words = ["predict", run, scenes, "--out", f"{tmp_path}/new/", "--report", tmp_path / "new" / name, "--view"]
        (tmp_path / "new").mkdir(exist_ok=True)
        code, _, errors = drseg(*words)
        assert code == 2 and "--report is an input or a map" in errors and not list((tmp_path / "new").iterdir()), name


def test_a_plan_of_many(drseg, run, scenes, tmp_path):
    code, text, _ = drseg("predict", run, scenes, "--out", tmp_path / "maps", "--dry-run")
    assert code == 0 and text.count("time of the model") == 5 and f"{scenes / '4.tif'}:" in text


def test_shards(drseg, run, scenes, whole, tmp_path):
    out = tmp_path / "maps"
    for shard in ("2/2", "1/2"):
        code, text, _ = drseg("predict", run, scenes, "--out", f"{out}/", "--shard", shard)
        assert code == 0 and f"shard {shard} made of: 5 of 5 scenes" in text
    code, text, _ = drseg("predict", run, scenes, "--out", f"{out}/")
    assert code == 0 and content(out) == content(whole)


@pytest.mark.promise("C45")
def test_two_processes_write_the_bytes_of_one(run, scenes, whole, tmp_path):
    out = tmp_path / "maps"
    words = ["predict", str(run), str(scenes), "--out", f"{out}/{{name}}.tif", "--device", "cpu"]
    code, text, errors = in_torchrun(words, tmp_path, anew=False)
    assert code == 0, errors
    assert text.count("mapped: 5 of 5 scenes") == 1 and text.count(" -> ") == 5
    assert content(out) == content(whole)


# what the workers import
ON_CLUSTER = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"), *sys.path)), "OMP_NUM_THREADS": "1"}


def test_workers_of_a_cluster_write_the_bytes_of_one(drseg, run, scenes, whole, tmp_path):
    pytest.importorskip("distributed", reason="the extra cluster is not installed")
    bad = tmp_path / "bad.tif"
    bad.write_text("no image")
    words = ["predict", run, scenes, bad, "--out", tmp_path / "maps", "--device", "cpu", "--cluster", 2]

    def on_cluster() -> int:
        before = dict(os.environ)
        code = main([str(word) for word in (*words, "--keep-going")])
        # Dask has settings for its workers, one thread of MKL among them
        assert dict(os.environ) == before
        return code

    call = Fork(on_cluster, tmp_path / "said", tmp_path / "errors", seconds=300, environment=ON_CLUSTER)
    text, errors = call.communicate()
    code = call.returncode
    assert code == 8 and "mapped: 5 of 6 scenes" in text and f"failed: {bad}" in errors
    kept = {name: data for name, data in content(tmp_path / "maps").items() if ".work" not in name}
    assert kept == content(whole)
    code, _, errors = drseg(*words, "--shard", "1/2")
    assert code == 2 and "--cluster makes all blocks; expected neither --shard nor torchrun beside it" in errors


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_how_a_call_is_shared_out_is_checked_first(drseg, tmp_path, how):
    """Before the run and the scene are looked for."""
    words = ["predict", tmp_path / "no run", tmp_path / "absent.tif", "--out", tmp_path / "map.tif", *how]
    for where in ("abc", "-1", "0", "tcp://host", "9" * 5000):
        code, _, errors = drseg(*words, "--cluster", where)
        assert code == 2 and errors.count("\n") == 1
        assert "--cluster has a wrong value; expected the address of a scheduler, tcp://HOST:PORT, or a num" in errors
    code, _, errors = drseg(*words, "--shard", "0/3")
    assert code == 2 and "--shard has a wrong value" in errors
    code, _, errors = drseg(*words, "--shard", "1/3", "--cluster", "2")
    assert code == 2 and "--cluster makes all blocks" in errors


@pytest.mark.promise("C33")
def test_ctrl_c_is_one_line_with_workers_too(run, scenes, tmp_path):
    """A terminal sends it to all processes."""
    pytest.importorskip("distributed", reason="the extra cluster is not installed")
    words = ["predict", str(run), str(scenes), "--out", f"{tmp_path}/", "--device", "cpu", "--cluster", "2"]

    def in_a_session() -> int:
        os.setsid()
        return main(words)

    started = Fork(in_a_session, tmp_path / "said", tmp_path / "errors", seconds=240, environment=ON_CLUSTER)
    try:
        end = time.monotonic() + 120
        # Path.glob raises where a folder goes meanwhile
        while not glob.glob(f"{tmp_path}/*.work/*.block") and time.monotonic() < end:
            assert started.poll() is None
            time.sleep(0.01)
        os.killpg(started.pid, signal.SIGINT)
        _, errors = started.communicate()
    finally:
        started.kill()
    assert started.returncode == 130 and errors.splitlines()[-1] == "drseg: interrupted"
    assert "Traceback" not in errors and "distributed." not in errors


@pytest.mark.promise("C45")
def test_a_killed_call_goes_on(forked, drseg, run, scenes, whole, tmp_path):
    out = tmp_path / "maps"
    words = ["predict", run, scenes, "--out", f"{out}/{{name}}.tif", "--device", "cpu"]
    started = forked(*words)
    end = time.monotonic() + 120
    while not glob.glob(f"{out}/0.tif.work/block-[1-9].block") and time.monotonic() < end:
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.01)
    started.kill()
    started.wait()
    assert list(out.glob("*.work/*.block")) and not list(out.glob("4.tif"))
    code, _, errors = drseg(*words)
    assert code == 0 and "started again" not in errors and content(out) == content(whole)


def test_blocks_of_another_precision_are_of_another_map(run):
    facts = [run_mapper(run, device="cpu", precision=precision).facts for precision in ("float32", "bfloat16")]
    assert [given["arithmetic"] for given in facts] == ["float32", "bfloat16"]


def test_two_calls_at_once_are_never_mixed(forked, drseg, run, scenes, whole, tmp_path):
    """One maps all, the other is refused where it meets it, or finds all of it made."""
    out = tmp_path / "maps"
    words = ["predict", run, scenes, "--out", f"{out}/{{name}}.tif", "--device", "cpu", "--overwrite"]
    started = [forked(*words, *more) for more in ((), (), ("--threshold", "0.4"))]
    said = [call.communicate()[1] for call in started]
    codes = [call.returncode for call in started]
    assert set(codes) <= {0, 2} and 0 in codes, said
    refused = [text.splitlines()[-1] for text, code in zip(said, codes, strict=True) if code]
    assert all("is being written by another call; expected one at a time" in line for line in refused)
    assert not any("Traceback" in text for text in said)
    # whoever lost may go on
    code, _, errors = drseg(*words)
    assert code == 0, errors
    assert content(out) == content(whole)


# the limit of a file's size stands for a full disk: too little for a block of the first scene, or of the last
@pytest.mark.parametrize("allowed", [9_000, 30_000])
def test_a_disk_that_fills_keeps_what_is_finished(drseg, run, scenes, whole, tmp_path, allowed):
    out, report = tmp_path / "maps", tmp_path / "report.json"
    order = [scenes / f"{number}.tif" for number in (1, 2, 4, 3, 0)]
    words = [str(w) for w in ("predict", run, *order, "--out", f"{out}/", "--device", "cpu", "--report", report)]

    def filled() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed,) * 2)
        # Python would leave what it compiles cut short there, for all that import it later
        sys.dont_write_bytecode = True
        return main(words)

    call = Fork(filled, tmp_path / "said", tmp_path / "errors")
    _, errors = call.communicate()
    assert call.returncode == 7, errors
    last = errors.splitlines()[-1]
    assert last.startswith("drseg: error: ") and f"{out}/" in last and " cannot be written: " in last
    assert "Traceback" not in errors
    counts = json.loads(report.read_text())["counts"]
    assert counts["failed"] == 1 and counts["mapped"] + counts["not reached"] == 4
    for number in range(5):
        if (out / f"{number}.tif").exists():
            assert (out / f"{number}.tif").read_bytes() == (whole / f"{number}.tif").read_bytes()
    assert not [path for path in out.rglob("*") if ".part" in path.name]
    # with room again the same command goes on
    code, _, errors = drseg(*words)
    assert code == 0 and "started again" not in errors and content(out) == content(whole), errors
