# SPDX-License-Identifier: Apache-2.0
"""A training that is killed, or refused by the disk, at any system call that writes into its folder.

What was finished stays and can be read, and a resumed run ends with the bytes of one that was left alone. At every
commit some calls are drawn, in the deep run a hundred for each test (``make test-deep``).
"""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import yaml

from drseg_core.checkpoints.channels import load_channels
from drseg_core.checkpoints.checkpoint import WEIGHTS, generations, open_checkpoint
from drseg_core.cli.main import main
from drseg_core.training.logs import read_log
from tests.faults.conftest import RENAME, Call, one_line, places
from tests.training.test_resume import differences, final_state

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def words(small, data):
    options = {"train.iterations": STEPS, "train.checkpoint_every": 1, "model.graph.dropout": 0.2}
    extra = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["train", *small, *extra, "--data", data, "--device", "cpu", "--out"]


@pytest.fixture(scope="module")
def undisturbed(inject, words, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    # in this process once, which then has loaded all that a child needs
    assert main([*words, str(place / "here")]) == 0
    done = inject(lambda: main([*words, str(place / "run")]), place)
    assert done.code == 0 and differences(final_state(place / "run"), final_state(place / "here")) == []
    return place / "run", done.calls


def finished(calls: list[Call]) -> int:
    """The last step whose generation was renamed."""
    steps = [
        re.fullmatch(r"run/checkpoints/\.step-(\d+)-\w+\.part", call.path) for call in calls if call.number == RENAME
    ]
    return max([int(step[1]) for step in steps if step], default=0)


def readable(run: Path) -> int:
    """Every file that does not say that it is unfinished can be read; returns the newest step."""
    for path in (path for path in run.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(run).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".yaml":
            assert yaml.safe_load(path.read_text(encoding="utf-8"))
        elif path.name == "channels.safetensors":
            load_channels(path)
    assert [record["step"] for record in read_log(run)] == list(range(1, len(read_log(run)) + 1))
    return max([open_checkpoint(path).step for path in generations(run)], default=0)


def goes_on(inject, words, run: Path, right: Path) -> None:
    """The same command, resumed where it has begun, ends as if nothing had been."""
    resume = ["--resume"] if (run / "config.yaml").is_file() else []
    done = inject(lambda: main([*words, str(run), *resume]), run.parent)
    assert done.code == 0 and "checksum" not in done.said, done
    newest, expected = generations(run)[0], generations(right)[0]
    assert (newest / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert differences(final_state(run), final_state(right)) == []
    assert readable(run) == STEPS and len(read_log(run)) == STEPS
    assert not list(run.rglob("*.part*"))


@pytest.mark.promise("C28", "C30")
def test_killed_at_a_system_call(inject, words, undisturbed, tmp_path):
    right, calls = undisturbed
    for number, at in enumerate(places(calls, 4, seed=0)):
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        done = inject(lambda run=run: main([*words, str(run)]), run.parent, at=at)
        assert done.code == -9, done
        assert readable(run) >= finished(done.calls[:-1]), done
        goes_on(inject, words, run, right)


@pytest.mark.promise("C28", "C38")
def test_refused_at_a_system_call(inject, words, undisturbed, tmp_path):
    right, calls = undisturbed
    for number, at in enumerate(places(calls, 3, seed=1)):
        error, once = ((errno.ENOSPC, False), (errno.EIO, True), (errno.ENOSPC, True))[number % 3]
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        done = inject(lambda run=run: main([*words, str(run)]), run.parent, at=at, error=error, once=once)
        if done.code != 0:
            one_line(done)
        assert readable(run) >= finished(done.calls[: at - 1]), done
        goes_on(inject, words, run, right)
