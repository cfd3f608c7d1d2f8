# SPDX-License-Identifier: Apache-2.0
"""Runs a study that trains, and keeps its JSON, table and figure up to date while it does."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drseg_core.checkpoints.run import plain_config
from drseg_core.checkpoints.versions import library_versions
from drseg_core.config.schema import Config
from drseg_core.files import write_text_atomic
from drseg_core.ops import backend_report
from drseg_core.studies import figures, report
from drseg_core.studies.plan import PlannedVariant, changed_options, plan
from drseg_core.studies.runner import provenance, run_variants, seconds, steps_reached
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import training_study

_log = logging.getLogger(__name__)


class StudyFiles:
    """The JSON, table and figure of a training study, kept up to date.

    Args:
        name: one of :func:`drseg_core.studies.tables.training_study_names`.
        setting: what it is run on.
        out: folder of the studies.
        command: as it was typed, for the report.
    """

    def __init__(self, name: str, setting: Setting, out: Path, command: str = "") -> None:
        self.setting, self.study = setting, training_study(name, setting)
        self.planned = plan(setting, self.study.variants, out)
        self.name, self.out = name + setting.suffix, out
        options = changed_options(plain_config(setting.config), plain_config(Config()))
        self.facts: dict[str, Any] = {**setting.record(), "command": command, "config": options}
        self.scores: dict[str, dict[int, Any]] = {}
        self.problems: dict[str, str] = {}

    def write(self) -> None:
        """Write ``OUT/NAME.json`` and ``.md`` of what is there so far."""
        study, scores, problems = self.study, self.scores, self.problems
        variants = [
            {
                "name": variant.name,
                "title": variant.title,
                # files by their names, wherever they lie here
                "options": {
                    name: Path(value).name if name.endswith(".weights") and value else value
                    for name, value in variant.options.items()
                },
                "paper": None if variant.paper is None else variant.paper._asdict(),
                "not_run": variant.why_not or problems.get(variant.name),
                "scores": scores.get(variant.name, {}),
                "mean": {
                    metric: None if found is None else found._asdict()
                    for metric in report.METRICS
                    for found in [report.spread(scores.get(variant.name, {}), metric)]
                },
            }
            for variant in study.variants
        ]
        order = report.order(study.variants, scores)
        self.facts.update(provenance(self.planned))
        self.facts["seconds"] = seconds(self.planned)
        if self.setting.config.train.seconds is not None:
            self.facts["steps_reached"] = steps_reached(self.planned)
        content = {
            "study": self.name,
            "title": study.title,
            **self.facts,
            "versions": library_versions(),
            "backends": backend_report(),
            "variants": variants,
            "order": None if order is None else order._asdict(),
            "sections": [section._asdict() for section in study.sections],
        }
        write_text_atomic(self.out / f"{self.name}.json", json.dumps(content, indent=1) + "\n")
        write_text_atomic(self.out / f"{self.name}.md", report.markdown(study, scores, problems, self.facts))

    def add(self, item: PlannedVariant, found: dict[str, Any] | None, problem: str | None) -> None:
        """Take up the scores of a variant and seed, or why there are none, and write."""
        variant, seed = item.variant, item.seed
        if found is None:
            before = f"{self.problems[variant.name]}; " if variant.name in self.problems else ""
            self.problems[variant.name] = f"{before}seed {seed}: {problem}"
            _log.error("study %s: %s failed with seed %d; %s", self.name, variant.title, seed, problem)
        else:
            self.scores.setdefault(variant.name, {})[seed] = found
            self.scores[variant.name] = dict(sorted(self.scores[variant.name].items()))
            _log.info("study %s: %s, seed %d: mIoU %s", self.name, variant.title, seed, _shown(found))
        self.write()

    def draw(self) -> None:
        """Draw ``OUT/NAME.png``."""
        figures.draw_training_study(self.study, self.scores, self.out / f"{self.name}.png")


def run_training_study(
    name: str, setting: Setting, out: Path, *, jobs: int = 1, devices: Sequence[str] = (), command: str = ""
) -> dict[str, str]:
    """Train and score the variants of a study; ``OUT/NAME.json``, ``.md`` and ``.png`` are written after every variant.

    Args:
        name: one of :func:`drseg_core.studies.tables.training_study_names`.
        setting: what it is run on.
        out: folder of the studies.
        jobs: processes, on each device.
        devices: where they run; the setting's where none is named.
        command: as it was typed, for the report.

    Returns:
        Why variants failed, by name; empty where all went well.
    """
    files = StudyFiles(name, setting, out, command)
    run_variants(files.planned, jobs=jobs, devices=devices, done=files.add)
    # for a study none of whose variants can be run
    files.write()
    files.draw()
    return files.problems


def _shown(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{test} {row['mIoU']:.1f}" if row["mIoU"] is not None else f"{test} -" for test, row in found.items()
    )
