# SPDX-License-Identifier: Apache-2.0
"""Generations of training state that appear complete or not at all.

``RUN/checkpoints/step-00000120/`` holds ``model.safetensors`` (weights), ``training.pt`` (optimiser, position,
random generators) and ``checkpoint.json`` (checksums, format, configuration, versions). A generation is written into
a hidden folder beside its place, made durable, and then renamed. The newest has the highest step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drseg_core.checkpoints.versions import library_versions
from drseg_core.errors import CheckpointError, ResourceError
from drseg_core.files import parse_json, sync_directory
from drseg_core.models.weights import load_weights, save_weights

FORMAT_VERSION = 1
FOLDER = "checkpoints"
WEIGHTS, TRAINING, DESCRIPTION = "model.safetensors", "training.pt", "checkpoint.json"
_GENERATION = re.compile(r"step-(\d{8,})")
_STORAGE_TEXT = re.compile(r"os error \d+|PytorchStreamWriter|file write failed|unexpected pos|No space left", re.I)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A generation whose checksums were found right.

    Args:
        path: its folder.
        step: optimiser steps taken.
        config: configuration it was trained with, as plain values.
        class_names: classes it was trained on.
        versions: libraries that wrote it.
        left_out: SHA-256 of each frozen part whose weights are not in it.
    """

    path: Path
    step: int
    config: dict[str, Any]
    class_names: tuple[str, ...]
    versions: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, on the CPU."""
        return load_weights(self.path / WEIGHTS)[0]

    def training_state(self) -> dict[str, Any]:
        """The ``training`` argument of ``save_checkpoint``, on the CPU; code in the file is never run."""
        path = self.path / TRAINING
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"resume: {path} holds unsafe or unreadable content, which is refused; {first_line(error)}"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(
                f"resume: {path} holds the wrong content; expected a dict, got {type(state).__name__}"
            )
        return state


def save_checkpoint(
    run: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    training: dict[str, Any],
    config: dict[str, Any],
    class_names: tuple[str, ...],
    keep: int = 2,
    left_out: dict[str, str] | None = None,
) -> Path:
    """Write generation ``step`` and drop all but the newest ``keep`` (at least 2).

    Args:
        run: run folder; the caller holds its lock.
        step: optimiser steps taken.
        model: tensors for ``model.safetensors``.
        training: plain containers, numbers, strings and tensors only, so that it can be read without running code.
        config: configuration as plain values.
        class_names: classes the model is trained on.
        keep: generations that stay.
        left_out: SHA-256 of each frozen part that ``model`` lacks.

    Returns:
        Folder of the generation.

    Raises:
        ResourceError: the disk is full, damaged or not writable. What was there before is intact.
    """
    target = run / FOLDER / f"step-{step:08d}"
    try:
        with whole_folder(target) as temporary:
            _write_generation(temporary, step, model, training, config, class_names, left_out or {})
    except Exception as error:
        if not storage_failure(error):
            raise
        raise ResourceError(
            f"save_checkpoint: {target} could not be written ({first_line(error)}); earlier checkpoints are intact"
        ) from error
    for old in generations(run)[max(keep, 2) :]:
        try:
            _remove(old)
        except OSError as error:
            _log.warning("save_checkpoint: %s could not be removed (%s)", old, error.strerror)
    return target


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` that takes its place, durably, when the body is done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".part", dir=target.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o777 & ~mask)
        yield temporary
        for path in temporary.iterdir():
            _sync_file(path)
        sync_directory(temporary)
        if target.exists():
            _remove(target)
        os.rename(temporary, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def generations(run: Path) -> list[Path]:
    """Folders of all generations, the highest step first, unchecked."""
    try:
        found = [path for path in (run / FOLDER).iterdir() if _GENERATION.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(found, key=_step, reverse=True)


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest undamaged generation of a run; damaged ones are named in a warning and passed over.

    Returns:
        None when the run has never saved one.

    Raises:
        CheckpointError: every generation is damaged, or the newest is of a later format.
    """
    found = generations(run)
    for place, path in enumerate(found):
        try:
            return open_checkpoint(path)
        except DamagedCheckpoint as error:
            if place + 1 == len(found):
                raise CheckpointError(f"{error}; no undamaged checkpoint is left in {run / FOLDER}") from error
            _log.warning("%s; using previous %s", error, found[place + 1].name)
    return None


