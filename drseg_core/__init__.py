# SPDX-License-Identifier: Apache-2.0
"""DR-Seg: open-vocabulary segmentation of remote-sensing images around a custom-kernel graph engine.

``load`` and ``predict`` use a trained model, ``zero_shot`` makes maps without one. ``nn`` has the paper's blocks,
``ops`` the operations they consist of.
"""

import importlib
from typing import TYPE_CHECKING, Any

from drseg_core.errors import BackendUnavailableError, NumericalError

if TYPE_CHECKING:
    from drseg_core import nn, ops
    from drseg_core.checkpoints.pretrained import load
    from drseg_core.scenes.predict import predict
    from drseg_core.scenes.zero_shot import zero_shot

__version__ = "0.2.0"
__all__ = [
    "BackendUnavailableError",
    "NumericalError",
    "__version__",
    "backends",
    "load",
    "nn",
    "ops",
    "predict",
    "zero_shot",
]

_DOORS = {
    "load": "drseg_core.checkpoints.pretrained",
    "predict": "drseg_core.scenes.predict",
    "zero_shot": "drseg_core.scenes.zero_shot",
}


def __getattr__(name: str) -> Any:
    # a name is imported when it is first used, so that importing the package stays quick
    if name in ("nn", "ops"):
        return importlib.import_module(f"drseg_core.{name}")
    if name in _DOORS:
        from drseg_core.processor import prepare

        # as commands do, unless torch is loaded: beside other processes threads that spin take many times as long
        prepare()
        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'drseg_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def backends() -> list[dict[str, object]]:
    """Which backend can compute which op here, and why the others cannot (see ``drseg doctor``).

    Examples:
        >>> import drseg_core as drseg
        >>> any(row["op"] == "knn_graph" and row["available"] for row in drseg.backends())
        True
    """
    from drseg_core.ops import backend_report

    return backend_report()
