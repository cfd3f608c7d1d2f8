# SPDX-License-Identifier: Apache-2.0
"""Trains and scores the cells of a study, once each, in as many processes as asked for.

``OUT/runs/`` holds one run folder per cell and seed, named by a hash of everything that decides it. A study that is
started again takes what is complete, goes on with what is not, and shares cells with every other study in ``OUT``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from drseg_core.checkpoints.checkpoint import newest_checkpoint
from drseg_core.checkpoints.lock import LOCK_NAME, run_lock
from drseg_core.checkpoints.run import CONFIG, MANIFEST, LoadedRun, load_run, plain_config
from drseg_core.checkpoints.versions import git_revision
from drseg_core.config.load import override
from drseg_core.config.schema import Config
from drseg_core.data.manifest import file_sha256
from drseg_core.errors import DRSegError
from drseg_core.evaluation.evaluate import evaluate
from drseg_core.files import write_text_atomic
from drseg_core.studies.prior import prior_file, teach_prior
from drseg_core.studies.setting import Setting, fingerprint, scored_fingerprint
from drseg_core.studies.tables import Cell
from drseg_core.training.loop import train
from drseg_core.training.signals import TrainingStopped

SCORES = "scores.json"
SECONDS = "seconds.json"
# raised when scores of the same configuration would come out differently
VERSION = 1
_log = logging.getLogger(__name__)

Task = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, and its arguments."""


class Outcome(NamedTuple):
    """What a task gave, or why it gave nothing."""

    result: Any
    problem: str | None


def start_folder(setting: Setting, seed: int, out: Path) -> Path:
    """Where the dual encoder of a seed is."""
    return _folder(out, f"start-{seed}", setting.start_config(seed), setting, None)


def cell_folder(setting: Setting, cell: Cell, seed: int, out: Path) -> Path:
    """Where a cell of a seed is."""
    start = start_folder(setting, seed, out).name if setting.needs_start else None
    return _folder(out, f"cell-{seed}", cell_config(setting, cell, seed, out), setting, start)


def cell_config(setting: Setting, cell: Cell, seed: int, out: Path) -> Config:
    """The configuration of a cell; one that has a prior gets the taught one where the setting asks for it."""
    config = setting.cell_config(dict(cell.options), seed)
    if not setting.prior_steps or config.model.fusion.kind in ("none", "cosine"):
        return config
    path = prior_file(config.model.dino, setting.prior_data, setting.prior_steps, out)
    return override(config, {"model.dino.weights": str(path)})


def train_priors(setting: Setting, cells: Sequence[Cell], out: Path) -> None:
    """The taught priors that cells need, where they are not yet."""
    for cell in cells if setting.prior_steps else ():
        config = setting.cell_config(dict(cell.options), 0)
        if config.model.fusion.kind not in ("none", "cosine"):
            teach_prior(config.model.dino, setting.prior_data, setting.prior_steps, out)


