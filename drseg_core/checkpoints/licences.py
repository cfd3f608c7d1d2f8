# SPDX-License-Identifier: Apache-2.0
"""The licences of the weights inside a model, as notes for passing it on. No legal advice."""

from __future__ import annotations

from collections.abc import Collection

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
        ("clip", config.clip, clip_licence(config.clip))
    ]
    if config.fusion.kind not in ("none", "cosine"):
        encoders.append(("dino", config.dino, prior_licence(config.dino)))
    if config.decoder.remote_clip:
        encoders.append(("remote", config.remote, clip_licence(config.remote)))
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


def clip_licence(config: ClipConfig | RemoteConfig) -> str:
    """In a few words, of a CLIP's weights."""
    if config.weights is None:
        return "none: no published weights"
    # open_clip's tags carry no licence; this one is stated in github.com/openai/CLIP
    return "MIT (OpenAI)" if config.weights == "openai" else UNKNOWN


def prior_licence(config: DinoConfig) -> str:
    """In a few words, of a prior's weights."""
    if config.weights is None:
        return "none: no published weights"
    import timm

    published = timm.get_pretrained_cfg(config.name) if timm.is_model(config.name.split(".", 1)[0]) else None
    licence = getattr(published, "license", None)
    if licence is None:
        return UNKNOWN
    return licence if config.weights == "pretrained" else f"{licence}, if the file is the published one"
