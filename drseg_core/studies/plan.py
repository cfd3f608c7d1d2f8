# SPDX-License-Identifier: Apache-2.0
"""What a study will run, decided once when it starts: each variant and seed with its configuration and its folder.

``OUT/runs/`` holds one run folder per variant and seed, named by a hash of everything that decides it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drseg_core.checkpoints.run import plain_config
from drseg_core.config.load import override
from drseg_core.config.schema import Config, DinoConfig
from drseg_core.data.manifest import file_sha256
from drseg_core.studies.contrast import contrast_file
from drseg_core.studies.prior import prior_file
from drseg_core.studies.setting import Setting, fingerprint
from drseg_core.studies.tables import Variant

# raised when scores of the same configuration would come out differently
VERSION = 2


@dataclass(frozen=True)
class Start:
    """The dual encoder that stands for CLIP: its configuration, and where its run is, or its weight file."""

    config: Config
    path: Path


@dataclass(frozen=True)
class PlannedVariant:
    """One training of a study, and all that follows from its variant, its seed and the setting.

    Args:
        setting: what the variants have in common.
        variant: the row it belongs to.
        seed: of initial weights and order.
        out: folder of the studies.
        config: all options, with the taught prior's weight file where the setting asks for one.
        folder: where its run is.
        start: the dual encoder it begins with; None where CLIP has published weights.
        prior: the prior that is taught first; None where there is none to teach.
    """

    setting: Setting
    variant: Variant
    seed: int
    out: Path
    config: Config
    folder: Path
    start: Start | None
    prior: DinoConfig | None

    def on(self, device: str) -> PlannedVariant:
        """The same on another device, in the same folder."""
        return dataclasses.replace(self, setting=dataclasses.replace(self.setting, device=device))


def plan(setting: Setting, variants: Sequence[Variant], out: Path) -> tuple[PlannedVariant, ...]:
    """All variants that can be run, seed by seed."""
    return tuple(
        plan_variant(setting, variant, seed, out)
        for seed in setting.seeds
        for variant in variants
        if variant.why_not is None
    )


def plan_variant(setting: Setting, variant: Variant, seed: int, out: Path) -> PlannedVariant:
    """One variant and seed.

    Raises:
        ConfigError: options of the variant do not fit the setting's configuration.
        DatasetError: the training data cannot be read.
    """
    start = None
    if setting.needs_start:
        begin = setting.start_config(seed)
        if setting.start == "contrast":
            data = fingerprint(setting.data, "train")
            start = Start(begin, contrast_file(begin, data, setting.contrast_steps, out))
        else:
            start = Start(begin, _folder(out, f"start-{seed}", begin, setting, None))
    config, prior = setting.variant_config(dict(variant.options), seed), None
    if setting.prior_steps and config.model.fusion.kind not in ("none", "cosine") and config.model.dino.weights is None:
        prior = config.model.dino
        taught = prior_file(prior, setting.prior_data, setting.prior_steps, out)
        config = override(config, {"model.dino.weights": str(taught)})
    folder = _folder(out, f"cell-{seed}", config, setting, None if start is None else start.path.name)
    return PlannedVariant(setting, variant, seed, out, config, folder, start, prior)


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


def changed_options(config: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Options that are not at their default: one that a later version adds changes no name."""
    found = {
        key: changed_options(value, default[key]) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != default[key]
    }
    return found
