# SPDX-License-Identifier: Apache-2.0
"""From a scene to its class map."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.checkpoints.pretrained import load
from drseg_core.checkpoints.run import LoadedRun
from drseg_core.config.reading import Reading, choose_reading, parse_reading
from drseg_core.config.schema import ReadingConfig
from drseg_core.data.dataset import IGNORE, check_class_names
from drseg_core.data.ground import PixelArea
from drseg_core.data.vocabulary import OTHER, Color, Vocabulary, as_vocabulary, never_learned, plain_classes
from drseg_core.device import PrecisionName, select_device
from drseg_core.errors import ConfigError, RasterError
from drseg_core.evaluation.inference import Box, Piece, Predictor, PredictsPieces
from drseg_core.extras import require
from drseg_core.files import atomic_path
from drseg_core.models.weights import weights_hash
from drseg_core.scenes.areas import ClassAreas
from drseg_core.scenes.block_store import BlockStore, share, work_folder
from drseg_core.scenes.facts import computing_facts, scene_facts
from drseg_core.scenes.files import (
    SceneFiles,
    check_disks,
    check_input_stays,
    check_outputs,
    leftovers,
    usual_bytes,
)
from drseg_core.scenes.mosaic import Grid, Mosaic, Neighbour
from drseg_core.scenes.outputs import Overlay, Part, Rasters
from drseg_core.scenes.plan import Plan, plan_scene
from drseg_core.scenes.polygons import check_degrees, check_min_area, write_polygons
from drseg_core.scenes.reader import SceneReader, describe, open_scene
from drseg_core.scenes.style import write_attributes, write_style
from drseg_core.scenes.threads import ReadAhead, WriteBehind, gdal_thread
from drseg_core.scenes.writer import as_levels, check_place, written

_log = logging.getLogger(__name__)

__all__ = ["SceneFiles", "Work", "plan", "predict", "predict_scene"]

OPEN, BLOCKS = "open", "blocks"
"""The first and the last step of a map; the steps of a ``GraphPredictor`` come between."""


class Work(NamedTuple):
    """How the blocks of a map are kept, and who makes them.

    Blocks lie in a folder beside the output (:func:`drseg_core.scenes.block_store.work_folder`) until the map is
    complete. Blocks that are there already are not computed again.

    * ``facts`` identify the model.
    * ``step`` is the only step to do, and ``part`` the one among ``parts`` of it. Then only blocks are written.
      :data:`OPEN` makes no blocks and only prepares the folder.
    * ``alone`` says that no other process works at this map. So blocks of another model, of another scene or with other
      options may be removed.
    * ``neighbours`` have a share in the map where they overlap, except those ``left_out``. All their blocks must be
      there before the map is written, and its own blocks stay.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.evaluation.inference import Predictor
        >>> from drseg_core.scenes.predict import Work, predict_scene
        >>> predictor = Predictor(drseg.load("run").model, ["roof", "pond"], mode="tile", tile_size=32, overlap=8)
        >>> for part in range(2):
        ...     half = Work({"model": "run"}, "blocks", part, 2)
        ...     files = predict_scene(predictor, "scene.tif", "map.tif", work=half, progress=False)
        >>> files.classes.exists()
        False
        >>> whole = Work({"model": "run"})
        >>> predict_scene(predictor, "scene.tif", "map.tif", work=whole, progress=False).classes.exists()
        True
    """

    facts: Mapping[str, Any]
    step: str | None = None
    part: int = 0
    parts: int = 1
    alone: bool = True
    neighbours: tuple[Neighbour, ...] = ()
    left_out: frozenset[str] = frozenset()

    @property
    def blended(self) -> list[Neighbour]:
        return [other for other in self.neighbours if other.folder not in self.left_out]


def predict(
    model: LoadedRun | str | Path,
    image: str | Path,
    *,
    classes: Vocabulary | str | Sequence[str] | None = None,
    threshold: float | None = None,
    out: str | Path,
    scores: bool = False,
    probabilities: bool = False,
    polygons: str | Path | None = None,
    min_area: float = 0.0,
    overwrite: bool = False,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    scale: str | None = None,
    gsd: float | None = None,
    aoi: str | Path | None = None,
    mode: Literal["whole", "tile"] = "tile",
    tile_size: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: PrecisionName = "float32",
    compiled: bool = False,
    progress: bool = True,
) -> SceneFiles:
    """Map an image of any size by class names, as ``drseg predict`` does.

    Args:
        model: from :func:`drseg_core.load`, or what that takes. A model from there is left on ``device``.
        image: GeoTIFF, PNG, JPEG or another format of GDAL.
        classes: what to tell apart, any words: one text such as ``"building; road, street; tree#00ff00"`` (synonyms,
            colour), a list of its parts, or the result of :func:`drseg_core.data.vocabulary.parse_classes`. By default
            the classes of the training.
        threshold: pixels whose best score is below it become the class "other".
        out: class raster to write, ``.tif``. :func:`predict_scene` says what it holds and what is written beside it.
        scores: also write the score of the best class, ``map_scores.tif``.
        probabilities: also write the scores of all classes, ``map_probabilities.tif``.
        polygons: vector file to write, ``.gpkg``, ``.geojson`` or ``.parquet``.
        min_area: areas below it, in m2, join a neighbour in the polygons.
        overwrite: replace existing outputs, and remove files of theirs that are not written again.
        bands: one or three band numbers from 1. By default those that the file calls red, green and blue, else the
            first three, or the only one.
        nodata: value of pixels without data, besides what the file declares.
        scale: values that become 0 and 255: ``"0,3000"``, three such pairs with ``;`` between them, or ``"auto"``. By
            default those of the training.
        gsd: side in metres of the pixels in which the scene is read and mapped, such as those of the training. By
            default the scene's own.
        aoi: vector file of the part to map; the map covers its box.
        mode: ``tile`` at native resolution, or the ``whole`` image in one piece.
        tile_size: side of a tile in pixels; the run's by default, like the next two.
        overlap: pixels shared by neighbouring tiles.
        batch_size: tiles per forward pass.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None takes CUDA if there is one.
        precision: ``float32``, ``bfloat16`` or ``auto``, see :class:`drseg_core.evaluation.inference.Predictor`.
        compiled: run the model compiled, see there.
        progress: show a progress bar.

    Returns:
        The files written.

    Raises:
        ConfigError: an option does not fit, or an output exists.
        CheckpointError: the model cannot be read.
        RasterError: the image cannot be read in full.
        BackendUnavailableError: this machine has no such device, the device has no bfloat16, or the model cannot be
            compiled.
        ResourceError: an output cannot be written in full.

    Examples:
        >>> import drseg_core as drseg
        >>> model = drseg.load("run")
        >>> files = drseg.predict(model, "scene.tif", classes=["building", "field"], out="map.tif", progress=False)
        >>> files.classes.name
        'map.tif'
    """
    # before the model is read: that may take a while
    check_min_area("predict", min_area, polygons)
    wanted: dict[str, Any] = {"scores": scores, "probabilities": probabilities}
    check_outputs(image, out, overwrite=overwrite, inputs=[aoi], polygons=polygons, **wanted)
    if polygons is not None:
        require("predict", "vectors")
    mapper = run_mapper(
        model,
        classes=classes,
        threshold=threshold,
        min_area=min_area,
        bands=bands,
        nodata=nodata,
        scale=scale,
        gsd=gsd,
        aoi=aoi,
        mode=mode,
        tile_size=tile_size,
        overlap=overlap,
        batch_size=batch_size,
        device=device,
        precision=precision,
        compiled=compiled,
        **wanted,
    )
    return mapper.write(image, out, polygons=polygons, overwrite=overwrite, progress=progress)


class Mapper(NamedTuple):
    """A model with its options, ready for any number of scenes.

    * ``write(image, out, polygons=, overwrite=, work=, progress=)`` maps a scene as :func:`predict_scene` does.
    * ``facts`` identify the model.
    * ``steps`` are made of a scene before its blocks.
    * ``grid(image)`` says where a scene lies.
    * ``reading`` are the options of ``open_scene`` for its scenes.
    * ``predictor(scene)`` maps an open scene.
    """

    write: Callable[..., SceneFiles]
    facts: Mapping[str, Any]
    grid: Callable[[str | Path], Grid]
    reading: Mapping[str, Any]
    predictor: Callable[[SceneReader], PredictsPieces]
    steps: tuple[str, ...] = ()


def run_mapper(
    model: LoadedRun | str | Path,
    *,
    classes: Vocabulary | str | Sequence[str] | None = None,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    scale: str | None = None,
    mode: str = "tile",
    tile_size: int | None = None,
    overlap: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: PrecisionName = "float32",
    compiled: bool = False,
    **options: Any,
) -> Mapper:
    """The mapper of a trained run; args and errors are those of :func:`predict`."""
    run = model if isinstance(model, LoadedRun) else load(model)
    predictor, vocabulary, reading, trained_gsd = _prepared(
        run,
        classes,
        device,
        {"mode": mode, "tile_size": tile_size, "overlap": overlap, "batch_size": batch_size},
        {"precision": precision, "compiled": compiled},
        ReadingConfig(scale, nodata, None if bands is None else ",".join(map(str, bands))),
    )
    facts = {
        "weights": weights_hash(run.model),
        "model": dataclasses.asdict(run.config.model),
        "vocabulary": vocabulary,
        "tiles": [mode, predictor.tile_size, predictor.overlap, predictor.batch_size],
        "arithmetic": predictor.arithmetic,
    }

    def write(image: str | Path, out: str | Path, **how: Any) -> SceneFiles:
        return predict_scene(
            predictor,
            image,
            out,
            colors=vocabulary.colors,
            reading=reading,
            trained_gsd=trained_gsd,
            **options,
            **how,
        )

    opening: dict[str, Any] = {"reading": reading, "gsd": options.get("gsd"), "aoi": options.get("aoi")}

    def grid(image: str | Path) -> Grid:
        with open_scene(image, **opening) as scene:
            return Grid(scene.crs, scene.transform, scene.height, scene.width)

    return Mapper(write, facts, grid, opening, lambda scene: predictor)


def plan(
    model: LoadedRun | str | Path,
    image: str | Path,
    *,
    classes: Vocabulary | str | Sequence[str] | None = None,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    scale: str | None = None,
    gsd: float | None = None,
    aoi: str | Path | None = None,
    scores: bool = False,
    probabilities: bool = False,
    polygons: str | Path | None = None,
    device: str | None = None,
    precision: PrecisionName = "float32",
    compiled: bool = False,
    **tiles: Any,
) -> Plan:
    """Size, tiles, bands, memory, time, and disk with blocks that ``drseg predict`` would take. Nothing is written.

    Args and errors are those of :func:`predict`. ``tiles`` are ``mode``, ``tile_size``, ``overlap`` and ``batch_size``.

    Examples:
        >>> from drseg_core.scenes.predict import plan
        >>> found = plan("run", "scene.tif", tile_size=32, overlap=8)
        >>> found.width, found.height, found.tiles
        (60, 40, 6)
    """
    require("predict", "maps")
    predictor, vocabulary, reading, trained_gsd = _prepared(
        model,
        classes,
        device,
        {"mode": "tile", **tiles},
        {"precision": precision, "compiled": compiled},
        ReadingConfig(scale, nodata, None if bands is None else ",".join(map(str, bands))),
    )
    with open_scene(image, reading=reading, gsd=gsd, aoi=aoi) as scene:
        describe(scene, trained_gsd)
        if polygons is not None:
            check_degrees(Path(polygons), scene)
        found = plan_scene(predictor, scene, probabilities=probabilities)
    wanted = {"scores": scores, "probabilities": probabilities, "polygons": polygons is not None}
    disk = usual_bytes(found.height * found.width, len(vocabulary.names), **wanted, blocks=True)
    return found._replace(disk_mb=disk / 1e6, polygons=polygons is not None)


def _prepared(
    model: LoadedRun | str | Path,
    classes: Vocabulary | str | Sequence[str] | None,
    device: str | None,
    tiles: Mapping[str, Any],
    arithmetic: Mapping[str, Any],
    given: ReadingConfig,
) -> tuple[Predictor, Vocabulary, Reading, float | None]:
    """The model with its vocabulary, how scenes are read, and the side in metres of the pixels of its training."""
    place = select_device(device)
    run = model if isinstance(model, LoadedRun) else load(model)
    names = run.class_names
    vocabulary = plain_classes(names) if classes is None else as_vocabulary(classes, "predict", known=names)
    unknown = never_learned(vocabulary.synonyms, names)
    if unknown is not None:
        _log.warning("%s", unknown)
    own = {name: getattr(run.config.evaluation, name) for name in ("tile_size", "overlap", "batch_size")}
    chosen = {**own, **{name: value for name, value in tiles.items() if value is not None}}
    predictor = Predictor(
        run.model, vocabulary.names, synonyms=vocabulary.synonyms, device=place, **arithmetic, **chosen
    )
    if predictor.arithmetic != "float32" or arithmetic["precision"] == "auto":
        _log.info("precision: %s", predictor.arithmetic)
    trained = run.config.reading
    return predictor, vocabulary, parse_reading(choose_reading(trained, given)), trained.gsd


def check_threshold(name: str, threshold: float | None) -> None:
    """Check the score below which pixels become "other"; None is allowed.

    Raises:
        ConfigError: it is not a number from 0 to 1.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"{name}: threshold is out of range; expected 0 to 1, got {threshold}")


