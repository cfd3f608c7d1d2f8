# SPDX-License-Identifier: Apache-2.0
"""Measurements of studies that train nothing of their own: each seed once, several at a time, kept in ``OUT/runs``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drseg_core.checkpoints.versions import git_revision
from drseg_core.errors import DRSegError
from drseg_core.files import write_text_atomic
from drseg_core.studies.plan import PlannedVariant
from drseg_core.studies.runner import read_json, scored_sets, train_starts
from drseg_core.studies.tasks import Task, run_tasks

# raised when a measure would find something else in the same models and images
VERSION = 2

Measure = Callable[[PlannedVariant], Mapping[str, Any]]
"""``measure(planned)``: what is found, as JSON has it, by test set. A function of a module."""


class Measured(NamedTuple):
    """``found``: ``{test set: {seed: result}}``; ``problems``: why seeds have none; ``commits`` of the source."""

    found: dict[str, dict[int, Any]]
    problems: dict[str, str]
    commits: list[str]


def measure_seeds(name: str, measure: Measure, planned: Sequence[PlannedVariant], jobs: int) -> Measured:
    """What ``measure`` finds for every seed, taken from ``OUT/runs`` where that has been done; seeds fail alone.

    Args:
        name: of the measure.
        measure: a function of a module.
        planned: one variant, once for each seed.
        jobs: processes.

    Raises:
        DRSegError: no seed has a result.
    """
    paths = {item.seed: _path(name, item) for item in planned}
    failed = train_starts([item for item in planned if not paths[item.seed].is_file()], jobs)
    starts = {item.seed: None if item.start is None else failed.get(item.start.path) for item in planned}
    problems = {f"seed {seed}": problem for seed, problem in starts.items() if problem is not None}
    left = [item for item in planned if starts[item.seed] is None]
    tasks: list[Task] = [(_measured, (paths[item.seed], measure, item)) for item in left]
    by_seed = dict[int, dict[str, Any]]()
    for place, (content, problem) in run_tasks(tasks, jobs):
        if content is None:
            problems[f"seed {left[place].seed}"] = problem or ""
        else:
            by_seed[left[place].seed] = content
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


def _path(name: str, planned: PlannedVariant) -> Path:
    content = [VERSION, planned.folder.name, scored_sets(planned.setting), planned.setting.protocol]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return planned.out / "runs" / f"{name}-{planned.seed}-{digest[:12]}.json"


def _measured(path: Path, measure: Measure, planned: PlannedVariant) -> dict[str, Any]:
    content = read_json(path)
    if content is None:
        content = {"git": git_revision(), "found": measure(planned)}
        write_text_atomic(path, json.dumps(content) + "\n")
    return content