def _folder(out: Path, kind: str, config: Config, setting: Setting, start: str | None) -> Path:
    plain = plain_config(config)
    weights = plain["model"]["dino"]["weights"]
    if weights is not None and Path(weights).parent == out / "runs":
        # a taught prior is told by its name, wherever the studies lie
        plain["model"]["dino"]["weights"] = Path(weights).name
    content = {
        "version": VERSION,
        "config": changed_options(plain, plain_config(Config())),
        "files": files_hash(config, out),
        "data": fingerprint(setting.data, "train"),
        "start": start,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return out / "runs" / f"{kind}-{digest[:12]}"


def files_hash(config: Config, out: Path) -> dict[str, str]:
    """SHA-256 of the files that a configuration names, by option; a taught prior is what its name says."""
    model = config.model
    named = {
        "clip": model.clip.weights,
        "dino": model.dino.weights,
        "remote": model.remote.weights if model.decoder.remote_clip else None,
        "channels": model.spsd.channels,
    }
    found = {}
    for option, path in named.items():
        if path is not None and Path(path).is_file() and Path(path).parent != out / "runs":
            status = Path(path).stat()
            found[option] = _file_hash(path, status.st_size, status.st_mtime_ns)
    return found


@functools.cache
def _file_hash(path: str, size: int, changed: int) -> str:
    # size and time are part of what is remembered: a file that changed is read again
    return file_sha256(Path(path))


def scored_sets(setting: Setting) -> list[dict[str, Any]]:
    """What is scored, told by its content."""
    return [{**dataclasses.asdict(test), "sha256": scored_fingerprint(setting, test)} for test in setting.tests]


def changed_options(config: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Options that are not at their default: one that a later version adds changes no name."""
    found = {
        key: changed_options(value, default[key]) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != default[key]
    }
    return found


def train_start(setting: Setting, seed: int, out: Path) -> Path:
    """The dual encoder that stands for CLIP, trained where it is not yet."""
    folder = start_folder(setting, seed, out)
    _train(setting.start_config(seed), setting, folder, init=None)
    return folder


def train_starts(setting: Setting, seeds: Sequence[int], out: Path, jobs: int) -> dict[int, str]:
    """Train the dual encoders of seeds; returns why some could not be, by seed."""
    tasks: list[Task] = [(train_start, (setting, seed, out)) for seed in seeds if setting.needs_start]
    problems = {seeds[place]: problem for place, (_, problem) in run_tasks(tasks, jobs) if problem is not None}
    return {seed: f"its dual encoder failed; {problem}" for seed, problem in problems.items()}


def run_cell(setting: Setting, cell: Cell, seed: int, out: Path) -> dict[str, Any]:
    """Train and score one cell where that has not been done.

    Returns:
        ``{test: {mIoU, fwIoU, mACC, pACC, boundary, unseen}}`` in percent; ``unseen`` is the mean IoU of the names that
        the training data do not have, None where there are none.

    Raises:
        DRSegError: the cell cannot be trained or scored.
    """
    folder = cell_folder(setting, cell, seed, out)
    wanted = {"tests": scored_sets(setting), "protocol": setting.protocol}
    kept = read_json(folder / SCORES)
    if kept is not None and all(kept.get(key) == value for key, value in wanted.items()):
        return kept["scores"]
    train_priors(setting, [cell], out)
    start = train_start(setting, seed, out) if setting.needs_start else None
    _train(cell_config(setting, cell, seed, out), setting, folder, init=start)
    begin = time.monotonic()
    scores = score(load_cell(setting, cell, seed, out), setting)
    _note_seconds(folder, score=time.monotonic() - begin)
    content = {**wanted, "cell": cell.title, "git": git_revision(), "scores": scores}
    write_text_atomic(folder / SCORES, json.dumps(content, indent=1) + "\n")
    return scores


def load_cell(setting: Setting, cell: Cell, seed: int, out: Path) -> LoadedRun:
    """A trained cell, with its prior from ``out``, wherever that was when it was trained."""
    weights = cell_config(setting, cell, seed, out).model.dino.weights
    return load_run(cell_folder(setting, cell, seed, out), dino_weights=weights)


def provenance(setting: Setting, cells: Sequence[Cell], out: Path) -> dict[str, list[str]]:
    """The commits of the source, and the machines, that trained the cells that are complete."""
    folders = {
        cell_folder(setting, cell, seed, out) for cell in cells for seed in setting.seeds if cell.why_not is None
    }
    found = [read_json(folder / MANIFEST) or {} for folder in folders if (folder / SCORES).is_file()]
    # a training that stopped may have gone on elsewhere
    parts = [part for manifest in found for part in (manifest, *manifest.get("resumed", ()))]
    return {
        "commits": sorted({part.get("git") or "unknown" for part in parts}),
        "machines": sorted({_machine(part) for part in parts}),
    }


def _machine(manifest: Mapping[str, Any]) -> str:
    machine = manifest.get("machine")
    return "a machine that was not noted" if machine is None else f"{machine['device']}, threads: {machine['threads']}"


def seconds(setting: Setting, cells: Sequence[Cell], out: Path) -> float:
    """What training and scoring the cells that are complete took, and the dual encoders that they start from, one
    process after another."""
    folders = set()
    for seed in setting.seeds:
        own = {cell_folder(setting, cell, seed, out) for cell in cells if cell.why_not is None}
        own = {folder for folder in own if (folder / SCORES).is_file()}
        folders |= own | ({start_folder(setting, seed, out)} if own and setting.needs_start else set())
    return sum(sum((read_json(folder / SECONDS) or {}).values()) for folder in folders)


def score(loaded: LoadedRun, setting: Setting) -> dict[str, Any]:
    """The scores of a trained model on every test set; see :func:`run_cell`."""
    scores = {}
    for test in setting.tests:
        dataset, protocol = setting.open_test(test)
        names = dataset.class_names
        unseen = [place for place, name in enumerate(names) if name not in loaded.class_names]
        result = evaluate(
            loaded.model,
            names,
            dataset,
            loaded.config.evaluation,
            views=None if protocol is None else protocol.views,
            subsets={"unseen": unseen} if unseen else None,
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
            "unseen": result["subsets"]["unseen"]["mIoU"] if unseen else None,
            "per_class": {name: row["iou"] for name, row in result["per_class"].items()},
        }
    return scores


def run_cells(
    setting: Setting,
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int = 1,
    done: Callable[[Cell, int, dict[str, Any] | None, str | None], None],
) -> None:
    """Train and score all cells for all seeds.

    Args:
        setting: what they have in common.
        cells: those that cannot be run are left out.
        out: folder of the studies.
        jobs: processes; each gets its share of the CPU's threads.
        done: called for every cell and seed with its scores, or with why there are none.
    """
    todo = [(cell, seed) for seed in setting.seeds for cell in cells if cell.why_not is None]
    # cells of equal options are one run: two processes must not write it at a time
    twins: dict[Path, list[tuple[Cell, int]]] = {}
    for cell, seed in todo:
        twins.setdefault(cell_folder(setting, cell, seed, out), []).append((cell, seed))
    unique = {folder: cells[0] for folder, cells in twins.items()}

    def report(folder: Path, scores: dict[str, Any] | None, problem: str | None) -> None:
        for cell, seed in twins[folder]:
            done(cell, seed, scores, problem)

    missing = [item for item in unique.items() if read_json(item[0] / SCORES) is None]
    seeds = sorted({seed for _, (_, seed) in missing})
    train_priors(setting, [cell for _, (cell, _) in missing], out)
    failed = train_starts(setting, seeds, out, jobs)
    for folder, (_, seed) in missing:
        if seed in failed:
            report(folder, None, failed[seed])
            del unique[folder]
    folders = list(unique)
    tasks: list[Task] = [(run_cell, (setting, cell, seed, out)) for cell, seed in unique.values()]
    for place, (scores, problem) in run_tasks(tasks, jobs):
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
    begin = time.monotonic() - (read_json(folder / SECONDS) or {}).get("train", 0.0)
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


def _note_seconds(folder: Path, **spent: float) -> None:
    found = (read_json(folder / SECONDS) or {}) | {what: round(value, 1) for what, value in spent.items()}
    write_text_atomic(folder / SECONDS, json.dumps(found) + "\n")


def _clear(folder: Path) -> None:
    """Empty a run folder, unless another process is training in it."""
    with run_lock(folder):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_NAME:
                path.unlink()


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _outcome(task: Task) -> Outcome:
    function, arguments = task
    try:
        return Outcome(function(*arguments), None)
    except TrainingStopped:
        raise
    except Exception as error:
        kind = "" if isinstance(error, DRSegError) else f"{type(error).__name__}: "
        return Outcome(None, kind + " ".join(str(error).split()))


def run_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Yield (place, outcome) of each task as it ends: here, or in ``jobs`` processes that take one after another.

    Whatever a task fails of, the death of its process (killed, out of memory) included, the others go on.

    Raises:
        TrainingStopped: a task was told to stop.
    """
    if jobs == 1:
        for place, task in enumerate(tasks):
            yield place, _outcome(task)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    waiting, running = collections.deque(enumerate(tasks)), dict[Connection, int]()
    workers = dict[Connection, Any]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                idle = next((worker for worker in workers if worker not in running), None)
                worker = idle or _start_worker(workers, threads)
                running[worker], task = waiting.popleft()
                # one that died while it was idle says so below
                with contextlib.suppress(OSError):
                    worker.send(task)
            for worker in cast("list[Connection]", multiprocessing.connection.wait(list(running))):
                place = running.pop(worker)
                try:
                    outcome = worker.recv()
                except (EOFError, OSError):
                    process = workers.pop(worker)
                    process.join()
                    worker.close()
                    code = process.exitcode
                    outcome = Outcome(None, f"its process died with exit code {code}; expected a result, got none")
                if isinstance(outcome, TrainingStopped):
                    raise outcome
                yield place, outcome
    finally:
        for worker, process in workers.items():
            if worker in running:
                # a training that is told to stop saves its state first
                process.terminate()
            worker.close()
        for process in workers.values():
            process.join()


def _start_worker(workers: dict[Connection, Any], threads: int) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, threads))
    process.start()
    # the process has its own copy: when it ends, ours sees the end of the pipe
    theirs.close()
    workers[ours] = process
    return ours


def _work(tasks: Connection, threads: int) -> None:
    # a terminal's Ctrl-C goes to the parent alone, which then tells its processes once to stop
    with contextlib.suppress(OSError):
        os.setsid()
    torch.set_num_threads(threads)
    # until nobody asks, or waits for an answer, any more
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = tasks.recv()
            try:
                outcome: Outcome | TrainingStopped = _outcome(task)
            except TrainingStopped as stop:
                outcome = stop
            tasks.send(outcome)
