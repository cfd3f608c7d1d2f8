# SPDX-License-Identifier: Apache-2.0
"""What a person must bring for Table 1: which files, under which names, and where they are published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from drseg_core.checkpoints.published import Published, located, published_clip, published_prior
from drseg_core.config.schema import ModelConfig
from drseg_core.data.benchmark_dataset import split_folders
from drseg_core.data.benchmarks import BENCHMARKS
from drseg_core.data.pairs import SUFFIXES
from drseg_core.data.protocols import get_protocol
from drseg_core.errors import ConfigError, DatasetError
from drseg_core.studies.setting import Setting
from drseg_core.studies.tables import training_study

SETS = "OVRSISBench, linked in the README of https://github.com/LiBingyu01/RSKT-Seg"
RSIB = "RSIB.pth, linked in the README of https://github.com/yecy749/GSNet (Specialist RSI Backbone)"
REMOTE = "RemoteCLIP-ViT-B-32.pt, https://huggingface.co/chendelong/RemoteCLIP"


class Need(NamedTuple):
    """Something that a study reads.

    Args:
        what: a data set and its split, or weights.
        expected: files, and how they are named to the command.
        published: where they are to be had.
        found: whether they are here.
    """

    what: str
    expected: str
    published: str
    found: bool


def needs(settings: Iterable[Setting]) -> list[Need]:
    """Data and weights of the parts of Table 1, each once: training sets, test sets, weights."""
    found: dict[tuple[str, str], Need] = {}
    several = list(settings)
    for setting in several:
        _add(found, _set(setting.data, "train"))
    for setting in several:
        for test in setting.tests:
            protocol = get_protocol(setting.protocol or "rskt")
            _add(found, _set(test.spec, protocol.view(test.spec.partition(":")[0]).split))
    for setting in several:
        for variant in training_study("table1", setting).variants:
            for need in _weights(setting.variant_config(dict(variant.options), 0).model, setting):
                _add(found, need)
    return list(found.values())


def text(found: Sequence[Need]) -> str:
    """A line for each, and how many are missing."""
    lines = []
    for need in found:
        lines.append(f"{'found  ' if need.found else 'missing'}  {need.what}: {need.expected}")
        if not need.found:
            lines.append(f"         {need.published}")
    missing = sum(not need.found for need in found)
    lines.append(f"{missing} of {len(found)} missing" if missing else f"all {len(found)} are here")
    return "\n".join(lines)


def _add(found: dict[tuple[str, str], Need], need: Need) -> None:
    found.setdefault((need.what, need.expected), need)


def _set(spec: str, split: str) -> Need:
    name, _, root = spec.partition(":")
    if name not in BENCHMARKS:
        raise ConfigError(
            f"study: training data is no benchmark set; expected NAME:ROOT with NAME one of {', '.join(BENCHMARKS)}, "
            f"got {spec!r}"
        )
    benchmark = BENCHMARKS[name]
    home = Path(root) / benchmark.folder(split)
    kinds = ", ".join(sorted(SUFFIXES))
    expected = f"{home / benchmark.images}/* and {home / benchmark.masks}/* ({kinds})"
    try:
        there = all(any(folder.images.iterdir()) for folder in split_folders(benchmark, Path(root), split))
    except (DatasetError, OSError):
        there = False
    makers = f"{SETS}; or from its makers' archives: drseg data prepare {name} --raw DIR --out {root}"
    return Need(f"{benchmark.title}, {split}", expected, makers, there)


def _weights(model: ModelConfig, setting: Setting) -> list[Need]:
    """Of CLIP, the prior and the second CLIP of one method; none where they begin with random weights."""
    if setting.needs_start:
        return []
    found = [
        _published(f"CLIP {model.clip.name}", model.clip.weights, "model.clip.weights", published_clip(model.clip))
    ]
    if model.fusion.kind != "none":
        if model.dino.weights is None:
            found.append(Need("RS-DINOv1, the prior of GSNet and RSKT-Seg", "--prior-v1 FILE", RSIB, False))
        else:
            source = published_prior(model.dino)
            found.append(_published(f"prior {model.dino.name}", model.dino.weights, "model.dino.weights", source))
    if model.decoder.remote_clip:
        there = model.remote.weights is not None and Path(model.remote.weights).is_file()
        expected = f"--remote-clip {model.remote.weights or 'FILE'}"
        found.append(Need("RemoteCLIP, for RSKT-Seg", expected, REMOTE, there))
    return found


def _published(what: str, weights: str | None, option: str, source: Published | None) -> Need:
    if source is None:
        return Need(what, str(weights), f"as the configuration names it ({option})", Path(str(weights)).is_file())
    files = " or ".join(source.files)
    how = f"{files} in the hub's cache, where they are fetched to when they are first needed, or a file in {option}"
    return Need(what, how, f"{source.address}; licence: {source.licence}", located(source) is not None)
