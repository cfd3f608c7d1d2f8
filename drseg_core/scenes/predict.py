# SPDX-License-Identifier: Apache-2.0
"""From a scene to its class map."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from drseg_core.checkpoints.pretrained import load
from drseg_core.checkpoints.run import LoadedRun
from drseg_core.config.reading import Reading, choose_reading, parse_reading
from drseg_core.config.schema import ReadingConfig
from drseg_core.data.dataset import IGNORE, check_class_names
from drseg_core.data.ground import PixelArea
from drseg_core.data.vocabulary import OTHER, Color, Vocabulary, never_learned, plain_classes
from drseg_core.device import PrecisionName, select_device
from drseg_core.errors import ConfigError, RasterError
from drseg_core.evaluation.inference import Piece, Predictor, PredictsPieces
from drseg_core.extras import require
from drseg_core.files import atomic_path
from drseg_core.scenes.areas import ClassAreas
from drseg_core.scenes.files import (
    SceneFiles,
    check_disks,
    check_input_stays,
    check_outputs,
    leftovers,
    usual_bytes,
)
from drseg_core.scenes.outputs import Overlay, Rasters
from drseg_core.scenes.plan import Plan, plan_scene
from drseg_core.scenes.polygons import write_polygons
from drseg_core.scenes.reader import SceneReader, describe, open_scene
from drseg_core.scenes.style import write_attributes, write_style
from drseg_core.scenes.writer import check_place, written

_log = logging.getLogger(__name__)

__all__ = ["SceneFiles", "plan", "predict", "predict_scene"]


def predict(
    model: LoadedRun | str | Path,
    image: str | Path,
    *,
    classes: Vocabulary | Sequence[str] | None = None,
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
    """Map an image of any size by class names: what ``drseg predict`` does.

    Args:
        model: what :func:`drseg_core.load` gives, or what it takes. A model that is given is left on ``device``.
        image: GeoTIFF, PNG, JPEG or what else GDAL reads.
        classes: names to tell apart, any words, or what :func:`drseg_core.data.vocabulary.parse_classes` gives, with
            synonyms and colours; those of the training by default.
        threshold: pixels whose best score is below it become the class "other".
        out: class raster to write, ``.tif``; see :func:`predict_scene` for what it holds and what is written beside it.
        scores: also write the score of the best class, ``map_scores.tif``.
        probabilities: also write the scores of all classes, ``map_probabilities.tif``.
        polygons: vector file to write, ``.gpkg``, ``.geojson`` or ``.parquet``.
        min_area: areas below it, in m2, join a neighbour in the polygons.
        overwrite: replace existing outputs, and remove what belonged to them and is not written again.
        bands: one or three band numbers from 1; by default those that the file calls red, green and blue, else the
            first three, or the only one.
        nodata: value of pixels where nothing is, besides what the file declares.
        scale: what becomes 0 and 255: ``"0,3000"``, three such pairs with ``;`` between them, or ``"auto"``; by default
            what the run was trained with.
        gsd: side in metres of the pixels that the scene is read and mapped in, such as those of the training; its own
            by default.
        aoi: vector file of the part that is mapped; the map covers its box.
        mode: ``tile`` at native resolution, or the ``whole`` image in one piece.
        tile_size: side of a tile in pixels; the run's by default, like the next two.
        overlap: pixels shared by neighbouring tiles.
        batch_size: tiles per forward pass.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None takes CUDA where there is one.
        precision: ``float32``, ``bfloat16`` or ``auto``, see :class:`drseg_core.evaluation.inference.Predictor`.
        compiled: run the model compiled, see there.
        progress: show a progress bar.

    Returns:
        The files written.

    Raises:
        ConfigError: an option does not fit, or an output exists.
        CheckpointError: the model cannot be read.
        RasterError: the image cannot be read in full.
        BackendUnavailableError: the device is not here, has no bfloat16, or the model cannot be compiled.
        ResourceError: an output cannot be written in full.

    Example:
        >>> import drseg_core as drseg
        >>> model = drseg.load("run")
        >>> files = drseg.predict(model, "scene.tif", classes=["building", "field"], out="map.tif", progress=False)
        >>> files.classes.name
        'map.tif'
    """
    # before the model is read: that may take a while
    wanted: dict[str, Any] = {"scores": scores, "probabilities": probabilities, "polygons": polygons}
    check_outputs(image, out, overwrite=overwrite, inputs=[aoi], **wanted)
    if polygons is not None:
        require("predict", "vectors")
    predictor, vocabulary, reading, trained_gsd = _prepared(
        model,
        classes,
        device,
        {"mode": mode, "tile_size": tile_size, "overlap": overlap, "batch_size": batch_size},
        {"precision": precision, "compiled": compiled},
        ReadingConfig(scale, nodata, None if bands is None else ",".join(map(str, bands))),
    )
    return predict_scene(
        predictor,
        image,
        out,
        colors=vocabulary.colors,
        threshold=threshold,
        min_area=min_area,
        overwrite=overwrite,
        reading=reading,
        gsd=gsd,
        trained_gsd=trained_gsd,
        aoi=aoi,
        progress=progress,
        **wanted,
    )


def plan(
    model: LoadedRun | str | Path,
    image: str | Path,
    *,
    classes: Vocabulary | Sequence[str] | None = None,
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
    """What :func:`predict` would take: size, tiles, bands, memory and time. Nothing is written.

    Args and errors are those of :func:`predict`; ``tiles`` are ``mode``, ``tile_size``, ``overlap`` and ``batch_size``.

    Example:
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
        found = plan_scene(predictor, scene, probabilities=probabilities)
    wanted = {"scores": scores, "probabilities": probabilities, "polygons": polygons is not None}
    disk = usual_bytes(found.height * found.width, len(vocabulary.names), **wanted)
    return found._replace(disk_mb=disk / 1e6, polygons=polygons is not None)


