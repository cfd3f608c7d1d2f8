# SPDX-License-Identifier: Apache-2.0
"""A map as one HTML file to look at, with the graph that made it."""