def predict_scene(
    predictor: PredictsPieces,
    image_path: str | Path,
    out_path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    colors: Sequence[Color | None] | None = None,
    threshold: float | None = None,
    scores: bool = False,
    probabilities: bool = False,
    polygons: str | Path | None = None,
    min_area: float = 0.0,
    overwrite: bool = False,
    bands: Sequence[int] | None = None,
    reading: Reading | None = None,
    gsd: float | None = None,
    trained_gsd: float | None = None,
    aoi: str | Path | None = None,
    overlay_side: int = 2000,
    tags: Mapping[str, str] | None = None,
    work: Work | None = None,
    progress: bool = True,
) -> SceneFiles:
    """Predict a scene of any size and write its map.

    The class raster is uint8. It has the class ids, 255 (nodata) in invalid pixels, a colour table, and the names and
    their synonyms in its tags. Beside it lie GDAL's category names and attribute table, and a style for QGIS.
    Uncertainty, scores and probabilities are uint8 too, with scale and offset in the metadata: the uncertainty over its
    own range, scores from 0 to 1 in steps of 0.004. All rasters are Cloud Optimized GeoTIFFs. They have exactly the
    scene's CRS, transform (also rotated or south-up), ground control points and RPCs. A scene without georeference
    gives a map without. The overlay is reduced to ``overlay_side`` and has a legend of the classes that occur. The
    table of areas says how they were measured.

    Nothing appears before all files are complete.

    Args:
        predictor: in ``tile`` mode a part of one row of tiles is in memory at a time: at most 1 GB besides the model,
            with up to 100 classes. In ``whole`` mode the scene is in memory.
        image_path: a raster file that GDAL reads, such as GeoTIFF, PNG or JPEG.
        out_path: the class raster, ``.tif``.
        class_names: names for tags and legend; the predictor's own by default.
        colors: RGB of each class; None takes that of the palette.
        threshold: pixels whose best score is below it become the class "other".
        scores: also write the score of the best class, ``map_scores.tif``.
        probabilities: also write the scores of all classes, ``map_probabilities.tif``.
        polygons: vector file to write, ``.gpkg``, ``.geojson`` or ``.parquet``.
        min_area: areas below it, in m2, join a neighbour in the polygons.
        overwrite: replace existing outputs, and remove files of theirs that are not written again.
        bands: one or three band numbers from 1; by default those that the file calls red, green and blue.
        reading: scale, nodata and bands.
        gsd: side in metres of the pixels in which the scene is read and mapped; by default its own.
        trained_gsd: ``gsd`` of the training; if it differs, a line says so.
        aoi: vector file of the part to map; the map covers its box.
        overlay_side: bound on the overlay's longer side in pixels.
        tags: further metadata of the class raster.
        work: keep finished blocks beside the output, reuse those that are there, or make only some of them. The result
            has the same bits.
        progress: show a progress bar.

    Raises:
        ConfigError: an output exists, is the input or cannot be written; or ``bands`` or names do not fit.
        RasterError: the scene cannot be read in full.
        ResourceError: an output cannot be written in full.

    Examples:
        >>> import drseg_core as drseg
        >>> from drseg_core.evaluation.inference import Predictor
        >>> from drseg_core.scenes.predict import predict_scene
        >>> predictor = Predictor(drseg.load("run").model, ["roof", "pond"], mode="tile", tile_size=32, overlap=8)
        >>> predict_scene(predictor, "scene.tif", "map.tif", progress=False).overlay.name
        'map_overlay.png'
    """
    check_min_area("predict_scene", min_area, polygons)
    require("predict_scene", "maps")
    files = check_outputs(
        image_path,
        out_path,
        # what was put in place before the work was interrupted is looked at below
        overwrite=overwrite or work is not None and work_folder(out_path).is_dir(),
        inputs=[aoi],
        scores=scores,
        probabilities=probabilities,
        polygons=polygons,
    )
    names = predictor.class_names if class_names is None else check_class_names(class_names, "predict_scene")
    if len(names) != len(predictor.class_names):
        raise ConfigError(
            f"predict_scene: class_names do not fit; expected {len(predictor.class_names)} names, got {len(names)}"
        )
    check_threshold("predict_scene", threshold)
    legend = plain_classes(names)._replace(colors=tuple(colors or (None,) * len(names)))
    if len(legend.colors) != len(names):
        raise ConfigError(f"predict_scene: colors do not fit; expected {len(names)}, got {len(legend.colors)}")
    if threshold is not None:
        legend = legend.with_other()
        check_class_names(legend.names, "predict_scene")
    options: dict[str, Any] = {
        "legend": legend,
        "threshold": threshold,
        "scores": scores,
        "probabilities": probabilities,
        "polygons": polygons,
        "min_area": min_area,
        "reading": reading,
        "bands": bands,
        "gsd": gsd,
        "overlay_side": overlay_side,
        "tags": tags,
    }
    with contextlib.ExitStack() as stack:
        scene = stack.enter_context(open_scene(image_path, bands=bands, reading=reading, gsd=gsd, aoi=aoi))
        store = None
        if work is not None:
            options["neighbours"] = sorted((Path(other.folder).name, *other[1:]) for other in work.neighbours)
            facts = {"model": work.facts, "options": options, **computing_facts(predictor), **scene_facts(scene, aoi)}
            store = BlockStore(work_folder(out_path), facts)
            # blocks of a map with neighbours are still there, and a neighbour may need them
            done = store.finished(files.present(), [other.folder for other in work.blended])
            if done and (work.step is None or not work.neighbours):
                _log.info("%s is complete", files.classes)
                return files
            _check_placed(files, store, overwrite=overwrite)
        if work is None or work.alone:
            describe(scene, trained_gsd)
        for path in (*files.present(), *leftovers(files)):
            # also what belongs to the scene, such as the members of a mosaic
            check_input_stays(path, scene.source.files, "an output is a file of the scene")
        check_place(scene)
        if files.polygons is not None:
            check_degrees(files.polygons, scene)
        check_disks(files, scene.height * scene.width, len(legend.names), blocks=store is not None)
        if store is not None and work is not None:
            # processes that share the blocks of a map write it one at a time
            stack.enter_context(store.claim(alone=work.step is None or work.alone))
            store.open(alone=work.alone)
            if work.alone:
                stack.callback(store.remove_empty)
            if getattr(predictor, "steps", ()):
                predictor.store = store  # type: ignore[attr-defined]
        stored_scores = scores or polygons is not None
        parts = _Parts(
            stack, predictor, scene, store, legend, threshold, stored_scores, probabilities, overlay_side, progress
        )
        if work is not None and work.neighbours:
            parts.share(str(work_folder(out_path)), work)
        if work is not None and work.step is not None:
            parts.make(work)
            return files
        # the class raster is entered first, so it is put in place last: if it is there, all others are
        places: list[Any] = [path and stack.enter_context(_replaced(path)) for path in files]
        temporary = SceneFiles(*places)
        if files.polygons is not None and files.scores is None:
            # for the mean score of each polygon
            own = temporary.classes.with_name(f"{temporary.classes.stem}.scores.tif")
            stack.callback(own.unlink, missing_ok=True)
            own.touch()
            temporary = temporary._replace(scores=own)
        _write(parts, files, temporary, min_area=min_area, tags={**_asked(predictor, threshold), **(tags or {})})
        for path in leftovers(files):
            path.unlink(missing_ok=True)
            if path.suffix == ".html":
                _log.info("%s, the page of the map before, is removed", path)
        if store is not None:
            blended = [other.folder for other in work.blended] if work is not None else []
            store.finishing({path: now for path, now in zip(files, temporary, strict=True) if path and now}, blended)
    if store is not None and work is not None and not work.neighbours:
        store.remove_blocks()
    return files


