# SPDX-License-Identifier: Apache-2.0
"""The run folder: files of a training besides its checkpoints, and how a trained model is read back."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from drseg_core.checkpoints.checkpoint import (
    DESCRIPTION,
    FOLDER,
    WEIGHTS,
    Checkpoint,
    newest_checkpoint,
    open_checkpoint,
)
from drseg_core.checkpoints.versions import git_revision, library_versions
from drseg_core.config.load import config_from_dict, override, to_yaml
from drseg_core.config.schema import Config
from drseg_core.errors import CheckpointError, ConfigError, DatasetError
from drseg_core.files import parse_json, write_text_atomic
from drseg_core.models.build import build_model
from drseg_core.models.segmenter import Segmenter
from drseg_core.models.weights import check_left_out, load_into, load_weights

__all__ = ["LoadedRun", "load_run"]

PARTS = ("clip", "dino", "remote")
"""Parts of a model whose weights may be those of a file."""
CONFIG, CLASSES, MANIFEST, CHANNELS = "config.yaml", "classes.txt", "manifest.json", "channels.safetensors"
# what may differ between the parts of one run: limits, intervals and what depends on the machine
_FREE = (
    "train.seconds",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.nan_limit",
    "train.workers",
    "model.graph.backend",
    "evaluation.",
    "reading.gsd",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model on the CPU, in evaluation mode, with what it was trained for.

    Examples:
        >>> import drseg_core as drseg
        >>> run = drseg.load("run")
        >>> run.step, run.class_names, run.config.train.batch_size
        (1, ('bare soil', 'red roof', 'blue pond'), 2)
    """

    model: Segmenter
    config: Config
    class_names: tuple[str, ...]
    step: int
    path: Path


def load_run(path: str | Path, *, weights: Mapping[str, str | Path] | None = None) -> LoadedRun:
    """Read the newest undamaged checkpoint of a run folder, or one checkpoint folder.

    Args:
        path: ``RUN`` or ``RUN/checkpoints/step-XXXXXXXX``.
        weights: files of parts that were left out, such as ``{"dino": "dinov3.safetensors"}``; by default those of the
            run's configuration.

    Raises:
        ConfigError: ``weights`` names no part of a model.
        CheckpointError: not found, damaged, or not the model of its configuration. Or it has an option that this
            version does not know, or a frozen part that it leaves out has other weights now.

    Examples:
        >>> from drseg_core.checkpoints.run import load_run
        >>> load_run("run").path.as_posix()
        'run/checkpoints/step-00000001'
    """
    moved = weight_options(weights, "load_run")
    checkpoint = find_checkpoint(Path(path))
    state = checkpoint.weights()
    try:
        config = override(config_from_dict(checkpoint.config, Config, str(checkpoint.path / DESCRIPTION)), moved)
        model = model_of(config, read_clip=not holds_clip(state))
    except ConfigError as error:
        raise CheckpointError(
            f"load_run: {checkpoint.path} has a configuration that cannot be used; {error}"
        ) from error
    load_into(model, state, name=str(checkpoint.path / WEIGHTS))
    check_left_out(model, checkpoint.left_out, name=str(checkpoint.path))
    return LoadedRun(model.eval(), config, checkpoint.class_names, checkpoint.step, checkpoint.path)


def weight_options(weights: Mapping[str, str | Path] | None, caller: str) -> dict[str, str]:
    """The options that name the weight files of parts.

    Raises:
        ConfigError: no such part.
    """
    for part in weights or {}:
        if part not in PARTS:
            raise ConfigError(f"{caller}: weights name no part; expected one of {', '.join(PARTS)}, got {part!r}")
    return {f"model.{part}.weights": str(path) for part, path in (weights or {}).items()}


