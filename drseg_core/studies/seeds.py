# SPDX-License-Identifier: Apache-2.0
"""Measurements of studies that train nothing of their own: each seed once, several at a time, kept in ``OUT/runs``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from drseg_core.checkpoints.versions import git_revision
from drseg_core.errors import DRSegError
from drseg_core.files import write_text_atomic
from drseg_core.studies.runner import Task, cell_folder, read_json, run_tasks, scored_sets, train_starts
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import Cell

# raised when a measure would find something else in the same models and images
VERSION = 1

Measure = Callable[[Setting, int, Path], Mapping[str, Any]]
"""``measure(setting, seed, out)``: what is found, as JSON has it, by test set. A function of a module."""


class Measured(NamedTuple):
    """``found``: ``{test set: {seed: result}}``; ``problems``: why seeds have none; ``commits`` of the source."""

    found: dict[str, dict[int, Any]]
    problems: dict[str, str]
    commits: list[str]


def measure_seeds(name: str, measure: Measure, setting: Setting, out: Path, jobs: int) -> Measured:
    """What ``measure`` finds for every seed, taken from ``OUT/runs`` where that has been done; seeds fail alone.

    Raises:
        DRSegError: no seed has a result.
    """
    paths = {seed: _path(name, setting, seed, out) for seed in setting.seeds}
    missing = [seed for seed, path in paths.items() if not path.is_file()]
    failed = train_starts(setting, missing, out, jobs)
    problems = {f"seed {seed}": problem for seed, problem in failed.items()}
    seeds = [seed for seed in setting.seeds if seed not in failed]
    tasks: list[Task] = [(_measured, (paths[seed], measure, setting, seed, out)) for seed in seeds]
    by_seed = dict[int, dict[str, Any]]()
    for place, (content, problem) in run_tasks(tasks, jobs):
        if content is None:
            problems[f"seed {seeds[place]}"] = problem or ""
        else:
            by_seed[seeds[place]] = content
    if not by_seed:
        reasons = "; ".join(f"{seed}: {problem}" for seed, problem in problems.items())
        error = DRSegError(f"study: {name} has no result; {reasons}")
        error.exit_code = 8
        raise error
    order = sorted(by_seed)
    tests = by_seed[order[0]]["found"]
    return Measured(
        {test: {seed: by_seed[seed]["found"][test] for seed in order} for test in tests},
        problems,
        sorted({content["git"] for content in by_seed.values() if content["git"]}),
    )


def _path(name: str, setting: Setting, seed: int, out: Path) -> Path:
    cell = cell_folder(setting, Cell(name, name, {}), seed, out)
    content = [VERSION, cell.name, scored_sets(setting), setting.protocol]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return out / "runs" / f"{name}-{seed}-{digest[:12]}.json"


def _measured(path: Path, measure: Measure, setting: Setting, seed: int, out: Path) -> dict[str, Any]:
    content = read_json(path)
    if content is None:
        content = {"git": git_revision(), "found": measure(setting, seed, out)}
        write_text_atomic(path, json.dumps(content) + "\n")
    return content