def _asked(predictor: PredictsPieces, threshold: float | None) -> dict[str, str]:
    """Tags of a map: ``words`` of a run are all words of each class, as JSON, and ``threshold`` is there if given."""
    words = getattr(predictor, "synonyms", None)
    found = {} if words is None else {"words": json.dumps(words, ensure_ascii=False)}
    return found if threshold is None else {**found, "threshold": str(float(threshold))}


def _check_placed(files: SceneFiles, store: BlockStore, *, overwrite: bool) -> None:
    """Refuse outputs that exist and were not put there by this map before it was interrupted."""
    for path in files.present():
        if not overwrite and path.exists() and not store.placed(path):
            raise ConfigError(f"predict_scene: {path} exists; expected a new path, or overwrite")


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """``atomic_path``, whose own failures (not those of the body) name ``path``."""
    with contextlib.ExitStack() as stack:
        with written(path):
            temporary = stack.enter_context(atomic_path(path))
        yield temporary
        with written(path):
            stack.close()


class _Parts:
    """The parts of a map as they are written: kept ones, and new ones, made while others are read and written."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        predictor: PredictsPieces,
        scene: SceneReader,
        store: BlockStore | None,
        legend: Vocabulary,
        threshold: float | None,
        scores: bool,
        probabilities: bool,
        overlay_side: int,
        progress: bool,
    ) -> None:
        self.predictor, self.scene, self.store, self.legend = predictor, scene, store, legend
        self.threshold, self.scores, self.probabilities, self.progress = threshold, scores, probabilities, progress
        self.picture = Overlay(scene.height, scene.width, overlay_side)
        self.neighbours: tuple[Neighbour, ...] = ()
        self.mosaic: Mosaic | None = None
        self._reader = stack.enter_context(gdal_thread("read"))
        self._writer = stack.enter_context(gdal_thread("write"))

    def share(self, folder: str, work: Work) -> None:
        """From now on keep what neighbours need, and blend with what they kept."""
        size = self.scene.height, self.scene.width
        self.neighbours = work.neighbours
        self.mosaic = Mosaic(folder, size, work.blended, self.predictor.blocks)

    def make(self, work: Work) -> None:
        """Make and keep the share of one process in one step."""
        size = self.scene.height, self.scene.width
        if work.step == OPEN:
            return
        if work.step != BLOCKS:
            predictor: Any = self.predictor
            predictor.make(work.step, self._read_in_thread, *size, work.part, work.parts)
            return
        own = share(range(len(self.predictor.blocks(*size))), work.part, work.parts)
        missing = [number for number in own if not self._kept(number)]
        total = sum(self._pixels(number) for number in missing)
        with self._bar(total) as bar, WriteBehind(self._writer) as behind:
            for number, part in zip(missing, self._made(missing), strict=True):
                behind(self._keep, number, part)
                bar.update(part.label.size)

    def write(self, add: Callable[[Part], None]) -> None:
        """Hand on all parts in their order, in a thread of its own."""
        total = self.scene.height * self.scene.width
        with self._bar(total) as bar, WriteBehind(self._writer) as behind:
            for part in self._all(behind):
                behind(add, self._blended(part))
                bar.update(part.label.size)

    def _all(self, behind: WriteBehind) -> Iterator[Part]:
        if self.store is None:
            yield from self._made(None)
            return
        numbers = range(len(self.predictor.blocks(self.scene.height, self.scene.width)))
        missing = [number for number in numbers if not self.store.has(_name(number))]
        made = self._made(missing) if missing else iter(())
        absent = set(missing)
        for number in numbers:
            kept = None if number in absent else self.store.load(_name(number))
            if kept is not None:
                yield Part.of(kept)
                continue
            # a damaged block was not counted in advance
            part = next(made) if number in absent else next(self._made([number]))
            behind(self._keep, number, part)
            yield part

    def _kept(self, number: int) -> bool:
        return self.store is not None and self.store.load(_name(number)) is not None

    def _keep(self, number: int, part: Part) -> None:
        if self.store is not None:
            self.store.save(_name(number), part.arrays())

    def _pixels(self, number: int) -> int:
        block = self.predictor.blocks(self.scene.height, self.scene.width)[number]
        return (block.bottom - block.top) * (block.right - block.left)

    def _bar(self, total: int) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, desc="predict", unit="px", unit_scale=True, disable=not self.progress)

    def _read_in_thread(self, *box: int) -> Any:
        return self._reader.submit(self._read, *box).result()

    def _read(self, top: int, bottom: int, left: int, right: int) -> tuple[Tensor, NDArray[np.bool_]]:
        image, valid = self.scene.window(top, bottom, left, right)
        device = getattr(self.predictor, "device", None)
        return (image.pin_memory() if device is not None and device.type == "cuda" else image), valid

    def _made(self, wanted: Collection[int] | None) -> Iterator[Part]:
        """Parts computed by the model, for some blocks or for all."""
        size = self.scene.height, self.scene.width
        read = ReadAhead(self._read, self.predictor.reads(*size, wanted=wanted), self._reader)
        origin, band = (0, 0), (np.empty(0, np.uint8), np.empty(0, np.bool_))

        def spied(top: int, bottom: int, left: int, right: int) -> tuple[Tensor, NDArray[np.bool_]]:
            nonlocal origin, band
            image, valid = read(top, bottom, left, right)
            origin, band = (top, left), (image.numpy(), valid)
            return image, valid

        for piece in self.predictor.pieces(spied, *size, wanted=wanted):
            rows, columns = piece.prediction.class_index.shape
            top, left = piece.top - origin[0], piece.left - origin[1]
            place = slice(top, top + rows), slice(left, left + columns)
            yield self._part(piece, band[0][:, place[0], place[1]], band[1][place])

    def _part(self, piece: Piece, image: NDArray[np.uint8], valid: NDArray[np.bool_]) -> Part:
        found = piece.prediction
        rows, columns = valid.shape
        block = Box(piece.top, piece.top + rows, piece.left, piece.left + columns)
        scores = None
        if any(other.meets(block) for other in self.neighbours):
            labels = range(len(self.predictor.class_names))
            scores = np.stack([piece.score_of(label).cpu().numpy() for label in labels])
        return Part(
            piece.top,
            piece.left,
            self._label(found.class_index.numpy(), found.score.numpy(), valid),
            np.where(valid, found.uncertainty.numpy(), np.float32("nan")),
            self.picture.sampled(piece.top, piece.left, image).copy(),
            as_levels(found.score.numpy(), valid) if self.scores else None,
            self._levels(lambda label: piece.score_of(label).cpu().numpy(), valid) if self.probabilities else None,
            scores,
        )

    def _label(
        self, index: NDArray[np.uint8], score: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> NDArray[np.uint8]:
        label = np.where(valid, index, np.uint8(IGNORE))
        if self.threshold is not None:
            label[valid & (score < self.threshold)] = self.legend.names.index(OTHER)
        return label

    def _levels(self, score_of: Callable[[int], NDArray[np.float32]], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Steps of all bands. The class added for low scores has no band of its own."""
        nothing = np.zeros(valid.shape, np.float32)
        classes = len(self.predictor.class_names)
        bands = range(len(self.legend.names))
        return np.stack([as_levels(score_of(band) if band < classes else nothing, valid) for band in bands])

    def _blended(self, part: Part) -> Part:
        """A part blended with its neighbours."""
        found = None if self.mosaic is None else self.mosaic.blended(part)
        if found is None:
            return part
        shared, scores, uncertainty = found
        best = scores.max(0)
        label = self._label(scores.argmax(0).astype(np.uint8), best, shared)
        changed = part._replace(
            label=np.where(shared, label, part.label), uncertainty=np.where(shared, uncertainty, part.uncertainty)
        )
        if part.score is not None:
            changed = changed._replace(score=np.where(shared, as_levels(best, shared), part.score))
        if part.probabilities is not None:
            levels = self._levels(lambda label: scores[label], shared)
            changed = changed._replace(probabilities=np.where(shared, levels, part.probabilities))
        return changed


