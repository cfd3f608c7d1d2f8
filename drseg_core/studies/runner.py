# SPDX-License-Identifier: Apache-2.0
"""Trains and scores the variants of a study, once each, in as many processes as asked for.

A study that is started again takes what is complete, goes on with what is not, and shares variants with every other
study in ``OUT``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drseg_core.checkpoints.checkpoint import newest_checkpoint
from drseg_core.checkpoints.lock import LOCK_NAME, run_lock
from drseg_core.checkpoints.run import CONFIG, MANIFEST, LoadedRun, load_run
from drseg_core.checkpoints.versions import git_revision
from drseg_core.config.schema import Config
from drseg_core.evaluation.evaluate import evaluate
from drseg_core.files import parse_json, write_text_atomic
from drseg_core.studies.contrast import pretrain
from drseg_core.studies.plan import PlannedVariant
from drseg_core.studies.prior import teach_prior
from drseg_core.studies.setting import Setting, scored_fingerprint
from drseg_core.studies.tasks import Task, run_tasks
from drseg_core.training.loop import train

SCORES = "scores.json"
SECONDS = "seconds.json"
_log = logging.getLogger(__name__)


def train_priors(planned: Sequence[PlannedVariant]) -> None:
    """The taught priors that variants need, where they are not yet."""
    for item in planned:
        if item.prior is not None:
            teach_prior(item.prior, item.setting.prior_data, item.setting.prior_steps, item.out)


def scored_sets(setting: Setting) -> list[dict[str, Any]]:
    """What is scored, told by its content."""
    return [{**dataclasses.asdict(test), "sha256": scored_fingerprint(setting, test)} for test in setting.tests]


def train_start(planned: PlannedVariant) -> Path | None:
    """The dual encoder that stands for CLIP, trained where it is not yet: a run folder or a weight file. None where
    none is needed."""
    start = planned.start
    if start is None:
        return None
    setting = planned.setting
    if setting.start == "dense":
        _train(start.config, setting, start.path, init=None)
    elif not start.path.is_file():
        begin = time.monotonic()
        pretrain(start.config, setting.data, setting.contrast_steps, start.path)
        _note_seconds(start.path, train=time.monotonic() - begin)
    return start.path


def train_starts(planned: Sequence[PlannedVariant], jobs: int, devices: Sequence[str] = ()) -> dict[Path, str]:
    """Train the dual encoders of variants, each once; returns why some could not be, by path."""
    firsts = sorted({item.start.path: item for item in planned if item.start is not None}.items())
    tasks: list[Task] = [(train_start, (item,)) for _, item in firsts]
    found = run_tasks(tasks, jobs, devices)
    return {
        firsts[place][0]: f"its dual encoder failed; {problem}" for place, (_, problem) in found if problem is not None
    }


def run_variant(planned: PlannedVariant) -> dict[str, Any]:
    """Train and score one variant where that has not been done.

    Returns:
        ``{test: {mIoU, fwIoU, mACC, pACC, boundary, novel}}`` in percent; ``novel`` is the mean IoU of the classes that
        the training data do not have, None where there are none.

    Raises:
        DRSegError: the variant cannot be trained or scored.
    """
    setting, folder = planned.setting, planned.folder
    wanted = {"tests": scored_sets(setting), "protocol": setting.protocol}
    kept = read_json(folder / SCORES)
    # scores from before the metric had its name are made again
    if (
        kept is not None
        and all(kept.get(key) == value for key, value in wanted.items())
        and all("novel" in row for row in kept["scores"].values())
    ):
        return kept["scores"]
    train_priors([planned])
    _train(planned.config, setting, folder, init=train_start(planned))
    begin = time.monotonic()
    scores = score(load_variant(planned), setting)
    _note_seconds(folder, score=time.monotonic() - begin)
    content = {**wanted, "variant": planned.variant.title, "git": git_revision(), "scores": scores}
    write_text_atomic(folder / SCORES, json.dumps(content, indent=1) + "\n")
    return scores


def load_variant(planned: PlannedVariant) -> LoadedRun:
    """A trained variant, with its prior from where the studies are now, wherever that was when it was trained."""
    taught = planned.config.model.dino.weights
    return load_run(planned.folder, weights=None if taught is None else {"dino": taught})


def provenance(planned: Sequence[PlannedVariant]) -> dict[str, list[str]]:
    """The commits of the source, and the machines, that trained the variants that are complete."""
    folders = {item.folder for item in planned}
    found = [read_json(folder / MANIFEST) or {} for folder in folders if (folder / SCORES).is_file()]
    # a training that stopped may have gone on elsewhere
    parts = [part for manifest in found for part in (manifest, *manifest.get("resumed", ()))]
    return {
        "commits": sorted({part.get("git") or "unknown" for part in parts}),
        "machines": sorted({_machine(part) for part in parts}),
    }


def steps_reached(planned: Sequence[PlannedVariant]) -> dict[str, list[int]]:
    """By the titles of variants the steps of their runs that are complete, seed by seed."""
    found: dict[str, list[int]] = {}
    for item in planned:
        if (item.folder / SCORES).is_file() and (checkpoint := newest_checkpoint(item.folder)) is not None:
            found.setdefault(item.variant.title, []).append(checkpoint.step)
    return found


def _machine(manifest: Mapping[str, Any]) -> str:
    machine = manifest.get("machine")
    return "a machine that was not noted" if machine is None else f"{machine['device']}, threads: {machine['threads']}"


def seconds(planned: Sequence[PlannedVariant]) -> float:
    """What training and scoring the variants that are complete took, and the dual encoders that they start from, one
    process after another."""
    complete = [item for item in planned if (item.folder / SCORES).is_file()]
    folders = {item.folder for item in complete} | {item.start.path for item in complete if item.start is not None}
    return sum(sum((read_json(_seconds_file(folder)) or {}).values()) for folder in folders)


def score(loaded: LoadedRun, setting: Setting) -> dict[str, Any]:
    """The scores of a trained model on every test set; see :func:`run_variant`."""
    scores = {}
    for test in setting.tests:
        dataset, protocol = setting.open_test(test)
        names = dataset.class_names
        novel = [place for place, name in enumerate(names) if name not in loaded.class_names]
        result = evaluate(
            loaded.model,
            names,
            dataset,
            loaded.config.evaluation,
            views=None if protocol is None else protocol.views,
            subsets={"novel": novel} if novel else None,
            device=setting.device,
            boundary=True,
            progress=False,
        )
        convention = "present" if protocol is None else protocol.convention
        scores[test.name] = {
            "mIoU": result["mIoU_conventions"][convention],
            "fwIoU": result["fwIoU"],
            "mACC": result["mACC"],
            "pACC": result["pACC"],
            "boundary": result["boundary"]["mIoU"],
            "novel": result["subsets"]["novel"]["mIoU"] if novel else None,
            "per_class": {name: row["iou"] for name, row in result["per_class"].items()},
        }
    return scores


def run_variants(
    planned: Sequence[PlannedVariant],
    *,
    jobs: int = 1,
    devices: Sequence[str] = (),
    done: Callable[[PlannedVariant, dict[str, Any] | None, str | None], None],
) -> None:
    """Train and score all variants for all seeds.

    Args:
        planned: see :func:`drseg_core.studies.plan.plan`.
        jobs: processes, on each device; each gets its share of the CPU's threads.
        devices: where they run; the setting's where none is named.
        done: called for every variant and seed with its scores, or with why there are none.
    """
    # variants of equal options are one run: two processes must not write it at a time
    twins: dict[Path, list[PlannedVariant]] = {}
    for item in planned:
        twins.setdefault(item.folder, []).append(item)
    unique = {folder: items[0] for folder, items in twins.items()}

    def report(folder: Path, scores: dict[str, Any] | None, problem: str | None) -> None:
        for item in twins[folder]:
            done(item, scores, problem)

    missing = [item for folder, item in unique.items() if read_json(folder / SCORES) is None]
    train_priors(missing)
    failed = train_starts(missing, jobs, devices)
    for item in missing:
        if item.start is not None and item.start.path in failed:
            report(item.folder, None, failed[item.start.path])
            del unique[item.folder]
    folders = list(unique)
    tasks: list[Task] = [(run_variant, (item,)) for item in unique.values()]
    for place, (scores, problem) in run_tasks(tasks, jobs, devices):
        report(folders[place], scores, problem)


def _train(config: Config, setting: Setting, folder: Path, init: Path | None) -> None:
    checkpoint = newest_checkpoint(folder) if (folder / CONFIG).is_file() else None
    if checkpoint is not None and checkpoint.step >= config.train.iterations:
        return
    begun = checkpoint is not None
    if folder.is_dir() and not begun:
        # stopped before its first checkpoint: to go on would be to go on from other weights than the first ones
        _clear(folder)
    # stopped runs count
    begin = time.monotonic() - (read_json(_seconds_file(folder)) or {}).get("train", 0.0)
    try:
        train(
            config,
            setting.data,
            folder,
            resume=begun,
            init=None if begun else init,
            device=setting.device,
            show_progress=False,
        )
    finally:
        if folder.is_dir():
            _note_seconds(folder, train=time.monotonic() - begin)


def _seconds_file(path: Path) -> Path:
    """Where the seconds of a run folder, or of a weight file, are noted."""
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path / SECONDS


def _note_seconds(path: Path, **spent: float) -> None:
    file = _seconds_file(path)
    found = (read_json(file) or {}) | {what: round(value, 1) for what, value in spent.items()}
    write_text_atomic(file, json.dumps(found) + "\n")


def _clear(folder: Path) -> None:
    """Empty a run folder, unless another process is training in it."""
    with run_lock(folder):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
