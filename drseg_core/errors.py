# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package, and the exit code each one becomes on the command line.

Every message is one line: ``<function>: <argument> <problem>; expected ..., got ...``.
"""

from __future__ import annotations


class DRSegError(RuntimeError):
    """Base of the package's own errors. ``exit_code`` is what ``drseg`` exits with."""

    exit_code = 1


class ConfigError(DRSegError, ValueError):
    """A configuration file or option cannot be used."""

    exit_code = 2


class DatasetError(DRSegError):
    """A data set, image or mask is missing, damaged or contradicts its class list."""

    exit_code = 3


class RasterError(DatasetError):
    """A georeferenced raster cannot be read or written as asked."""


class ArchiveError(DatasetError):
    """An archive holds a member that must not be extracted."""


class CheckpointError(DRSegError):
    """Weights or training state are missing, damaged, unsafe or of another model."""

    exit_code = 4


class BackendUnavailableError(DRSegError):
    """A named backend or device cannot run here; the message says why."""

    exit_code = 5


class BackendDtypeError(BackendUnavailableError, TypeError):
    """A named backend does not compute in the dtype it was given."""


class NumericalError(DRSegError):
    """Values are not finite where they must be."""

    exit_code = 6


class ResourceError(DRSegError):
    """Memory or disk space ran out, or a worker process died."""

    exit_code = 7
