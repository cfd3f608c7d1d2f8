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
from drseg_core.studies.runner import provenance, run_variants, seconds
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import Variant, training_study

_log = logging.getLogger(__name__)


def run_training_study(name: str, setting: Setting, out: Path, *, jobs: int = 1, command: str = "") -> dict[str, str]:
    """Train and score the variants of a study; ``OUT/NAME.json``, ``.md`` and ``.png`` are written after every variant.

    Args:
        name: one of :func:`drseg_core.studies.tables.training_study_names`.
        setting: what it is run on.
        out: folder of the studies.
        jobs: processes.
        command: as it was typed, for the report.

    Returns:
        Why variants failed, by name; empty where all went well.
    """
    study = training_study(name, setting)
    planned = plan(setting, study.variants, out)
    name += setting.suffix
    options = changed_options(plain_config(setting.config), plain_config(Config()))
    facts: dict[str, Any] = {**setting.record(), "command": command, "config": options}
    scores: dict[str, dict[int, Any]] = {}
    problems: dict[str, str] = {}

    def write() -> None:
        variants = [
            {
                "name": variant.name,
                "title": variant.title,
                "options": dict(variant.options),
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
        facts.update(provenance(planned))
        facts["seconds"] = seconds(planned)
        content = {
            "study": name,
            "title": study.title,
            **facts,
            "versions": library_versions(),
            "backends": backend_report(),
            "variants": variants,
            "order": None if order is None else order._asdict(),
            "sections": [section._asdict() for section in study.sections],
        }
        write_text_atomic(out / f"{name}.json", json.dumps(content, indent=1) + "\n")
        write_text_atomic(out / f"{name}.md", report.markdown(study, scores, problems, facts))

    def done(variant: Variant, seed: int, found: dict[str, Any] | None, problem: str | None) -> None:
        if found is None:
            before = f"{problems[variant.name]}; " if variant.name in problems else ""
            problems[variant.name] = f"{before}seed {seed}: {problem}"
            _log.error("study %s: %s failed with seed %d; %s", name, variant.title, seed, problem)
        else:
            scores.setdefault(variant.name, {})[seed] = found
            scores[variant.name] = dict(sorted(scores[variant.name].items()))
            _log.info("study %s: %s, seed %d: mIoU %s", name, variant.title, seed, _shown(found))
        write()

    run_variants(planned, jobs=jobs, done=done)
    # for a study none of whose variants can be run
    write()
    figures.draw_training_study(study, scores, out / f"{name}.png")
    return problems


def _shown(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{test} {row['mIoU']:.1f}" if row["mIoU"] is not None else f"{test} -" for test, row in found.items()
    )
