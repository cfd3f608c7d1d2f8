# SPDX-License-Identifier: Apache-2.0
"""The methods that DR-Seg is compared with, as options of the one model: same data, loss, schedule and evaluation.

Each is built from its paper's and repository's description and says what is simplified. A method keeps the sizes of
the configuration it is applied to (encoders, widths, layers), so that a comparison compares methods;
:func:`published_options` are the sizes that its own files have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from drseg_core.config.load import override
from drseg_core.config.schema import Config
from drseg_core.errors import ConfigError

__all__ = ["METHODS", "Method", "PublishedSizes", "apply_method", "published_options"]


@dataclass(frozen=True)
class PublishedSizes:
    """Sizes of a method's own files that differ from the configuration's; None keeps the configuration's.

    Args:
        prior: its prior: ``v1`` is RS-DINOv1, which the printed rows of GSNet and RSKT-Seg use.
        layers: aggregation layers with ViT-B and with ViT-L.
        released: layers of its released weights by training set, where they differ from those of its files.
        heads: attention heads of the aggregator.
        mlp_hidden: hidden width of the aggregator's MLPs.
        remote_clip: whether RemoteCLIP guides its decoder.
        options: further options with ViT-B and with ViT-L: another encoder, image sizes, the trained parts of CLIP.

    Examples:
        >>> from drseg_core.config.methods import METHODS
        >>> METHODS["rskt"].published.prior, METHODS["rskt"].published.remote_clip
        ('v1', True)
    """

    prior: Literal["v1"] | None = None
    layers: tuple[int, int] | None = None
    released: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    heads: int | None = None
    mlp_hidden: int | None = None
    remote_clip: bool | None = False
    options: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default_factory=lambda: ({}, {}))


@dataclass(frozen=True)
class Method:
    """A comparison method.

    Args:
        title: its name in print.
        source: paper and repository it is described by.
        options: dotted options of the configuration.
        simplified: what differs from the original, besides the sizes.
        published: its own sizes.

    Examples:
        >>> from drseg_core.config.methods import METHODS
        >>> METHODS["sed"].source
        'arXiv 2311.15537; xb534/SED'
    """

    title: str
    source: str
    options: Mapping[str, Any]
    simplified: str
    published: PublishedSizes = field(default_factory=PublishedSizes)


_NO_PRIOR = {"model.fusion.kind": "none", "model.decoder.dino_guidance": False}
# masks first, classes second: there is no decoder to guide
_PROPOSALS = {**_NO_PRIOR, "model.decoder.remote_clip": False, "model.rotations": 1}
_ROTATED = {"model.rotations": 4, "model.fusion.original": "stack"}
_SWIN = {"model.aggregator.kind": "swin"}


def _convnext(name: str, weights: str) -> dict[str, Any]:
    """SED's encoder: the whole image tower is trained, the text tower is not."""
    return {
        "model.clip.name": name,
        "model.clip.weights": weights,
        "model.clip.image_size": 768,
        "model.clip.trainable": "visual",
        "model.aggregator.class_pooling": (2, 1),
    }


def _side_adapter(image_size: int, blocks: int, *, trainable: str = "position") -> dict[str, Any]:
    """SAN's two image sizes, and its frozen CLIP, of which only the position embedding is trained."""
    return {
        "model.clip.image_size": image_size,
        "model.clip.trainable": trainable,
        "model.proposals.image_size": 640,
        "model.proposals.recognition_blocks": blocks,
    }


# every method begins here, whatever the configuration says
_RESET = {
    "model.rotations": 4,
    "model.fusion.kind": "ugaf",
    "model.fusion.branch": "graph",
    "model.decoder.kind": "upsampling",
    "model.decoder.guidance_attention": False,
    "model.decoder.skip_correlation": False,
    "model.proposals.kind": "none",
}

