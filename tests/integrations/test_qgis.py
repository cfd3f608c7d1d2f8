# SPDX-License-Identifier: Apache-2.0
"""The QGIS plugin in QGIS itself: ``qgis_process``, and its Python where layers are loaded."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drseg_core.cli.main import main
from tests.integrations.conftest import ROOT

rasterio = pytest.importorskip("rasterio")
# Debian's script of that name hands on an option that the program refuses
QGIS = shutil.which("qgis_process.bin") or shutil.which("qgis_process")
pytestmark = pytest.mark.skipif(QGIS is None, reason="needs qgis_process (apt-get install qgis python3-qgis)")
# of a system's Python, where qgis is installed
PYTHON = "/usr/bin/python3"
WORDS = ("CLASSES=building; road, street; tree#00ff00", "PRESET=tiny", "OFFLINE=true")


@pytest.fixture(scope="module")
def environment(executable: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user of QGIS who has the plugin and nothing else, with ``drseg`` on PATH."""
    home = tmp_path_factory.mktemp("qgis")
    found = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")},
        "HOME": str(home),
        "PATH": f"{executable.parent}{os.pathsep}{os.environ['PATH']}",
        "QGIS_CUSTOM_CONFIG_PATH": str(home),
        "QGIS_PLUGINPATH": str(ROOT / "integrations" / "qgis"),
        "QT_QPA_PLATFORM": "offscreen",
        "XDG_RUNTIME_DIR": str(home),
    }
    subprocess.run([str(QGIS), "plugins", "enable", "drseg_qgis"], env=found, capture_output=True, check=True)
    return found


