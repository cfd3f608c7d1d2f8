# SPDX-License-Identifier: Apache-2.0
"""Procedural overhead scenes with a compositional vocabulary, in two worlds.

``objects`` has six kinds of object in six colours on soil. Six of the 36 combinations never occur in scenes of the
``seen`` vocabulary. So a model trained on those scenes can be asked for the six by name. ``landscape`` is harder, see
:mod:`drseg_core.data.synthetic.landscape`. A scene is a pure function of (seed, split, index, world, domain,
vocabulary, size).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from drseg_core.data.dataset import Sample, SegmentationDataset
from drseg_core.data.synthetic import landscape
from drseg_core.data.synthetic.landscape import DOMAINS, Domain, draw_landscape
from drseg_core.data.synthetic.shapes import COLORS, KINDS, Sun, draw_object, soil
from drseg_core.errors import ConfigError
from drseg_core.extras import require
from drseg_core.files import write_text_atomic

Vocabulary = Literal["seen", "full"]
World = Literal["objects", "landscape"]

BACKGROUND = "bare soil"
HELD_OUT = ("green roof", "white tank", "yellow field", "blue pond", "red court", "gray car")
"""Combinations that scenes of the ``seen`` vocabulary never show: one per kind of object and one per colour."""

SEEN_NAMES = (BACKGROUND, *(n for k in KINDS for c in COLORS if (n := f"{c} {k}") not in HELD_OUT))
CLASS_NAMES = (*SEEN_NAMES, *HELD_OUT)
"""All 37 names: bare soil, the 30 seen combinations, the 6 held-out ones (ids 31 to 36)."""

HELD_OUT_IDS = tuple(range(len(SEEN_NAMES), len(CLASS_NAMES)))

# part of every fingerprint: to be raised whenever a change alters any pixel
GENERATOR = 1
MARKER = "synthetic.json"
# of one set; 600 landscapes take ten seconds to draw
KEPT_BYTES = 64 << 20
KEPT_SETS = 3
_SPLITS = {"train": 0, "val": 1, "test": 2}
_NUMBERS = ("seed", "scenes", "size")


def class_names(vocabulary: Vocabulary, world: World = "objects") -> tuple[str, ...]:
    """The ``seen`` or the ``full`` names: 31 or 37 of ``objects``, 21 or 25 of ``landscape``.

    The seen names come first, so a seen name has the same id in both.

    Examples:
        >>> from drseg_core.data.synthetic import class_names
        >>> len(class_names("seen")), class_names("full")[-1]
        (31, 'gray car')
    """
    if vocabulary not in ("seen", "full"):
        raise ConfigError(f"synthetic: vocabulary is unknown; expected seen or full, got {vocabulary!r}")
    if world not in ("objects", "landscape"):
        raise ConfigError(f"synthetic: world is unknown; expected objects or landscape, got {world!r}")
    if world == "landscape":
        return landscape.SEEN_NAMES if vocabulary == "seen" else landscape.CLASS_NAMES
    return SEEN_NAMES if vocabulary == "seen" else CLASS_NAMES


def held_out_ids(world: World = "objects") -> tuple[int, ...]:
    """Ids of the names that scenes of the ``seen`` vocabulary never show.

    Examples:
        >>> from drseg_core.data.synthetic import class_names, held_out_ids
        >>> [class_names("full")[i] for i in held_out_ids()][:2]
        ['green roof', 'white tank']
    """
    return tuple(range(len(class_names("seen", world)), len(class_names("full", world))))


def render_scene(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    vocabulary: Vocabulary = "seen",
    size: int | tuple[int, int] = 128,
    world: World = "objects",
    domain: Domain = "source",
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one scene.

    Every object is drawn from the combinations of the vocabulary with equal chance, so in ``full`` scenes a held-out
    combination is as frequent as a seen one. About seven objects share 128 x 128 pixels; they never overlap. A smaller
    scene shows smaller objects, a larger one more of them.

    Args:
        index: number of the scene, from 0.
        seed: seed of the whole set.
        split: ``train``, ``val`` or ``test``: three independent streams of scenes.
        vocabulary: ``seen`` (30 combinations) or ``full`` (36).
        size: side in pixels, or (height, width).
        world: ``objects`` (described above) or ``landscape``.
        domain: of ``landscape``: ``source``, or ``shifted``, which no training scene should be.

    Returns:
        image (H, W, 3) uint8 RGB and mask (H, W) uint8 with ids into :func:`class_names`.

    Raises:
        ConfigError: unknown split, vocabulary, world or domain, negative index or seed, size below 32.

    Examples:
        >>> from drseg_core.data.synthetic import render_scene
        >>> image, mask = render_scene(0, size=(64, 96), world="landscape")
        >>> image.shape, mask.shape
        ((64, 96, 3), (64, 96))
    """
    height, width = (size, size) if isinstance(size, int) else size
    if split not in _SPLITS:
        raise ConfigError(f"synthetic: split is unknown; expected one of {', '.join(_SPLITS)}, got {split!r}")
    if index < 0 or seed < 0 or min(height, width) < 32:
        raise ConfigError(
            "synthetic: index, seed or size is out of range; expected index >= 0, seed >= 0, size >= 32, "
            f"got {index}, {seed}, {height} x {width}"
        )
    names = class_names(vocabulary, world)
    if domain not in DOMAINS or (domain != "source" and world == "objects"):
        expected = "source" if world == "objects" else " or ".join(DOMAINS)
        raise ConfigError(f"synthetic: domain is unknown; expected {expected}, got {domain!r}")
    key = [GENERATOR, seed, _SPLITS[split], index, len(names), height, width]
    if world == "landscape":
        key.append(DOMAINS.index(domain))
        rng = np.random.default_rng(np.random.SeedSequence(key))
        return draw_landscape(rng, (height, width), names, domain)
    rng = np.random.default_rng(np.random.SeedSequence(key))
    scale = min(1.0, min(height, width) / 128)
    image = soil(rng, height, width)
    mask = np.zeros((height, width), np.uint8)
    taken = np.zeros((height, width), bool)
    sun = Sun(angle=float(rng.uniform(0, 2 * np.pi)), length=float(rng.uniform(0.7, 1.2)) * scale)
    area = height * width / (128 * scale) ** 2
    for _ in range(max(1, round(float(rng.uniform(6.5, 9.0)) * area))):
        label = int(rng.integers(1, len(names)))
        color, kind = names[label].split(" ")
        draw_object(rng, image, mask, taken, label=label, kind=kind, color=color, scale=scale, sun=sun)
    image *= rng.uniform(0.92, 1.05)
    image += rng.normal(0, 3.0, size=image.shape).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), mask


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """Options of ``synthetic:...``: seed of the set, number of scenes, side in pixels, vocabulary, world, domain.

    Examples:
        >>> from drseg_core.data.synthetic import SyntheticOptions
        >>> SyntheticOptions(scenes=8, vocabulary="full").content()
        {'seed': 0, 'scenes': 8, 'size': 128, 'vocabulary': 'full'}
    """

    seed: int = 0
    scenes: int = 400
    size: int = 128
    vocabulary: Vocabulary = "seen"
    world: World = "objects"
    domain: Domain = "source"

    def content(self) -> dict[str, int | str]:
        """What decides the scenes; options that are newer than stored fingerprints only where they say something."""
        content = dataclasses.asdict(self)
        return content if self.world != "objects" else {k: content[k] for k in ("seed", "scenes", "size", "vocabulary")}