def training_data(run: LoadedRun) -> str | None:
    """The specification of the data a run was trained on; None if its folder does not tell."""
    for folder in (run.path, *run.path.parents[:2]):
        try:
            return str(parse_json((folder / MANIFEST).read_text(encoding="utf-8"))["data"]["spec"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def holds_clip(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has CLIP's tensors, so that their original file or tag is not needed."""
    return any(name.startswith("clip.") for name in state)


def check_class_names(model: Segmenter, class_names: Sequence[str]) -> None:
    """Refuse class names of a data set that cannot be prompts.

    Raises:
        DatasetError: an empty name, or one too long for the text encoder.
    """
    try:
        model.tokenize(class_names)
    except ConfigError as error:
        raise DatasetError(f"data set: a class name cannot be used; {error}") from error


def model_of(config: Config, *, read_clip: bool = True, read_prior: bool = True, read_remote: bool = True) -> Segmenter:
    """The untrained model of a configuration.

    Args:
        config: all options.
        read_clip: False leaves CLIP's weights as memory is, for a checkpoint that holds all of them.
        read_prior: the same for the prior's weights.
        read_remote: the same for those of the second CLIP that guides the decoder.

    Raises:
        ConfigError: options that do not fit together.
    """
    try:
        return build_model(config.model, read_clip=read_clip, read_prior=read_prior, read_remote=read_remote)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def plain_config(config: Config) -> dict[str, Any]:
    """A configuration as JSON has it: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a run folder or checkpoint folder, with its checksums verified.

    Raises:
        CheckpointError: there is no usable one.
    """
    try:
        is_folder, is_checkpoint, is_run = path.is_dir(), (path / DESCRIPTION).is_file(), (path / CONFIG).is_file()
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"load_run: {path} is not readable ({error})") from None
    if not is_folder:
        problem = "is not a folder" if exists else "not found"
        raise CheckpointError(f"load_run: {path} {problem}; expected the folder of a training run or of a checkpoint")
    if is_checkpoint:
        return open_checkpoint(path)
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        reason = f"has no checkpoint in {FOLDER}/ yet" if is_run else "is not the folder of a training run"
        raise CheckpointError(f"load_run: {path} {reason}; expected a folder written by drseg train")
    return checkpoint


def check_output(run: Path, *, resume: bool) -> None:
    """Refuse a folder that a new run must not write into, or that holds no run to resume.

    Hidden files do not count: a run killed at its very start leaves only a lock and unfinished files.

    Raises:
        ConfigError: for a new run the folder is not empty, or is a file.
        CheckpointError: there is no run to resume.
    """
    try:
        exists = run.exists()
    except OSError as error:
        raise ConfigError(f"train: out is not usable; expected a new or empty folder ({error.strerror})") from error
    if exists and not run.is_dir():
        raise ConfigError(f"train: out is not a folder; expected a new or empty folder, got {run}")
    if resume:
        if not (run / CONFIG).is_file():
            problem = f"has no {CONFIG}" if run.is_dir() else "not found"
            raise CheckpointError(f"train: {run} {problem}; expected the folder of a run to resume")
    elif run.is_dir() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise ConfigError(f"train: out is not empty; expected a new folder, or --resume to go on with it, got {run}")


def check_resumable(checkpoint: Checkpoint, config: Config, class_names: tuple[str, ...]) -> None:
    """Refuse to go on with another configuration or other classes than the checkpoint's.

    Limits may be raised, and logging, checkpoint and evaluation options may change. The file of a frozen prior may have
    moved, because its content is compared when the checkpoint is restored.

    Raises:
        CheckpointError: the message names the first fields that differ, with both values.
    """
    moved = tuple(f"model.{part}.weights" for part in ("dino", "remote") if part in checkpoint.left_out)
    differing = [
        f"{name}: {old!r} then, {new!r} now"
        for name, old, new in _differences(_completed(checkpoint), plain_config(config))
        if not name.startswith((*_FREE, *moved)) and not (name == "train.iterations" and new > old)
    ]
    if checkpoint.class_names != class_names:
        differing.append(_class_difference(checkpoint.class_names, class_names))
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        run = checkpoint.path.parent.parent
        raise CheckpointError(
            f"resume: the run in {run} was started with other options; {'; '.join(differing[:5])}{more}"
        )


def write_run_files(
    run: Path, config: Config, class_names: tuple[str, ...], facts: dict[str, Any], *, resumed_at: int | None
) -> None:
    """Write config.yaml first (a folder that has it can be resumed), then classes.txt and manifest.json.

    A resumed run keeps the manifest of its start and adds an entry to its list ``resumed``.
    """
    from drseg_core.ops import backend_report

    write_text_atomic(run / CONFIG, to_yaml(config))
    write_text_atomic(run / CLASSES, "".join(f"{name}\n" for name in class_names))
    entry = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_revision(),
        "versions": library_versions(),
        "seed": config.seed,
        "backends": backend_report(),
        **facts,
    }
    manifest = entry
    if resumed_at is not None:
        try:
            manifest = parse_json((run / MANIFEST).read_text(encoding="utf-8"))
            manifest.setdefault("resumed", []).append({"step": resumed_at, **entry})
        except (OSError, ValueError, AttributeError):
            manifest = entry
    write_text_atomic(run / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def warm_start(model: Segmenter, path: Path) -> bool:
    """Copy the weights of another run wherever names and shapes match, and say how many did.

    Returns:
        True if the channel split was copied. It must then be kept, because the graph's weights belong to it.

    Raises:
        CheckpointError: nothing matches, or there is no such run.
    """
    try:
        is_file = path.is_file()
    except OSError as error:
        raise CheckpointError(f"init: path is not readable; {error.strerror}") from error
    state = load_weights(path)[0] if is_file else find_checkpoint(path).weights()
    own = model.state_dict()
    matching = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    learned = {name for name, _ in model.named_parameters()} & matching.keys()
    if not learned:
        raise CheckpointError(f"init: no tensor of {path} has the name and shape of one of the model's {len(own)}")
    model.load_state_dict(matching, strict=False)
    print(f"init: {len(matching)} of {len(own)} tensors taken from {path}", file=sys.stderr)
    missing = sorted({name for name, value in model.named_parameters() if value.requires_grad} - matching.keys())
    if missing:
        _log.info("init: %d trainable tensors start anew: %s", len(missing), ", ".join(missing[:10]))
    return {"spsd.semantic_index", "spsd.structural_index"} <= matching.keys()


def _completed(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's configuration; an option that is newer than it has its default."""
    try:
        return plain_config(config_from_dict(checkpoint.config, Config))
    except ConfigError:
        return checkpoint.config


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        prefix = f"{name}." if name else ""
        return [item for key in keys for item in _differences(old.get(key), new.get(key), f"{prefix}{key}")]
    return [] if old == new else [(name, old, new)]


def _class_difference(old: tuple[str, ...], new: tuple[str, ...]) -> str:
    if len(old) != len(new):
        return f"classes: {len(old)} then, {len(new)} now"
    place, (before, now) = next((i, pair) for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
    return f"classes[{place}]: {before!r} then, {now!r} now"