class DamagedCheckpoint(CheckpointError):
    """A generation whose files are not those that were written."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Check every file of one generation against its checksums.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or changed.
        CheckpointError: the generation is of a later format than this version reads.
    """
    description = _read_description(path)
    for name in (WEIGHTS, TRAINING):
        try:
            expected = description["files"][name]["sha256"]
            actual = file_hash(path / name)
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {path}: {name} cannot be read ({error.strerror})") from error
        except (KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"checkpoint {path}: {DESCRIPTION} is not valid") from error
        if actual != expected:
            raise DamagedCheckpoint(f"checkpoint {path}: checksum mismatch in {name}")
    return Checkpoint(
        path=path,
        step=description["step"],
        config=description["config"],
        class_names=tuple(description["class_names"]),
        versions=description["versions"],
        left_out=description.get("left_out", {}),
    )


def remove_leftovers(run: Path) -> None:
    """Remove unfinished files of writers that died. Only for the holder of the run's lock."""
    with contextlib.suppress(OSError):
        for path in (run / FOLDER).iterdir():
            if path.name.startswith(".step-"):
                shutil.rmtree(path, ignore_errors=True)


def set_aside_damaged(run: Path, resumed_step: int) -> None:
    """Rename generations newer than the one from which training goes on, so that they do not count as kept."""
    for path in generations(run):
        if _step(path) > resumed_step:
            spare = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(spare, ignore_errors=True)
            path.rename(spare)


_KINDS = {"format_version": int, "step": int, "config": dict, "class_names": list, "versions": dict, "files": dict}


def check_kinds(description: dict[str, Any]) -> None:
    """Refuse a description with missing fields or fields of another kind, which its own checksum cannot exclude.

    Raises:
        ValueError: names the field.
    """
    for name, kind in {**_KINDS, "left_out": dict}.items():
        if not isinstance(description.get(name), kind) or isinstance(description[name], bool):
            raise ValueError(f"{name} is no {kind.__name__}")
    if not all(isinstance(name, str) for name in description["class_names"]):
        raise ValueError("class_names are not text")


def content_hash(content: Any) -> str:
    """SHA-256 of plain values, the same on every machine."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def storage_failure(error: BaseException | None) -> bool:
    """Whether an error comes from the disk; libraries wrap the system's error in their own."""
    while error is not None:
        if isinstance(error, OSError) or _STORAGE_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _write_generation(
    folder: Path,
    step: int,
    model: dict[str, Tensor],
    training: dict[str, Any],
    config: dict[str, Any],
    class_names: tuple[str, ...],
    left_out: dict[str, str],
) -> None:
    save_weights(folder / WEIGHTS, model, {"step": step, "class_names": list(class_names)})
    with open(folder / TRAINING, "wb") as file:
        torch.save(training, file)
    description = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "config": config,
        "config_sha256": content_hash(config),
        "class_names": list(class_names),
        "left_out": left_out,
        "versions": library_versions(),
        "files": {
            name: {"sha256": file_hash(folder / name), "bytes": (folder / name).stat().st_size}
            for name in (WEIGHTS, TRAINING)
        },
    }
    text = json.dumps({**description, "sha256": content_hash(description)}, indent=1)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = parse_json((path / DESCRIPTION).read_text(encoding="utf-8"))
        expected = description.pop("sha256")
        damaged = content_hash(description) != expected
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {path}: {DESCRIPTION} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {path}: {DESCRIPTION} is not valid") from error
    if damaged:
        raise DamagedCheckpoint(f"checkpoint {path}: checksum mismatch in {DESCRIPTION}")
    version = description.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path}: format_version is newer than this program; "
            f"expected at most {FORMAT_VERSION}, got {version}"
        )
    try:
        check_kinds({"left_out": {}, **description})
    except ValueError as error:
        raise DamagedCheckpoint(f"checkpoint {path}: {DESCRIPTION} is not valid; {error}") from error
    return description


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Delete a generation so that it is never seen half deleted."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
