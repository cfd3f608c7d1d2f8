# SPDX-License-Identifier: Apache-2.0
"""A map from words alone: nothing is trained, and one exact graph of the whole scene rectifies it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from drseg_core.checkpoints.encoders import choose_clip, choose_prior, load_encoders
from drseg_core.config.load import config_from_dict
from drseg_core.config.reading import Reading, parse_reading
from drseg_core.config.schema import ReadingConfig
from drseg_core.config.zero_shot import DECAY, IN_METRES, NO_PRIOR, ZeroShotConfig, load_zero_shot
from drseg_core.data.dataset import IGNORE, check_class_names, has_control
from drseg_core.data.vocabulary import OTHER_COLOR, Vocabulary, as_vocabulary, class_files, plain_classes
from drseg_core.device import select_device
from drseg_core.errors import ConfigError
from drseg_core.evaluation.inference import Box, Piece, PredictsPieces, ReadWindow
from drseg_core.extras import require
from drseg_core.models.clip import patch_side
from drseg_core.models.prompts import AERIAL_TEMPLATES, class_prompt
from drseg_core.models.weights import weights_hash
from drseg_core.models.zero_shot import ZeroShot, check_choices
from drseg_core.scenes.block_store import work_folder
from drseg_core.scenes.files import SceneFiles, check_outputs
from drseg_core.scenes.mosaic import Grid
from drseg_core.scenes.polygons import check_min_area
from drseg_core.scenes.predict import OPEN, Mapper, Work, check_threshold, predict_scene
from drseg_core.scenes.reader import SceneReader, describe, open_scene
from drseg_core.scenes.scene_graph import GraphPredictor, scene_windows
from drseg_core.scenes.zero_shot_plan import ZeroShotPlan, check_cells, plan_cells

__all__ = ["SceneZeroShot", "ZeroShotMap", "zero_shot"]

BACKGROUND = "background"
_log = logging.getLogger(__name__)
_SQUARE = 0.05
"""Share by which the sides of a pixel may differ if distances are in metres."""
_READING = ("bands", "nodata", "scale", "gsd", "aoi")
_WORDS = ("background", "templates")
_OF_FILES = ("scores", "probabilities", "polygons", "min_area", "overwrite")


class ZeroShotMap(NamedTuple):
    """A map in memory.

    ``class_index`` (H, W) is uint8, 255 where the scene has no data. ``score`` of that class and ``uncertainty``
    (H, W) are float32 from 0 to 1, NaN without data. ``class_names`` are the classes, ``files`` what was written.

    Examples:
        >>> import drseg_core as drseg
        >>> found = drseg.zero_shot("tiny").predict("scene.tif", ["building", "road"], background=["sky"])
        >>> found.class_names, found.score.shape, found.files
        (('building', 'road', 'background'), (40, 60), None)
    """

    class_index: NDArray[np.uint8]
    score: NDArray[np.float32]
    uncertainty: NDArray[np.float32]
    class_names: tuple[str, ...]
    files: SceneFiles | None = None


class SceneZeroShot:
    """Encoders that map scenes by words; :func:`zero_shot` makes one.

    Args:
        model: dense CLIP features and a prior.
        config: windows, graph and propagation.
        facts: what the metadata of a map say about the weights.
        device: where the model runs.

    Raises:
        ConfigError: windows that do not fit the model.

    Examples:
        >>> import drseg_core as drseg
        >>> mapper = drseg.zero_shot("tiny", steps=3)
        >>> mapper.plan("scene.tif", ["building", "road"]).grid
        (5, 8)
    """

    def __init__(self, model: ZeroShot, config: ZeroShotConfig, facts: dict[str, str], device: torch.device) -> None:
        self.model, self.config, self.facts, self.device = model.to(device), config, facts, device
        try:
            scene_windows(model, config)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def predict(
        self,
        image: str | Path,
        classes: Vocabulary | str | Sequence[str],
        *,
        out: str | Path | None = None,
        progress: bool = False,
        **options: Any,
    ) -> ZeroShotMap:
        """Map a scene into arrays, and into files if ``out`` is given.

        Args:
            image: see :func:`drseg_core.scenes.predict.predict`.
            classes: one text such as ``"building; road, street; tree#00ff00"``, or a list of its parts.
            out: class raster to write, ``.tif``.
            progress: show progress bars.
            options: those of :meth:`write`; options of files need ``out``.

        Raises:
            ConfigError: an option does not fit, too many cells, or an output exists.
            RasterError: the image cannot be read in full.
            ResourceError: an output cannot be written in full.

        Examples:
            >>> import drseg_core as drseg
            >>> mapper = drseg.zero_shot("tiny")
            >>> found = mapper.predict("scene.tif", ["building", "road"], out="map.tif")
            >>> found.class_index.shape, found.files.classes.name
            ((40, 60), 'map.tif')
        """
        if out is not None:
            arrays: list[_Arrays] = []
            files = self.write(image, classes, out, progress=progress, arrays=arrays, **options)
            return arrays[0].result(files)
        threshold = options.pop("threshold", None)
        check_threshold("zero_shot", threshold)
        words = {name: options.pop(name) for name in _WORDS if name in options}
        for name in _OF_FILES:
            if name in options:
                raise ConfigError(f"zero_shot: {name} is unknown without out; expected a path in out")
        with self._open(image, options, (*_WORDS, "threshold", "out")) as scene:
            describe(scene)
            predictor, _ = self.predictor(scene, classes, **words, progress=progress)
            found = _Arrays(predictor, threshold)
            for _ in found.pieces(scene.window, scene.height, scene.width):
                pass
        return found.result(None)

    def write(
        self,
        image: str | Path,
        classes: Vocabulary | str | Sequence[str],
        out: str | Path,
        *,
        background: Sequence[str] = (),
        templates: Sequence[str] = AERIAL_TEMPLATES,
        threshold: float | None = None,
        scores: bool = False,
        probabilities: bool = False,
        polygons: str | Path | None = None,
        min_area: float = 0.0,
        overwrite: bool = False,
        progress: bool = True,
        arrays: list[Any] | None = None,
        work: Work | None = None,
        **reading: Any,
    ) -> SceneFiles:
        """Map a scene only into files, in bounded memory, as ``drseg predict zero-shot`` does.

        Args not listed are those of :func:`drseg_core.scenes.predict.predict`.

        Args:
            image: see :func:`drseg_core.scenes.predict.predict`.
            classes: one text such as ``"building; road, street; tree#00ff00"``, or a list of its parts.
            out: class raster to write, ``.tif``.
            background: prompts of one more class, the last, for all else in the scene.
            templates: sentences with one ``{}``, over which the features of a word are averaged.
            arrays: list that gets one collector of the arrays of :meth:`predict`.
            work: see :func:`drseg_core.scenes.predict.predict_scene`.
            reading: ``bands``, ``nodata``, ``scale``, ``gsd``, ``aoi``.

        Returns:
            The files written.

        Examples:
            >>> import drseg_core as drseg
            >>> files = drseg.zero_shot("tiny").write("scene.tif", "roof; road", "map.tif", progress=False)
            >>> files.areas.name
            'map_areas.csv'
        """
        check_min_area("zero_shot", min_area, polygons)
        wanted: dict[str, Any] = {"scores": scores, "probabilities": probabilities, "polygons": polygons}
        inputs = [reading.get("aoi"), *(class_files(classes) if isinstance(classes, str) else ())]
        kept_blocks = work is not None and work_folder(out).is_dir()
        check_outputs(image, out, overwrite=overwrite or kept_blocks, inputs=inputs, **wanted)
        if polygons is not None:
            require("predict", "vectors")
        with self._open(image, reading, (*_WORDS, "threshold", *_OF_FILES)) as scene:
            predictor, legend = self.predictor(
                scene,
                classes,
                background,
                templates,
                folder=Path(out).absolute().parent,
                # printed, and refused, once: before the first of several processes makes anything
                limited=work is None or work.alone or work.step == OPEN,
                progress=progress,
            )
        kept: PredictsPieces = predictor
        if arrays is not None:
            kept = _Arrays(predictor, threshold)
            arrays.append(kept)
        return predict_scene(
            kept,
            image,
            out,
            colors=legend.colors,
            threshold=threshold,
            min_area=min_area,
            overwrite=overwrite,
            reading=_reading(reading),
            gsd=reading.get("gsd"),
            aoi=reading.get("aoi"),
            tags=self._tags(legend, templates, predictor),
            work=work,
            progress=progress,
            **wanted,
        )

    def mapper(self, classes: Vocabulary | str | Sequence[str], **options: Any) -> Mapper:
        """A mapper of any number of scenes, with the options of :meth:`write`."""

        def write(image: str | Path, out: str | Path, **how: Any) -> SceneFiles:
            return self.write(image, classes, out, **options, **how)

        config = dataclasses.asdict(self.config)
        # who raises it as the refusal says keeps what is made
        del config["max_cells"]
        facts = {"weights": weights_hash(self.model), "config": config, **self.facts}
        reading = {name: options[name] for name in _READING if name in options}

        def grid(image: str | Path) -> Grid:
            with self._open(image, reading) as scene:
                return Grid(scene.crs, scene.transform, scene.height, scene.width)

        def predictor(scene: SceneReader) -> GraphPredictor:
            words = {name: options[name] for name in _WORDS if name in options}
            return self.predictor(scene, classes, **words, progress=True)[0]

        opening = {"reading": _reading(reading), "gsd": reading.get("gsd"), "aoi": reading.get("aoi")}
        return Mapper(write, facts, grid, opening, predictor, GraphPredictor.steps)

    def plan(
        self,
        image: str | Path,
        classes: Vocabulary | str | Sequence[str],
        *,
        background: Sequence[str] = (),
        templates: Sequence[str] = AERIAL_TEMPLATES,
        **reading: Any,
    ) -> ZeroShotPlan:
        """Cells, memory and time that :meth:`write` would take. Nothing is written. Args and errors as there.

        Examples:
            >>> import drseg_core as drseg
            >>> print(drseg.zero_shot("tiny").plan("scene.tif", ["road"]).text().splitlines()[3])
            one graph: 8 x 5 = 40 cells
        """
        with self._open(image, reading, _WORDS) as scene:
            return plan_cells(self.predictor(scene, classes, background, templates, limited=False)[0], scene)

    def _open(self, image: str | Path, reading: dict[str, Any], others: Sequence[str] = ()) -> Any:
        """The scene; ``others`` are the options beside those of ``reading``, to be named where one is unknown."""
        require("zero_shot", "maps")
        if unknown := sorted(reading.keys() - set(_READING)):
            known = ", ".join((*others, *_READING))
            raise ConfigError(f"zero_shot: option {unknown[0]} is unknown; expected one of {known}")
        return open_scene(image, reading=_reading(reading), gsd=reading.get("gsd"), aoi=reading.get("aoi"))

    def predictor(
        self,
        scene: SceneReader,
        classes: Vocabulary | str | Sequence[str],
        background: Sequence[str] = (),
        templates: Sequence[str] = AERIAL_TEMPLATES,
        *,
        folder: Path | None = None,
        limited: bool = True,
        progress: bool = False,
    ) -> tuple[GraphPredictor, Vocabulary]:
        """The predictor of an open scene, and the classes with that of ``background``; see :meth:`write`.

        Args:
            folder: where a large prior is kept.
            limited: refuse more cells than the configuration allows.
        """
        legend = check_words(classes, background, templates)
        background = _plain(background)
        text = self.model.encode(legend.synonyms, templates, background)
        if background:
            legend = Vocabulary(
                (*legend.names, BACKGROUND), (*legend.synonyms, background), (*legend.colors, OTHER_COLOR)
            )
        decay, radius = self._distances(scene)
        predictor = GraphPredictor(
            self.model,
            text,
            check_class_names(legend.names, "zero_shot"),
            self.config,
            decay=decay,
            radius=radius,
            device=self.device,
            folder=folder,
            progress=progress,
        )
        if limited and predictor.has_graph:
            check_cells(plan_cells(predictor, scene, time_model=False), self.config)
        return predictor, legend

    def _distances(self, scene: SceneReader) -> tuple[float, float | None]:
        """Decay for each cell of this scene, and the radius in cells."""
        config = self.config
        check_metres(config, scene)
        side = (scene.gsd or 0.0) * scene_windows(self.model, config).cell
        decay = DECAY if config.decay is None else config.decay
        if config.decay_per_metre is not None:
            decay = config.decay_per_metre * side
        return decay, config.radius if config.radius_metres is None else config.radius_metres / side

    def _tags(self, legend: Vocabulary, templates: Sequence[str], predictor: GraphPredictor) -> dict[str, str]:
        """Options and weights of a map, for its metadata."""
        options = {
            field.name: getattr(self.config, field.name)
            for field in dataclasses.fields(self.config)
            # the others change nothing in a map
            if field.name not in ("clip", "prior", "batch_size", "max_cells", "super_tile")
        }
        options |= {
            "decay": predictor.decay,
            "radius": predictor.radius,
            "words": legend.synonyms,
            "templates": list(templates),
        }
        tags = {**self.facts, "zero_shot": json.dumps(options, ensure_ascii=False)}
        if "random weights" in self.facts["clip"]:
            tags["warning"] = "CLIP has random weights: this map means nothing"
        return tags


def zero_shot(
    preset: str | os.PathLike[str] = "b",
    *,
    clip: str | None = None,
    prior: str | None = None,
    offline: bool = False,
    device: str | None = None,
    **options: Any,
) -> SceneZeroShot:
    """Maps from words alone: CLIP's dense features, rectified over one exact graph of the whole scene.

    Args:
        preset: ``b`` (CLIP ViT-B/16), ``l`` (ViT-L/14 at 336), ``tiny`` (random weights, means nothing), or a YAML
            file of :class:`drseg_core.config.zero_shot.ZeroShotConfig`.
        clip: other weights: a file, ``hub:owner/name/file``, a tag or architecture of open_clip,
            ``ARCHITECTURE:FILE``, or ``random``, which means nothing.
        prior: another prior: a file, ``hub:owner/name/file``, an architecture of timm, ``ARCHITECTURE:FILE``,
            ``none`` (no graph), or ``random``.
        offline: never connect to a network.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None takes CUDA if there is one.
        options: any option of the configuration, such as ``variant``, ``rotations``, ``window``, ``overlap``, ``k``,
            ``alpha``, ``steps``, ``decay``, ``decay_per_metre``, ``radius``, ``radius_metres``, ``super_tile``,
            ``refine``. And ``prior_layer``, the block of the prior whose features are taken.

    Raises:
        ConfigError: an option is unknown or does not fit.
        CheckpointError: weights are missing and cannot be fetched; the message says which files to bring.
        BackendUnavailableError: this machine has no such device.

    Examples:
        >>> import drseg_core as drseg
        >>> found = drseg.zero_shot("tiny", rotations=4).predict("scene.tif", ["building", "road"])
        >>> found.class_index.shape, bool(found.class_index.max() < 2)
        ((40, 60), True)
    """
    place = select_device(device)
    config = configured(preset, clip=clip, prior=prior, **options)
    encoders = load_encoders(config.clip, config.prior, offline=offline)
    try:
        model = ZeroShot(encoders.clip, encoders.prior, variant=config.variant, rotations=config.rotations)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return SceneZeroShot(model, config, encoders.facts, place)


def configured(
    preset: str | os.PathLike[str], *, clip: str | None = None, prior: str | None = None, **options: Any
) -> ZeroShotConfig:
    """A preset with options, checked as far as possible without weights. See :func:`zero_shot`."""
    config = load_zero_shot(preset)
    layer = options.pop("prior_layer", None)
    known = [field.name for field in dataclasses.fields(config) if field.name not in ("clip", "prior")]
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"zero_shot: option {unknown[0]} is unknown; expected one of {', '.join(known)}")
    share = config.overlap / config.window
    # an option of such a pair replaces the preset's other one
    replaced = {b: None for pair in IN_METRES.items() for a, b in (pair, pair[::-1]) if a in given}
    config = config_from_dict({**dataclasses.asdict(config), **replaced, **given}, ZeroShotConfig, "zero_shot")
    towers = dataclasses.replace(choose_clip(config.clip, clip), image_size=config.window)
    structure = dataclasses.replace(choose_prior(config.prior, prior), image_size=config.window)
    if layer is not None:
        structure = dataclasses.replace(structure, layer=layer)
    if config.steps == 0 and config.variant != "proxyclip":
        # nothing asks for it
        structure = dataclasses.replace(structure, name=NO_PRIOR)
    try:
        check_choices(config.variant, config.rotations, has_prior=structure.name != NO_PRIOR)
        patch = patch_side(towers.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if patch is not None and "overlap" not in given and (clip is not None or "window" in given):
        # as much of a window as in the preset, in whole cells of another CLIP too
        config = dataclasses.replace(config, overlap=int(share * (config.window // patch)) * patch)
    if patch is not None:
        _check_windows(config.window, config.overlap, patch)
    return dataclasses.replace(config, clip=towers, prior=structure)


def _check_windows(window: int, overlap: int, patch: int) -> None:
    if window < 2 * patch or window % patch:
        raise ConfigError(
            f"zero_shot: window does not fit CLIP; expected a multiple of {patch}, at least {2 * patch} pixels, "
            f"got {window}"
        )
    if not 0 <= overlap < window or overlap % patch:
        raise ConfigError(
            f"zero_shot: overlap does not fit; expected a multiple of {patch} pixels below {window}, got {overlap}"
        )


def _plain(words: Sequence[str]) -> tuple[str, ...]:
    """Words with one space between their parts, and none around; a comma ends one, as in a list of classes."""
    return tuple(" ".join(word.split()) for item in words for word in item.split(","))


def check_words(
    classes: Vocabulary | str | Sequence[str], background: Sequence[str] = (), templates: Sequence[str] = ()
) -> Vocabulary:
    """The classes, checked as far as words can be without a text encoder.

    Raises:
        ConfigError: ``background`` or ``templates`` is no list, a template has not exactly one ``{}``, a class has
            the name of the background, or a word of the background is there twice, one of a class, empty, or has a
            colour or a control character.
        DatasetError: a name is no class name.
    """
    legend = as_vocabulary(classes, "zero_shot")
    for name, texts in {"background": background, "templates": templates}.items():
        # which would be read letter by letter
        if isinstance(texts, str):
            raise ConfigError(f"zero_shot: {name} is one text; expected a list of them, got {texts!r}")
    for template in templates:
        class_prompt(BACKGROUND, template)
    # text encoders see no capitals
    if background and BACKGROUND in (name.strip().casefold() for name in legend.names):
        raise ConfigError(
            f"zero_shot: a class is called {BACKGROUND}, as that of the prompts of the background; "
            "expected another name, or no such prompts"
        )
    seen = {word.casefold() for words in legend.synonyms for word in _plain(words)}
    for word in _plain(background):
        if not word:
            raise ConfigError("zero_shot: background has an empty word; expected text")
        if has_control(word):
            raise ConfigError(f"zero_shot: background has a control character; expected text, got {ascii(word)}")
        if "#" in word:
            raise ConfigError(f"zero_shot: background has a colour; expected words alone, got {word!r}")
        # a word of a class as well would be that class everywhere, which is the first of two that are equal
        if word.casefold() in seen:
            raise ConfigError(
                f"zero_shot: background has a word twice; expected every word once, and none of a class, got {word!r}"
            )
        seen.add(word.casefold())
    return legend


def check_metres(config: ZeroShotConfig, scene: SceneReader) -> None:
    """Check that distances in metres, if an option has them, are the same in both directions of a scene.

    Raises:
        ConfigError: the scene has no georeference, or its pixels are not square on the ground.
    """
    for cells, metres in IN_METRES.items():
        if getattr(config, metres) is None:
            continue
        sides = scene.sides
        if sides is None:
            raise ConfigError(
                f"zero_shot: {metres} needs a place; expected a CRS and a transform in {scene.path}, or {cells}"
            )
        if max(sides) > (1 + _SQUARE) * min(sides):
            raise ConfigError(
                f"zero_shot: {metres} does not fit the scene; expected pixels that are square on the ground, got "
                f"{sides[0]:.3g} m across and {sides[1]:.3g} m down: reproject {scene.path}, or give {cells}"
            )


class _Arrays:
    """Passes on the pieces of a predictor, and keeps their values."""

    def __init__(self, predictor: GraphPredictor, threshold: float | None = None) -> None:
        self.class_names, self._predictor, self._threshold = predictor.class_names, predictor, threshold
        self.index, self.score, self.uncertainty = np.empty((0, 0), np.uint8), *(np.empty((0, 0), np.float32),) * 2

    def blocks(self, height: int, width: int) -> list[Box]:
        return self._predictor.blocks(height, width)

    def reads(self, height: int, width: int, *, wanted: Collection[int] | None = None) -> Iterator[Box]:
        return self._predictor.reads(height, width, wanted=wanted)

    def pieces(
        self, read: ReadWindow, height: int, width: int, *, wanted: Collection[int] | None = None
    ) -> Iterator[Piece]:
        self.index = np.full((height, width), IGNORE, np.uint8)
        self.score, self.uncertainty = (np.zeros((height, width), np.float32) for _ in range(2))
        band: Any = None
        origin = 0, 0

        def spied(top: int, bottom: int, left: int, right: int) -> Any:
            nonlocal band, origin
            image, band = read(top, bottom, left, right)
            origin = top, left
            return image, band

        for piece in self._predictor.pieces(spied, height, width, wanted=wanted):
            found = piece.prediction
            rows, columns = found.class_index.shape
            top, left = piece.top - origin[0], piece.left - origin[1]
            known = band[top : top + rows, left : left + columns]
            place = slice(piece.top, piece.top + rows), slice(piece.left, piece.left + columns)
            index = found.class_index.numpy()
            if self._threshold is not None:
                index = np.where(found.score.numpy() < self._threshold, self._other, index)
            self.index[place] = np.where(known, index, IGNORE)
            for target, value in ((self.score, found.score), (self.uncertainty, found.uncertainty)):
                target[place] = np.where(known, value.numpy(), np.float32("nan"))
            yield piece

    @property
    def _other(self) -> np.uint8:
        return np.uint8(plain_classes(self.class_names).with_other().names.index("other"))

    def result(self, files: SceneFiles | None) -> ZeroShotMap:
        names = self.class_names
        if self._threshold is not None:
            names = plain_classes(names).with_other().names
        return ZeroShotMap(self.index, self.score, self.uncertainty, names, files)


def _reading(options: dict[str, Any]) -> Reading:
    bands = options.get("bands")
    given = ReadingConfig(
        options.get("scale"), options.get("nodata"), None if bands is None else ",".join(map(str, bands))
    )
    return parse_reading(given)
