# SPDX-License-Identifier: Apache-2.0
"""One training step and one scored image of every benchmark set under the large presets, with random weights on a CPU.

Takes minutes and up to about ten GB of memory and four of disk, so only ``pytest -m slow tests/cli/test_presets.py``
runs it. It prints time and peak memory of every command.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from drseg_core.training.logs import read_log
from tests.data.miniatures import NAMES, write_release

RANDOM = ["--model.clip.weights", "null", "--model.dino.weights", "null"]
STEP = ["--train.iterations", "1", "--train.batch_size", "1", "--train.workers", "0", "--train.log_every", "1"]


@pytest.fixture
def measured(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """``measured("train", ...)`` runs the command in a process of its own and prints what it took."""
    if "slow" not in request.config.option.markexpr:
        pytest.skip("minutes and up to ten GB of memory; runs with -m slow")

    def run(*words: object) -> None:
        command = [sys.executable, "-m", "drseg_core", *map(str, words), "--device", "cpu"]
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
        begin = time.monotonic()
        with open(tmp_path / "output", "w") as output:
            actions = [(os.POSIX_SPAWN_DUP2, output.fileno(), stream) for stream in (1, 2)]
            child = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
            _, status, usage = os.wait4(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, (tmp_path / "output").read_text()
        with capsys.disabled():
            seconds, memory = time.monotonic() - begin, usage.ru_maxrss / 2**20
            used = usage.ru_utime + usage.ru_stime
            print(f"\n{request.node.callspec.id} {words[0]}: {seconds:.0f} s, {used:.0f} CPU s, {memory:.1f} GiB")

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["vitb", "vitl"])
def test_a_step_and_an_image(measured: Callable[..., None], tmp_path: Path, preset: str, name: str) -> None:
    data = f"{name}:{write_release(name, tmp_path / 'sets', count=1)}"
    run, out = tmp_path / "run", tmp_path / "metrics.json"
    try:
        measured("train", "--config", preset, *RANDOM, *STEP, "--data", data, "--out", run)
        (record,) = read_log(run)
        assert record["step"] == 1 and record["skipped"] == 0 and record["loss"] > 0
        measured("evaluate", run, "--data", data, "--protocol", "rskt", "--out", out)
        card = json.loads(out.read_text())
        assert card["images"] == 1 and card["mIoU"] is not None
        total = json.loads((run / "manifest.json").read_text())["parameters"]["total"]["total"]
        assert total == {"vitb": 457_804_132, "vitl": 737_406_052}[preset]
    finally:
        # gigabytes each, and pytest keeps the folders of three sessions
        shutil.rmtree(run, ignore_errors=True)
