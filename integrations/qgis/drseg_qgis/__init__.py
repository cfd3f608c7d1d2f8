# SPDX-License-Identifier: Apache-2.0
"""QGIS plugin: Processing algorithms that call the installed ``drseg``."""

from __future__ import annotations

from typing import Any


def classFactory(iface: Any) -> Any:
    """What QGIS calls to get the plugin; ``iface`` is None in ``qgis_process``."""
    # the other modules are of use without QGIS
    from .plugin import DRSegPlugin

    return DRSegPlugin()
