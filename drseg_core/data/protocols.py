# SPDX-License-Identifier: Apache-2.0
"""Evaluation protocols by name: which images, which classes, what is ignored, how images enter the model, which mean.

Numbers of two protocols cannot be compared, even where the set and the metric have the same names. The four:

``rskt``
    The benchmark that the paper follows (RSKT-Seg). It scores every image of every set. So the columns of DLRSD and
    iSAID include the images that were trained on. LoveDA has 8 classes: "no-data" is a prompt and is scored. Images are
    seen whole: shortest edge to 640 (longest at most 2560), then to the model's size whatever the aspect ratio. Classes
    that occur in the truth are averaged.

    Two faults of that code are part of the protocol. First, the resized image is padded to multiples of 32 at its right
    and lower edge. The output of the model is then stretched over the image with its padding. A square image is not
    shifted by this, the right edge of VDD's 4000 x 3000 by 51 pixels. Second, a training image without any label
    teaches that every class is absent (``train.unlabelled``, an option of ``drseg train`` that studies set).
``clean``
    What ``rskt`` should be: only held-out images, and only real classes. DLRSD and iSAID are scored on ``val``. The
    other six are scored on every image, unless the model was trained on the same set (``drseg evaluate`` refuses that).
    LoveDA's no-data is ignored, as its makers ask, so it has 7 classes. Images are not padded, and those without a
    label have no part in the loss. Otherwise as ``rskt``.
``ovrs``
    OVRS on its four sets, with the same images and classes as ``rskt``, but in sliding windows. The image is resized to
    640 x 640. The scores of four windows of 384 at stride 256, and of the whole image at 384, are averaged. The logits
    of each are enlarged to 384 before they are made scores.
``segearth``
    SegEarth-OV, a public protocol that needs only the original archives. Validation images (test for UAVid and VDD),
    other class names, 16 classes of iSAID with background, 7 of LoveDA and UAVid (cars are one class). Long side at
    448, windows of 224 at stride 112, whose logits are averaged. A class that is only predicted counts as 0. It does
    not have DLRSD.

    Potsdam, Vaihingen and iSAID are cut differently than in the benchmark (``drseg data prepare potsdam --patch 512
    --edges shift``). 14 test tiles then give the 2,016 images that it states, so its stride is 512 in effect.

    Three things differ from its code. Frames of UAVid stay whole, instead of crops of 1280 x 1080. Only the first of
    several names of a class is a prompt. No score threshold sends pixels to the background.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from drseg_core.data.benchmark_dataset import BenchmarkDataset, RelabelledDataset
from drseg_core.data.benchmarks import ALL, BENCHMARKS
from drseg_core.data.dataset import IGNORE, SegmentationDataset
from drseg_core.errors import ConfigError

__all__ = ["get_protocol", "open_protocol"]


@dataclass(frozen=True)
class Views:
    """How an image enters the model.

    Args:
        edge: pixels the image is resized to first.
        resize: which edge becomes ``edge``: the ``short`` or the ``long`` one, or both (``square``).
        limit: bound on the long edge for ``short``.
        window: side of the windows; None has none.
        stride: pixels from one window to the next.
        whole: the model also sees the whole resized image.
        pad: both sides of the resized image are padded to a multiple of it, with CLIP's mean colour. The padding is
            then stretched over the image like the rest (a fault of the public code). None pads nothing. Not with
            windows.
        mean_of: what is averaged over windows: ``scores`` in [0, 1], or ``logits``.
    """

    edge: int
    resize: Literal["short", "long", "square"]
    limit: int | None = None
    window: int | None = None
    stride: int | None = None
    whole: bool = True
    pad: int | None = None
    mean_of: Literal["scores", "logits"] = "scores"


@dataclass(frozen=True)
class SetView:
    """What a protocol makes of one set.

    Args:
        split: the images.
        class_names: prompts in id order.
        new_id: new id of each of the set's ids, if they differ; ids left out are ignored.
        image_side: side in pixels that the images must have; None takes any.
    """

    split: str
    class_names: tuple[str, ...]
    new_id: Mapping[int, int] | None = None
    image_side: int | None = None


@dataclass(frozen=True)
class Protocol:
    """One protocol.

    Args:
        name: what ``--protocol`` calls it.
        sets: what it makes of each set it supports.
        views: how images enter the model.
        convention: which classes the mean IoU is over (see :mod:`drseg_core.evaluation.metrics`).
        held_out: no set may be scored by a model that was trained on it, unless on ``val``.
        unlabelled: what training images without any label are (see ``train.unlabelled``).
    """

    name: str
    sets: Mapping[str, SetView]
    views: Views
    convention: Literal["present", "union", "all"]
    held_out: bool = False
    unlabelled: Literal["left_out", "negative"] = "left_out"

    def view(self, name: str) -> SetView:
        """The view of a set.

        Raises:
            ConfigError: the protocol does not cover the set.
        """
        if name not in self.sets:
            raise ConfigError(
                f"protocol {self.name}: set is not covered; expected one of {', '.join(self.sets)}, got {name!r}"
            )
        return self.sets[name]


_WHOLE = Views(640, "short", limit=2560)
_RSKT = {name: SetView(ALL, benchmark.class_names) for name, benchmark in BENCHMARKS.items()}
_SEGEARTH_ISPRS = ("building", "low vegetation", "tree", "car", "clutter")

PROTOCOLS: dict[str, Protocol] = {
    "rskt": Protocol("rskt", _RSKT, replace(_WHOLE, pad=32), "present", unlabelled="negative"),
    "clean": Protocol(
        "clean",
        {
            **_RSKT,
            "dlrsd": SetView("val", BENCHMARKS["dlrsd"].class_names),
            "isaid": SetView("val", BENCHMARKS["isaid"].class_names),
            "loveda": SetView(ALL, BENCHMARKS["loveda"].class_names[1:], {old: old - 1 for old in range(1, 8)}),
        },
        _WHOLE,
        "present",
        held_out=True,
    ),
    "ovrs": Protocol(
        "ovrs",
        {name: _RSKT[name] for name in ("dlrsd", "isaid", "potsdam", "vaihingen")},
        Views(640, "square", window=384, stride=256),
        "present",
    ),
    "segearth": Protocol(
        "segearth",
        {
            "isaid": SetView(
                "val",
                (
                    "background", "ship", "store tank", "baseball diamond", "tennis court", "basketball court",
                    "ground track field", "bridge", "large vehicle", "small vehicle", "helicopter", "swimming pool",
                    "roundabout", "soccer ball field", "plane", "harbor",
                ),
                {**{old: old + 1 for old in range(15)}, IGNORE: 0},
                896,
            ),
            "potsdam": SetView("val", ("road", *_SEGEARTH_ISPRS), image_side=512),
            "vaihingen": SetView("val", ("impervious surface", *_SEGEARTH_ISPRS), image_side=512),
            "loveda": SetView(
                "val",
                ("background", "building", "road", "water", "barren", "forest", "agricultural"),
                {old: old - 1 for old in range(1, 8)},
            ),
            "uavid": SetView(
                "test",
                ("background", "building", "road", "car", "tree", "vegetation", "human"),
                {0: 0, 1: 1, 2: 2, 3: 4, 4: 5, 5: 3, 6: 3, 7: 6},
            ),
            "udd5": SetView("val", ("vegetation", "building", "road", "vehicle", "background")),
            "vdd": SetView("test", ("background", "facade", "road", "vegetation", "vehicle", "roof", "water")),
        },
        Views(448, "long", window=224, stride=112, whole=False, mean_of="logits"),
        "union",
    ),
}  # fmt: skip
"""The protocols by name."""


def get_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        ConfigError: no such protocol.

    Examples:
        >>> from drseg_core.data.protocols import get_protocol
        >>> get_protocol("rskt").convention, get_protocol("clean").held_out
        ('present', True)
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"get_protocol: name is unknown; expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


def open_protocol(protocol: Protocol, spec: str) -> SegmentationDataset:
    """The images of a set that a protocol scores, under its class names.

    Args:
        protocol: the protocol.
        spec: ``NAME:ROOT`` (see :func:`drseg_core.data.open_dataset`).

    Raises:
        ConfigError: not a benchmark set, or one that the protocol does not cover.
        DatasetError: the files cannot be used.

    Examples:
        >>> from drseg_core.data.protocols import get_protocol, open_protocol
        >>> open_protocol(get_protocol("rskt"), "udd5:datasets").class_names
        ('Vegetation', 'Building', 'Road', 'Vehicle', 'Other')
    """
    name, _, root = spec.partition(":")
    if name not in BENCHMARKS:
        raise ConfigError(
            f"protocol {protocol.name}: data is no benchmark set; expected NAME:ROOT with NAME one of "
            f"{', '.join(protocol.sets)}, got {spec!r}"
        )
    view = protocol.view(name)
    base = BenchmarkDataset(name, root, view.split)
    new_id = view.new_id
    if new_id is None:
        if view.class_names == base.class_names and view.image_side is None:
            return base
        new_id = {old: old for old in range(len(base.class_names))}
    return RelabelledDataset(base, view.class_names, new_id, image_side=view.image_side)


def check_held_out(protocol: Protocol, spec: str, trained_on: str) -> None:
    """Refuse a protocol of held-out images for the images of the training.

    Args:
        protocol: the protocol.
        spec: the data that are scored.
        trained_on: the data of the training.

    Raises:
        ConfigError: both are the same set, and the protocol scores more than its ``val``.
    """
    name, trained = spec.partition(":")[0], trained_on.partition(":")[0]
    if protocol.held_out and name == trained and protocol.view(name).split == ALL:
        raise ConfigError(
            f"protocol {protocol.name}: the model was trained on {trained_on}; expected images it never saw, "
            f"got every image of {spec} (--split val without a protocol scores the rest of a set)"
        )
