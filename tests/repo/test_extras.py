# SPDX-License-Identifier: Apache-2.0
"""What works with torch and numpy alone, and what the rest says there; the extras are those of pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from drseg_core.errors import DRSegError, MissingExtraError
from drseg_core.extras import EXTRAS, module_name, require

ROOT = Path(__file__).parents[2]
LIBRARIES = sorted({library for libraries in EXTRAS.values() for library in libraries})
# a process in which none of the extras' libraries is installed
BARE = f"""
import sys
from importlib import metadata

for name in {[module_name(library) for library in LIBRARIES]!r}:
    sys.modules[name] = None
distribution = metadata.distribution


def missing(name):
    if name in {LIBRARIES!r}:
        raise metadata.PackageNotFoundError(name)
    return distribution(name)


metadata.distribution = missing
"""


@pytest.fixture(scope="module")
def bare() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(code: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-c", BARE + code], capture_output=True, text=True, env=environment)

    return run


def drseg(*words: str) -> str:
    return f"from drseg_core.cli.main import main\nsys.exit(main({list(words)!r}))"


@pytest.mark.promise("C27")
def test_ops_and_pdgr_need_no_extra(bare):
    done = bare("""
import torch
import drseg_core.ops
from drseg_core.nn import PDGR, SPSD, UGAF

features = torch.randn(1, 4, 3, 3, requires_grad=True)
pdgr = PDGR(channels=4, prior_dim=5, k=3)
pdgr(features, torch.randn(1, 5, 3, 3)).square().mean().backward()
assert features.grad.abs().sum() > 0 and all(p.grad is not None for p in pdgr.parameters())
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.promise("C27")
def test_every_module_but_the_commands_can_be_imported(bare):
    done = bare("""
import importlib, pkgutil, drseg_core

for found in pkgutil.walk_packages(drseg_core.__path__, "drseg_core."):
    if not found.name.startswith("drseg_core.cli.") and not found.name.endswith("__main__"):
        importlib.import_module(found.name)
        print(found.name)
""")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 80


@pytest.mark.promise("C27")
@pytest.mark.parametrize(
    ("command", "extras"),
    [("predict", "cli,model,maps"), ("train", "cli,model"), ("data", "cli,maps"), ("study", "cli,model")],
)
def test_a_command_says_in_one_line_what_to_install(bare, command, extras):
    done = bare(drseg(command, "run", "scene.tif", "--out", "map.tif"))
    assert done.returncode == 5 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"drseg: error: {command}: jsonargparse, pyyaml") and "not installed; expected" in line
    assert line.endswith(f": pip install 'drseg[{extras}]'")


def test_a_command_without_the_extra_of_its_work_says_so_too(bare):
    """jsonargparse and pyyaml are there: help and usage work, the command does not."""
    code = BARE + "del sys.modules['jsonargparse'], sys.modules['yaml']\n"
    done = bare(code + drseg("predict", "--help"))
    assert done.returncode == 0 and done.stdout.startswith("usage: drseg predict"), done.stderr
    done = bare(code + drseg("predict", "--nonsense"))
    assert done.returncode == 2 and "--nonsense\nusage: drseg predict" in done.stderr
    done = bare(code + drseg("predict", "run", "scene.tif", "--out", "map.tif"))
    assert done.returncode == 5 and "predict: torchvision, timm" in done.stderr and "rasterio" in done.stderr


def test_help_version_and_doctor_need_no_extra(bare):
    for word, said in (("--help", "drseg COMMAND --help"), ("--version", "drseg "), ("doctor", "no problems found")):
        done = bare(drseg(word))
        assert done.returncode == 0 and said in done.stdout, done.stderr
    assert "maps: rasterio, pillow, tqdm not installed; pip install 'drseg[maps]'" in done.stdout
    assert "cli: jsonargparse, pyyaml not installed" in done.stdout and "knn_graph on cpu" in done.stdout
    assert bare(drseg("fly")).returncode == bare(drseg()).returncode == 2


# function: where it is, how it is called, and the extra that it needs
CALLS = {
    "load_config": ("config.load", "('tiny')", "model"),
    "build_model": ("models.build", "(ModelConfig())", "model"),
    "save_weights": ("models.weights", "('a', {}, {})", "model"),
    "read_image": ("data.images", "(Path('a.png'))", "model"),
    "write_scenes": ("data.synthetic", "('a', splits={})", "model"),
    "open_scene": ("scenes.reader", "('a.tif').__enter__()", "maps"),
    "predict_scene": ("scenes.predict", "(None, 'a.tif', 'b.tif')", "maps"),
}


TRY = """
from drseg_core.{module} import {name}
try:
    {name}{call}
except ImportError as error:
    print(error)
"""


def test_a_function_says_in_one_line_what_to_install(bare):
    code = "from pathlib import Path\nfrom drseg_core.config.schema import ModelConfig\n"
    done = bare(
        code + "".join(TRY.format(module=where, name=name, call=call) for name, (where, call, _) in CALLS.items())
    )
    assert done.returncode == 0, done.stderr
    for line, (_, _, extra) in zip(done.stdout.splitlines(), CALLS.values(), strict=True):
        assert "not installed; expected the extra" in line and line.endswith(f"pip install 'drseg[{extra}]'")


def test_the_message(monkeypatch):
    require.cache_clear()
    absent = {"rasterio", "yaml"}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(MissingExtraError) as caught:
        require("f", "rasterio")
    assert str(caught.value) == "f: rasterio is not installed; expected the extra maps: pip install 'drseg[maps]'"
    assert isinstance(caught.value, DRSegError) and caught.value.exit_code == 5
    with pytest.raises(
        MissingExtraError, match="f: pyyaml and rasterio are not installed; expected the extras cli and"
    ):
        require("f", "cli", "maps", "plots")
    # it is asked again once it was installed
    absent.clear()
    require("f", "rasterio")


def test_the_extras_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]} == {"torch", "numpy"}
    extras = project["optional-dependencies"]
    for name, libraries in EXTRAS.items():
        assert tuple(re.match(r"[\w-]+", line)[0] for line in extras[name]) == libraries
    assert set(re.search(r"\[(.+)\]", extras["all"][0])[1].split(",")) == set(EXTRAS)