METHODS: dict[str, Method] = {
    "drseg": Method(
        "DR-Seg",
        "arXiv 2604.02010",
        {},
        "nothing that the paper states",
        # it names none of them
        PublishedSizes(remote_clip=None),
    ),
    "catseg": Method(
        "CAT-Seg",
        "arXiv 2303.11797; cvlab-kaist/CAT-Seg",
        {**_NO_PRIOR, **_SWIN, "model.rotations": 1},
        "the prompt template is the benchmark's",
        PublishedSizes(layers=(2, 2), heads=4, mlp_hidden=512),
    ),
    "ovrs": Method(
        "OVRS",
        "arXiv 2409.07683; caoql98/OVRS",
        {**_NO_PRIOR, **_SWIN, **_ROTATED, "model.decoder.guidance_attention": True},
        "scored by the protocol's views instead of its own sliding windows",
        # its repository has CAT-Seg's head, but no files for the two backbones: CAT-Seg's
        PublishedSizes(layers=(2, 2), heads=4, mlp_hidden=512),
    ),
    "gsnet": Method(
        "GSNet",
        "arXiv 2412.19492",
        {
            **_SWIN,
            "model.rotations": 1,
            "model.fusion.kind": "separate",
            "model.fusion.branch": "prior",
            "model.decoder.dino_guidance": True,
        },
        "its specialist encoder is the configuration's prior where methods are matched",
        # its aggregator is CAT-Seg's
        PublishedSizes(prior="v1", layers=(2, 2), heads=4, mlp_hidden=512),
    ),
    "rskt": Method(
        "RSKT-Seg",
        "arXiv 2509.12040; LiBingyu01/RSKT-Seg",
        {
            **_ROTATED,
            "model.aggregator.kind": "efficient",
            "model.fusion.kind": "separate",
            "model.fusion.branch": "prior",
            "model.decoder.dino_guidance": True,
        },
        "outside of table1 RemoteCLIP guides the decoder only with model.decoder.remote_clip, as its weights are a "
        "download of their own",
        # of those trained on iSAID the released ones have the layers of the files
        PublishedSizes(
            prior="v1", layers=(3, 2), released={"dlrsd": (5, 5)}, heads=8, mlp_hidden=384, remote_clip=True
        ),
    ),
    "sed": Method(
        "SED",
        "arXiv 2311.15537; xb534/SED",
        {**_NO_PRIOR, "model.rotations": 1, "model.decoder.kind": "gradual"},
        "the prompt is the benchmark's instead of ImageNet's 80; on the configuration's vision transformer instead of "
        "its ConvNeXt where methods are matched; no class is rejected early, as in its own files",
        PublishedSizes(
            heads=4,
            options=(
                _convnext("convnext_base_w_320", "laion_aesthetic_s13b_b82k"),
                _convnext("convnext_large_d_320", "laion2b_s29b_b131k_ft_soup"),
            ),
        ),
    ),
    "san": Method(
        "SAN",
        "arXiv 2302.12242; MendelXu/SAN",
        {**_PROPOSALS, "model.proposals.kind": "side_adapter"},
        "the prompt is the benchmark's instead of 14; where methods are matched, the side network sees the image in "
        "CLIP's size and CLIP is trained like that of the others",
        PublishedSizes(options=(_side_adapter(320, 3), _side_adapter(448, 6))),
    ),
    "scan": Method(
        "SCAN",
        "arXiv 2312.04089; yongliu20/SCAN",
        {**_PROPOSALS, "model.proposals.kind": "calibrated"},
        "SAN's side network instead of Mask2Former on a Swin transformer; CLIP is integrated by cross-attention alone, "
        "without frequency filter and class token, and recognises without cropping; the prompt is the benchmark's",
        PublishedSizes(
            options=(_side_adapter(320, 3, trainable="none"), _side_adapter(448, 6, trainable="none")),
        ),
    ),
}


def apply_method(config: Config, name: str) -> Config:
    """A copy of a configuration with the options of a method.

    Raises:
        ConfigError: no such method, or it does not fit the configuration.

    Examples:
        >>> from drseg_core.config.load import load_config
        >>> from drseg_core.config.methods import apply_method
        >>> apply_method(load_config("tiny"), "catseg").model.aggregator.kind
        'swin'
    """
    if name not in METHODS:
        raise ConfigError(f"method: name is unknown; expected one of {', '.join(METHODS)}, got {name!r}")
    return override(config, method_options(name))


def published_options(name: str, clip: str, *, released: str | None = None) -> dict[str, Any]:
    """Options of a method's own sizes, besides its prior: those of :func:`apply_method` leave the configuration's.

    Args:
        name: one of ``METHODS``.
        clip: open_clip name of the backbone. Layers, heads and widths are of ViT-B and ViT-L; another backbone, such as
            that of the ``tiny`` preset, keeps the configuration's.
        released: name of the training set whose released weights' layers are meant; None means those of its files.

    Examples:
        >>> from drseg_core.config.methods import published_options
        >>> published_options("rskt", "ViT-B-16-quickgelu")["model.aggregator.layers"]
        3
        >>> published_options("rskt", "ViT-B-16-quickgelu", released="dlrsd")["model.aggregator.layers"]
        5
        >>> published_options("catseg", "drseg-tiny")
        {'model.decoder.remote_clip': False}
    """
    sizes = METHODS[name].published
    found: dict[str, Any] = {"model.decoder.remote_clip": sizes.remote_clip}
    place = next((place for place, kind in enumerate(("ViT-B", "ViT-L")) if clip.startswith(kind)), None)
    if place is not None:
        layers = sizes.layers if released is None else sizes.released.get(released, sizes.layers)
        found["model.aggregator.layers"] = None if layers is None else layers[place]
        found["model.aggregator.heads"] = sizes.heads
        found["model.aggregator.mlp_hidden"] = sizes.mlp_hidden
        found.update(sizes.options[place])
    return {option: value for option, value in found.items() if value is not None}


def method_options(name: str) -> dict[str, Any]:
    """All options that make a method: those that other methods change are set back."""
    return {**_RESET, **METHODS[name].options}
