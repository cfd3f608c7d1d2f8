# SPDX-License-Identifier: Apache-2.0
"""The plugin and its Processing provider."""

from __future__ import annotations

from processing.core.ProcessingConfig import ProcessingConfig, Setting
from qgis.core import QgsApplication, QgsProcessingProvider

from .algorithms import EXECUTABLE, MapFromWords, MapWithRun, Tile


class DRSegProvider(QgsProcessingProvider):
    """The algorithms, and one setting: where ``drseg`` is, if PATH does not have it."""

    def load(self) -> bool:
        words = "Path of drseg, if it is not on PATH"
        ProcessingConfig.settingIcons[self.name()] = self.icon()
        ProcessingConfig.addSetting(Setting(self.name(), EXECUTABLE, words, "", valuetype=Setting.FILE))
        ProcessingConfig.readSettings()
        self.refreshAlgorithms()
        return True

    def unload(self) -> None:
        ProcessingConfig.removeSetting(EXECUTABLE)

    def loadAlgorithms(self) -> None:
        for algorithm in (MapFromWords(), MapWithRun(), Tile()):
            self.addAlgorithm(algorithm)

    def id(self) -> str:
        return "drseg"

    def name(self) -> str:
        return "drseg"

    # what drseg writes

    def supportedOutputRasterLayerExtensions(self) -> list[str]:
        return ["tif"]

    def supportedOutputVectorLayerExtensions(self) -> list[str]:
        return ["gpkg", "geojson", "parquet"]


class DRSegPlugin:
    """What QGIS holds on to."""

    def __init__(self) -> None:
        self.provider: DRSegProvider | None = None

    def initProcessing(self) -> None:
        """All that ``qgis_process`` calls."""
        self.provider = DRSegProvider()
        QgsApplication.processingRegistry().addProvider(self.provider)

    def initGui(self) -> None:
        self.initProcessing()

    def unload(self) -> None:
        QgsApplication.processingRegistry().removeProvider(self.provider)
