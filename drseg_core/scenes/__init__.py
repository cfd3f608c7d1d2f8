# SPDX-License-Identifier: Apache-2.0
"""Georeferenced scenes: a map out for every image in."""
