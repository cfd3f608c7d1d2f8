# SPDX-License-Identifier: Apache-2.0
"""What is stored here was trained as in ``tests/training``."""

from tests.training.conftest import config, data, fork, one_thread

__all__ = ["config", "data", "fork", "one_thread"]