@pytest.fixture
def qgis(environment: dict[str, str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """``qgis("run", ...)``: exit code and all that is said."""

    def call(*words: Any, **variables: str) -> tuple[int, str]:
        done = subprocess.run(
            [str(QGIS), *map(str, words)],
            env={**environment, **variables},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is hardly trained."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = [
        "--config",
        "tiny",
        "--train.iterations",
        "1",
        "--train.batch_size",
        "1",
        "--train.crop_size",
        "32",
        "--device",
        "cpu",
    ]
    assert main(["train", *words, "--data", "synthetic:seed=0,scenes=4", "--out", str(out)]) == 0
    return out


def test_what_it_offers(qgis: Callable[..., tuple[int, str]]) -> None:
    code, text = qgis("list")
    assert code == 0
    for name in ("map_from_words", "map_with_run", "tile"):
        assert f"drseg:{name}\t" in text
        code, said = qgis("help", f"drseg:{name}")
        assert code == 0 and "OUTPUT" in said


def test_a_map_from_words(qgis: Callable[..., tuple[int, str]], scene: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyogrio")
    out = tmp_path / "a map.tif"
    code, text = qgis(
        *("run", "drseg:map_from_words", "--", f"INPUT={scene}", *WORDS, "SCORES=true", "VIEW=true", "THRESHOLD=0.1"),
        *("MORE=--k 5", f"POLYGONS={tmp_path / 'p.gpkg'}", f"OUTPUT={out}"),
    )
    assert code == 0, text
    for name, end in (
        ("OUTPUT", ".tif"),
        ("UNCERTAINTY", "_uncertainty.tif"),
        ("AREAS", "_areas.csv"),
        ("PAGE", ".html"),
    ):
        assert f"{name}:\t{tmp_path / 'a map'}{end}\n" in text
        assert (tmp_path / f"a map{end}").is_file()
    assert f"POLYGONS:\t{tmp_path / 'p.gpkg'}" in text and (tmp_path / "p.gpkg").is_file()
    assert (tmp_path / "a map_scores.tif").is_file()
    # what is under way, and how far
    assert "\nwindows\n" in text and "90...100" in text
    assert "WARNING:" in text and "random weights" in text
    # the map of the command itself
    own = [
        "predict",
        "zero-shot:tiny",
        scene,
        "--classes",
        "building; road, street; tree#00ff00",
        "--offline",
        "--k",
        5,
    ]
    assert main([*map(str, own), "--threshold", "0.1", "--out", str(tmp_path / "own.tif")]) == 0
    with rasterio.open(out) as found, rasterio.open(tmp_path / "own.tif") as expected:
        assert (found.read() == expected.read()).all() and found.tags() == expected.tags()


def test_a_map_with_a_run_in_an_area(
    qgis: Callable[..., tuple[int, str]], scene: Path, run: Path, tmp_path: Path
) -> None:
    """The area is a layer of a file of several, which drseg gets as a file of its own."""
    pyogrio = pytest.importorskip("pyogrio")
    shapely = pytest.importorskip("shapely")
    with rasterio.open(scene) as source:
        left, bottom, right, top = source.bounds
        box = shapely.box(left + (right - left) / 2, bottom, right, top)
        whole = shapely.box(*source.bounds)
        for layer, shape in (("all", whole), ("half", box)):
            pyogrio.raw.write(
                tmp_path / "areas.gpkg", [shape.wkb], [], [], layer=layer, crs="EPSG:32632", geometry_type="Polygon"
            )
        assert source.crs.to_epsg() == 32632
    code, text = qgis(
        *("run", "drseg:map_with_run", "--", f"INPUT={scene}", f"RUN={run}", "CLASSES=roof; lawn"),
        *(f"AOI={tmp_path / 'areas.gpkg'}|layername=half", f"OUTPUT={tmp_path / 'map.tif'}"),
    )
    assert code == 0, text
    with rasterio.open(tmp_path / "map.tif") as found:
        assert found.width == 35 and json.loads(found.tags()["class_names"]) == ["roof", "lawn"]


def test_a_training_set(qgis: Callable[..., tuple[int, str]], scene: Path, tmp_path: Path) -> None:
    pyogrio = pytest.importorskip("pyogrio")
    shapely = pytest.importorskip("shapely")
    from drseg_core.scenes.synthetic import write_synthetic_scene

    image = write_synthetic_scene(tmp_path / "scene.tif", width=300, height=200)
    with rasterio.open(image) as source:
        left, bottom, right, top = source.bounds
    halves = [shapely.box(left, bottom, (left + right) / 2, top), shapely.box((left + right) / 2, bottom, right, top)]
    labels = tmp_path / "labels.gpkg"
    names = np.array(["field", "wood"], object)
    shapes = [half.wkb for half in halves]
    pyogrio.raw.write(labels, shapes, [names], ["kind"], crs="EPSG:32632", geometry_type="Polygon")
    code, text = qgis(
        *("run", "drseg:tile", "--", f"INPUT={image}", f"LABELS={labels}", "FIELD=kind", "SIZE=64", "BACKGROUND=other"),
        f"OUTPUT={tmp_path / 'tiles'}",
    )
    assert code == 0, text
    assert (tmp_path / "tiles" / "classes.txt").read_text().split() == ["other", "field", "wood"]
    assert main(["data", "check", "folder", str(tmp_path / "tiles")]) == 0
    # a raster of numbers
    code, text = qgis(
        *("run", "drseg:tile", "--", f"INPUT={tmp_path / 'tiles/train/images'}/{_first(tmp_path)}"),
        *(f"LABELS={tmp_path / 'tiles/train/masks'}/{_first(tmp_path)}", "CLASSES=a; b; c", "SIZE=64", "VAL_SHARE=0"),
        f"OUTPUT={tmp_path / 'again'}",
    )
    assert code == 0, text
    assert (tmp_path / "again" / "classes.txt").read_text().split() == ["a", "b", "c"]


def _first(folder: Path) -> str:
    return sorted(path.name for path in (folder / "tiles/train/masks").iterdir())[0]


def test_errors_are_the_lines_of_the_command(
    qgis: Callable[..., tuple[int, str]], scene: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    begin = ("run", "drseg:map_from_words", "--", f"INPUT={scene}", "PRESET=tiny", f"OUTPUT={tmp_path / 'map.tif'}")
    code, text = qgis(*begin, "CLASSES=roof; roof")
    line = "--classes has a word twice; expected every word once, in one class, got 'roof'"
    assert code != 0 and f"ERROR:\t{line}\n" in text and "Traceback" not in text
    code, text = qgis(*begin, "CLASSES=roof; tree", "MORE=--nonsense 3")
    assert code != 0 and "ERROR:\t" in text and "--nonsense" in text and "Traceback" not in text
    code, text = qgis(*begin, "CLASSES=roof; tree", PATH=os.defpath)
    assert code != 0 and "ERROR:\tdrseg is not found; expected it in PATH (Settings" in text
    assert list(tmp_path.iterdir()) == []


def test_the_path_of_the_command_is_a_setting(
    environment: dict[str, str], executable: Path, scene: Path, tmp_path: Path
) -> None:
    found = in_qgis(environment, "setting", scene, tmp_path / "map.tif", executable, PATH=os.defpath)
    assert found["refused"].startswith(f"drseg is not found; expected it in {executable}.gone, as the settings say")
    assert found["written"] and (tmp_path / "map.tif").is_file()


def test_the_map_is_loaded_with_its_style(environment: dict[str, str], scene: Path, tmp_path: Path) -> None:
    found = in_qgis(environment, "load", scene, tmp_path / "map.tif")
    assert found["renderer"] == "paletted"
    assert found["done"] and found["classes"][1][1] == "#00ff00"
    assert [name for name, _ in found["classes"]] == ["building", "tree"]


def in_qgis(environment: dict[str, str], *words: Any, **variables: str) -> Any:
    """What ``in_qgis.py`` finds in the Python that has QGIS."""
    here = Path(PYTHON)
    if not here.exists() or subprocess.run([PYTHON, "-c", "import qgis.core"], env=environment).returncode:
        pytest.skip("needs QGIS in the system's Python (apt-get install python3-qgis)")
    done = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("in_qgis.py")), *map(str, words)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def started(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def start(*words: Any) -> subprocess.Popen[str]:
        running.append(
            subprocess.Popen(
                [str(QGIS), *map(str, words)],
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return running[-1]

    yield start
    for process in running:
        with process:
            process.kill()


def test_ctrl_c_leaves_nothing(started: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    from drseg_core.scenes.synthetic import write_synthetic_scene

    image = write_synthetic_scene(tmp_path / "scene.tif", width=900, height=900)
    (tmp_path / "maps").mkdir()
    out = tmp_path / "maps" / "map.tif"
    process = started("run", "drseg:map_from_words", "--", f"INPUT={image}", *WORDS, f"OUTPUT={out}")
    end = time.monotonic() + 120
    children: list[int] = []
    while not list(out.parent.glob("*.work")) and process.poll() is None and time.monotonic() < end:
        children = children_of(process.pid)
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=120)[0]
    assert "drseg predict zero-shot:tiny" in text and "OUTPUT:\t" not in text.partition("Results")[2]
    assert list(out.parent.iterdir()) == []
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)


def children_of(number: int) -> list[int]:
    """Processes that a thread of a process has started."""
    found = []
    for path in glob.glob(f"/proc/{number}/task/*/children"):
        # a thread may end meanwhile
        with contextlib.suppress(OSError):
            found += list(map(int, Path(path).read_text().split()))
    return found
