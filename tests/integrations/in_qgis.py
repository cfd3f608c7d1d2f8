# SPDX-License-Identifier: Apache-2.0
"""Runs in the Python that has QGIS; ``test_qgis.py`` reads the last line."""

from __future__ import annotations

import json
import os
import sys

sys.path[:0] = ["/usr/share/qgis/python/plugins", os.environ["QGIS_PLUGINPATH"]]
from qgis.core import (  # noqa: E402
    QgsApplication,
    QgsProcessingContext,
    QgsProcessingException,
    QgsProcessingFeedback,
    QgsProcessingOutputLayerDefinition,
    QgsProject,
)

application = QgsApplication([], False)
application.initQgis()
from processing.core.Processing import Processing  # noqa: E402
from processing.core.ProcessingConfig import ProcessingConfig  # noqa: E402
from processing.gui.Postprocessing import handleAlgorithmResults  # noqa: E402


def load(image: str, out: str) -> dict:
    """Run as the toolbox does, and look at the layer that the project has then."""
    project, context, feedback = QgsProject.instance(), QgsProcessingContext(), QgsProcessingFeedback()
    context.setProject(project)
    algorithm = QgsApplication.processingRegistry().algorithmById("drseg:map_from_words")
    words = {"INPUT": image, "CLASSES": "building; tree#00ff00", "PRESET": "tiny"}
    results, done = algorithm.run(
        {**words, "OUTPUT": QgsProcessingOutputLayerDefinition(out, project)}, context, feedback
    )
    handleAlgorithmResults(algorithm, context, feedback)
    renderer = next(iter(project.mapLayers().values())).renderer()
    classes = [[found.label, found.color.name()] for found in renderer.classes()]
    return {"done": done, "results": results, "renderer": renderer.type(), "classes": classes}


def setting(image: str, out: str, executable: str) -> dict:
    """Run with a setting that is wrong and one that is right."""
    algorithm = QgsApplication.processingRegistry().algorithmById("drseg:map_from_words")
    words = {"INPUT": image, "CLASSES": "building; tree", "PRESET": "tiny", "OUTPUT": out}
    refused = ""
    ProcessingConfig.settings["DRSEG_EXECUTABLE"].value = f"{executable}.gone"
    try:
        algorithm.run(words, QgsProcessingContext(), QgsProcessingFeedback(), catchExceptions=False)
    except QgsProcessingException as error:
        refused = str(error)
    ProcessingConfig.setSettingValue("DRSEG_EXECUTABLE", executable)
    results, done = algorithm.run(words, QgsProcessingContext(), QgsProcessingFeedback())
    return {"refused": refused, "written": done and results["OUTPUT"] == out}


Processing.initialize()
from drseg_qgis.plugin import DRSegProvider  # noqa: E402

provider = DRSegProvider()
QgsApplication.processingRegistry().addProvider(provider)
print(json.dumps({"load": load, "setting": setting}[sys.argv[1]](*sys.argv[2:])))
