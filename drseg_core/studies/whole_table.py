# SPDX-License-Identifier: Apache-2.0
"""All of Table 1 at once: every training set and backbone, on the same processes, and one page of all rows."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drseg_core.config.load import load_config
from drseg_core.config.methods import METHODS
from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.errors import ConfigError
from drseg_core.evaluation.report import markdown_table
from drseg_core.files import write_text_atomic
from drseg_core.scenes.plan import time_text
from drseg_core.studies import paper
from drseg_core.studies.expected_time import expected_seconds
from drseg_core.studies.plan import PlannedVariant
from drseg_core.studies.report import spread, text_of
from drseg_core.studies.runner import run_variants
from drseg_core.studies.setting import Setting, make_setting
from drseg_core.studies.tables import as_printed
from drseg_core.studies.training import StudyFiles

PAGE = "table1.md"
QUICK = "This is a quick run, of the smallest encoders: it shows that the command ends, and nothing else."
_log = logging.getLogger(__name__)


def whole_table(configs: str, train: str, test_root: str, **options: Any) -> list[Setting]:
    """One setting for each training set and configuration, in the paper's order.

    Args:
        configs: presets or files, with commas between them.
        train: ``NAME:ROOT`` of the training sets, with commas between them.
        test_root: folder of all eight sets.
        options: of :func:`drseg_core.studies.setting.make_setting`. ``quick`` takes encoders and sizes of the ``tiny``
            preset whatever the configurations are.

    Raises:
        ConfigError: a backbone that Table 1 does not have, or a set or backbone that is named twice.
    """
    tests = [f"{name}:{test_root}" for name in paper.SETS]
    found: dict[tuple[str, str], Setting] = {}
    for spec in re.split(r",(?=\w+:)", train):
        name = spec.partition(":")[0]
        if name not in paper.TRAINED_ON or name not in BENCHMARKS:
            known = ", ".join(f"{one}:ROOT" for one in paper.TRAINED_ON)
            raise ConfigError(f"study: --train is no training set of Table 1; expected of {known}, got {spec!r}")
        for config in configs.split(","):
            clip = load_config(config).model.clip.name
            key = next((key for key in paper.TABLE1 if key[0] == name and clip.startswith(key[1])), None)
            if key is None:
                raise ConfigError(f"study: Table 1 has no backbone {clip}; expected vitb, vitl or such, got {config!r}")
            if key in found:
                raise ConfigError(f"study: {name} and {key[1]} are named twice; expected each part of Table 1 once")
            setting = make_setting("tiny" if options.get("quick") else config, data=spec, tests=tests, **options)
            part = f"{name}-{key[1].replace('-', '').lower()}"
            found[key] = dataclasses.replace(setting, part=part, backbone=key[1])
    return [found[key] for key in paper.TABLE1 if key in found]


def run_whole_table(
    settings: Sequence[Setting], out: Path, *, jobs: int = 1, devices: Sequence[str] = (), command: str = ""
) -> dict[str, str]:
    """Train and score all parts, whichever is next on whichever process is free; says before how long it will take.

    ``OUT/table1-SET-BACKBONE.json``, ``.md`` and ``.png`` are written of each part and ``OUT/table1.md`` of all, after
    every variant. What is complete is taken as it is.

    Args:
        settings: of :func:`whole_table`.
        out: folder of the studies.
        jobs: processes, on each device.
        devices: where they run; one that is chosen by itself where none is named.
        command: as it was typed, for the reports.

    Returns:
        Why variants failed, by part and name.
    """
    files = [StudyFiles("table1", setting, out, command) for setting in settings]
    # what is trained on one set comes after one another: it stays in the file system's memory
    planned = [item for one in files for item in one.planned]
    owner = {id(item): one for one in files for item in one.planned}
    count = jobs * max(len(devices), 1)
    _log.info("study table1: %d trainings in %d processes; measuring how long they take", len(planned), count)
    probe = [item.on(devices[0]) for item in planned] if devices else planned
    seconds = expected_seconds(probe, count)
    _log.info("study table1: about %s, without reading and optimiser", time_text(seconds))

    def done(item: PlannedVariant, scores: dict[str, Any] | None, problem: str | None) -> None:
        owner[id(item)].add(item, scores, problem)
        write_text_atomic(out / PAGE, page(files))

    run_variants(planned, jobs=jobs, devices=devices, done=done)
    for one in files:
        one.write()
        one.draw()
    write_text_atomic(out / PAGE, page(files))
    return {f"{one.setting.part} {name}": problem for one in files for name, problem in one.problems.items()}


def page(files: Sequence[StudyFiles]) -> str:
    """All 32 rows as published, and beside each what was scored here."""
    here = {(one.setting.data.partition(":")[0], one.setting.backbone): one for one in files}
    rows: list[dict[str, Any]] = []
    for key, methods in paper.TABLE1.items():
        for name, row in methods.items():
            head = {"trained on": paper.TRAINED_ON[key[0]], "backbone": key[1], "method": METHODS[name].title}
            printed = zip((*row.miou, row.mean_miou), (*row.macc, row.mean_macc), strict=True)
            cells = [f"{miou:.2f} / {macc:.2f}" for miou, macc in printed]
            rows.append({**head, "of": "paper", **dict(zip((*paper.SETS, "mean"), cells, strict=True))})
            rows.append({**head, "of": "here", **_here(here.get(key), name)})
    first = files[0]
    parts = ", ".join(f"[{one.setting.part}]({one.name}.md)" for one in files)
    lines = [
        "# Comparison with other methods (Table 1)",
        "",
        f"Percent, mIoU / mACC, protocol {first.setting.protocol}, seeds "
        f"{', '.join(map(str, first.setting.seeds))}. As published, and as scored here; the parts have more: {parts}. "
        f"SED's backbones are ConvNeXt-B and ConvNeXt-L. {as_printed()}",
        "",
        *([QUICK, ""] if first.setting.quick else []),
        markdown_table(rows),
        f"`{first.facts['command']}`",
        "",
    ]
    return "\n".join(lines)


def _here(files: StudyFiles | None, name: str) -> Mapping[str, str]:
    """A method's cells of one part."""
    if files is None:
        return {"mean": "not asked for"}
    scores = files.scores.get(name)
    if not scores:
        variant = next(one for one in files.study.variants if one.name == name)
        return {"mean": variant.why_not or files.problems.get(name) or "not yet"}
    cells = {}
    for test in (*paper.SETS, None):
        pair = [spread(scores, metric, test) for metric in ("mIoU", "mACC")]
        cells[test or "mean"] = " / ".join(map(text_of, pair))
    return cells
