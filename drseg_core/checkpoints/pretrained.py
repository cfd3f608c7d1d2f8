# SPDX-License-Identifier: Apache-2.0
"""A trained model as a folder to give away: weights, options, classes, channel split, licence notes.

The folder holds:

* ``model.safetensors``: weights
* ``config.json``: options, classes, checksums of all files
* ``classes.txt``
* ``channels.safetensors``: the ranking behind the split, if there is one
* ``manifest.json``: what it was trained on, and with what
* ``README.md``: a model card with the licences

Paths of the machine on which it was made are left out. :func:`push_to_hub` puts such a folder on the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from drseg_core.checkpoints.card import model_card, read_scores, training_facts
from drseg_core.checkpoints.channels import ChannelFile, load_channels, save_channels
from drseg_core.checkpoints.checkpoint import (
    check_kinds,
    content_hash,
    file_hash,
    first_line,
    storage_failure,
    whole_folder,
)
from drseg_core.checkpoints.licences import licence_notes
from drseg_core.checkpoints.published import without_retries
from drseg_core.checkpoints.run import (
    CHANNELS,
    CLASSES,
    MANIFEST,
    PARTS,
    LoadedRun,
    load_run,
    model_of,
    plain_config,
    weight_options,
)
from drseg_core.checkpoints.versions import library_versions
from drseg_core.config.load import config_from_dict, override
from drseg_core.config.schema import Config
from drseg_core.data.dataset import class_names_hash
from drseg_core.errors import CheckpointError, ConfigError, ResourceError
from drseg_core.extras import require
from drseg_core.files import parse_json
from drseg_core.models.weights import (
    check_left_out,
    left_out_hashes,
    load_into,
    load_weights,
    model_state,
    save_weights,
    weights_hash,
)

__all__ = ["from_pretrained", "load", "push_to_hub", "save_pretrained"]

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
_READ = {"clip": "read_clip", "dino": "read_prior", "remote": "read_remote"}
# owner/name, as the hub takes it
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_FILES = [WEIGHTS, DESCRIPTION, CLASSES, CHANNELS, MANIFEST, CARD]
# fields taken from a run's manifest; commands and paths are left out
_KEPT = ("started", "git", "versions", "seed", "parameters", "device", "processes")


def save_pretrained(
    run: LoadedRun,
    folder: str | Path,
    *,
    channels: ChannelFile | None = None,
    include_frozen: bool = False,
    results: Sequence[str | Path] = (),
    name: str | None = None,
) -> Path:
    """Write a model, complete or not at all.

    Args:
        run: the model with its options and classes, from :func:`drseg_core.checkpoints.run.load_run`.
        folder: new or empty.
        channels: the ranking behind the model's split; by default that of the run's folder.
        include_frozen: also write frozen parts that are published elsewhere (the prior), with their licence. Without
            them, loading the model needs the same weights, which are then checked.
        results: files of ``drseg evaluate`` whose scores the card shows.
        name: ``owner/name``, which the card uses to tell how to load the model.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder is not empty, or ``results`` has a file of another model.
        CheckpointError: the ranking does not belong to the model's split.
        ResourceError: the disk is full or not writable.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.checkpoints.pretrained import save_pretrained
        >>> folder = save_pretrained(drseg.load("run"), "gift")
        >>> sorted(path.name for path in folder.iterdir())[:3]
        ['README.md', 'channels.safetensors', 'classes.txt']
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"save_pretrained: folder is in use; expected a new or empty one, got {target}")
    channels = channels or _ranking(run)
    if channels is not None and (
        run.model.spsd is None or not torch.equal(run.model.spsd.semantic_index.cpu(), channels.semantic_index)
    ):
        raise CheckpointError("save_pretrained: channels are not the model's; expected the ranking behind its split")
    state = run.model.state_dict() if include_frozen else model_state(run.model)
    config = _portable(run.config)
    inside = {part for part in PARTS if any(name.startswith(f"{part}.") for name in state)}
    notes = licence_notes(config.model, inside)
    manifest = _manifest(run)
    facts, scores = training_facts(run.config, run.step, manifest), read_scores(results, weights_hash(run.model))
    card = model_card(config.model, run.class_names, notes, facts=facts, scores=scores, name=name)
    try:
        with whole_folder(target) as temporary:
            save_weights(temporary / WEIGHTS, state, {"step": run.step, "class_names": list(run.class_names)})
            if channels is not None:
                save_channels(temporary / CHANNELS, channels)
            (temporary / CLASSES).write_text("".join(f"{name}\n" for name in run.class_names), encoding="utf-8")
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            (temporary / CARD).write_text(card, encoding="utf-8")
            description = {
                "format_version": FORMAT_VERSION,
                "step": run.step,
                "config": plain_config(config),
                "class_names": list(run.class_names),
                "class_names_sha256": class_names_hash(run.class_names),
                "left_out": {part: digest for part, digest in left_out_hashes(run.model).items() if part not in inside},
                "licences": notes,
                "versions": library_versions(),
                "files": {path.name: file_hash(path) for path in sorted(temporary.iterdir())},
            }
            text = json.dumps({**description, "sha256": content_hash(description)}, indent=1)
            (temporary / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    except Exception as error:
        if not storage_failure(error):
            raise
        raise ResourceError(f"save_pretrained: {target} could not be written ({first_line(error)})") from error
    return target


def from_pretrained(
    name: str | Path,
    *,
    weights: Mapping[str, str | Path] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> LoadedRun:
    """Read what :func:`save_pretrained` wrote, on the CPU and in evaluation mode. No code of the folder is run.

    Args:
        name: a folder, or ``owner/name`` on the Hugging Face hub.
        weights: files of parts that were left out, such as ``{"dino": "dinov3.safetensors"}``.
        revision: branch, tag or commit on the hub.
        cache_dir: where the hub's files are kept.
        local_files_only: use only files that were fetched before.

    Raises:
        CheckpointError: not found, damaged, of a newer format or of another model, or the weights given for a part that
            was left out are not those of its training.
        ConfigError: ``weights`` names no part of the model.

    Examples:
        >>> from drseg_core.checkpoints.pretrained import from_pretrained
        >>> from_pretrained("folder").class_names
        ('bare soil', 'red roof', 'blue pond')
    """
    moved = weight_options(weights, "from_pretrained")
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetched(str(name), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    description = _description(folder)
    state = load_weights(folder / WEIGHTS)[0]
    inside = {part for part in PARTS if any(key.startswith(f"{part}.") for key in state)}
    try:
        config = override(config_from_dict(description["config"], Config, str(folder / DESCRIPTION)), moved)
        model = model_of(config, **{flag: part not in inside for part, flag in _READ.items()})
    except ConfigError as error:
        raise CheckpointError(f"from_pretrained: {folder} has a configuration that cannot be used; {error}") from error
    load_into(model, state, name=str(folder / WEIGHTS), complete=not description["left_out"])
    check_left_out(model, description["left_out"], name=str(folder))
    return LoadedRun(model.eval(), config, tuple(description["class_names"]), description["step"], folder)


def push_to_hub(
    model: LoadedRun | str | Path,
    repository: str,
    *,
    channels: ChannelFile | None = None,
    include_frozen: bool = False,
    results: Sequence[str | Path] = (),
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    message: str = "DR-Seg model",
) -> str:
    """Put a model on the Hugging Face hub, where :func:`from_pretrained` finds it: all files in one commit.

    Args:
        model: a loaded run or its folder, which :func:`save_pretrained` writes first. Or a folder that it wrote, whose
            card may have been edited. Only the files it wrote are sent.
        repository: ``owner/name``; made if it is not there.
        channels: see :func:`save_pretrained`; with a run only.
        include_frozen: see :func:`save_pretrained`; with a run only. The licence of those weights has to allow it.
        results: see :func:`save_pretrained`; with a run only.
        private: whether a new repository is only for its owner. An existing one stays as it is.
        token: a token with the right to write; by default that of ``hf auth login`` or ``HF_TOKEN``.
        revision: an existing branch; by default ``main``.
        message: message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: ``repository`` is no such name, or an option needs a run.
        CheckpointError: the model cannot be read or is damaged, or the hub cannot be reached or refuses access.
        ResourceError: there is no room for the folder.

    Examples:
        >>> from drseg_core.checkpoints.pretrained import push_to_hub
        >>> push_to_hub("folder", "owner/name")
        'https://.../owner/name/commit/...'
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"push_to_hub: repository has a wrong form; expected owner/name, got {repository!r}")
    require("push_to_hub", "huggingface_hub")
    import huggingface_hub

    finished = not isinstance(model, LoadedRun) and (Path(model) / DESCRIPTION).is_file()
    if finished and (include_frozen or channels is not None or results):
        raise ConfigError(
            "push_to_hub: model is a finished folder; expected a run with include_frozen, channels or results"
        )
    with _reaching(repository):
        hub = huggingface_hub.HfApi(token=token)
        # before gigabytes are written for nothing
        hub.whoami()
    with tempfile.TemporaryDirectory(prefix="drseg-hub-") as place:
        if isinstance(model, LoadedRun) or not finished:
            run = model if isinstance(model, LoadedRun) else load_run(model)
            folder = save_pretrained(
                run,
                Path(place) / "model",
                channels=channels,
                include_frozen=include_frozen,
                results=results,
                name=repository,
            )
        else:
            folder = Path(model)
            _description(folder)
        with _reaching(repository):
            hub.create_repo(repository, private=private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=_FILES,
                # what an earlier model had and this one has not
                delete_patterns=_FILES,
                revision=revision,
                commit_message=message,
            )
    return str(commit.commit_url)


def load(
    source: str | Path, *, weights: Mapping[str, str | Path] | None = None, revision: str | None = None
) -> LoadedRun:
    """A trained model, on the CPU and in evaluation mode, from a folder or the hub.

    Args:
        source: the folder of a run, of one of its checkpoints, or of :func:`save_pretrained`. Or ``owner/name`` on the
            Hugging Face hub.
        weights: files of parts that were left out, such as ``{"dino": "dinov3.safetensors"}``.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: see :func:`drseg_core.checkpoints.run.load_run` and :func:`from_pretrained`.
        ConfigError: ``weights`` names no part of a model.

    Examples:
        >>> import drseg_core as drseg
        >>> run = drseg.load("run")
        >>> run.model.training, run.class_names
        (False, ('bare soil', 'red roof', 'blue pond'))
    """
    path = Path(source)
    on_hub = _REPOSITORY.fullmatch(str(source)) is not None and not path.exists()
    if on_hub or (path / DESCRIPTION).is_file():
        return from_pretrained(source, weights=weights, revision=revision)
    return load_run(path, weights=weights)


def _fetched(name: str, **options: Any) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"from_pretrained: {name} not found; expected a folder, or owner/name on the hub")
    require("from_pretrained", "huggingface_hub")
    import huggingface_hub

    try:
        with without_retries():
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES, **options))
    except Exception as error:
        raise CheckpointError(
            f"from_pretrained: {name} cannot be fetched; expected a folder, or owner/name on the hub and a network, "
            f"got {type(error).__name__}: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def _reaching(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"push_to_hub: {repository} cannot be written; expected a network, and a token with the right to write "
            f"(hf auth login, or HF_TOKEN), got {type(error).__name__}: {first_line(error)}"
        ) from error


def _description(folder: Path) -> dict[str, Any]:
    """``config.json``, after every file it lists was checked against its checksum."""
    path = folder / DESCRIPTION
    try:
        description = parse_json(path.read_text(encoding="utf-8"))
        whole = content_hash({key: value for key, value in description.items() if key != "sha256"})
        expected, version = description["sha256"], description["format_version"]
        if not isinstance(version, int) or version <= FORMAT_VERSION:
            check_kinds(description)
    except OSError as error:
        raise CheckpointError(f"from_pretrained: {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"from_pretrained: {path} was not written by save_pretrained, or is damaged") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"from_pretrained: {path} is of a newer format; expected at most {FORMAT_VERSION}, got {version}"
        )
    if whole != expected:
        raise CheckpointError(f"from_pretrained: {path} is damaged (checksum mismatch)")
    for name, digest in description["files"].items():
        # of the folder itself, and nothing that never ends
        if name not in _FILES or (folder / name).exists() and not (folder / name).is_file():
            raise CheckpointError(f"from_pretrained: {path} names {name!r}; expected files that save_pretrained writes")
        try:
            found = file_hash(folder / name)
        except OSError as error:
            raise CheckpointError(f"from_pretrained: {folder / name} cannot be read ({error.strerror})") from error
        # the card may be edited, the rest is the model
        if found != digest and name != CARD:
            raise CheckpointError(f"from_pretrained: {folder / name} is damaged (checksum mismatch)")
    return description


def _ranking(run: LoadedRun) -> ChannelFile | None:
    for folder in (run.path, *run.path.parents[:2]):
        if (folder / CHANNELS).is_file():
            return load_channels(folder / CHANNELS)
    return None


def _manifest(run: LoadedRun) -> dict[str, Any]:
    for folder in (run.path, *run.path.parents[:2]):
        try:
            content = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
            data = {**content["data"], "spec": content["data"]["spec"].partition(":")[0]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return {**{key: content[key] for key in _KEPT if key in content}, "data": data}
    return {}


def _portable(config: Config) -> Config:
    """The configuration with file names in place of paths; the split is in the weights."""
    model = config.model
    named: dict[str, Any] = {"spsd": dataclasses.replace(model.spsd, channels=None)}
    for name in PARTS:
        part = getattr(model, name)
        named[name] = dataclasses.replace(part, weights=part.weights and Path(part.weights).name)
    return dataclasses.replace(config, model=dataclasses.replace(model, **named))
