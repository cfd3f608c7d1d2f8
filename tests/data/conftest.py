# SPDX-License-Identifier: Apache-2.0
"""The command and its small options, as the tests of commands have them."""

from __future__ import annotations

from tests.cli.conftest import drseg, small

__all__ = ["drseg", "small"]
