# SPDX-License-Identifier: Apache-2.0
"""Under whose terms the weights inside a model stand: notes for who passes them on. No legal advice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from drseg_core.config.schema import ClipConfig, DinoConfig, ModelConfig, RemoteConfig

UNKNOWN = "not known to drseg; ask where the weights came from"


def licence_notes(config: ModelConfig, inside: Collection[str]) -> list[dict[str, str | bool]]:
    """One note per encoder of a model.

    Args:
        config: the model.
        inside: parts whose weights are in the files, of ``clip``, ``dino`` and ``remote``.

    Returns:
        Notes with the keys ``part``, ``architecture``, ``weights``, ``licence`` and ``included``.
    """
    encoders: list[tuple[str, ClipConfig | DinoConfig | RemoteConfig, str]] = [
        ("clip", config.clip, _clip_licence(config.clip))
    ]
    if config.fusion.kind not in ("none", "cosine"):
        encoders.append(("dino", config.dino, _dino_licence(config.dino)))
    if config.decoder.remote_clip:
        encoders.append(("remote", config.remote, _clip_licence(config.remote)))
    return [
        {
            "part": part,
            "architecture": options.name,
            "weights": options.weights or "random initial weights",
            "licence": licence,
            "included": part in inside,
        }
        for part, options, licence in encoders
    ]


def model_card(
    config: ModelConfig,
    class_names: Sequence[str],
    notes: Sequence[dict[str, str | bool]],
    *,
    facts: Mapping[str, str] | None = None,
    name: str | None = None,
) -> str:
    """The ``README.md`` of a model folder, in the hub's form.

    Args:
        config: the model.
        class_names: of its training.
        notes: see :func:`licence_notes`.
        facts: what is known of its training, heading by heading.
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
        "from drseg_core.training.pretrained import from_pretrained",
        "",
        f'model = from_pretrained("{name or "this folder or its name on the hub"}").model',
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
        lines += ["", f'Where {part} is a file: `from_pretrained(..., weights={{"{part}": "FILE"}})`; it is checked.']
    if facts:
        lines += [
            "",
            "## Training",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
        ]
    lines += ["", "## Classes of the training", "", ", ".join(class_names), ""]
    return "\n".join(lines)


def _clip_licence(config: ClipConfig | RemoteConfig) -> str:
    if config.weights is None:
        return "none: no published weights"
    # open_clip's tags carry no licence; this one is stated in github.com/openai/CLIP
    return "MIT (OpenAI)" if config.weights == "openai" else UNKNOWN


def _dino_licence(config: DinoConfig) -> str:
    if config.weights is None:
        return "none: no published weights"
    import timm

    published = timm.get_pretrained_cfg(config.name) if timm.is_model(config.name.split(".", 1)[0]) else None
    licence = getattr(published, "license", None)
    if licence is None:
        return UNKNOWN
    return licence if config.weights == "pretrained" else f"{licence}, if the file is the published one"
