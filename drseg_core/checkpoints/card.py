# SPDX-License-Identifier: Apache-2.0
"""The card of a model that is given away: how to load it, licences, training, scores, classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drseg_core.config.schema import Config, ModelConfig
from drseg_core.errors import ConfigError
from drseg_core.files import parse_json


def model_card(
    config: ModelConfig,
    class_names: Sequence[str],
    notes: Sequence[dict[str, str | bool]],
    *,
    facts: Mapping[str, str] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
    name: str | None = None,
) -> str:
    """The ``README.md`` of a model folder, in the hub's form.

    Args:
        config: the model.
        class_names: of its training.
        notes: see :func:`licence_notes`.
        facts: see :func:`training_facts`.
        scores: see :func:`read_scores`.
        name: ``owner/name`` on the hub, where it is known.
    """
    lines = [
        "---",
        "library_name: drseg",
        "license: other",
        "pipeline_tag: image-segmentation",
        "tags: [remote-sensing, open-vocabulary]",
        "---",
        "",
        "# DR-Seg",
        "",
        "Open-vocabulary segmentation of remote-sensing images (arXiv 2604.02010), written by `drseg`.",
        f"Image encoder {config.clip.name}, prior {config.dino.name}, fusion {config.fusion.kind}.",
        "",
        "```python",
        "import drseg_core as drseg",
        "",
        f'model = drseg.load("{name or "this folder or its name on the hub"}")',
        'drseg.predict(model, "scene.tif", classes=["building", "field"], out="map.tif")',
        "```",
        "",
        "## Licences",
        "",
        "What was trained stands under the terms of the one who trained it, and of the weights it began with:",
        "",
        "| part | architecture | weights | licence | in this folder |",
        "|---|---|---|---|---|",
    ]
    for note in notes:
        cells = [str(note[key]) for key in ("part", "architecture", "weights", "licence")]
        lines.append(f"| {' | '.join(cells)} | {'yes' if note['included'] else 'no, has to be fetched'} |")
    for part in [note["part"] for note in notes if not note["included"]]:
        lines += ["", f'Where {part} is a file: `drseg.load(..., weights={{"{part}": "FILE"}})`; it is checked.']
    if facts:
        lines += [
            "",
            "## Training",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
        ]
    if scores:
        lines += ["", "## Scores", "", f"| {' | '.join(scores[0])} |", f"|{'---|' * len(scores[0])}"]
        lines += [f"| {' | '.join(map(str, row.values()))} |" for row in scores]
    lines += ["", "## Classes of the training", "", ", ".join(class_names), ""]
    return "\n".join(lines)


def training_facts(config: Config, step: int, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the card tells of the training, heading by heading; what the run's manifest does not know is left out."""
    train = config.train
    data, counts = manifest.get("data", {}), manifest.get("parameters", {}).get("total", {})
    versions = manifest.get("versions", {})
    found = {
        "data": f"{data['spec']}, {data['samples']} images" if data else None,
        "data SHA-256": data.get("sha256"),
        "steps": f"{step} of {train.batch_size} crops of {train.crop_size} px",
        "loss, precision": f"{train.loss}, {train.precision}",
        "learning rate": f"{train.learning_rate:g}, of CLIP {train.learning_rate * train.clip_learning_rate_scale:g}",
        "seed": str(config.seed),
        "parameters": f"{counts['total']:,}, {counts['trainable']:,} of them trained" if counts else None,
        "evaluation": config.evaluation.mode,
        "begun": manifest.get("started"),
        "commit": manifest.get("git"),
        "versions": ", ".join(f"{key} {versions[key]}" for key in ("drseg", "torch") if key in versions) or None,
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def read_scores(files: Sequence[str | Path], weights: str) -> list[dict[str, str]]:
    """The scores in files of ``drseg evaluate``, with what they depend on, as rows of one table.

    Args:
        files: what ``drseg evaluate --out`` wrote.
        weights: SHA-256 of the model, :func:`drseg_core.models.weights.weights_hash`.

    Raises:
        ConfigError: a file is not there, is none of these, or is of another model.
    """
    rows = []
    for file in files:
        try:
            found = parse_json(Path(file).read_text(encoding="utf-8"))
            digest, data, protocol = str(found["weights_sha256"]), found["data"], found["protocol"]
            row = {
                "data": str(data["spec"]).partition(":")[0],
                "split": data["split"],
                "images": str(found["images"]),
                "protocol": "none" if protocol is None else protocol["name"],
                "class names": found["class_names_sha256"][:12],
                "mean over classes": found["mIoU_convention"],
                **{key: "-" if found[key] is None else f"{found[key]:.2f} %" for key in ("mIoU", "mACC", "fwIoU")},
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"read_scores: {file} cannot be read; expected a file of drseg evaluate, got {type(error).__name__}"
            ) from error
        if digest != weights:
            raise ConfigError(
                f"read_scores: {file} belongs to another model; expected weights {weights[:12]}, got {digest[:12]}"
            )
        rows.append(row)
    return rows
