# SPDX-License-Identifier: Apache-2.0
"""How many threads a command takes and how they wait: what control groups say, what users say, and when it is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drseg_core import processor
from drseg_core.cli.doctor import thread_lines

ROOT = Path(__file__).parents[2]
UNSET = ("OMP_NUM_THREADS", *processor.WAITING_OF_USERS)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        # the least of the groups above counts
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
            },
            0.5,
        ),
        # a container that sees its group at the top and the host's path
        ({"proc/self/cgroup": "0::/host/pod\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        # version 1; another controller's limit is none
        (
            {
                "proc/self/cgroup": "3:cpuset:/x\n1:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "no number\n"}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], granted: float | None) -> None:
    assert processor.quota(write(tmp_path, files)) == granted


@pytest.mark.parametrize(("granted", "threads"), [(None, None), (0.5, "1"), (1.5, "2"), (8.0, None), (4.0, None)])
def test_a_quota_below_the_cores_bounds_the_threads(
    monkeypatch: pytest.MonkeyPatch, granted: float | None, threads: str | None
) -> None:
    monkeypatch.setattr(processor, "quota", lambda: granted)
    monkeypatch.setattr(processor, "allowed_cores", lambda: 4)
    assert processor.choice({}).get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("granted", "processes", "threads"), [(None, 2, "2"), (None, 3, "1"), (None, 9, "1"), (2.0, 2, "1")]
)
def test_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, granted: float | None, processes: int, threads: str
) -> None:
    monkeypatch.setattr(processor, "quota", lambda: granted)
    monkeypatch.setattr(processor, "allowed_cores", lambda: 4)
    assert processor.choice({}, processes)["OMP_NUM_THREADS"] == threads
    assert "OMP_NUM_THREADS" not in processor.choice({"OMP_NUM_THREADS": "3"}, processes)


@pytest.mark.parametrize("name", UNSET)
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(processor, "quota", lambda: 1.0)
    monkeypatch.setattr(processor, "allowed_cores", lambda: 4)
    chosen = processor.choice({name: "3"})
    assert name not in chosen
    if name == "OMP_NUM_THREADS":
        assert chosen == processor.WAITING
    else:
        assert chosen == {"OMP_NUM_THREADS": "1"}


def command(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    kept = {key: value for key, value in os.environ.items() if key not in UNSET}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | {"PYTHONPATH": path} | environment, capture_output=True, text=True
    )


# a command that shows what its process, and one that it starts, have in their environment when torch is loaded
SHOWN = f"""
import json, os, subprocess, sys
import drseg_core.cli.evaluate as command
from drseg_core.cli.main import main
def run(args):
    assert "torch" not in sys.modules
    import torch
    code = "import json, os; print(json.dumps([os.environ.get(name) for name in {UNSET}]))"
    child = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    print(json.dumps([[os.environ.get(name) for name in {UNSET}], child, torch.get_num_threads()]))
command.run = run
sys.exit(main(["evaluate", "run", "--data", "folder:x", "--out", "m.json"]))
"""


def test_commands_set_it_before_torch_is_loaded_and_say_so_in_one_line() -> None:
    done = command(SHOWN)
    own, child, threads = json.loads(done.stdout)
    assert own == child and own[1:] == ["passive", "1000", None]
    assert done.stderr == f"drseg: INFO: CPU threads: {threads}; idle ones sleep at once\n"


# without torch, which takes longer than all else
QUICK = SHOWN.replace("    import torch\n", "").replace("torch.get_num_threads()", "None")
MAPS = QUICK.replace("cli.evaluate", "cli.predict").replace('"evaluate", "run", "--data", "folder:x"', "WORDS")


@pytest.mark.parametrize(
    ("words", "threads"),
    [
        (["predict", "run", "x.tif"], None),
        # which has options with words of the model
        (["predict", "zero-shot", "x.tif", "--classes", "roof"], None),
        (["predict", "run", "x.tif", "--cluster", "1000"], "1"),
        (["predict", "run", "x.tif", "--cluster", "tcp://host:8786"], None),
    ],
)
def test_maps_too_and_workers_of_this_machine_share_its_cores(words: list[str], threads: str | None) -> None:
    done = command(MAPS.replace("WORDS", f"*{words}").replace("m.json", "m.tif"))
    assert done.returncode == 0, done.stderr
    own, child, _ = json.loads(done.stdout)
    granted = processor.choice({}).get("OMP_NUM_THREADS")
    assert own == child == [threads or granted, "passive", "1000", None]
    assert ("1 in each of 1000 workers; idle" in done.stderr) == (threads is not None)


def test_commands_leave_the_users_settings() -> None:
    done = command(SHOWN, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="active")
    own, child, threads = json.loads(done.stdout)
    assert own == child == ["1", "active", None, None] and threads == 1
    assert done.stderr == ("drseg: INFO: CPU threads: 1 (OMP_NUM_THREADS); they wait by OMP_WAIT_POLICY=active\n")


def test_of_processes_that_start_together_one_says_it() -> None:
    assert command(QUICK, RANK="1").stderr == ""
    assert "CPU threads" in command(QUICK, RANK="0").stderr


def test_nothing_is_set_when_torch_is_loaded() -> None:
    assert command(f"import torch\n{SHOWN.replace('assert', 'False and')}").stderr == ""
    environment: dict[str, str] = {}
    assert processor.prepare(environment) is None and environment == {}


def test_the_library_alone_sets_nothing() -> None:
    done = command("import os, drseg_core.nn; print(os.environ.get('OMP_WAIT_POLICY'))")
    assert done.stdout == "None\n"


def test_the_doctor_explains_the_two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drseg_core.cli.doctor.quota", lambda: 1.5)
    monkeypatch.setattr("drseg_core.cli.doctor.choice", lambda environment: {"OMP_NUM_THREADS": "2"})
    cores, threads, waits = thread_lines({"GOMP_SPINCOUNT": "7"})
    assert "1.5 granted" in cores
    assert threads.startswith("OMP_NUM_THREADS: 2, set by commands; ")
    assert waits.startswith("OMP_WAIT_POLICY: GOMP_SPINCOUNT=7, as set; active: ") and waits.endswith("it sleeps")
    monkeypatch.undo()
    assert "OMP_NUM_THREADS: 5, as set" in list(thread_lines({"OMP_NUM_THREADS": "5"}))[1]
    assert "OMP_WAIT_POLICY: passive, set by commands" in list(thread_lines({}))[2]