@functools.lru_cache(maxsize=KEPT_SETS)
def _kept_scenes(options: SyntheticOptions, split: str) -> dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The drawn scenes of a set by index, which a process that opens it again need not draw again."""
    return {}


class SyntheticDataset(SegmentationDataset):
    """Scenes of :func:`render_scene`, drawn when they are first read and kept in memory up to ``KEPT_BYTES``.

    Data sets of equal options share them; a process keeps those of the ``KEPT_SETS`` sets that it opened last.

    Args:
        options: which scenes.
        split: ``train``, ``val`` or ``test``.

    Examples:
        >>> from drseg_core.data.synthetic import SyntheticDataset, SyntheticOptions
        >>> dataset = SyntheticDataset(SyntheticOptions(scenes=3, size=64), "val")
        >>> len(dataset), dataset[2].image.shape
        (3, torch.Size([3, 64, 64]))
    """

    def __init__(self, options: SyntheticOptions | None = None, split: str = "train") -> None:
        self.options = options or SyntheticOptions()
        self.split = split
        self.class_names = class_names(self.options.vocabulary, self.options.world)
        if self.options.scenes < 1:
            raise ConfigError(f"synthetic: scenes is out of range; expected >= 1, got {self.options.scenes}")
        self._kept = _kept_scenes(self.options, split)
        self._render(0)

    @classmethod
    def from_spec(cls, text: str, split: str = "train") -> SyntheticDataset:
        """From ``seed=0,scenes=400,size=128,vocabulary=seen``."""
        kinds = {field.name: field for field in dataclasses.fields(SyntheticOptions)}
        values: dict[str, int | str] = {}
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            key = key.strip()
            if key not in kinds or key in values:
                raise ConfigError(
                    f"synthetic: option {key!r} is unknown or repeated; expected each of {', '.join(kinds)} once"
                )
            try:
                values[key] = value.strip() if kinds[key].type != "int" else int(value)
            except ValueError:
                raise ConfigError(f"synthetic: {key} is not a number; expected an integer, got {value!r}") from None
        return cls(SyntheticOptions(**values), split)  # type: ignore[arg-type]

    def _render(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        found = self._kept.get(index)
        if found is None:
            options = self.options
            found = render_scene(
                index,
                seed=options.seed,
                split=self.split,
                vocabulary=options.vocabulary,
                size=options.size,
                world=options.world,
                domain=options.domain,
            )
            # image and mask are four bytes a pixel
            if 4 * options.size**2 * (len(self._kept) + 1) <= KEPT_BYTES:
                self._kept[index] = found
        return found

    def __len__(self) -> int:
        return self.options.scenes

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"synthetic: index {index} is out of range; expected 0 to {len(self) - 1}")
        image, mask = self._render(index)
        chw = np.ascontiguousarray(image.transpose(2, 0, 1))
        # a copy: what a reader does to its sample is not done to the next one's
        return Sample(torch.from_numpy(chw), torch.from_numpy(mask.copy()), self.sample_name(index))

    def sample_name(self, index: int) -> str:
        kind = " ".join(str(value) for key, value in self.options.content().items() if key not in _NUMBERS)
        return f"synthetic {kind} {self.split} scene {index} of seed {self.options.seed}"

    def fingerprint(self) -> str:
        content = [GENERATOR, self.split, self.options.content(), self.class_names]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_scenes(
    root: str | Path,
    *,
    splits: Mapping[str, int],
    seed: int = 0,
    size: int = 128,
    vocabulary: Vocabulary = "seen",
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write scenes as a folder that ``folder:ROOT`` reads; the folder appears only when it is complete.

    The two sets of the demo::

        write_scenes(out / "seen", splits={"train": 400, "val": 60}, vocabulary="seen")   # 31 classes
        write_scenes(out / "full", splits={"val": 120}, vocabulary="full")                # 37 classes

    Args:
        root: folder to make: ``classes.txt``, ``{split}/{images,masks}/scene_00000.png`` and ``synthetic.json``,
            which says how it was made.
        splits: number of scenes of each split.
        seed: seed of the set.
        size: side of a scene in pixels.
        vocabulary: ``seen`` or ``full``.
        overwrite: replace a folder that this function wrote earlier.
        progress: show a progress bar.

    Returns:
        ``root``.

    Raises:
        ConfigError: ``root`` exists and is not empty (or, with ``overwrite``, is not of this function's making).

    Examples:
        >>> from drseg_core.data import open_dataset
        >>> from drseg_core.data.synthetic import write_scenes
        >>> root = write_scenes("scenes", splits={"train": 2, "val": 1}, size=64)
        >>> len(open_dataset(f"folder:{root}", "train"))
        2
    """
    require("write_scenes", "pillow", "tqdm")
    from PIL import Image
    from tqdm import tqdm

    root = Path(root)
    names = class_names(vocabulary)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not overwrite or not (root / MARKER).is_file():
            raise ConfigError(f"write_scenes: {root} exists; expected a new folder, or one of its own with overwrite")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        temporary = Path(folder) / "scenes"
        bar = tqdm(total=sum(splits.values()), desc="scenes", unit="scene", disable=not progress)
        for split, count in splits.items():
            for part in ("images", "masks"):
                (temporary / split / part).mkdir(parents=True)
            for index in range(count):
                image, mask = render_scene(index, seed=seed, split=split, vocabulary=vocabulary, size=size)
                name = f"scene_{index:05d}.png"
                Image.fromarray(image).save(temporary / split / "images" / name, compress_level=1)
                Image.fromarray(mask).save(temporary / split / "masks" / name, compress_level=1)
                bar.update()
        bar.close()
        write_text_atomic(temporary / "classes.txt", "\n".join(names) + "\n")
        made = {"generator": GENERATOR, "seed": seed, "size": size, "vocabulary": vocabulary, "splits": dict(splits)}
        write_text_atomic(temporary / MARKER, json.dumps(made, indent=1) + "\n")
        if root.exists():
            shutil.rmtree(root)
        temporary.replace(root)
    return root
