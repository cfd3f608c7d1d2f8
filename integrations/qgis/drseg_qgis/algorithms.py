# SPDX-License-Identifier: Apache-2.0
"""The Processing algorithms: parameters in, a command line out, and what it wrote as layers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

from processing.core.ProcessingConfig import ProcessingConfig
from qgis.core import (
    QgsProcessing,
    QgsProcessingAlgorithm,
    QgsProcessingContext,
    QgsProcessingException,
    QgsProcessingFeedback,
    QgsProcessingLayerPostProcessorInterface,
    QgsProcessingOutputFile,
    QgsProcessingOutputRasterLayer,
    QgsProcessingParameterBoolean,
    QgsProcessingParameterDefinition,
    QgsProcessingParameterField,
    QgsProcessingParameterFile,
    QgsProcessingParameterFolderDestination,
    QgsProcessingParameterMapLayer,
    QgsProcessingParameterNumber,
    QgsProcessingParameterRasterDestination,
    QgsProcessingParameterRasterLayer,
    QgsProcessingParameterString,
    QgsProcessingParameterVectorDestination,
    QgsProcessingParameterVectorLayer,
    QgsProviderRegistry,
    QgsVectorLayer,
)

from . import command
from .process import Cancelled, Failed, run

EXECUTABLE = "DRSEG_EXECUTABLE"
"""Name of the setting."""

VECTORS = ["gpkg", "geojson", "shp"]
"""Files of polygons that go to drseg as they are; other layers are written into one of these first."""


class _Styled(QgsProcessingLayerPostProcessorInterface):
    """Gives a map the style that lies beside it: Processing loads layers without."""

    def postProcessLayer(self, layer: Any, context: QgsProcessingContext, feedback: QgsProcessingFeedback) -> None:
        layer.loadNamedStyle(command.beside(layer.source(), ".qml"))
        layer.triggerRepaint()


# QGIS does not hold on to it
_STYLED = _Styled()


class _Algorithm(QgsProcessingAlgorithm):
    """What the algorithms share. Each has the class attributes ``words``, ``title`` and ``about``."""

    words, title, about = "", "", ""

    def name(self) -> str:
        return self.words

    def displayName(self) -> str:
        return self.title

    def shortHelpString(self) -> str:
        return self.about

    def createInstance(self) -> QgsProcessingAlgorithm:
        return type(self)()

    def add(self, *parameters: Any, advanced: bool = False) -> None:
        for parameter in parameters:
            if advanced:
                parameter.setFlags(parameter.flags() | QgsProcessingParameterDefinition.FlagAdvanced)
            self.addParameter(parameter)

    def values(self, parameters: dict[str, Any], context: QgsProcessingContext) -> dict[str, Any]:
        """Numbers, flags and texts of the parameters; those that are absent are None."""
        found: dict[str, Any] = {}
        for definition in self.parameterDefinitions():
            name, kind = definition.name(), definition.type()
            if parameters.get(name, definition.defaultValue()) is None:
                found[name] = None
            elif kind == "boolean":
                found[name] = self.parameterAsBool(parameters, name, context)
            elif kind == "number":
                value = self.parameterAsDouble(parameters, name, context)
                found[name] = int(value) if value.is_integer() else value
            elif kind in ("string", "file"):
                found[name] = self.parameterAsString(parameters, name, context).strip()
            elif kind == "field":
                found[name] = next(iter(self.parameterAsFields(parameters, name, context)), None)
        return found

    def image(self, parameters: dict[str, Any], name: str, context: QgsProcessingContext) -> str:
        """The file of a raster layer.

        Raises:
            QgsProcessingException: it has none of its own.
        """
        layer = self.parameterAsRasterLayer(parameters, name, context)
        if layer is None:
            raise QgsProcessingException(self.invalidRasterError(parameters, name))
        return _file(layer)

    def polygons(
        self, parameters: dict[str, Any], name: str, context: QgsProcessingContext, feedback: QgsProcessingFeedback
    ) -> str | None:
        """The file of a vector layer; one that is in memory, filtered or a part of a file is written into one."""
        if parameters.get(name) in (None, ""):
            return None
        return self.parameterAsCompatibleSourceLayerPath(parameters, name, context, VECTORS, VECTORS[0], feedback)

    def run_drseg(self, words: Sequence[str], feedback: QgsProcessingFeedback, begun: Sequence[str] = ()) -> bool:
        """Whether the command ran to its end: False where it was cancelled.

        Raises:
            QgsProcessingException: with the line that it says.
        """

        now = ""

        def progress(what: str, percent: int) -> None:
            nonlocal now
            if what != now:
                feedback.setProgressText(what)
            now = what
            feedback.setProgress(percent)

        def say(line: str) -> None:
            (feedback.pushWarning if "WARNING: " in line else feedback.pushConsoleInfo)(line)

        feedback.pushCommandInfo(shlex.join(words))
        environment = command.own_environment(os.environ)
        try:
            run(words, environment, progress=progress, say=say, cancelled=feedback.isCanceled, begun=begun)
        except Cancelled:
            return False
        except Failed as error:
            raise QgsProcessingException(str(error)) from None
        return True


def _file(layer: Any) -> str:
    uri = QgsProviderRegistry.instance().decodeUri(layer.providerType(), layer.source())
    if layer.providerType() != "gdal" or uri.get("layerName") or not uri.get("path"):
        raise QgsProcessingException(
            f"layer {layer.name()} is no file of its own; expected a raster file, got {layer.source()}"
        )
    return uri["path"]


def _drseg() -> str:
    try:
        return command.find_executable(ProcessingConfig.getSetting(EXECUTABLE))
    except FileNotFoundError as error:
        raise QgsProcessingException(str(error)) from None


class _Map(_Algorithm):
    """``drseg predict``."""

    make = staticmethod(command.map_with_run)

    def initAlgorithm(self, configuration: dict[str, Any] | None = None) -> None:
        real, optional = QgsProcessingParameterNumber.Double, {"optional": True}
        self.add(QgsProcessingParameterRasterLayer("INPUT", "Image"))
        self.add_model()
        self.add(
            QgsProcessingParameterNumber(
                "THRESHOLD", 'Score below which a pixel becomes "other"', real, minValue=0, maxValue=1, **optional
            ),
            QgsProcessingParameterVectorLayer(
                "AOI", "Map the part inside these polygons", [QgsProcessing.TypeVectorPolygon], **optional
            ),
            QgsProcessingParameterBoolean("SCORES", "Also write the score of the best class", False),
            QgsProcessingParameterBoolean("VIEW", "Also write a page to look at it (.html)", False),
        )
        self.add(
            QgsProcessingParameterNumber("MIN_AREA", "Smallest area of a polygon in m2", real, 0, minValue=0),
            QgsProcessingParameterNumber("GSD", "Side of a pixel to map in, in metres", real, minValue=0, **optional),
            QgsProcessingParameterString("DEVICE", "Device (cpu, cuda, cuda:1, mps)", **optional),
            QgsProcessingParameterString("MORE", "More options, as drseg predict has them", **optional),
            advanced=True,
        )
        self.add(
            QgsProcessingParameterRasterDestination("OUTPUT", "Map"),
            QgsProcessingParameterVectorDestination("POLYGONS", "Polygons", createByDefault=False, **optional),
        )
        self.addOutput(QgsProcessingOutputRasterLayer("UNCERTAINTY", "Uncertainty"))
        for name, words in (("AREAS", "Area of each class (.csv)"), ("PAGE", "Page (.html)")):
            self.addOutput(QgsProcessingOutputFile(name, words))

    def add_model(self) -> None:
        raise NotImplementedError

    def processAlgorithm(
        self, parameters: dict[str, Any], context: QgsProcessingContext, feedback: QgsProcessingFeedback
    ) -> dict[str, Any]:
        drseg, image = _drseg(), self.image(parameters, "INPUT", context)
        out = self.parameterAsOutputLayer(parameters, "OUTPUT", context)
        values = self.values(parameters, context)
        values["AOI"] = self.polygons(parameters, "AOI", context, feedback)
        values["POLYGONS"] = self.parameterAsOutputLayer(parameters, "POLYGONS", context) or None
        if not self.run_drseg(type(self).make(drseg, image, out, values), feedback, [f"{out}.work"]):
            return {}
        if context.willLoadLayerOnCompletion(out):
            context.layerToLoadOnCompletionDetails(out).setPostProcessor(_STYLED)
        results = {"OUTPUT": out, "UNCERTAINTY": command.beside(out, "_uncertainty.tif")}
        results["AREAS"] = command.beside(out, "_areas.csv")
        if values["VIEW"]:
            results["PAGE"] = command.beside(out, ".html")
        if values["POLYGONS"]:
            results["POLYGONS"] = values["POLYGONS"]
        return results


class MapFromWords(_Map):
    """``drseg predict zero-shot``."""

    words, title = "map_from_words", "Map from words"
    about = (
        "Maps an image by class names alone: nothing is trained. The first call fetches weights of CLIP and DINOv3, "
        "unless files are given. Beside the map lie its uncertainty, a table of areas and an overlay."
    )
    make = staticmethod(command.map_from_words)

    def add_model(self) -> None:
        self.add(
            QgsProcessingParameterString("CLASSES", 'Classes, such as "building; road, street; tree#00ff00"'),
            QgsProcessingParameterString("BACKGROUND", 'Words of the background, such as "sky; wall"', optional=True),
        )
        self.add(
            QgsProcessingParameterString("PRESET", "Preset: b, l, or a file", "b"),
            QgsProcessingParameterString("CLIP", "CLIP: file or name; the preset's by default", optional=True),
            QgsProcessingParameterString("PRIOR", "Prior: file, name or none; the preset's by default", optional=True),
            QgsProcessingParameterBoolean("OFFLINE", "Never connect to a network", False),
            advanced=True,
        )


class MapWithRun(_Map):
    """``drseg predict RUN``."""

    words, title = "map_with_run", "Map with a run"
    about = (
        "Maps an image with a model that drseg train has trained, by the classes of the training or by other words. "
        "Beside the map lie its uncertainty, a table of areas and an overlay."
    )

    def add_model(self) -> None:
        self.add(
            QgsProcessingParameterFile("RUN", "Run: the folder", QgsProcessingParameterFile.Folder),
            QgsProcessingParameterString("CLASSES", "Classes; the run's by default", optional=True),
        )


class Tile(_Algorithm):
    """``drseg data tile``."""

    words, title = "tile", "Tile a training set"
    about = (
        "Cuts an image and its labels, polygons or a raster of class numbers, into a folder for drseg train. Tiles for "
        "validation are one strip of ground that touches no tile for training."
    )

    def initAlgorithm(self, configuration: dict[str, Any] | None = None) -> None:
        real, whole = QgsProcessingParameterNumber.Double, QgsProcessingParameterNumber.Integer
        labels = [QgsProcessing.TypeRaster, QgsProcessing.TypeVectorPolygon]
        self.add(
            QgsProcessingParameterRasterLayer("INPUT", "Image"),
            QgsProcessingParameterMapLayer("LABELS", "Labels: polygons, or a raster", types=labels),
            QgsProcessingParameterField(
                "FIELD", "Of polygons: column of the class", parentLayerParameterName="LABELS", optional=True
            ),
            QgsProcessingParameterString(
                "CLASSES", 'Of a raster: names of 0, 1, ..., "building; field"', optional=True
            ),
            QgsProcessingParameterString("BACKGROUND", "Class where no polygon is; else unknown", optional=True),
            QgsProcessingParameterNumber("SIZE", "Side of a tile in pixels", whole, 512, minValue=64),
            QgsProcessingParameterNumber("VAL_SHARE", "Share for validation", real, 0.2, minValue=0, maxValue=1),
        )
        self.add(QgsProcessingParameterNumber("NODATA", "Value without data", real, optional=True), advanced=True)
        self.add(QgsProcessingParameterFolderDestination("OUTPUT", "Folder of the set"))

    def processAlgorithm(
        self, parameters: dict[str, Any], context: QgsProcessingContext, feedback: QgsProcessingFeedback
    ) -> dict[str, Any]:
        drseg, image = _drseg(), self.image(parameters, "INPUT", context)
        layer = self.parameterAsLayer(parameters, "LABELS", context)
        if layer is None:
            raise QgsProcessingException(self.invalidSourceError(parameters, "LABELS"))
        vector = isinstance(layer, QgsVectorLayer)
        labels = self.polygons(parameters, "LABELS", context, feedback) if vector else _file(layer)
        out = self.parameterAsString(parameters, "OUTPUT", context)
        words = command.tile(drseg, image, str(labels), out, self.values(parameters, context))
        if not self.run_drseg(words, feedback):
            return {}

        return {"OUTPUT": out}