def _prepared(
    model: LoadedRun | str | Path,
    classes: Vocabulary | Sequence[str] | None,
    device: str | None,
    tiles: Mapping[str, Any],
    arithmetic: Mapping[str, Any],
    given: ReadingConfig,
) -> tuple[Predictor, Vocabulary, Reading, float | None]:
    """The model with its vocabulary, how scenes are read, and the pixels that it was trained on, in metres."""
    place = select_device(device)
    run = model if isinstance(model, LoadedRun) else load(model)
    if classes is not None and not isinstance(classes, Vocabulary):
        classes = plain_classes(check_class_names(classes, "predict"))
    vocabulary = classes or plain_classes(run.class_names)
    unknown = never_learned(vocabulary.synonyms, run.class_names)
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
    """A score below which pixels become "other" is one, or None.

    Raises:
        ConfigError: it is no number from 0 to 1.
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
    progress: bool = True,
) -> SceneFiles:
    """Predict a scene of any size and write its map.

    The class raster is uint8 with the class ids, 255 = nodata where the scene is invalid, a colour table, and the names
    in its tags; beside it lie GDAL's category names and attribute table and a style for QGIS. Uncertainty, scores and
    probabilities are uint8 as well, with scale and offset in the metadata: the uncertainty over the range that it has,
    scores from 0 to 1 in steps of 0.004. All rasters are Cloud Optimized GeoTIFFs and have exactly the scene's CRS,
    transform (also rotated or south-up), ground control points and RPCs; a scene without georeference gives a map
    without. The overlay is reduced to ``overlay_side`` and has a legend of the classes that occur. The table of areas
    says how they were measured.

    Nothing appears before all files are complete.

    Args:
        predictor: in ``tile`` mode a part of one row of tiles is in memory at a time, at most 1 GB besides the model
            with up to 100 classes; in ``whole`` mode it is the scene.
        image_path: a raster file that GDAL reads, such as GeoTIFF, PNG or JPEG.
        out_path: the class raster, ``.tif``.
        class_names: names for tags and legend; the predictor's own by default.
        colors: RGB of each class; None takes that of the palette.
        threshold: pixels whose best score is below it become the class "other".
        scores: also write the score of the best class, ``map_scores.tif``.
        probabilities: also write the scores of all classes, ``map_probabilities.tif``.
        polygons: vector file to write, ``.gpkg``, ``.geojson`` or ``.parquet``.
        min_area: areas below it, in m2, join a neighbour in the polygons.
        overwrite: replace existing outputs, and remove what belonged to them and is not written again.
        bands: one or three band numbers from 1; by default those that the file calls red, green and blue.
        reading: scale, nodata and bands.
        gsd: side in metres of the pixels that the scene is read and mapped in; its own by default.
        trained_gsd: that of the training, for a word where it is another.
        aoi: vector file of the part that is mapped; the map covers its box.
        overlay_side: bound on the overlay's longer side in pixels.
        tags: further metadata of the class raster.
        progress: show a progress bar.

    Raises:
        ConfigError: an output exists, is the input or cannot be written; or ``bands`` or names do not fit.
        RasterError: the scene cannot be read in full.
        ResourceError: an output cannot be written in full.

    Example:
        >>> import drseg_core as drseg
        >>> from drseg_core.evaluation.inference import Predictor
        >>> from drseg_core.scenes.predict import predict_scene
        >>> predictor = Predictor(drseg.load("run").model, ["roof", "pond"], mode="tile", tile_size=32, overlap=8)
        >>> predict_scene(predictor, "scene.tif", "map.tif", progress=False).overlay.name
        'map_overlay.png'
    """
    require("predict_scene", "maps")
    files = check_outputs(
        image_path,
        out_path,
        overwrite=overwrite,
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
    other = None
    if threshold is not None:
        legend = legend.with_other()
        check_class_names(legend.names, "predict_scene")
        other = legend.names.index(OTHER)
    with open_scene(image_path, bands=bands, reading=reading, gsd=gsd, aoi=aoi) as scene:
        describe(scene, trained_gsd)
        for path in (*files.present(), *leftovers(files)):
            # also what belongs to the scene, such as the members of a mosaic
            check_input_stays(path, scene.source.files, "an output is a file of the scene")
        check_place(scene)
        check_disks(files, scene.height * scene.width, len(legend.names))
        with contextlib.ExitStack() as stack:
            # the class raster is entered first, so it is put in place last: where it is, the others are
            places: list[Any] = [path and stack.enter_context(_replaced(path)) for path in files]
            temporary = SceneFiles(*places)
            if files.polygons is not None and files.scores is None:
                # for the mean score of each polygon
                own = temporary.classes.with_name(f"{temporary.classes.stem}.scores.tif")
                stack.callback(own.unlink, missing_ok=True)
                own.touch()
                temporary = temporary._replace(scores=own)
            sieve = (threshold, other) if threshold is not None and other is not None else None
            _write(
                predictor,
                scene,
                files,
                temporary,
                legend,
                sieve,
                min_area=min_area,
                overlay_side=overlay_side,
                tags=tags or {},
                progress=progress,
            )
            for path in leftovers(files):
                path.unlink(missing_ok=True)
    return files


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """``atomic_path``, whose own failures (not those of the body) name ``path``."""
    with contextlib.ExitStack() as stack:
        with written(path):
            temporary = stack.enter_context(atomic_path(path))
        yield temporary
        with written(path):
            stack.close()


def _write(
    predictor: PredictsPieces,
    scene: SceneReader,
    files: SceneFiles,
    temporary: SceneFiles,
    legend: Vocabulary,
    sieve: tuple[float, int] | None,
    *,
    min_area: float,
    overlay_side: int,
    tags: Mapping[str, str],
    progress: bool,
) -> None:
    from PIL import Image
    from tqdm import tqdm

    picture = Overlay(scene.height, scene.width, overlay_side)
    areas = ClassAreas(len(legend.names), PixelArea(scene.crs, scene.transform))
    size = scene.height * scene.width
    with contextlib.ExitStack() as stack:
        rasters = Rasters(stack, scene, files, temporary, legend)
        rasters.classes.update_tags(**tags)
        bar = stack.enter_context(tqdm(total=size, desc="predict", unit="px", unit_scale=True, disable=not progress))
        for piece, image, valid in _predicted(predictor, scene):
            label = np.where(valid, piece.prediction.class_index.numpy(), np.uint8(IGNORE))
            if sieve is not None:
                label[valid & (piece.prediction.score.numpy() < sieve[0])] = sieve[1]
            rasters.add(piece, label, valid, len(predictor.class_names))
            picture.add(piece.top, piece.left, image, label)
            areas.add(piece.top, piece.left, label)
            bar.update(label.size)
        if picture.pixels != size:
            raise RasterError(f"predict_scene: pixels are missing; expected {size}, got {picture.pixels}")
    with written(files.overlay):
        Image.fromarray(picture.picture(legend)).save(temporary.overlay, format="PNG")
    areas.write(temporary.areas, legend.names)
    m2 = areas.m2.tolist() if areas.pixel.known else None
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
            progress=progress,
        )


def _predicted(
    predictor: PredictsPieces, scene: SceneReader
) -> Iterator[tuple[Piece, NDArray[np.uint8], NDArray[np.bool_]]]:
    """The pieces of the map, with the image and the valid pixels of each."""
    origin, band = (0, 0), (np.empty(0, np.uint8), np.empty(0, np.bool_))

    def read(top: int, bottom: int, left: int, right: int) -> tuple[Tensor, NDArray[np.bool_]]:
        nonlocal origin, band
        image, valid = scene.window(top, bottom, left, right)
        origin, band = (top, left), (image.numpy(), valid)
        return image, valid

    for piece in predictor.pieces(read, scene.height, scene.width):
        # what was read last begins at the same row; it may reach further in every other direction
        rows, columns = piece.prediction.class_index.shape
        left = piece.left - origin[1]
        place = slice(piece.top - origin[0], piece.top - origin[0] + rows), slice(left, left + columns)
        yield piece, band[0][:, place[0], place[1]], band[1][place]
