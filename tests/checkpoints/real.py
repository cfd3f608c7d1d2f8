# SPDX-License-Identifier: Apache-2.0
"""Real encoders for tests: out of the cache that ``make real`` fills, or the test is skipped."""

from __future__ import annotations

from typing import Any

import pytest

from drseg_core.checkpoints.packaged import DINOV2, packaged_prior
from drseg_core.config.schema import DinoConfig
from drseg_core.errors import CheckpointError


def real_prior(name: str = DINOV2.name, **options: Any) -> DinoConfig:
    """``packaged_prior``, where it is."""
    try:
        return packaged_prior(name, **options)
    except CheckpointError as error:
        pytest.skip(str(error))
