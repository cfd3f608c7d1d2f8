# SPDX-License-Identifier: Apache-2.0
"""DR-Seg: open-vocabulary segmentation of remote-sensing images around a custom-kernel graph engine."""

from drseg_core.errors import BackendUnavailableError, NumericalError

__version__ = "0.1.0"
__all__ = ["BackendUnavailableError", "NumericalError", "__version__", "backends"]


def backends() -> list[dict[str, object]]:
    """Which backend can compute which op here, and why the others cannot (see ``drseg doctor``)."""
    from drseg_core.ops import backend_report

    return backend_report()
