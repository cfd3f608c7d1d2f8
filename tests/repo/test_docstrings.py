# SPDX-License-Identifier: Apache-2.0
"""What ``__all__`` names has an example in its docstring, and every example is true.

The examples run in a folder that has what a reader has: data, a trained run, a scene, original archives.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch

from drseg_core.checkpoints.pretrained import save_pretrained
from drseg_core.checkpoints.run import load_run
from drseg_core.config.load import override
from drseg_core.ops import _dispatch
from drseg_core.scenes.synthetic import write_synthetic_scene
from drseg_core.testing import numerics
from drseg_core.training.loop import train
from tests.checkpoints.test_pretrained import Hub
from tests.data.miniatures import write_raw, write_release
from tests.training.conftest import config, data

__all__ = ["config", "data"]

ROOT = Path(__file__).parents[2]


def public_modules() -> Iterator[ModuleType]:
    """Modules that say what is public; cases of ops are sizes to test and measure at."""
    for path in sorted((ROOT / "drseg_core").rglob("*.py")):
        if path.stem != "cases" and re.search(r"^__all__\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def public() -> dict[str, Any]:
    """Functions and classes by where they are defined."""
    named = [getattr(module, name) for module in public_modules() for name in module.__all__]
    named += vars(numerics).values()
    found = [value for value in named if inspect.isclass(value) or inspect.isroutine(value)]
    found = [value for value in found if value.__module__.startswith("drseg_core")]
    return {f"{value.__module__}.{value.__qualname__}": value for value in found}


PUBLIC = public()


@pytest.fixture(scope="module")
def place(config, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "place"
    shutil.copytree(data.removeprefix("folder:"), folder / "data")
    run = train(override(config, {"train.iterations": 1}), data, folder / "run", device="cpu", show_progress=False)
    save_pretrained(load_run(run), folder / "folder")
    write_synthetic_scene(folder / "scene.tif", width=60, height=40)
    write_raw("udd5", folder / "raw")
    write_release("udd5", folder / "datasets")
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch) -> Iterator[None]:
    """A copy of the place as the current folder, one thread, and a hub that is not on any network."""
    shutil.copytree(place, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(huggingface_hub, "HfApi", type("Hub", (Hub,), {"asked": [], "store": tmp_path / "hub"}))
    # a backend that an example registers ends with it
    for name in ("_tables", "_names"):
        monkeypatch.setattr(_dispatch, name, type(getattr(_dispatch, name))(getattr(_dispatch, name)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    _dispatch.table.cache_clear()


def examples(name: str) -> doctest.DocTest:
    text = inspect.getdoc(PUBLIC[name]) or ""
    return doctest.DocTestParser().get_doctest(text, {}, name, inspect.getsourcefile(PUBLIC[name]), 0)


def test_the_public_names_were_found():
    parts = {name.split(".")[1] for name in PUBLIC}
    assert {"checkpoints", "config", "data", "errors", "evaluation", "models", "nn", "ops", "scenes"} <= parts
    assert "drseg_core.backends" in PUBLIC and "drseg_core.nn.pdgr.PDGR" in PUBLIC and len(PUBLIC) > 60


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_an_example(name):
    assert examples(name).examples, f"{name}: no example in its docstring; expected lines that begin with >>>"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_examples_are_true(here, name):
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(examples(name), out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("text", ["A thing.", ">>> 1 + 1\n3\n", ">>> int('a')\n0\n"])
def test_planted_faults_are_found(text):
    test = doctest.DocTestParser().get_doctest(text, {}, "planted", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(test, out=lambda line: None)
    assert not test.examples or runner.failures
