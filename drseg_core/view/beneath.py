# SPDX-License-Identifier: Apache-2.0
"""What lies beneath a map, whatever made it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from drseg_core.scenes.reader import SceneReader
from drseg_core.scenes.scene_graph import GraphPredictor
from drseg_core.view.graph import Beneath
from drseg_core.view.layers import MapReader
from drseg_core.view.of_run import beneath_run
from drseg_core.view.of_words import beneath_words

_log = logging.getLogger(__name__)


def beneath_of(predictor_of: Callable[[SceneReader], Any]) -> Callable[[SceneReader, MapReader, int], Beneath]:
    """The ``beneath`` of :func:`drseg_core.view.page.write_page`, for the predictor that made a map.

    Args:
        predictor_of: gives it for an open scene, as :class:`drseg_core.scenes.predict.Mapper` does.
    """

    def beneath(scene: SceneReader, found: MapReader, room: int) -> Beneath:
        _log.info("view: the scene is computed once more, for the graph and the scores beneath the map")
        predictor = predictor_of(scene)
        if isinstance(predictor, GraphPredictor):
            return beneath_words(predictor, scene, room=room)
        return beneath_run(predictor, scene, room=room, progress=True)

    return beneath
