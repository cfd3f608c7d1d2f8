# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and figures, its open options and other measurements, as commands that can be run again."""