def _name(number: int) -> str:
    return f"block-{number}"


def _write(
    parts: _Parts,
    files: SceneFiles,
    temporary: SceneFiles,
    *,
    min_area: float,
    tags: Mapping[str, str],
) -> None:
    from PIL import Image

    scene, legend, picture = parts.scene, parts.legend, parts.picture
    areas = ClassAreas(len(legend.names), PixelArea(scene.crs, scene.transform))
    size = scene.height * scene.width
    with contextlib.ExitStack() as stack:
        rasters = Rasters(stack, scene, files, temporary, legend)
        rasters.classes.update_tags(**tags)

        def add(part: Part) -> None:
            rasters.add(part)
            picture.add(part)
            areas.add(part.top, part.left, part.label)

        parts.write(add)
        if picture.pixels != size:
            raise RasterError(f"predict_scene: pixels are missing; expected {size}, got {picture.pixels}")
    with written(files.overlay):
        Image.fromarray(picture.picture(legend)).save(temporary.overlay, format="PNG")
    areas.write(temporary.areas, legend.names)
    m2 = areas.m2.tolist() if areas.known else None
    write_attributes(temporary.attributes, legend, areas.pixels.tolist(), m2)
    write_style(temporary.style, legend)
    if files.polygons is not None and temporary.polygons is not None and temporary.scores is not None:
        write_polygons(
            temporary.classes,
            temporary.scores,
            temporary.polygons,
            files.polygons,
            legend.names,
            min_area=min_area,
            progress=parts.progress,
        )
