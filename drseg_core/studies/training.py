# SPDX-License-Identifier: Apache-2.0
"""Runs a study that trains, and keeps its JSON, table and figure up to date while it does."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from drseg_core.checkpoints.run import plain_config
from drseg_core.checkpoints.versions import library_versions
from drseg_core.config.schema import Config
from drseg_core.files import write_text_atomic
from drseg_core.ops import backend_report
from drseg_core.studies import figures, report
from drseg_core.studies.plan import changed_options, plan
from drseg_core.studies.runner import provenance, run_cells, seconds
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import Cell, training_study

_log = logging.getLogger(__name__)


def run_training_study(name: str, setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """Train and score the cells of a study; ``OUT/NAME.json``, ``.md`` and ``.png`` are written after every cell.

    Args:
        name: one of :func:`drseg_core.studies.tables.training_study_names`.
        setting: what it is run on.
        out: folder of the studies.
        jobs: processes.
        command: as it was typed, for the report.

    Returns:
        Why cells failed, by name; empty where all went well.
    """
    study = training_study(name, setting)
    planned = plan(setting, study.cells, out)
    name += setting.suffix
    options = changed_options(plain_config(setting.config), plain_config(Config()))
    facts: dict[str, Any] = {**setting.record(), "command": command, "config": options}
    scores: dict[str, dict[int, Any]] = {}
    problems: dict[str, str] = {}

    def write() -> None:
        cells = [
            {
                "name": cell.name,
                "title": cell.title,
                "options": dict(cell.options),
                "paper": None if cell.paper is None else cell.paper._asdict(),
                "not_run": cell.why_not or problems.get(cell.name),
                "scores": scores.get(cell.name, {}),
                "mean": {
                    metric: None if found is None else found._asdict()
                    for metric in report.METRICS
                    for found in [report.spread(scores.get(cell.name, {}), metric)]
                },
            }
            for cell in study.cells
        ]
        order = report.order(study.cells, scores)
        facts.update(provenance(planned))
        facts["seconds"] = seconds(planned)
        content = {
            "study": name,
            "title": study.title,
            **facts,
            "versions": library_versions(),
            "backends": backend_report(),
            "cells": cells,
            "order": None if order is None else order._asdict(),
        }
        write_text_atomic(out / f"{name}.json", json.dumps(content, indent=1) + "\n")
        write_text_atomic(out / f"{name}.md", report.markdown(study, scores, problems, facts))

    def done(cell: Cell, seed: int, found: dict[str, Any] | None, problem: str | None) -> None:
        if found is None:
            before = f"{problems[cell.name]}; " if cell.name in problems else ""
            problems[cell.name] = f"{before}seed {seed}: {problem}"
            _log.error("study %s: %s failed with seed %d; %s", name, cell.title, seed, problem)
        else:
            scores.setdefault(cell.name, {})[seed] = found
            scores[cell.name] = dict(sorted(scores[cell.name].items()))
            _log.info("study %s: %s, seed %d: mIoU %s", name, cell.title, seed, _shown(found))
        write()

    run_cells(planned, jobs=jobs, done=done)
    # for a study none of whose cells can be run
    write()
    figures.draw_training_study(study, scores, out / f"{name}.png")
    return problems


def _shown(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{test} {row['mIoU']:.1f}" if row["mIoU"] is not None else f"{test} -" for test, row in found.items()
    )
