# SPDX-License-Identifier: Apache-2.0
"""Measurements and comparisons that can be run again."""
