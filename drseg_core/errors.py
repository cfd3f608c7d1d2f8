# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package, and the exit code each one becomes on the command line.

Every message is one line: ``<function>: <argument> <problem>; expected ..., got ...``.
"""

from __future__ import annotations

__all__ = [
    "ArchiveError",
    "BackendDtypeError",
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "DRSegError",
    "DatasetError",
    "MissingExtraError",
    "NumericalError",
    "RasterError",
    "ResourceError",
]


class DRSegError(RuntimeError):
    """Base of the package's own errors. ``exit_code`` is what ``drseg`` exits with.

    Examples:
        >>> from drseg_core.errors import ConfigError, DRSegError
        >>> issubclass(ConfigError, DRSegError), DRSegError("unforeseen").exit_code, ConfigError("option").exit_code
        (True, 1, 2)
    """

    exit_code = 1


class ConfigError(DRSegError, ValueError):
    """A configuration file or option cannot be used.

    Examples:
        >>> from drseg_core.config.load import load_config
        >>> load_config("large")
        Traceback (most recent call last):
        drseg_core.errors.ConfigError: load_config: large not found; expected a YAML file or one of paper, tiny, ...
    """

    exit_code = 2


class DatasetError(DRSegError):
    """A data set, image or mask is missing, damaged or contradicts its class list.

    Examples:
        >>> from drseg_core.data import open_dataset
        >>> open_dataset("folder:absent")
        Traceback (most recent call last):
        drseg_core.errors.DatasetError: FolderDataset: absent is not a folder; expected ...
    """

    exit_code = 3


class RasterError(DatasetError):
    """A georeferenced raster cannot be read or written as asked.

    Examples:
        >>> import drseg_core as drseg
        >>> drseg.predict("run", "absent.tif", out="map.tif")
        Traceback (most recent call last):
        drseg_core.errors.RasterError: ...absent.tif...
    """


class ArchiveError(DatasetError):
    """An archive holds a member that must not be extracted.

    Examples:
        >>> from pathlib import Path
        >>> from drseg_core.data.prepare.archives import unpack
        >>> unpack(Path("scene.tif"), Path("unpacked"))
        Traceback (most recent call last):
        drseg_core.errors.ArchiveError: ...scene.tif...
    """


class CheckpointError(DRSegError):
    """Weights or training state are missing, damaged, unsafe or of another model.

    Examples:
        >>> import drseg_core as drseg
        >>> drseg.load("data")
        Traceback (most recent call last):
        drseg_core.errors.CheckpointError: load_run: data is not the folder of a training run; expected ...
    """

    exit_code = 4


class BackendUnavailableError(DRSegError):
    """A named backend or device cannot run here; the message says why.

    Examples:
        >>> import torch
        >>> from drseg_core.ops import graph_propagate
        >>> graph_propagate(torch.ones(1, 2, 3), torch.tensor([[[0], [1]]]), torch.ones(1, 2, 1), backend="triton")
        Traceback (most recent call last):
        drseg_core.errors.BackendUnavailableError: graph_propagate: ...triton...
    """

    exit_code = 5


class BackendDtypeError(BackendUnavailableError, TypeError):
    """A named backend does not compute in the dtype it was given.

    Examples:
        >>> from drseg_core.errors import BackendDtypeError, BackendUnavailableError
        >>> issubclass(BackendDtypeError, BackendUnavailableError) and issubclass(BackendDtypeError, TypeError)
        True
    """


class MissingExtraError(DRSegError, ImportError):
    """A library of an extra is not installed; the message says what to install.

    Examples:
        >>> from drseg_core.errors import DRSegError, MissingExtraError
        >>> issubclass(MissingExtraError, (DRSegError, ImportError)), MissingExtraError("no rasterio").exit_code
        (True, 5)
    """

    exit_code = 5


class NumericalError(DRSegError):
    """Values are not finite where they must be.

    Examples:
        >>> import torch, drseg_core as drseg
        >>> from drseg_core.evaluation.inference import Predictor
        >>> model = drseg.load("run").model
        >>> bias = torch.nn.init.constant_(model.decoder.head.bias, torch.nan)
        >>> Predictor(model, ["roof"])(torch.zeros(3, 32, 32, dtype=torch.uint8))
        Traceback (most recent call last):
        drseg_core.errors.NumericalError: Predictor: logits are not finite; expected finite values from the model
    """

    exit_code = 6


class ResourceError(DRSegError):
    """Memory or disk space ran out, or a worker process died.

    Examples:
        >>> from drseg_core.errors import ResourceError
        >>> ResourceError("save_checkpoint: the disk is full").exit_code
        7
    """

    exit_code = 7
